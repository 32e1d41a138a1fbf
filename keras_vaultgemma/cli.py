"""The command line, a table of subcommands: parse, call one library function, print.

A command returns its text, or pieces of it as they come, and nothing else reaches standard output: progress, logs and
warnings go to standard error.
Errors are one line there, and exit code 2; `python -X dev -m keras_vaultgemma` shows the traceback instead.
"""

import argparse
import contextlib
import os
import sys
from typing import NamedTuple

from keras_vaultgemma._version import __version__
from keras_vaultgemma.recipes.samplers import SAMPLERS

PROGRAM = "keras-vaultgemma"
FAILED, INTERRUPTED, PIPE_CLOSED = 2, 130, 141
"""Exit codes; the last two are those of a program that SIGINT or SIGPIPE ends."""

LONGEST_ERROR = 2000
"""Characters. Keras puts a whole config into some errors, with the cause at the end."""


class Command(NamedTuple):
    """A subcommand.

    Attributes:
        run: takes the parsed options and returns the text to print, or an iterator of pieces of it.
        help: one line.
        options: `{name: arguments of add_argument}`.
    """

    run: object
    help: str
    options: dict


def _generate(options):
    """Continue a prompt, and print the text as it is generated; in a chat the reply alone."""
    from keras_vaultgemma.recipes.generate import generate

    arguments = _arguments(options)
    return generate(_prompt(arguments.pop("prompt")), **arguments)


def _convert(options):
    """Write a checkpoint in another format, tensor by tensor."""
    from keras_vaultgemma import convert

    metadata = convert(**_arguments(options))
    count, dtype = metadata["parameter_count"], metadata["dtype"]
    return f"{options.target}: {count:,} parameters in {dtype}" + (
        ", equal to the source" if options.verify else ""
    )


def _info(options):
    """Describe a preset from its small files: architecture, parameters, tokenizer and privacy."""
    from keras_vaultgemma import describe

    return describe(options.preset)


def _finetune(options):
    """Train on a file of texts or of prompts and responses. The same command resumes a run that was killed."""
    from keras_vaultgemma import finetune

    return finetune(**_arguments(options))


def _epsilon(options):
    """Print the ε of a noise multiplier, or the noise multiplier of an ε, before anything is trained."""
    from keras_vaultgemma.recipes.privacy_budget import privacy_budget

    return privacy_budget(
        options.rows,
        options.batch,
        options.epochs,
        options.noise,
        options.epsilon,
        options.delta,
        options.png,
    )


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


