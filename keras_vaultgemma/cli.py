"""The command line: a table of subcommands. Each parses its options, calls one recipe and prints.

Only the text of the command goes to standard output. Progress, logs and warnings go to standard
error. An error is one line there, with exit code 2; run `python -X dev -m keras_vaultgemma` to see
the traceback instead.
"""

import argparse
import contextlib
import os
import sys
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from keras_vaultgemma._version import __version__
from keras_vaultgemma.recipes.samplers import SAMPLERS

PROGRAM = "keras-vaultgemma"
FAILED, INTERRUPTED, PIPE_CLOSED = 2, 130, 141
"""Exit codes. The last two are those of a process that SIGINT or SIGPIPE ends."""

LONGEST_ERROR = 2000
"""Characters. Keras puts a whole config into some errors, with the cause at the end."""


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
    _select_backend()
    from keras_vaultgemma.recipes.generate import generate

    arguments = _arguments(options)
    return generate(_prompt(arguments.pop("prompt")), **arguments)


def _convert(options):
    """Convert a checkpoint to another format, one tensor at a time."""
    _select_backend()
    from keras_vaultgemma.recipes.convert import convert

    metadata = convert(**_arguments(options))
    count, dtype = metadata["parameter_count"], metadata["dtype"]
    verified = ", equal to the source" if options.verify else ""
    return f"{options.target}: {count:,} parameters in {dtype}{verified}"


def _info(options):
    """Describe a preset's architecture, parameters, tokenizer and privacy from its small files."""
    _select_backend()
    from keras_vaultgemma.recipes.describe import describe

    return describe(options.preset)


def _finetune(options):
    """Train on a file of texts or of prompts and responses. Run it again to resume a killed run."""
    _select_backend()
    from keras_vaultgemma.recipes.finetune import finetune

    return finetune(**_arguments(options))


def _epsilon(options):
    """Compute the ε of a noise multiplier, or the noise multiplier for an ε, before training.

    Without --batch or --epochs it prints the options that `finetune --private` would choose."""
    if options.batch_size is None or options.epochs is None:
        _select_backend()  # reading the preset imports Keras
    from keras_vaultgemma.recipes.privacy_budget import privacy_budget

    return privacy_budget(**_arguments(options))


def _ledger(options):
    """List the private runs on this machine, the records that they share, and ε of each and all."""
    from keras_vaultgemma.recipes.private_runs import private_runs

    return private_runs(**_arguments(options))


def _select_backend():
    # First, because this package selects the Keras backend before Keras is imported.
    import keras_vaultgemma.backend  # noqa: F401


def _arguments(options):
    return {name: value for name, value in vars(options).items() if name != "command"}


def _prompt(argument):
    """Return the argument, or the contents of a pipe without its last line break."""
    if argument is not None:
        return argument
    piped = "" if sys.stdin is None or sys.stdin.isatty() else sys.stdin.read().removesuffix("\n")
    if not piped:
        raise ValueError("PROMPT must be an argument or come through a pipe. Received: neither")
    return piped


def _value(metavar, help, type=str, **settings):
    return dict(metavar=metavar, help=help, type=type, **settings)


def _choice(choices, help, **settings):
    return dict(choices=choices, help=help, **settings)


def _flag(help, action="store_true", **settings):
    return dict(action=action, help=help, **settings)


DEFAULT = "(default: %(default)s)"
PRESET = "bundled preset, folder, or handle that starts with hf:// or kaggle://"
PRESET_OPTION = dict(default="vaultgemma_tiny", help=f"{PRESET} {DEFAULT}")
RULE = "; with --private by a rule, see `epsilon`"
DTYPES = ("float32", "bfloat16", "float16")
FORMATS = ("keras", "hf")

