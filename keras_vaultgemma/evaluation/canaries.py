"""Canaries: records that are inserted by coin flips, to audit a training's privacy later."""

import hashlib
import json
import os
import secrets
from collections.abc import Sequence
from typing import Any

import numpy as np

from keras_vaultgemma._validation import check_choice, check_integer, check_number

KINDS = ("random", "high_temperature", "new_token")
FORMAT = 1


def insert_canaries(
    records: Sequence[Any],
    path: str | os.PathLike,
    *,
    kind: str = "random",
    count: int = 200,
    length: int = 32,
    tokenizer: Any = None,
    model: Any = None,
    temperature: float = 3.0,
    seed: int | None = None,
) -> list[Any]:
    """Add canaries to training records, each with probability one half.

    Which ones were added is in the sealed file `path`, which `audit` reads after training. Keep it
    away from whoever trains: an audit means something only if nobody chose by it.

    Args:
        records: list of strings, or of lists of token ids.
        path: path of the file, which must not exist yet.
        kind: string. "random": uniformly random tokens. "high_temperature": text that `model`
            generates at a high temperature. "new_token": a record, followed by a token that occurs
            in no record. Defaults to "random".
        count: int. Number of canaries, of which about half are added. Defaults to 200.
        length: int. Tokens of a canary. Defaults to 32.
        tokenizer: `VaultGemmaTokenizer`, or the number of ids if `records` are ids. Defaults to
            that of `model`.
        model: `VaultGemmaCausalLM`, for "high_temperature". Defaults to None.
        temperature: float above 0, for "high_temperature". Defaults to 3.
        seed: int or None. Makes the canaries and the coins repeatable, for tests. Defaults to
            random numbers of the operating system.

    Returns:
        List: the records, followed by the canaries that were added.

    Raises:
        ValueError: If an argument is out of its range.
        FileExistsError: If `path` exists.

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
        - [Panda et al., 2025](https://arxiv.org/abs/2503.06808)
    """
    check_choice("kind", kind, KINDS)
    check_integer("count", count)
    check_integer("length", length)
    check_number("temperature", temperature, above=0)
    check_integer("seed", seed, 0, allow_none=True)
    generator = np.random.default_rng(secrets.randbits(128) if seed is None else seed)
    if isinstance(tokenizer, int):
        canaries = generator.integers(3, tokenizer, (count, length)).tolist()
    else:
        pieces = [
            i
            for i in range(tokenizer.vocabulary_size())
            if not tokenizer.id_to_token(i).startswith("<")
        ]
        canaries = [
            tokenizer.detokenize(row) for row in generator.choice(pieces, (count, length)).tolist()
        ]
    coins = generator.integers(0, 2, count).astype(bool).tolist()
    content = {"format": FORMAT, "kind": kind, "canaries": canaries, "is_in": coins}
    content["sha256"] = _digest(content)
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        json.dump(content, file)
    return [*records, *(x for x, is_in in zip(canaries, coins, strict=True) if is_in)]


def _digest(content):
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_canaries(path):
    """Return `(content)` of a sealed file."""
    with open(path, encoding="utf-8") as file:
        content = json.load(file)
    if content.pop("sha256", None) != _digest(content):
        raise ValueError(f"{path} was changed after it was sealed")
    return content