COMMANDS = {
    "generate": Command(
        _generate,
        "continue a prompt",
        {
            "prompt": dict(
                nargs="?", metavar="PROMPT", help="read from a pipe where it is left out"
            ),
            "--preset": dict(
                default="vaultgemma_tiny",
                help="a bundled name, a folder, hf:// or kaggle:// (default: %(default)s)",
            ),
            "--max-new-tokens": dict(
                type=int,
                default=64,
                metavar="N",
                help="at most; fewer where the text or the model's context ends (default: %(default)s)",
            ),
            "--sampler": dict(
                choices=SAMPLERS,
                default="greedy",
                help="how a token is chosen (default: %(default)s)",
            ),
            "--temperature": dict(
                type=float, metavar="T", help="above 0; below 1 prefers likely tokens"
            ),
            "--seed": dict(
                type=int, metavar="N", help="of a random sampler: the same seed, the same text"
            ),
            "--dtype": dict(
                choices=("float32", "bfloat16", "float16"),
                help="of the weights (default: the preset's)",
            ),
            "--stop": dict(
                action="append",
                default=[],
                metavar="TEXT",
                help="end before this text; may be given several times",
            ),
            "--chat": dict(
                action="store_true", help="the prompt is a user's turn; print the reply alone"
            ),
        },
    ),
    "convert": Command(
        _convert,
        "write a checkpoint in another format",
        {
            "source": dict(metavar="SOURCE", help="a bundled name, a folder, hf:// or kaggle://"),
            "target": dict(
                metavar="TARGET", help="folder to write; it appears whole or not at all"
            ),
            "--to": dict(
                choices=("keras", "hf"),
                default="keras",
                help="a preset for this package and keras-hub, or a folder for transformers (default: %(default)s)",
            ),
            "--dtype": dict(
                choices=("float32", "bfloat16", "float16"),
                help="of the weights (default: the source's)",
            ),
            "--shard-size": dict(
                metavar="SIZE",
                help="of a weights file at most, such as 500MB; only to hf (default: 5GB)",
            ),
            "--verify": dict(
                action="store_true",
                help="compare every tensor afterwards, and logits with transformers",
            ),
            "--overwrite": dict(action="store_true", help="replace the model in TARGET"),
        },
    ),
    "info": Command(
        _info,
        "describe a preset without loading its weights",
        {"preset": dict(metavar="PRESET", help="a bundled name, a folder, hf:// or kaggle://")},
    ),
    "finetune": Command(
        _finetune,
        "train an adapter or all weights on a file",
        {
            "--preset": dict(
                default="vaultgemma_tiny",
                help="a bundled name, a folder, hf:// or kaggle:// (default: %(default)s)",
            ),
            "--data": dict(
                required=True,
                metavar="FILE",
                help=".txt, where a blank line ends a text; .jsonl, an object a line; or .csv with a header",
            ),
            "--validation": dict(
                metavar="FILE", help="held-out data (default: every tenth row of FILE, at most 100)"
            ),
            "--text-column": dict(
                metavar="NAME", help='of texts to learn (default: "text", where it is there)'
            ),
            "--prompt-column": dict(metavar="NAME", help='of prompts (default: "prompt")'),
            "--response-column": dict(
                metavar="NAME", help='of responses, which are learnt (default: "response")'
            ),
            "--no-packing": dict(
                dest="packed",
                action="store_const",
                const=False,
                help="a row for each text, cut at its length, instead of full rows that texts share",
            ),
            "--lora-rank": dict(
                type=int,
                default=8,
                metavar="R",
                help="of the adapter on query and value; 0 trains all weights (default: %(default)s)",
            ),
            "--epochs": dict(
                type=int,
                default=1,
                metavar="N",
                help="more go on from the last (default: %(default)s)",
            ),
            "--batch-size": dict(
                type=int,
                metavar="N",
                help="rows of a step (default: 8; in private training 128, on average)",
            ),
            "--learning-rate": dict(
                type=float,
                metavar="RATE",
                help="of Adam (default: 1e-3, and 1e-4 where all weights are trained)",
            ),
            "--sequence-length": dict(
                type=int, metavar="N", help="tokens of a row (default: the preset's)"
            ),
            "--dtype": dict(
                choices=("float32", "bfloat16", "mixed_bfloat16"),
                help="of the weights; bfloat16 only under an adapter (default: float32)",
            ),
            "--gradient-checkpointing": dict(
                action="store_true", help="less memory, for about a third more time a step"
            ),
            "--merge": dict(
                action="store_true",
                help="write a preset with the adapter in it, not the adapter alone",
            ),
            "--save-every": dict(
                dest="save_freq",
                type=int,
                default=100,
                metavar="N",
                help="steps from checkpoint to checkpoint (default: %(default)s)",
            ),
            "--seed": dict(type=int, default=0, metavar="N", help="(default: %(default)s)"),
            "--output": dict(
                default="finetuned",
                metavar="FOLDER",
                help="gets adapter or preset, curves.png, run.json and checkpoint (default: %(default)s)",
            ),
            "--png": dict(metavar="FILE", help="picture of the curves (default: in FOLDER)"),
            "--private": dict(
                action="store_true",
                help="with differential privacy, which protects each row; needs",
            ),
            "--epsilon": dict(
                type=float, metavar="ε", help="budget, which all steps together keep to; or"
            ),
            "--noise": dict(
                dest="noise_multiplier", type=float, metavar="σ", help="noise multiplier"
            ),
            "--delta": dict(type=float, metavar="δ", help="(default: N^-1.1 for N rows)"),
            "--clip-norm": dict(
                type=float,
                default=1.0,
                metavar="C",
                help="largest norm of a row's gradient (default: %(default)s)",
            ),
        },
    ),
    "epsilon": Command(
        _epsilon,
        "plan private training: noise and ε",
        {
            "--rows": dict(
                type=int,
                required=True,
                metavar="N",
                help="of the data set; one row is what is protected",
            ),
            "--batch": dict(
                type=int, required=True, metavar="B", help="rows that a step draws on average"
            ),
            "--epochs": dict(
                type=int, required=True, metavar="E", help="how often a row takes part on average"
            ),
            "--noise": dict(type=float, metavar="σ", help="noise multiplier; or"),
            "--epsilon": dict(
                type=float, metavar="ε", help="budget, from which the noise multiplier is found"
            ),
            "--delta": dict(type=float, metavar="δ", help="(default: N^-1.1)"),
            "--png": dict(metavar="FILE", help="picture of ε against steps, and of σ against ε"),
        },
    ),
}


def main(arguments=None):
    """Run one command.

    Args:
        arguments: list of strings; those of the process if None.

    Returns:
        Exit code: 0; 2 after an error; 130 where the user interrupted; 141 where nobody reads the output any more.
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
        """Leave the usage out: an error is one line."""
        raise ValueError(f"{message} (see {self.prog} --help)")


def _parser():
    # Without abbreviations a new option cannot change what an old command line means.
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
    """Write pieces as they come and a line break after the last, also where an interrupt ends them."""
    try:
        try:
            for piece in pieces:
                print(piece, end="", file=output, flush=True)
        finally:
            print(file=output, flush=True)
    except OSError as error:
        # Python flushes once more when it exits, and that must not fail a second time.
        os.dup2(os.open(os.devnull, os.O_WRONLY), output.fileno())
        if isinstance(error, BrokenPipeError):
            return PIPE_CLOSED
        raise
    return 0