COMMANDS = {
    "generate": Command(
        _generate,
        "continue a prompt",
        {
            "prompt": _value("PROMPT", "text to continue (default: read from a pipe)", nargs="?"),
            "--preset": PRESET_OPTION,
            "--max-new-tokens": _value("N", f"most tokens to generate {DEFAULT}", int, default=64),
            "--sampler": _choice(SAMPLERS, f"how tokens are chosen {DEFAULT}", default="greedy"),
            "--temperature": _value("T", "above 0; below 1 prefers likely tokens", float),
            "--seed": _value("N", "seed of a random sampler, for repeatable text", int),
            "--dtype": _choice(DTYPES, "dtype of the weights (default: the preset's)"),
            "--stop": _value(
                "TEXT", "end before this text; repeatable", action="append", default=[]
            ),
            "--chat": _flag("treat the prompt as a user's turn and print only the reply"),
        },
    ),
    "convert": Command(
        _convert,
        "convert a checkpoint to another format",
        {
            "source": _value("SOURCE", PRESET),
            "target": _value("TARGET", "folder to write; it appears only when it is complete"),
            "--to": _choice(
                FORMATS, f"Keras preset or transformers folder {DEFAULT}", default="keras"
            ),
            "--dtype": _choice(DTYPES, "dtype of the weights (default: the source's)"),
            "--shard-size": _value("SIZE", "largest file (default: 5GB); only with --to hf"),
            "--verify": _flag("compare every tensor afterwards, and the logits with transformers"),
            "--overwrite": _flag("replace the model in TARGET"),
        },
    ),
    "info": Command(
        _info, "describe a preset without loading its weights", {"preset": _value("PRESET", PRESET)}
    ),
    "finetune": Command(
        _finetune,
        "train an adapter or all weights on a file",
        {
            "--preset": PRESET_OPTION,
            "--data": _value(
                "FILE", ".txt (a text a paragraph or line), .json(l), .csv, .tsv", required=True
            ),
            "--validation": _value(
                "FILE", "held-out data (default: every tenth row of --data, at most 100)"
            ),
            "--text-column": _value("NAME", 'texts or chats (default: "text" or "messages")'),
            "--prompt-column": _value("NAME", 'prompts (default: "prompt")'),
            "--response-column": _value("NAME", 'responses to train on (default: "response")'),
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
            "--dtype": _choice(
                ("float32", "bfloat16", "mixed_bfloat16"),
                "dtype policy; bfloat16 only with an adapter (default: float32)",
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
            "--clip-norm": _value(
                "C", "largest L2 norm of a row's gradient (default: by a rule)", float
            ),
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


def main(arguments: list[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: list of str. Defaults to the arguments of the process.

    Returns:
        int. Exit code: 0 on success, 2 after an error, 130 if the user interrupted the command, and
        141 if the reader of the output has closed the pipe.
    """
    try:
        options = _parser().parse_args(arguments)
        output = sys.stdout
        with contextlib.redirect_stdout(sys.stderr):
            text = COMMANDS[options.command].run(options)
            return _write([text] if isinstance(text, str) else text, output)
    except KeyboardInterrupt:
        return INTERRUPTED
    except Exception as error:
        if sys.flags.dev_mode:
            raise
        print(f"{PROGRAM}: {_one_line(error)}", file=sys.stderr)
        return FAILED


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        """Raise the message without the usage, because an error is one line."""
        raise ValueError(f"{message} (see {self.prog} --help)")


def _parser():
    # No abbreviations, because a new option could change the meaning of an old command line.
    parser = _Parser(PROGRAM, description="VaultGemma in Keras 3.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        subparser = subparsers.add_parser(
            name, help=command.help, description=command.run.__doc__, allow_abbrev=False
        )
        for option, settings in command.options.items():
            subparser.add_argument(option, **settings)
    return parser


def _one_line(error):
    message = " ".join(line.strip() for line in str(error).splitlines() if line.strip())
    if not message or not isinstance(error, (ValueError, OSError, ImportError)):
        message = f"{type(error).__name__}: {message}".removesuffix(": ")
    half = LONGEST_ERROR // 2
    return message if len(message) <= LONGEST_ERROR else f"{message[:half]} [...] {message[-half:]}"


def _write(pieces, output):
    """Write the pieces as they arrive and a final line break, also after an interrupt."""
    try:
        try:
            for piece in pieces:
                print(piece, end="", file=output, flush=True)
        finally:
            print(file=output, flush=True)
    except OSError as error:
        # Python flushes the stream again at exit, and that flush must not fail as well.
        os.dup2(os.open(os.devnull, os.O_WRONLY), output.fileno())
        if isinstance(error, BrokenPipeError):
            return PIPE_CLOSED
        raise
    return 0
