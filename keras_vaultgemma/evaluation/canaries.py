"""Canaries: records that are inserted by coin flips, to audit a training's privacy later."""

import hashlib
import json
import os
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import keras
import keras_hub
import numpy as np

from keras_vaultgemma._files import read_json, sync_folder
from keras_vaultgemma._validation import check_choice, check_integer, check_number
from keras_vaultgemma.data.text_inputs import as_texts
from keras_vaultgemma.generation.generator import Generator
from keras_vaultgemma.generation.state import Settings
from keras_vaultgemma.models.pieces import with_piece_logits

KINDS = ("random", "high_temperature", "new_token")

BOS = 2
"""Id of `<bos>` for a model without a vocabulary. Ids up to `<unk>`, 3, are control tokens."""

MAX_FILE = 2**28
"""Largest size of a sealed file, in bytes."""


class Sealed(NamedTuple):
    """Contents of a sealed file.

    Attributes:
        kind: string. One of `KINDS`.
        canaries: list of M strings or M lists of ids.
        is_in: bool array `[M]`. The coin flips.
        is_seeded: bool. True if the coins can be computed from a seed.
    """

    kind: str
    canaries: list
    is_in: np.ndarray
    is_seeded: bool


def insert_canaries(
    records: Sequence[Any],
    path: str | os.PathLike,
    *,
    kind: str = "random",
    count: int = 200,
    length: int = 32,
    tokenizer: Any = None,
    model: keras.Model | None = None,
    temperature: float = 3.0,
    seed: int | None = None,
) -> list[Any]:
    """Add canaries to training records, each with probability one half.

    The file `path` says which ones were added, and `audit` reads it after training. Only its owner
    may read it. Nobody who decides anything about the training should: an audit proves something
    only if the coins had no effect but through the records.

    Args:
        records: list of strings, or of lists of token ids. Canaries are of the same kind.
        path: path of the file, which must not exist yet.
        kind: string. "random": uniformly random tokens. "high_temperature": text that `model`
            generates at a high temperature. "new_token": the beginning of a record, followed by a
            token that occurs in no record and in no other canary. Defaults to "random".
        count: int. Number of canaries, of which about half are added. With more of them a larger ε
            can be found: 200 suffice for at most 3.7. Defaults to 200.
        length: int. Tokens of a canary. Defaults to 32.
        tokenizer: `VaultGemmaTokenizer`. Defaults to that of `model`. Either is required.
        model: `VaultGemmaCausalLM` before training, for "high_temperature". Defaults to None.
        temperature: float above 0, for "high_temperature". Defaults to 3.
        seed: int or None. Makes the canaries and the coins repeatable, for tests. Defaults to
            random numbers of the operating system.

    Returns:
        List: the records, followed by the canaries that were added.

    Raises:
        ValueError: If an argument is out of its range, `records` mix both kinds, or there are fewer
            new tokens than canaries.
        FileExistsError: If `path` exists, because other coins may have been trained on.

    Example:

    ```python
    from keras_vaultgemma import VaultGemmaTokenizer, evaluation

    tokenizer = VaultGemmaTokenizer.from_preset("vaultgemma_tiny")
    records = ["The fox said no.", "The crow said yes."]
    with_canaries = evaluation.insert_canaries(
        records, "canaries.json", count=100, tokenizer=tokenizer
    )
    ```

    References:
        - [Steinke et al., 2023](https://arxiv.org/abs/2305.08846)
        - [Panda et al., 2025](https://arxiv.org/abs/2503.06808) (canaries with new tokens)
    """
    check_choice("kind", kind, KINDS)
    check_integer("count", count, 2)
    check_integer("length", length, 2)
    check_number("temperature", temperature, above=0)
    check_integer("seed", seed, 0, allow_none=True)
    if kind == "high_temperature" and model is None:
        raise ValueError("`model` must be given for kind='high_temperature'. Received: model=None")
    if tokenizer is None:
        tokenizer = getattr(getattr(model, "preprocessor", None), "tokenizer", None)
    if tokenizer is None and model is None:
        raise ValueError("`tokenizer` or `model` must be given. Received: neither")
    records = list(records)
    is_text = tokenizer is not None and all(isinstance(x, (str, bytes)) for x in records)
    if not is_text and any(isinstance(x, (str, bytes)) for x in records):
        raise ValueError(
            "`records` must be all strings, with a tokenizer, or all lists of token ids. "
            "Received: strings"
        )
    path = Path(path)
    if path.exists():
        raise FileExistsError(f"{path} exists. Coins that were trained on must not be replaced")
    ids = tokenizer.tokenize(as_texts(records)[0]) if is_text and records else records
    generator = np.random.default_rng(secrets.randbits(128) if seed is None else seed)
    ordinary = _ordinary_ids(tokenizer, model)
    if kind == "random":
        rows = generator.choice(ordinary, (count, length)).tolist()
    elif kind == "high_temperature":
        rows = _generate(model, count, length, temperature, ordinary, generator)
    else:
        rows = _with_new_tokens(ids, count, length, ordinary, tokenizer, is_text, generator)
    canaries = [tokenizer.detokenize(row) for row in rows] if is_text else rows
    coins = (generator.integers(0, 2, count) == 1).tolist()
    _seal(path, {"kind": kind, "is_seeded": seed is not None, "canaries": canaries, "is_in": coins})
    return [*records, *(x for x, is_in in zip(canaries, coins, strict=True) if is_in)]


