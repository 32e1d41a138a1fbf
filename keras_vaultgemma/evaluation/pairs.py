"""Log-probabilities of continuations of contexts, by the rules of lm-evaluation-harness."""

import dataclasses
import os
from collections.abc import Iterable
from typing import NamedTuple

import keras
import numpy as np

from keras_vaultgemma._validation import check_choice, check_integer
from keras_vaultgemma.evaluation.packed_pairs import pack_pairs
from keras_vaultgemma.evaluation.parts import Parts

TRUNCATIONS = ("keep_bos", "lm_eval")


@dataclasses.dataclass(frozen=True, eq=False)
class PairScores:
    """Scores of N pairs of a context and a continuation.

    Attributes:
        log_probs: float64 NumPy array `[N]`. Sum of `log p(token)` of the continuation, in nats.
        is_greedy: bool NumPy array `[N]`. True if greedy decoding would return the continuation.
        tokens: int NumPy array `[N]`. Number of tokens of the continuation, with the spaces that
            the context ends with.
        characters: int NumPy array `[N]`. Number of characters of the continuation, as given.
        bytes: int NumPy array `[N]`. Number of its UTF-8 bytes.
        tokens_cut: int NumPy array `[N]`. Number of tokens of the context that did not fit into the
            model's positions.

    Example:

    ```python
    from keras_vaultgemma import VaultGemmaCausalLM, evaluation

    model = VaultGemmaCausalLM.from_preset("vaultgemma_tiny")
    scores = evaluation.score_pairs(model, [("The fox said", " no."), ("The fox said", " yes.")])
    print(scores.log_probs, scores.is_greedy)
    ```
    """

    log_probs: np.ndarray
    is_greedy: np.ndarray
    tokens: np.ndarray
    characters: np.ndarray
    bytes: np.ndarray
    tokens_cut: np.ndarray

    @property
    def truncated(self) -> int:
        """Number of pairs whose context was cut."""
        return int(np.count_nonzero(self.tokens_cut))


def score_pairs(
    model: keras.Model,
    pairs: Iterable[tuple[str, str]],
    *,
    truncation: str = "keep_bos",
    max_length: int | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    verbose: bool = True,
) -> PairScores:
    """Compute the log-probability of each continuation after its context.

    The rules are those of lm-evaluation-harness. Spaces at the end of a context belong to the
    continuation. The tokens of a continuation are those of the joined text that follow as many
    tokens as the context has alone. `<bos>` precedes the context, also an empty one.

    A context that several pairs share is computed once, and no logits of all tokens are stored.

    Args:
        model: `VaultGemmaCausalLM` with a preprocessor.
        pairs: iterable of `(context, continuation)`, strings.
        truncation: string. What is cut of pairs that are longer than the model's positions:
            "lm_eval" cuts the beginning with `<bos>`, as the harness does; "keep_bos" cuts what
            follows `<bos>`. Defaults to "keep_bos".
        max_length: int. Number of positions. Defaults to the model's.
        checkpoint: path of a folder or None. Finished batches are stored there, and the same call
            resumes after it was killed.
        verbose: bool. If True, show a progress bar on a terminal. Defaults to True.

    Returns:
        `PairScores`.

    Raises:
        ValueError: If a pair is not two strings, a continuation has no tokens or more than
            `max_length`, or an argument is out of its range.

    Example:

    ```python
    from keras_vaultgemma import VaultGemmaCausalLM, evaluation

    model = VaultGemmaCausalLM.from_preset("vaultgemma_tiny")
    scores = evaluation.score_pairs(model, [("Once upon a", " time"), ("", "Once upon a time")])
    print(scores.log_probs / scores.tokens)
    ```
    """
    pairs = _as_pairs(pairs)
    check_choice("truncation", truncation, TRUNCATIONS)
    tokenizer, length = tokenizer_of(model), positions_of(model, max_length)
    encoded = [
        cut_pair(i, context, continuation, length, truncation)
        for i, (context, continuation) in enumerate(encode_pairs(tokenizer, pairs))
    ]
    log_probs, is_greedy = score_ids(
        model, [(pair.context, pair.continuation) for pair in encoded], checkpoint, verbose
    )
    continuations = [continuation for _, continuation in pairs]
    return PairScores(
        log_probs,
        is_greedy,
        tokens=np.array([len(pair.continuation) for pair in encoded], int),
        characters=np.array([len(text) for text in continuations], int),
        bytes=np.array([len(text.encode()) for text in continuations], int),
        tokens_cut=np.array([pair.tokens_cut for pair in encoded], int),
    )


