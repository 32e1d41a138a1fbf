"""Text from and to streams of any encoding."""

import io
import sys

import pytest

from keras_vaultgemma import cli
from keras_vaultgemma._terminal import as_text, read_all, tolerate_encoding

pytestmark = [pytest.mark.any_backend, pytest.mark.usefixtures("no_cache")]


def stream(encoding, content=b""):
    return io.TextIOWrapper(io.BytesIO(content), encoding=encoding)


@pytest.mark.parametrize(
    "encoding, text, written",
    [
        (
            "ascii",
            "ε ≤ “2” – café 🦊 \udce9",
            b'epsilon \\u2264 "2" - caf\\xe9 \\U0001f98a \\udce9',
        ),
        ("latin-1", "ε “café”", b'epsilon "caf\xe9"'),
        ("cp1252", "ε “café”", b"epsilon \x93caf\xe9\x94"),
        ("utf-8", "ε “café” \udce9", "ε “café” \\udce9".encode()),
    ],
)
def test_what_cannot_be_encoded_is_replaced(encoding, text, written):
    output = stream(encoding)
    tolerate_encoding(output, None, io.StringIO())
    output.write(text)
    output.flush()
    assert output.buffer.getvalue() == written


@pytest.mark.parametrize(
    "encoding, content, text",
    [
        ("utf-8", "café\r\nε\n".encode(), "café\nε\n"),
        ("ascii", "café ε".encode(), "café ε"),
        ("latin-1", "café".encode("latin-1"), "café"),
        ("utf-8", b"caf\xe9 one\xff", "caf\ufffd one\ufffd"),
        ("ascii", b"caf\xe9", "caf\ufffd"),
        ("utf-8", b"\xef\xbb\xbfOnce", "Once"),
        ("utf-8", b"", ""),
    ],
)
def test_any_bytes_are_read(encoding, content, text):
    assert as_text(read_all(stream(encoding, content))) == text


@pytest.mark.parametrize(
    "argument, text",
    [
        ("café ε", "café ε"),
        ("caf\udce9", "caf\ufffd"),
        ("caf\udcc3\udca9", "café"),  # UTF-8 in an ASCII locale
        ("\ud83e a \udfff", "\ufffd a \ufffd"),
        ("", ""),
    ],
)
def test_arguments_have_no_surrogates(argument, text):
    assert as_text(argument) == text


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
@pytest.mark.parametrize("arguments", [["--help"], *([name, "--help"] for name in cli.COMMANDS)])
def test_help_in_any_encoding(monkeypatch, encoding, arguments):
    output = stream(encoding)
    monkeypatch.setattr(sys, "stdout", output)
    with pytest.raises(SystemExit) as exit:
        cli.main(arguments)
    assert exit.value.code == 0
    output.flush()
    assert output.buffer.getvalue().startswith(b"usage: keras-vaultgemma")
