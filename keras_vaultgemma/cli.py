"""The command line: parse, call one command of the table, print.

Only the text of the command goes to standard output. Progress, logs and warnings go to standard
error. An error is one line there, with exit code 2; run `python -X dev -m keras_vaultgemma` to see
the traceback instead.
"""

import argparse
import contextlib
import os
import sys

from keras_vaultgemma._terminal import tolerate_encoding
from keras_vaultgemma._version import __version__
from keras_vaultgemma.commands import COMMANDS, PROGRAM

FAILED, INTERRUPTED, PIPE_CLOSED = 2, 130, 141
"""Exit codes. The last two are those of a process that SIGINT or SIGPIPE ends."""

LONGEST_ERROR = 2000
"""Characters. Keras puts a whole config into some errors, with the cause at the end."""


def main(arguments: list[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: list of str. Defaults to the arguments of the process.

    Returns:
        int. Exit code: 0 on success, 2 after an error, 130 if the user interrupted the command, and
        141 if the reader of the output has closed the pipe.
    """
    tolerate_encoding(sys.stdout, sys.stderr)
    try:
        options = _parser().parse_args(
            _with_dashes(sys.argv[1:] if arguments is None else arguments)
        )
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


def _with_dashes(arguments):
    """Rearrange the arguments so that a prompt, and the value of an option, may begin with "-".

    argparse takes such a word for an option. A value is joined to its option by "=", and a prompt
    moves behind "--".
    """
    command = COMMANDS.get(arguments[0]) if arguments else None
    if command is None or "prompt" not in command.options:
        return arguments
    names = {"-h", "--help", *command.options}
    words, prompts, rest = [arguments[0]], [], [*arguments[1:]]
    while rest:
        word = rest.pop(0)
        if word == "--":
            prompts += rest
            break
        is_flag = command.options.get(word, {}).get("action") in ("store_true", "store_const")
        if word in command.options and not is_flag and rest and _name(rest[0]) not in names:
            words.append(f"{word}={rest.pop(0)}")
        elif _name(word) in names or not _is_prompt(word):
            words.append(word)
        else:
            prompts.append(word)
    return [*words, "--", *prompts] if prompts else words


def _name(word):
    """Return the name of the option that a word begins with, if it is one."""
    return word.partition(" ")[0].partition("=")[0]


def _is_prompt(word):
    """Return True for a word that begins with "-" and looks like text.

    A single word with two dashes is rather a misspelt option, which argparse reports.
    """
    is_option = word.startswith("--") and word.strip("-") and not any(map(str.isspace, word))
    return word.startswith("-") and not is_option


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
