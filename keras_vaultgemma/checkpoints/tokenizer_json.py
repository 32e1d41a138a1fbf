"""The tokenizer.json of Hugging Face, read as the pieces of a SentencePiece model, and written.

transformers 5 saves no other file of a Gemma tokenizer. It lists the merges of byte-pair encoding
in order, where SentencePiece has a score for the piece that each makes. SentencePiece also merges
two tokens into a piece that no merge makes, so such pieces are marked as unused there.
"""

import json

from keras_vaultgemma._files import read_json
from keras_vaultgemma.checkpoints.sentencepiece_format import (
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    Piece,
)

FILE = "tokenizer.json"
MAX_SIZE = 2**26
"""Largest file in bytes. Gemma's has 34 MB."""

BOS = "<bos>"
KINDS = {"<pad>": CONTROL, "<eos>": CONTROL, BOS: CONTROL, "<unk>": UNKNOWN}
BYTES = {f"<0x{i:02X}>" for i in range(256)}
TAB = "<0x09>"
"""Byte piece of the tab, which Gemma's tokenizer.json spells as the tab itself."""

REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
"""Gemma's normaliser."""


def read_tokenizer_json(path):
    """Read a Gemma tokenizer from a tokenizer.json.

    Args:
        path: `pathlib.Path`.

    Returns:
        Tuple `(pieces, added)`: a list of `Piece` in the order of their ids, and the dicts of
        `added_tokens`, which may have further ids.

    Raises:
        ValueError: If the file is no tokenizer.json, or its tokenizer is of another kind than
            Gemma's, so that SentencePiece would give other ids.
    """
    content = read_json(path, MAX_SIZE)
    model = content.get("model")
    added = content.get("added_tokens") or []
    problem = _difference(content, model)
    if problem is None and not _are_tokens(added):
        problem = "`added_tokens` must be a list of tokens with `id` and `content`"
    if problem:
        raise ValueError(f"{path} is no tokenizer like Gemma's: {problem}")
    vocabulary = model["vocab"]
    texts = sorted(vocabulary, key=vocabulary.__getitem__)
    if [vocabulary[text] for text in texts] != list(range(len(texts))):
        raise ValueError(f"{path}: the ids of `vocab` must be 0, 1, 2 and so on, each once")
    in_text = {token["content"].replace(" ", "▁") for token in added}
    scores = _scores(path, model["merges"], vocabulary, in_text)
    pieces = []
    for text in texts:
        if text in KINDS:
            piece = Piece(text, kind=KINDS[text])
        elif text in BYTES:
            piece = Piece(text, kind=BYTE)
        elif text == "\t" and TAB not in vocabulary:
            piece = Piece(TAB, kind=BYTE)
        elif text in in_text:
            piece = Piece(text, kind=USER_DEFINED)
        elif len(text) == 1 or text in scores:
            piece = Piece(text, scores.get(text, 0.0), NORMAL)
        else:
            piece = Piece(text, -float(len(scores)), UNUSED)
        pieces.append(piece)
    return pieces, added


