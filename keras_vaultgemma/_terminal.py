"""Text from and to a terminal or pipe, whatever its encoding."""

import codecs
import re

LEGIBLE = {
    "δ": "delta",
    "ε": "epsilon",
    "μ": "mu",
    "σ": "sigma",
    "\u00a0": " ",
    "–": "-",
    "—": "-",
    "‘": "'",
    "’": "'",
    "“": '"',
    "”": '"',
    "…": "...",
    "×": "x",
}
"""Replacements of characters that an encoding lacks. Others are escaped, as in Python's strings."""

ERRORS = "keras_vaultgemma.legible"
"""Name of the handler of encoding errors that uses `LEGIBLE`."""

REPLACEMENT = "\ufffd"
"""The character that stands for bytes that are no text."""


def tolerate_encoding(*streams):
    """Make text streams replace what they cannot encode, instead of raising.

    Args:
        *streams: text streams. None, and streams whose error handler is fixed, are left unchanged.
    """
    codecs.register_error(ERRORS, _replace)
    for stream in streams:
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors=ERRORS)


def _replace(error):
    if not isinstance(error, UnicodeEncodeError):
        raise error
    characters = error.object[error.start : error.end]
    return "".join(map(_replacement, characters)), error.end


def _replacement(character):
    if character in LEGIBLE:
        return LEGIBLE[character]
    return character.encode("ascii", "backslashreplace").decode("ascii")


def read_all(stream):
    """Read a text stream to its end.

    The bytes are decoded as the stream says, and as UTF-8 if that fails. Surrogates stand for bytes
    that are neither, as in arguments (`as_text`). A byte-order mark is dropped, and line breaks
    become "\\n".

    Args:
        stream: text stream.

    Returns:
        string.
    """
    if not hasattr(stream, "buffer"):
        return stream.read()
    content = stream.buffer.read()
    try:
        text = content.decode(stream.encoding)
    except UnicodeDecodeError:
        text = content.decode("utf-8", "surrogateescape")
    return text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")


def as_text(argument):
    """Return an argument of the process without surrogates, which stand for undecodable bytes.

    Bytes that are UTF-8 are decoded (Python escapes them in an ASCII locale); for others there is
    a `REPLACEMENT`.

    Args:
        argument: string.
    """
    # Only these surrogates stand for bytes.
    argument = re.sub("[\ud800-\udc7f\udd00-\udfff]", REPLACEMENT, argument)
    return argument.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
