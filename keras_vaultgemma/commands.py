"""The table of subcommands: for each the options it has and the recipe it calls."""

import argparse
import contextlib
import os
import sys
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from keras_vaultgemma._startup import BACKENDS
from keras_vaultgemma._terminal import REPLACEMENT, as_text, read_all
from keras_vaultgemma.recipes.samplers import SAMPLERS

PROGRAM = "keras-vaultgemma"

API_KEY = "KERAS_VAULTGEMMA_API_KEY"
"""Environment variable with the key of `serve`, which other users of a machine do not see."""


class Command(NamedTuple):
    """A subcommand.

    Attributes:
        run: callable. Takes the parsed options and returns the text to print, or an iterator of its
            pieces. Its docstring is the description in the help text.
        help: str. One line for the list of commands.
        options: dict. Maps the name of each option to the arguments of `add_argument`.
    """

    run: Callable[[argparse.Namespace], str | Iterable[str]]
    help: str
    options: dict[str, dict[str, Any]]


def _generate(options):
    """Continue a prompt and print the text as it is generated. A chat prints only the reply."""
    _start_backend()
    from keras_vaultgemma.recipes.generate import generate

    arguments = _arguments(options)
    arguments["stop"] = [_text("--stop", stop) for stop in options.stop]
    return generate(_prompt(arguments.pop("prompt")), **arguments)


def _chat(options):
    """Chat in turns. /help lists the commands, Ctrl-C ends a reply, Ctrl-D the chat."""
    _start_backend()
    from keras_vaultgemma.recipes.chat import chat

    arguments = _arguments(options)
    arguments["stop"] = [_text("--stop", stop) for stop in options.stop]
    return chat(_line_reader(), **arguments)


def _serve(options):
    """Answer requests of OpenAI's interface, many at once, until Ctrl-C."""
    _start_backend()
    from keras_vaultgemma.serving.server import serve

    arguments = _arguments(options)
    arguments["api_key"] = options.api_key or os.environ.get(API_KEY)
    return serve(**arguments)


def _convert(options):
    """Convert a checkpoint to another format, one tensor at a time."""
    _start_backend()
    from keras_vaultgemma.recipes.convert import convert

    metadata = convert(**_arguments(options))
    count, dtype = metadata["parameter_count"], metadata["dtype"]
    verified = ", equal to the source" if options.verify else ""
    return f"{options.target}: {count:,} parameters in {dtype}{verified}"


def _info(options):
    """Describe a preset's architecture, parameters, tokenizer and privacy from its small files."""
    _start_backend()
    from keras_vaultgemma.recipes.describe import describe

    return describe(options.preset)


def _finetune(options):
    """Train on a file of texts or of prompts and responses. Run it again to resume a killed run."""
    _start_backend()
    from keras_vaultgemma.recipes.finetune import finetune

    return finetune(**_arguments(options))


def _evaluate(options):
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


def _compare(options):
    """Write a page about a privately trained model next to its base and a plainly trained one.

    The page has the claim of the ledger, and measurements on private records without protection, so
    that its file is named ....unprotected.html. Run it again to resume a killed run."""
    _start_backend()
    from keras_vaultgemma.recipes.compare import compare

    return compare(**_arguments(options))


def _epsilon(options):
    """Compute the ε of a noise multiplier, or the noise multiplier for an ε, before training.

    Without --batch or --epochs it prints the options that `finetune --private` would choose."""
    if options.batch_size is None or options.epochs is None:
        _start_backend()  # reading the preset imports Keras
    from keras_vaultgemma.recipes.privacy_budget import privacy_budget

    return privacy_budget(**_arguments(options))


def _ledger(options):
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


def _value(metavar, help, type=str, **settings):
    return dict(metavar=metavar, help=help, type=type, **settings)


def _choice(choices, help, **settings):
    return dict(choices=choices, help=help, **settings)


def _flag(help, action="store_true", **settings):
    return dict(action=action, help=help, **settings)


