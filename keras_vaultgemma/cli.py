"""The command line, a table of subcommands: parse, call one library function, print.

A command returns its text and nothing else reaches standard output: progress, logs and warnings go to standard error.
Errors are one line there, and exit code 2; `python -X dev -m keras_vaultgemma` shows the traceback instead. Commands
import what they need when they run, so that a Keras backend that cannot be loaded is such an error too.
"""

import argparse
import contextlib
import inspect
import os
import sys
import textwrap
from collections import Counter
from typing import NamedTuple

from keras_vaultgemma import __version__

PROGRAM = "keras-vaultgemma"
FAILED, INTERRUPTED, PIPE_CLOSED = 2, 130, 141
"""Exit codes; the last two are those of a program that SIGINT or SIGPIPE ends."""

LONGEST_ERROR = 2000
"""Characters. Keras puts a whole config into some errors, with the cause at the end."""

SAMPLERS = {
    "greedy": ("GreedySampler", ()),
    "random": ("RandomSampler", ("temperature", "seed")),
    "top_k": ("TopKSampler", ("temperature", "seed")),
    "top_p": ("TopPSampler", ("temperature", "seed")),
    "beam": ("BeamSampler", ("temperature",)),
    "contrastive": ("ContrastiveSampler", ("temperature",)),
}
"""Name of a sampler: its class in `keras_hub.samplers`, and the options that change what it chooses."""

WIDTH, LABEL = 100, 26
"""Columns of a description, and of the names in it."""

LARGEST_SEED = 2**31 - 1
"""The largest that all three backends take."""


class Command(NamedTuple):
    """A subcommand.

    Attributes:
        run: takes the parsed options and returns the text to print.
        help: one line.
        options: `{name: arguments of add_argument}`.
    """

    run: object
    help: str
    options: dict


def generate(options):
    """The prompt and its continuation; for a chat the reply alone."""
    from keras_vaultgemma import VaultGemmaCausalLM, prompts

    text = _prompt(options.prompt)
    sampler = _sampler(options.sampler, temperature=options.temperature, seed=options.seed)
    model = VaultGemmaCausalLM.from_preset(options.preset, **({"dtype": options.dtype} if options.dtype else {}))
    model.compile(sampler=sampler)
    inputs = [{"role": "user", "content": text}] if options.chat else text
    context = model.backbone.max_sequence_length
    (row,) = prompts.read(inputs, model.preprocessor, model.backbone.vocabulary_size).rows
    if len(row) >= context:
        raise ValueError(
            f"PROMPT must have at most {context - 1} tokens, `<bos>` included: the model's context is {context}. "
            f"Received: {len(row)} tokens"
        )
    return model.generate(inputs, max_new_tokens=min(options.max_new_tokens, context - len(row)))


def info(options):
    """What a preset is: architecture, parameters, tokenizer and privacy, from its small files."""
    from keras_vaultgemma import presets

    folder = _find(options.preset)
    try:
        architecture = _architecture(folder)
        count = _parameter_count(**architecture)
        layers = Counter(architecture["layer_types"]).items()
    except (KeyError, TypeError) as error:
        raise ValueError(f"{folder / presets.CONFIG} does not describe a VaultGemma: {_one_line(error)}") from error
    metadata_file = folder / presets.METADATA
    metadata = presets.read_json(metadata_file) if metadata_file.is_file() else {}
    sections = {
        "Architecture": {**architecture, "layer_types": ", ".join(f"{n} x {layer_type}" for layer_type, n in layers)},
        "Parameters": {
            "count": f"{count:,}",
            "in float32": f"{count * 4 / 1e6:,.1f} MB",
            "in bfloat16": f"{count * 2 / 1e6:,.1f} MB",
        },
        "Tokenizer": _vocabulary(folder),
        "Privacy": _privacy(metadata),
    }
    lines = [options.preset, *textwrap.wrap(str(metadata.get("description", "")), WIDTH)]
    for title, section in sections.items():
        lines += ["", title, *_table(section)]
    return "\n".join(lines)