def read_canaries(path):
    """Read a sealed file.

    Args:
        path: path of the file that `insert_canaries` wrote.

    Returns:
        `Sealed`.

    Raises:
        ValueError: If the file is of another kind, or was changed.
        OSError: If it cannot be read.
    """
    content = read_json(path, MAX_FILE)
    if content.pop("sha256", None) != _digest(content):
        raise ValueError(f"{path} must be as `insert_canaries` wrote it. Received: a changed file")
    return Sealed(
        content["kind"], content["canaries"], np.array(content["is_in"]), content["is_seeded"]
    )


def _seal(path, content):
    """Write a file that only its owner can read, and never replace another."""
    content = {**content, "sha256": _digest(content)}
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with open(descriptor, "w", encoding="utf-8") as file:
        json.dump(content, file)
        file.flush()
        os.fsync(file.fileno())
    sync_folder(path.parent)


def _digest(content):
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _ordinary_ids(tokenizer, model):
    """Return ids of pieces of text: no control tokens, no bytes and no markup."""
    if tokenizer is None:
        return np.arange(4, model.backbone.vocabulary_size)
    pieces = [tokenizer.id_to_token(i) for i in range(tokenizer.vocabulary_size())]
    return np.array([i for i, piece in enumerate(pieces) if piece[0] != "<" and piece.strip()])


def _generate(model, count, length, temperature, ordinary, generator):
    """Return rows of ordinary ids that a model draws at a temperature."""
    forbidden = np.setdiff1d(np.arange(model.backbone.vocabulary_size), ordinary)
    sampler = keras_hub.samplers.RandomSampler(temperature=temperature)
    settings = Settings(
        seed=int(generator.integers(2**31)), logit_bias=dict.fromkeys(forbidden.tolist(), -np.inf)
    )
    found = Generator(with_piece_logits(model), sampler).generate(
        [[BOS]] * count, [length] * count, settings=settings
    )
    return found.tokens


def _with_new_tokens(ids, count, length, ordinary, tokenizer, is_text, generator):
    """Return beginnings of records, each followed by a token of its own that is in none."""
    known = {i for row in ids for i in row}
    new = [i for i in generator.permutation(ordinary).tolist() if i not in known]
    prefixes = [list(row)[: length - 1] for row in ids if len(row)]
    if not prefixes:
        raise ValueError("`records` must have one that is not empty. Received: none")
    rows = []
    for i in new:
        row = [*prefixes[generator.integers(len(prefixes))], i]
        # As text, the token must not merge with its neighbour.
        if not is_text or list(tokenizer.tokenize(tokenizer.detokenize(row)))[-1:] == [i]:
            rows.append(row)
        if len(rows) == count:
            return rows
    raise ValueError(
        f"`count` must be at most the number of tokens that occur in no record, {len(rows)}. "
        f"Received: count={count}"
    )