DEFAULT = "(default: %(default)s)"
PRESET = "bundled preset, folder, or handle that starts with hf:// or kaggle://"
SOURCE = f"{PRESET}, or what `finetune` wrote"
PRESET_OPTION = dict(default="vaultgemma_tiny", help=f"{PRESET} {DEFAULT}")
RULE = "; with --private by a rule, see `epsilon`"
DTYPES = ("float32", "bfloat16", "float16")
FORMATS = ("keras", "hf", "gguf")
EXPORT_DTYPES = (*DTYPES, "f32", "bf16", "f16", "q8_0")

COLUMNS = {
    "--text-column": _value("NAME", 'texts or chats (default: "text" or "messages")'),
    "--prompt-column": _value("NAME", 'prompts (default: "prompt")'),
    "--response-column": _value("NAME", 'responses, which alone count (default: "response")'),
}
DATA = ".txt (a text a paragraph or line), .json(l), .csv, .tsv"
MODEL = {
    "--preset": _value("PRESET", f"{SOURCE} (default: the base of --adapter, or vaultgemma_tiny)"),
    "--adapter": _value("FOLDER", "adapter to load, of `finetune` or of PEFT"),
    "--dtype": _choice(DTYPES, "dtype of the weights (default: the preset's own)"),
    "--int8": _flag("quantize the weights to int8, a quarter of the memory of float32"),
}
"""Options of the commands that compute with a model and do not train it."""

FILE_OPTIONS = {"--data": _value("FILE", DATA), **COLUMNS}
TASK_OPTIONS = {
    "--tasks": _value("NAMES", 'tasks with commas, such as "piqa,boolq", or "card"'),
    "--include-path": _value("FOLDER", "tasks of your own, or with data on this machine"),
    "--limit": _value("N", "items of each task; below 1, their fraction (default: all)", float),
    "--num-fewshot": _value("N", "examples before each item (default: the task's)", int),
    "--truncation": _choice(
        ("keep_bos", "lm_eval"),
        "cut what follows <bos> in a long context (default), or <bos> too, as the harness does",
    ),
    "--score-bos": _flag("count <bos> in rolling likelihoods, as the harness's model hf does"),
    "--output": _value("FOLDER", "for results.json, and parts from which the command resumes"),
}
"""Options of `evaluate` on a file and on tasks."""
SAMPLING = {
    "--sampler": _choice(
        SAMPLERS,
        "how tokens are chosen (default: greedy, or what --top-p, --top-k or --temperature needs)",
    ),
    "--temperature": _value("T", "above 0; below 1 prefers likely tokens", float),
    "--top-k": _value("K", "sample from the K likeliest tokens", int),
    "--top-p": _value("P", "sample from the likeliest tokens of probability P", float),
    "--repetition-penalty": _value(
        "X", "above 1 makes tokens less likely that have occurred", float
    ),
    "--seed": _value("N", "seed of a random sampler, for repeatable text", int),
    "--stop": _value("TEXT", "end before this text; repeatable", action="append", default=[]),
}
"""Options of the commands that generate text."""