def _as_pairs(pairs):
    pairs = [tuple(pair) for pair in pairs]
    for i, pair in enumerate(pairs):
        if len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise ValueError(
                "`pairs` must be pairs of a context and a continuation, strings. "
                f"Received: {pair!r} as pair {i}"
            )
    return pairs


class EncodedPair(NamedTuple):
    """A pair as tuples of ids, cut to the model's positions."""

    context: tuple
    continuation: tuple
    tokens_cut: int = 0


def tokenizer_of(model):
    """Return the tokenizer of a model, or raise ValueError if it has none."""
    if getattr(model, "preprocessor", None) is None:
        raise ValueError("`model` must have a preprocessor, which tokenizes. Received: none")
    return model.preprocessor.tokenizer


def positions_of(model, max_length):
    """Return `max_length` after a check, or the number of positions of the model if it is None."""
    check_integer("max_length", max_length, allow_none=True)
    return model.backbone.max_sequence_length if max_length is None else int(max_length)


def encode_pairs(tokenizer, pairs):
    """Return `(context, continuation)`, two tuples of ids, for each pair of strings."""
    split = []
    for context, continuation in pairs:
        kept = context.rstrip()
        split.append((kept, context[len(kept) :] + continuation))
    contexts = list(dict.fromkeys(context for context, _ in split))
    start = (tokenizer.start_token_id,)
    context_ids = {
        context: (*start, *ids)
        for context, ids in zip(contexts, tokenizer.tokenize(contexts), strict=True)
    }
    whole = tokenizer.tokenize([context + continuation for context, continuation in split])
    return [
        (context_ids[context], (*start, *ids)[len(context_ids[context]) :])
        for (context, _), ids in zip(split, whole, strict=True)
    ]


def cut_pair(index, context, continuation, max_length, truncation):
    """Return an `EncodedPair` of at most `max_length` inputs; the last token is no input.

    Args:
        index: int. Number of the pair, for the message.
        context: tuple of ids, not empty.
        continuation: tuple of ids.
        max_length: int.
        truncation: string, one of `TRUNCATIONS`.

    Raises:
        ValueError: If the continuation has no tokens or more than `max_length`.
    """
    if not 1 <= len(continuation) <= max_length:
        raise ValueError(
            f"A continuation must have from 1 to max_length={max_length} tokens "
            "(--sequence-length of the command). "
            f"Received: {len(continuation)} tokens in pair {index}"
        )
    excess = max(0, len(context) + len(continuation) - max_length - 1)
    if not excess:
        return EncodedPair(context, continuation)
    kept = context[:1] if truncation == "keep_bos" else ()
    return EncodedPair((*kept, *context[len(kept) + excess :]), continuation, excess)


def score_ids(model, pairs, checkpoint=None, verbose=True):
    """Compute the log-probability of each continuation after its context, both as ids.

    Args:
        model: `VaultGemmaCausalLM`.
        pairs: list of `(context, continuation)`, non-empty tuples of ids.
        checkpoint: path of a folder or None, as for `score_pairs`.
        verbose: bool, as for `score_pairs`.

    Returns:
        Tuple `(log_probs, is_greedy)`, float64 and bool NumPy arrays of shape `[N]`.
    """
    unique = list(dict.fromkeys(pairs))
    batches = pack_pairs(unique)

    def score(*arrays):
        losses, is_correct = model.score_branches(*arrays)
        return {"losses": losses, "is_correct": is_correct}

    results = Parts(checkpoint).compute(
        score, [batch.arrays for batch in batches], model, {}, "log-probabilities", verbose
    )
    log_probs, is_greedy = np.zeros(len(unique)), np.zeros(len(unique), bool)
    for batch, result in zip(batches, results, strict=True):
        for i, start, end in batch.pairs:
            log_probs[i] = -result["losses"][start:end].sum(dtype="float64")
            is_greedy[i] = result["is_correct"][start:end].all()
    index = {pair: i for i, pair in enumerate(unique)}
    order = np.array([index[pair] for pair in pairs], int)
    return log_probs[order], is_greedy[order]