COMMANDS = {
    "generate": Command(
        generate,
        "continue a prompt",
        {
            "prompt": dict(nargs="?", metavar="PROMPT", help="read from a pipe where it is left out"),
            "--preset": dict(
                default="vaultgemma_tiny", help="a bundled name, a folder, hf:// or kaggle:// (default: %(default)s)"
            ),
            "--max-new-tokens": dict(
                type=int,
                default=64,
                metavar="N",
                help="at most; fewer where the text or the model's context ends (default: %(default)s)",
            ),
            "--sampler": dict(choices=SAMPLERS, default="greedy", help="how a token is chosen (default: %(default)s)"),
            "--temperature": dict(type=float, metavar="T", help="above 0; below 1 prefers likely tokens"),
            "--seed": dict(type=int, metavar="N", help="of a random sampler: the same seed, the same text"),
            "--dtype": dict(choices=("float32", "bfloat16", "float16"), help="of the weights (default: the preset's)"),
            "--chat": dict(action="store_true", help="the prompt is a user's turn; print the reply alone"),
        },
    ),
    "info": Command(
        info,
        "describe a preset without loading its weights",
        {"preset": dict(metavar="PRESET", help="a bundled name, a folder, hf:// or kaggle://")},
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
        with contextlib.redirect_stdout(sys.stderr):
            text = COMMANDS[options.command].run(options)
        return _write(text)
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
        subparser = subparsers.add_parser(name, help=command.help, description=command.run.__doc__, allow_abbrev=False)
        for option, settings in command.options.items():
            subparser.add_argument(option, **settings)
    return parser


def _one_line(error):
    message = " ".join(line.strip() for line in str(error).splitlines() if line.strip())
    if not message or not isinstance(error, (ValueError, OSError, ImportError)):
        message = f"{type(error).__name__}: {message}".removesuffix(": ")
    half = LONGEST_ERROR // 2
    return message if len(message) <= LONGEST_ERROR else f"{message[:half]} [...] {message[-half:]}"


def _write(text):
    try:
        print(text, flush=True)
    except OSError as error:
        # Python flushes once more when it exits, and that must not fail a second time.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            return PIPE_CLOSED
        raise
    return 0


def _prompt(argument):
    """The argument, or what a pipe holds without its last line break."""
    if argument is not None:
        return argument
    piped = "" if sys.stdin is None or sys.stdin.isatty() else sys.stdin.read().removesuffix("\n")
    if not piped:
        raise ValueError("PROMPT must be an argument or come through a pipe. Received: neither")
    return piped


def _sampler(name, **options):
    """A sampler of `keras_hub.samplers` with those `options` that are not None."""
    import keras_hub

    class_name, takes = SAMPLERS[name]
    options = {option: value for option, value in options.items() if value is not None}
    for option, value in options.items():
        if option not in takes:
            able = ", ".join(other for other, (_, taken) in SAMPLERS.items() if option in taken)
            raise ValueError(
                f"--{option} changes nothing with --sampler {name}; it goes with {able}. Received: --{option} {value}"
            )
    # Not `<= 0`, so that NaN is refused.
    if not 0 < options.get("temperature", 1.0) < float("inf"):
        raise ValueError(f"--temperature must be a number above 0. Received: {options['temperature']}")
    if not 0 <= options.get("seed", 0) <= LARGEST_SEED:
        raise ValueError(f"--seed must be from 0 to {LARGEST_SEED}. Received: {options['seed']}")
    return getattr(keras_hub.samplers, class_name)(**options)


def _find(preset):
    """The preset's folder; of a repository that is downloaded file by file, with the vocabulary where it has one."""
    from keras_vaultgemma import presets

    if preset.startswith("hf://"):
        with contextlib.suppress(FileNotFoundError):
            return presets.find(preset, "vocabulary")
    return presets.find(preset, "config")


def _architecture(folder):
    """The backbone's hyperparameters by name, those included that config.json leaves to the backbone."""
    from keras_vaultgemma import VaultGemmaBackbone, checkpoint, presets

    if presets.is_keras(folder):
        arguments = presets.read_json(folder / presets.CONFIG)["config"]
    else:
        arguments = checkpoint.read_config(folder)
    bound = inspect.signature(VaultGemmaBackbone).bind(**arguments)
    bound.apply_defaults()
    architecture = {name: value for name, value in bound.arguments.items() if name not in ("dtype", "kwargs")}
    if architecture["query_pre_attn_scalar"] is None:
        architecture["query_pre_attn_scalar"] = architecture["head_dim"]
    if architecture["layer_types"] is None:
        architecture["layer_types"] = ["full_attention"] * architecture["num_layers"]
    return architecture


def _parameter_count(
    *,
    vocabulary_size,
    num_layers,
    num_query_heads,
    num_key_value_heads,
    hidden_dim,
    intermediate_dim,
    head_dim,
    **_,
):
    attention = hidden_dim * head_dim * 2 * (num_query_heads + num_key_value_heads)
    mlp = 3 * hidden_dim * intermediate_dim
    norms = 2 * hidden_dim
    return vocabulary_size * hidden_dim + num_layers * (attention + mlp + norms) + hidden_dim


def _vocabulary(folder):
    from keras_vaultgemma import VaultGemmaTokenizer, presets
    from keras_vaultgemma.tokenizer import TURN_END, TURN_START

    if not presets.file(folder, "vocabulary"):
        return "no vocabulary here"
    tokenizer = VaultGemmaTokenizer.from_preset(folder)
    special = {token: tokenizer.token_to_id(token) for token in ("<pad>", "<eos>", "<bos>", TURN_START, TURN_END)}
    # SentencePiece gives an unknown piece the id of <unk>.
    known = {token: i for token, i in special.items() if tokenizer.id_to_token(i) == token}
    return {"pieces": tokenizer.vocabulary_size(), **known}


def _privacy(metadata):
    """What the preset says of its training; a preset that says nothing has not said that it is private or is not."""
    if "privacy" not in metadata:
        return "no statement here"
    return metadata["privacy"] or "not privately trained"


def _table(section):
    """Lines of a sentence, or of a dict with its values below each other."""
    if not isinstance(section, dict):
        return [f"  {section}"]
    lines = []
    for name, value in section.items():
        lines += textwrap.wrap(f"  {name:{LABEL}}{value}", WIDTH, subsequent_indent=" " * (2 + LABEL))
    return lines