COMMANDS = {
    "generate": Command(
        _generate,
        "continue a prompt",
        {
            "prompt": _value("PROMPT", "text to continue (default: read from a pipe)", nargs="?"),
            **MODEL,
            "--max-new-tokens": _value("N", f"most tokens to generate {DEFAULT}", int, default=64),
            **SAMPLING,
            "--chat": _flag("treat the prompt as a user's turn and print only the reply"),
            "--json": _flag(
                "print one object: prompt, text, finish_reason, new_tokens", dest="as_json"
            ),
        },
    ),
    "chat": Command(
        _chat,
        "chat with a model in turns",
        {
            **MODEL,
            "--max-new-tokens": _value("N", f"most tokens of a reply {DEFAULT}", int, default=256),
            **SAMPLING,
        },
    ),
    "serve": Command(
        _serve,
        "serve a model over HTTP, as OpenAI's interface has it",
        {
            **{name: option for name, option in MODEL.items() if name != "--adapter"},
            "--adapter": _value(
                "NAME=FOLDER",
                "adapter that clients call by this name; repeatable",
                action="append",
                default=[],
                dest="adapters",
            ),
            "--host": _value(
                "ADDRESS", f"to listen on; 0.0.0.0 for all {DEFAULT}", default="127.0.0.1"
            ),
            "--port": _value("N", f"to listen on; 0 for any {DEFAULT}", int, default=8000),
            "--api-key": _value("KEY", f"that clients must send (default: ${API_KEY}, or none)"),
            "--allow-host": _value(
                "NAME",
                "by which clients may call this machine, besides its addresses; repeatable",
                action="append",
                default=[],
                dest="allow_hosts",
            ),
            "--allow-origin": _value(
                "URL",
                "of web pages that may call it, such as https://example.com; repeatable",
                action="append",
                default=[],
                dest="allow_origins",
            ),
            "--max-rows": _value("N", f"answers decoded together {DEFAULT}", int, default=8),
            "--max-queue": _value("N", f"answers that wait {DEFAULT}", int, default=256),
            "--timeout": _value("S", f"seconds for an answer {DEFAULT}", float, default=600.0),
            "--skip-warm-up": _flag("compile when requests come instead of at the start"),
        },
    ),
    "convert": Command(
        _convert,
        "convert a checkpoint to another format",
        {
            "source": _value("SOURCE", f"{SOURCE}; an adapter is merged"),
            "target": _value("TARGET", "folder to write; it appears only when it is complete"),
            "--to": _choice(
                FORMATS,
                f"Keras preset, transformers folder, or file of llama.cpp and Ollama {DEFAULT}",
                default="keras",
            ),
            "--dtype": _choice(
                EXPORT_DTYPES,
                "dtype of the weights (default: the source's); q8_0 only with --to gguf",
            ),
            "--as": _choice(
                ("vaultgemma", "gemma"),
                "architecture in the files; gemma, for engines that know no VaultGemma, only with "
                f"--to hf {DEFAULT}",
                dest="architecture",
                default="vaultgemma",
            ),
            "--shard-size": _value("SIZE", "largest file (default: 5GB); only with --to hf"),
            "--verify": _flag("compare every tensor afterwards, and the logits with transformers"),
            "--overwrite": _flag("replace the model in TARGET"),
        },
    ),
    "info": Command(
        _info, "describe a preset without loading its weights", {"preset": _value("PRESET", SOURCE)}
    ),
    "finetune": Command(
        _finetune,
        "train an adapter or all weights on a file",
        {
            "--preset": PRESET_OPTION,
            "--data": _value("FILE", DATA, required=True),
            "--validation": _value(
                "FILE", "held-out data (default: every tenth row of --data, at most 100)"
            ),
            **COLUMNS,
            "--group-column": _value("NAME", "user of each row; --private then protects users"),
            "--max-rows-per-group": _value("K", "rows of a user in a step (default: 4)", int),
            "--no-packing": _flag(
                "truncate each text to a row of its own", "store_const", dest="packed", const=False
            ),
            "--lora-rank": _value(
                "R", f"rank of the adapter; 0 trains all weights (default: 8{RULE})", int
            ),
            "--lora-targets": _value(
                "NAME", f"layers with an adapter (default: query value{RULE})", nargs="+"
            ),
            "--epochs": _value("N", f"in total; more continue a run (default: 1{RULE})", int),
            "--batch-size": _value("N", f"rows, or users, per step (default: 8{RULE})", int),
            "--learning-rate": _value(
                "RATE", f"of Adam (default: 1e-3, 1e-4 for all weights{RULE})", float
            ),
            "--sequence-length": _value("N", "tokens per row (default: the preset's)", int),
            "--truncate": _choice(
                ("prompt_start", "prompt_end", "row_end"),
                "where to cut pairs longer than a row (default: the preset's, prompt_start)",
            ),
            "--dtype": _choice(
                ("float32", "bfloat16", "mixed_bfloat16"),
                "dtype policy; bfloat16 only with an adapter (default: float32, or a mixed or "
                "quantized policy that the preset was saved with)",
            ),
            "--gradient-checkpointing": _flag("less memory, for about a third more time per step"),
            "--merge": _flag("save a preset with the adapter merged instead of the adapter"),
            "--save-every": _value(
                "N", f"steps between checkpoints {DEFAULT}", int, dest="save_freq", default=100
            ),
            "--seed": _value("N", f"seed of adapter and data order {DEFAULT}", int, default=0),
            "--output": _value(
                "FOLDER",
                f"for the adapter or preset, curves.png, run.json and the checkpoint {DEFAULT}",
                default="finetuned",
            ),
            "--png": _value("FILE", "plot of the curves (default: curves.png in FOLDER)"),
            "--private": _flag("differential privacy for each row; needs --epsilon or --noise"),
            "--epsilon": _value("ε", "privacy budget of all steps together", float),
            "--noise": _value("σ", "noise multiplier", float, dest="noise_multiplier"),
            "--delta": _value("δ", "δ of the guarantee (default: N^-1.1, at most 1e-5)", float),
            "--extend-budget": _flag("go on where earlier runs on these rows used the budget up"),
            "--secure": _flag("make the noise with a cryptographic generator"),
            "--clip-norm": _value(
                "C", "largest L2 norm of a row's gradient (default: by a rule)", float
            ),
            "--report": _flag("also train a plain twin, and write a page that compares the two"),
            "--canaries": _value("N", "invented records for an audit in the report", int),
        },
    ),
    "evaluate": Command(
        _evaluate,
        "measure perplexity on a file, or benchmark tasks",
        {
            "preset": _value(
                "PRESET", "the same as --preset", nargs="?", default=argparse.SUPPRESS
            ),
            **FILE_OPTIONS,
            **TASK_OPTIONS,
            **MODEL,
            "--sequence-length": _value(
                "N", "tokens per row, or positions of a task (default: the preset's)", int
            ),
            "--json": _flag("print one object with all figures", dest="as_json"),
        },
    ),
    "compare": Command(
        _compare,
        "write a page: what was claimed, learned and remembered",
        {
            "--private": _value("MODEL", f"{SOURCE}; the page is about it", required=True),
            "--plain": _value("MODEL", "the same, trained without privacy"),
            "--base": _value("MODEL", "the model before training (default: what --private names)"),
            "--train": _value("FILE", f"records that were trained on: {DATA}", required=True),
            "--held-out": _value(
                "FILE", "unseen records (default: those that `finetune` holds out of --train)"
            ),
            "--canaries": _value("FILE", "sealed file of canaries, for an audit"),
            **{name: TASK_OPTIONS[name] for name in ("--tasks", "--include-path", "--limit")},
            "--html": _value("FILE", f"page to write {DEFAULT}", default="report.html"),
            **COLUMNS,
            "--sequence-length": _value("N", "tokens per row (default: the run's)", int),
            "--prefix-length": _value("N", "tokens that a model is shown (default: 50)", int),
            "--suffix-length": _value("N", "tokens that it has to repeat (default: 50)", int),
            "--max-records": _value(
                "N", f"most records to test, of each file {DEFAULT}", int, default=1000
            ),
            "--dtype": _choice(DTYPES, "dtype of the weights (default: the preset's own)"),
            "--show-text": _flag("show text of records on the page"),
            "--public-records": _flag("the records are public, and nothing needs protection"),
        },
    ),
    "epsilon": Command(
        _epsilon,
        "plan private training: noise and ε",
        {
            "--rows": _value("N", "rows in the dataset; each is protected", int, required=True),
            "--max-rows-per-group": _value("K", "records are users of at most K rows a step", int),
            "--batch": _value("B", "rows per step (default: by a rule)", int, dest="batch_size"),
            "--epochs": _value(
                "E", "expected number of times a row is drawn (default: by a rule)", int
            ),
            "--noise": _value(
                "σ", "noise multiplier, to compute ε", float, dest="noise_multiplier"
            ),
            "--epsilon": _value("ε", "privacy budget, to compute the noise multiplier", float),
            "--delta": _value("δ", "δ of the guarantee (default: N^-1.1, at most 1e-5)", float),
            "--png": _value("FILE", "plot of ε against steps and of σ against ε"),
            "--preset": PRESET_OPTION,
        },
    ),
    "ledger": Command(
        _ledger,
        "list the private runs on this machine, and ε in all",
        {"--delta": _value("δ", "δ of every ε (default: the smallest of the runs)", float)},
    ),
}
