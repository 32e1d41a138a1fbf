"""A SentencePiece model file: its pieces are read, replaced and written.

The format is one protobuf message, of which this package needs a few fields. The `sentencepiece`
library reads such files but neither writes nor changes them without training, and protobuf's own
library is not installed with it.

References:
    - [Format](https://github.com/google/sentencepiece/blob/master/src/sentencepiece_model.proto)
"""

import struct
from typing import NamedTuple

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""Types of pieces.

A user-defined piece is one token wherever its text occurs. A control piece never occurs in text."""

PIECES, TRAINER, NORMALIZER = 1, 2, 3
"""Numbers of the fields of a model."""

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
"""Types of fields in protobuf's wire format."""


class Piece(NamedTuple):
    """A piece of a vocabulary.

    Attributes:
        text: string.
        score: float. Of two possible merges, that into the piece with the higher score is first.
        kind: int. One of the types of this module.
    """

    text: str
    score: float = 0.0
    kind: int = NORMAL


def write_model(pieces):
    """Return a byte-pair encoding model that normalises nothing but writes spaces as "▁".

    Args:
        pieces: iterable of `Piece`, in the order of their ids. The first are those of `<pad>`,
            `<eos>`, `<bos>` and `<unk>`.

    Returns:
        Bytes.
    """
    pieces = list(pieces)
    trainer = {
        3: 2,  # model_type: byte-pair encoding
        4: len(pieces),  # vocab_size
        22: 1,  # split_by_whitespace
        25: 1,  # split_digits
        26: 1,  # allow_whitespace_only_pieces
        35: int(sum(piece.kind == BYTE for piece in pieces) == 256),  # byte_fallback
        40: 3,  # unk_id
        41: 2,  # bos_id
        42: 1,  # eos_id
        43: 0,  # pad_id
        45: b"<unk>",
        46: b"<bos>",
        47: b"<eos>",
        48: b"<pad>",
    }
    # name, add_dummy_prefix, remove_extra_whitespaces, escape_whitespaces
    normalizer = {1: b"identity", 3: 0, 4: 0, 5: 1}
    return b"".join(
        [
            *(_field(PIECES, _piece(piece)) for piece in pieces),
            _field(TRAINER, _message(trainer)),
            _field(NORMALIZER, _message(normalizer)),
        ]
    )


def read_pieces(model):
    """Return the pieces of a model.

    Args:
        model: bytes.

    Returns:
        List of `Piece`, in the order of their ids.

    Raises:
        ValueError: If the bytes are no SentencePiece model.
    """
    pieces = []
    try:
        for number, value in _fields(model):
            if number == PIECES:
                content = dict(_fields(value))
                score, kind = content.get(2, bytes(4)), content.get(3, NORMAL)
                pieces.append(Piece(content[1].decode(), struct.unpack("<f", score)[0], kind))
    except (AttributeError, IndexError, KeyError, TypeError, ValueError, struct.error) as error:
        raise ValueError(f"it is no SentencePiece model: {error!r}") from error
    if not pieces:
        raise ValueError("it is no SentencePiece model: it has no pieces")
    return pieces


def with_pieces(model, changes):
    """Return a model in which some pieces are replaced or added.

    Args:
        model: bytes.
        changes: dict of ids to `Piece`. Ids after the last one follow each other without a gap.

    Returns:
        Bytes.
    """
    parts, count = [], 0
    for number, value in _fields(model):
        if number == PIECES:
            value = _piece(changes[count]) if count in changes else value
            count += 1
        parts.append(_field(number, value))
    # The order of different fields is free.
    parts += [_field(PIECES, _piece(changes[i])) for i in sorted(changes) if i >= count]
    return b"".join(parts)


def _piece(piece):
    text = piece.text.encode()
    # text, score and kind. Written out, because Gemma has 256,000 pieces.
    return b"\x0a%b%b\x15%b\x18%c" % (
        _varint(len(text)),
        text,
        struct.pack("<f", piece.score),
        piece.kind,
    )


def _message(fields):
    return b"".join(_field(number, value) for number, value in fields.items())


def _field(number, value):
    """Return the bytes of a field, whose value is an integer or bytes."""
    if isinstance(value, int):
        return _varint(number << 3 | VARINT) + _varint(value)
    return _varint(number << 3 | BYTES) + _varint(len(value)) + value


def _varint(value):
    if value < 128:
        return b"%c" % value
    result = bytearray()
    while value > 127:
        result.append(value & 127 | 128)
        value >>= 7
    result.append(value)
    return bytes(result)


def _fields(message):
    """Yield the number and the value of each field: an integer, or bytes."""
    at, end = 0, len(message)
    while at < end:
        tag, at = _read_varint(message, at)
        number, wire_type = tag >> 3, tag & 7
        if wire_type == VARINT:
            value, at = _read_varint(message, at)
        else:
            size = {FIXED64: 8, FIXED32: 4}.get(wire_type)
            if wire_type == BYTES:
                size, at = _read_varint(message, at)
            if size is None or at + size > end:
                raise ValueError(f"a field of type {wire_type} ends after byte {end}")
            value = message[at : at + size]
            at += size
        yield number, value


def _read_varint(message, at):
    value = shift = 0
    while True:
        byte = message[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
        shift += 7
        if shift > 63:
            raise ValueError("an integer has more than 64 bits")