def write_tokenizer_json(path, pieces, special=()):
    """Write the tokenizer of a SentencePiece model as transformers does.

    Args:
        path: `pathlib.Path`.
        pieces: list of `Piece`, in the order of their ids.
        special: iterable of user-defined pieces' texts that decoders leave out of text, as they do
            with control pieces.

    Returns:
        Dict of ids to the added tokens, as tokenizer_config.json lists them.
    """
    ids = {piece.text: i for i, piece in enumerate(pieces)}
    added = {
        i: {
            "content": piece.text,
            "special": piece.kind != USER_DEFINED or piece.text in special,
            **dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False),
        }
        for i, piece in enumerate(pieces)
        if piece.kind in (CONTROL, UNKNOWN, USER_DEFINED)
    }
    merges = []
    for piece in pieces:
        pairs = [(piece.text[:i], piece.text[i:]) for i in range(1, len(piece.text))]
        known = [pair for pair in pairs if pair[0] in ids and pair[1] in ids]
        if piece.kind in (NORMAL, USER_DEFINED):
            merges += [(piece.score, *map(len, pair), pair) for pair in known]
    # The longest first where scores are equal: a run of 40 spaces is one token of 31 and one of 9,
    # as in SentencePiece, which takes the longest user-defined piece.
    merges.sort(key=lambda merge: merge[:3], reverse=True)
    bos, text = {"SpecialToken": {"id": BOS, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    second = [{"SpecialToken": {"id": BOS, "type_id": 1}}, {"Sequence": {"id": "B", "type_id": 1}}]
    decoders = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, **token} for i, token in added.items()],
        "normalizer": REPLACE,
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [bos, text],
            "pair": [bos, text, *second],
            "special_tokens": {BOS: {"id": BOS, "ids": [ids[BOS]], "tokens": [BOS]}},
        },
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": ids,
            "merges": [merge[-1] for merge in merges],
        },
    }
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    return added


def _difference(content, model):
    """Return what distinguishes a tokenizer from Gemma's, or None."""
    if not isinstance(model, dict) or model.get("type", "BPE") != "BPE":
        return f"`model` must be of the type 'BPE'. Received: {_brief(model)}"
    if not isinstance(model.get("vocab"), dict) or not isinstance(model.get("merges"), list):
        return "`model` must have a `vocab` and `merges`"
    if not all(type(i) is int for i in model["vocab"].values()):
        return "the ids of `vocab` must be integers"
    for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "ignore_merges"):
        if model.get(name):
            return f"`model.{name}` must not be set. Received: {_brief(model[name])}"
    missing = [name for name in KINDS if name not in model["vocab"]]
    if missing:
        return f"it has no {', '.join(missing)}"
    normalizer, pre_tokenizer = content.get("normalizer"), content.get("pre_tokenizer")
    if normalizer not in (REPLACE, {"type": "Sequence", "normalizers": [REPLACE]}):
        return f"`normalizer` must replace ' ' by '▁'. Received: {_brief(normalizer)}"
    # The normaliser leaves no space to split at.
    split = isinstance(pre_tokenizer, dict) and {
        name: pre_tokenizer.get(name) for name in ("type", "pattern")
    }
    if pre_tokenizer is not None and split != {"type": "Split", "pattern": {"String": " "}}:
        return f"`pre_tokenizer` must be null or split at ' '. Received: {_brief(pre_tokenizer)}"
    return None


def _scores(path, merges, vocabulary, added):
    """Return a dict of the pieces that merges make to scores: 0 for the first, then -1, -2..."""
    scores, counts = {}, {}
    for merge in merges:
        # tokenizers below 0.20 wrote a string.
        pair = merge.split(" ") if isinstance(merge, str) else merge
        if type(pair) is not list or len(pair) != 2 or not type(pair[0]) is type(pair[1]) is str:
            raise ValueError(f"{path}: `merges` must be pairs. Received: {_brief(merge)}")
        piece = pair[0] + pair[1]
        if piece in scores:
            counts[piece] += 1
        else:
            scores[piece], counts[piece] = -float(len(scores)), 1
    for piece in scores.keys() - added:
        known = 0
        for i in range(1, len(piece)):
            if piece[:i] in vocabulary and piece[i:] in vocabulary:
                known += 1
        if counts[piece] < known:
            raise ValueError(
                f"{path}: `merges` must have every pair of tokens that makes {piece!r}, because "
                f"SentencePiece merges all of them. Received: {counts[piece]} of {known}"
            )
    return scores


def _are_tokens(added):
    return isinstance(added, list) and all(
        isinstance(token, dict)
        and type(token.get("id")) is int
        and isinstance(token.get("content"), str)
        for token in added
    )


def _brief(value):
    return repr(value)[:100]
