"""The table of subcommands: for each the recipe it calls and the options it has."""

import argparse
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from keras_vaultgemma.commands import calls, options
from keras_vaultgemma.commands.calls import PROGRAM as PROGRAM


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


COMMANDS = {
    "generate": Command(calls.generate, "continue a prompt", options.GENERATE),
    "chat": Command(calls.chat, "chat with a model in turns", options.CHAT),
    "serve": Command(
        calls.serve, "serve a model over HTTP, as OpenAI's interface has it", options.SERVE
    ),
    "convert": Command(calls.convert, "convert a checkpoint to another format", options.CONVERT),
    "info": Command(calls.info, "describe a preset without loading its weights", options.INFO),
    "finetune": Command(
        calls.finetune, "train an adapter or all weights on a file", options.FINETUNE
    ),
    "evaluate": Command(
        calls.evaluate, "measure perplexity on a file, or benchmark tasks", options.EVALUATE
    ),
    "compare": Command(
        calls.compare, "write a page: what was claimed, learned and remembered", options.COMPARE
    ),
    "epsilon": Command(calls.epsilon, "plan private training: noise and ε", options.EPSILON),
    "ledger": Command(
        calls.ledger, "list the private runs on this machine, and ε in all", options.LEDGER
    ),
}
