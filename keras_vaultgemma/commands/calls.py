"""What each subcommand does with its options: call one recipe."""

import contextlib
import os
import sys

from keras_vaultgemma._startup import BACKENDS
from keras_vaultgemma._terminal import REPLACEMENT, as_text, read_all
from keras_vaultgemma.commands.option_groups import API_KEY, FILE_OPTIONS, TASK_OPTIONS

PROGRAM = "keras-vaultgemma"


def generate(options):
    """Continue a prompt and print the text as it is generated. A chat prints only the reply."""
    _start_backend()
    from keras_vaultgemma.recipes.generate import generate

    arguments = _arguments(options)
    arguments["stop"] = [_text("--stop", stop) for stop in options.stop]
    return generate(_prompt(arguments.pop("prompt")), **arguments)


def chat(options):
    """Chat in turns. /help lists the commands, Ctrl-C ends a reply, Ctrl-D the chat."""
    _start_backend()
    from keras_vaultgemma.recipes.chat import chat

    arguments = _arguments(options)
    arguments["stop"] = [_text("--stop", stop) for stop in options.stop]
    return chat(_line_reader(), **arguments)


def serve(options):
    """Answer requests of OpenAI's interface, many at once, until Ctrl-C."""
    _start_backend()
    from keras_vaultgemma.serving.server import serve

    arguments = _arguments(options)
    arguments["api_key"] = options.api_key or os.environ.get(API_KEY)
    return serve(**arguments)


def convert(options):
    """Convert a checkpoint to another format, one tensor at a time."""
    _start_backend()
    from keras_vaultgemma.recipes.convert import convert

    metadata = convert(**_arguments(options))
    count, dtype = metadata["parameter_count"], metadata["dtype"]
    verified = ", equal to the source" if options.verify else ""
    return f"{options.target}: {count:,} parameters in {dtype}{verified}"


def info(options):
    """Describe a preset's architecture, parameters, tokenizer and privacy from its small files."""
    _start_backend()
    from keras_vaultgemma.recipes.describe import describe

    return describe(options.preset)


def finetune(options):
    """Train on a file of texts or of prompts and responses. Run it again to resume a killed run."""
    _start_backend()
    from keras_vaultgemma.recipes.finetune import finetune

    return finetune(**_arguments(options))


def evaluate(options):
    """Measure a model on a file of texts (perplexity, bits per byte), or on benchmark tasks.

    Tasks are those of lm-evaluation-harness; "card" stands for the five of VaultGemma's model card,
    whose figures are printed next to the measured ones."""
    arguments = _arguments(options)
    of_tasks = {option: arguments.pop(_name(option)) for option in TASK_OPTIONS}
    of_file = {option: arguments.pop(_name(option)) for option in FILE_OPTIONS}
    if (options.data is None) == (options.tasks is None):
        raise ValueError("Name either --data FILE or --tasks NAMES, and not both")
    used, unused = (of_tasks, of_file) if options.data is None else (of_file, of_tasks)
    for option, value in unused.items():
        if value is not None and value is not False:
            other = "--tasks" if option in TASK_OPTIONS else "--data"
            raise ValueError(f"{option} has an effect only with {other}")
    _start_backend()
    from keras_vaultgemma.recipes.evaluate import evaluate
    from keras_vaultgemma.recipes.evaluate_tasks import evaluate_tasks

    given = {_name(option): value for option, value in used.items() if value is not None}
    return (evaluate if options.tasks is None else evaluate_tasks)(**given, **arguments)


def compare(options):
    """Write a page about a privately trained model next to its base and a plainly trained one.

    The page has the claim of the ledger, and measurements on private records without protection, so
    that its file is named ....unprotected.html. Run it again to resume a killed run."""
    _start_backend()
    from keras_vaultgemma.recipes.compare import compare

    return compare(**_arguments(options))


def epsilon(options):
    """Compute the ε of a noise multiplier, or the noise multiplier for an ε, before training.

    Without --batch or --epochs it prints the options that `finetune --private` would choose."""
    if options.batch_size is None or options.epochs is None:
        _start_backend()  # reading the preset imports Keras
    from keras_vaultgemma.recipes.privacy_budget import privacy_budget

    return privacy_budget(**_arguments(options))


def ledger(options):
    """List the private runs on this machine, the records that they share, and ε of each and all."""
    from keras_vaultgemma.recipes.private_runs import private_runs

    return private_runs(**_arguments(options))


def _start_backend():
    """Import Keras, and report which backend it runs on if this command is what imports it."""
    is_running = "keras" in sys.modules
    from keras_vaultgemma.backend import NAME

    if not is_running:
        others = " or ".join(name for name in BACKENDS if name != NAME)
        print(
            f"{PROGRAM}: running on {NAME}; set KERAS_BACKEND to {others} for another backend",
            file=sys.stderr,
        )


def _name(option):
    """Return the name under which argparse stores an option."""
    return option.removeprefix("--").replace("-", "_")


def _arguments(options):
    return {name: value for name, value in vars(options).items() if name != "command"}


def _prompt(argument):
    """Return the argument, or the contents of a pipe without its last line break."""
    if argument is not None:
        return _text("PROMPT", argument)
    piped = "" if sys.stdin is None or sys.stdin.isatty() else read_all(sys.stdin)
    piped = piped.removesuffix("\n")
    if not piped:
        raise ValueError("PROMPT must be an argument or come through a pipe. Received: neither")
    return _text("PROMPT", piped)


def _line_reader():
    """Return a function that asks for a line and returns it, or None at the end of the input."""
    if sys.stdin is None:
        raise ValueError("A chat needs an input. Received: none")
    if not sys.stdin.isatty():
        return lambda: next(map(as_text, sys.stdin), None)
    output = sys.__stdout__  # that of this process, because the command line redirects the other
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 (gives `input` editing, and arrow keys for earlier lines)

    def read():
        with contextlib.redirect_stdout(output), contextlib.suppress(EOFError):
            return as_text(input("> "))

    return read


def _text(name, argument):
    """Return an argument as text, and report bytes in it that are none."""
    text = as_text(argument)
    if text.count(REPLACEMENT) > argument.count(REPLACEMENT):
        print(
            f"{PROGRAM}: {name} has bytes that are not UTF-8, read as {REPLACEMENT}",
            file=sys.stderr,
        )
    return text
