"""Choosing a token, as pure functions of logits [B, V] and of random numbers that are arguments."""

from typing import NamedTuple

import keras_hub
import numpy as np
from keras import ops

HALVINGS = 32
"""Steps of the search for the threshold of `top_p`: probabilities closer than 2^-32 are not told apart."""

RESOLUTION = 2**23
"""Random numbers are multiples of 1 / RESOLUTION, which leaves float32 room to stay below a total."""


class Rule(NamedTuple):
    """How a sampler chooses.

    Attributes:
        kind: "greedy" or "random".
        temperature: logits are divided by it before anything else.
        k, p: of `top_k` and `top_p`; None for all.
    """

    kind: str
    temperature: float = 1.0
    k: int | None = None
    p: float | None = None


def rule_of(sampler):
    """The `Rule` of a keras-hub sampler, or None for one that is not exactly greedy, random, top-k or top-p.

    Raises:
        ValueError: for a temperature that is not above 0.
    """
    kind = type(sampler)
    if kind is keras_hub.samplers.GreedySampler:
        return Rule("greedy")
    if kind not in (
        keras_hub.samplers.RandomSampler,
        keras_hub.samplers.TopKSampler,
        keras_hub.samplers.TopPSampler,
    ):
        return None
    # Not `<= 0`, so that NaN is refused.
    if not sampler.temperature > 0:
        raise ValueError(f"`temperature` must be a number above 0. Received: {sampler.temperature}")
    return Rule("random", sampler.temperature, getattr(sampler, "k", None), getattr(sampler, "p", None))


def probabilities(logits, rule):
    """float32 [B, V]: softmax of logits / temperature, without what `rule` leaves out; not normalised again."""
    kept = ops.softmax(ops.cast(logits, "float32") / rule.temperature, axis=-1)
    if rule.k is not None:
        kept = top_k(kept, rule.k)
    return kept if rule.p is None else top_p(kept, rule.p)


def top_k(probabilities, k):
    """Those of the k most likely tokens (ties with the k-th included), 0 elsewhere."""
    smallest = ops.top_k(probabilities, min(k, probabilities.shape[-1]))[0][:, -1:]
    return ops.where(probabilities >= smallest, probabilities, 0.0)


def top_p(probabilities, p):
    """The most likely tokens whose mass reaches `p`, 0 elsewhere (Holtzman et al., 2020, arXiv:1904.09751).

    The token that crosses `p` is kept, and what is as likely as it. The threshold is found by bisection: sorting a
    vocabulary of 256,000 takes many times longer.
    """

    def halve(_, bounds):
        low, high = bounds
        middle = (low + high) / 2
        reached = ops.sum(ops.where(probabilities >= middle, probabilities, 0.0), axis=-1, keepdims=True) >= p
        return ops.where(reached, middle, low), ops.where(reached, high, middle)

    largest = ops.max(probabilities, axis=-1, keepdims=True)
    low, _ = ops.fori_loop(0, HALVINGS, halve, (ops.zeros_like(largest), largest))
    # The most likely token is kept where it alone reaches p.
    alone = largest >= p
    return ops.where(probabilities >= ops.where(alone, largest, low), probabilities, 0.0)


def min_p(probabilities, threshold):
    """Those of at least `threshold` times the row's largest, 0 elsewhere (Nguyen et al., 2024, arXiv:2407.01082)."""
    largest = ops.max(probabilities, axis=-1, keepdims=True)
    return ops.where(probabilities >= threshold * largest, probabilities, 0.0)


def repetition_penalty(logits, seen, penalty):
    """Divide positive logits of tokens that have occurred by `penalty`, multiply negative ones (arXiv:1909.05858).

    Args:
        logits: float32 [B, V].
        seen: int32 [B, S] ids, each counted once however often it stands there; below 0 for none.
        penalty: scalar; 1 changes nothing.
    """
    batch, size = logits.shape
    rows = ops.arange(batch, dtype="int32")[:, None]
    # A row longer by one gives the ids that are none a place of their own.
    padded = ops.pad(logits, ((0, 0), (0, 1)))
    places = ops.where(seen < 0, size, seen)
    found = ops.take_along_axis(padded, places, axis=1)
    found = ops.where(found > 0, found / penalty, found * penalty)
    flat = ops.reshape(rows * (size + 1) + places, (-1, 1))
    updated = ops.scatter_update(ops.reshape(padded, (-1,)), flat, ops.reshape(found, (-1,)))
    return ops.reshape(updated, (batch, size + 1))[:, :size]


def logit_bias(logits, bias_ids, bias):
    """Add `bias` float32 [n] to the logits [B, V] of `bias_ids` int32 [n], in every row; ids below 0 stand for none.

    A bias of -inf becomes -1e30, so that a row whose tokens are all forbidden still has a most likely one.
    """
    size = logits.shape[1]
    places = ops.where(bias_ids < 0, size, bias_ids)[:, None]
    added = ops.scatter_update(ops.zeros((size + 1,), "float32"), places, ops.maximum(bias, -1e30))
    return logits + added[None, :size]


def draw(probabilities, uniform):
    """The token at which the cumulated probability passes `uniform` times the total: int32 [B].

    Args:
        probabilities: float32 [B, V], 0 or more, not necessarily of total 1; no token of probability 0 is drawn.
        uniform: float32 [B], multiples of 2^-23 in [0, 1).
    """
    batch, size = probabilities.shape
    # In two levels, of about sqrt(V) numbers each: one float32 sum over 256,000 would lose the unlikely tokens.
    width = int(np.ceil(np.sqrt(size)))
    count = -(-size // width)
    blocks = ops.reshape(ops.pad(probabilities, ((0, 0), (0, count * width - size))), (batch, count, width))
    sums = ops.cumsum(ops.sum(blocks, axis=2), axis=1)
    target = uniform * sums[:, -1]
    block = ops.cast(ops.sum(ops.cast(sums <= target[:, None], "int32"), axis=1), "int32")[:, None]
    inner = ops.cumsum(ops.take_along_axis(blocks, block[:, :, None], axis=1)[:, 0], axis=1)
    before = ops.where(block > 0, ops.take_along_axis(sums, ops.maximum(block - 1, 0), axis=1), 0.0)[:, 0]
    # Both sums round: stay within the block that was found.
    rest = ops.clip(target - before, 0.0, inner[:, -1] * (1 - 1 / RESOLUTION))
    place = ops.cast(ops.sum(ops.cast(inner <= rest[:, None], "int32"), axis=1), "int32")
    return block[:, 0] * width + place


def uniforms(entropy, prompts, count):
    """Random numbers on the host: float32 [B, count], multiples of 2^-23 in [0, 1).

    Those of a row depend on `entropy` and on how many equal prompts stand before it in the batch, on nothing else: a
    prompt gets the same numbers in every batch, and equal prompts get different ones. The first ones do not depend on
    `count`.

    Args:
        entropy: list of ints, 0 or more.
        prompts: list of B lists of ids.
    """
    earlier, rows = {}, []
    for prompt in map(tuple, prompts):
        number = earlier.get(prompt, 0)
        earlier[prompt] = number + 1
        bits = np.random.Philox(np.random.SeedSequence([*map(int, entropy), number])).random_raw(count)
        rows.append((bits >> np.uint64(64 - 23)) / np.float64(RESOLUTION))
    return np.array(rows, "float32").reshape(len(rows), count)
