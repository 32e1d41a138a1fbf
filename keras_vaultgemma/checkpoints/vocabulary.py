"""The vocabulary of a checkpoint folder: a SentencePiece model with the tokens that users added.

transformers keeps added tokens next to the model: in tokenizer.json, tokenizer_config.json or
added_tokens.json.
"""

from pathlib import Path

from keras_vaultgemma._files import check_link, read_json
from keras_vaultgemma.checkpoints import presets, tokenizer_json
from keras_vaultgemma.checkpoints.foreign_files import explain_pointer
from keras_vaultgemma.checkpoints.sentencepiece_format import (
    CONTROL,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    Piece,
    read_pieces,
    with_pieces,
    write_model,
)

CONFIG, ADDED = "tokenizer_config.json", "added_tokens.json"
MASK = "<mask>"
"""Token that transformers adds to every Gemma tokenizer without it, also where the model has no
embedding for it."""

NO_TEXT = "Pass `preprocessor=None` to work on ids"


def read_vocabulary(folder):
    """Return the SentencePiece model of a Hugging Face or keras-hub folder.

    Args:
        folder: `pathlib.Path` or string. Has one of the files of `presets.FILES["vocabulary"]`.

    Returns:
        Bytes.

    Raises:
        ValueError: If a file is malformed or a link that leaves the folder, or if SentencePiece
            cannot represent an added token. The message names the file or the token.
    """
    folder = Path(folder)
    path = presets.file(folder, "vocabulary")
    check_link(path, folder)
    added = None
    if path.name == tokenizer_json.FILE:
        pieces, added = tokenizer_json.read_tokenizer_json(path)
        model = write_model(pieces)
    else:
        model = path.read_bytes()
        try:
            pieces = read_pieces(model)
        except ValueError as error:
            raise ValueError(f"{path} is damaged: {error}{explain_pointer(path)}") from error
    if presets.names_a_class(folder):
        return model
    vocabulary = {}
    if added is None and (folder / tokenizer_json.FILE).is_file():
        content = read_json(folder / tokenizer_json.FILE, tokenizer_json.MAX_SIZE)
        added = content.get("added_tokens")
        vocabulary = _as_dict(_as_dict(content.get("model")).get("vocab"))
    changes = _changes(folder, pieces, added)
    _check_agreement(path, pieces, changes, vocabulary)
    return with_pieces(model, changes) if changes else model


def _changes(folder, pieces, added):
    """Return a dict of ids to the pieces that added tokens change or add.

    `added` are those of tokenizer.json, or None.
    """
    rows = read_json(folder / presets.CONFIG).get("vocab_size")
    changes, end = {}, len(pieces)
    for i, token in sorted(_added_tokens(folder, added).items()):
        text = token["content"].replace(" ", "▁")  # as SentencePiece writes spaces
        if i >= len(pieces):
            if text == MASK and type(rows) is int and i >= rows:
                continue
            if i != end:
                _reject(folder, token, f"has the id {i}, and ids below it have no token")
            end += 1
        elif pieces[i].text == text:
            if pieces[i].kind not in (NORMAL, UNUSED):
                continue
        elif text == "\t" and pieces[i].text == tokenizer_json.TAB:
            continue
        elif pieces[i].kind in (CONTROL, UNKNOWN):
            _reject(folder, token, f"replaces {pieces[i].text}")
        for name in ("lstrip", "rstrip", "single_word"):
            if token.get(name):
                _reject(folder, token, f"has `{name}`, which SentencePiece does not know")
        changes[i] = Piece(text, kind=USER_DEFINED)
    texts = {piece.text: i for i, piece in enumerate(pieces)} if changes else {}
    for i, piece in changes.items():
        if texts.get(piece.text, i) != i:
            _reject(folder, {"content": piece.text}, f"has the ids {texts[piece.text]} and {i}")
    return changes


def _check_agreement(path, pieces, changes, vocabulary):
    """Raise ValueError if tokenizer.json, which transformers reads, has other ids than `path`."""
    final = {**dict(enumerate(pieces)), **changes} if vocabulary else {}
    for text, i in vocabulary.items():
        piece = final.get(i) if type(i) is int else None
        if piece is None or piece.text not in (text, tokenizer_json.TAB if text == "\t" else text):
            raise ValueError(
                f"{path} must have the ids of {tokenizer_json.FILE} next to it. Received: "
                f"{piece and piece.text!r} as {i}, which is {text!r} there. Delete the wrong one"
            )


def _added_tokens(folder, added):
    """Return a dict of ids to the added tokens of all files, as dicts with `content`."""
    found = [(token.get("id"), token) for token in _as_list(added)]
    if (folder / CONFIG).is_file():
        decoder = read_json(folder / CONFIG).get("added_tokens_decoder")
        found += [(i, token) for i, token in _as_dict(decoder).items()]
    if (folder / ADDED).is_file():
        found += [(i, {"content": text}) for text, i in read_json(folder / ADDED).items()]
    tokens = {}
    for i, token in found:
        text = token.get("content") if isinstance(token, dict) else None
        if not str(i).isdecimal() or not isinstance(text, str) or not text:
            raise ValueError(
                f"{folder}: an added token must have an id and a text. Received: {token!r}"
            )
        earlier = tokens.setdefault(int(i), token)
        if earlier["content"] != text:
            _reject(folder, token, f"has the id {i}, and so has {earlier['content']!r}")
    return tokens


def _reject(folder, token, problem):
    raise ValueError(
        f"{folder}: the added token {token['content']!r} {problem}, so that text cannot be "
        f"tokenized as in transformers. {NO_TEXT}"
    )


def _as_list(value):
    return [token if isinstance(token, dict) else {} for token in value or ()]


def _as_dict(value):
    return value if isinstance(value, dict) else {}
