"""The tokenizer.json of Hugging Face, read as the pieces of a SentencePiece model.

transformers 5 saves no other file of a Gemma tokenizer. It lists the merges of byte-pair encoding
in order, where SentencePiece has a score for the piece that each makes. SentencePiece also merges
two tokens into a piece that no merge makes, so such pieces are marked as unused there.
"""

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

KINDS = {"<pad>": CONTROL, "<eos>": CONTROL, "<bos>": CONTROL, "<unk>": UNKNOWN}
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
