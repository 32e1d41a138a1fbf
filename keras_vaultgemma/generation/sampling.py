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
    greedy, *others = (
        getattr(keras_hub.samplers, f"{name}Sampler")
        for name in ("Greedy", "Random", "TopK", "TopP")
    )
    kind = type(sampler)
    # Not `isinstance`: what is derived from these may choose otherwise.
    if kind is not greedy and kind not in others:
        return None
    # Not `<= 0`, so that NaN is refused.
    if not sampler.temperature > 0:
        raise ValueError(f"`temperature` must be a number above 0. Received: {sampler.temperature}")
    if kind is greedy:
        return Rule("greedy")
    return Rule(
        "random", sampler.temperature, getattr(sampler, "k", None), getattr(sampler, "p", None)
    )


def probabilities(logits, rule):
    """Softmax of logits / temperature, 0 where `rule` leaves a token out, and not normalised after that.

    Args:
        logits: [B, V], of any float dtype.
        rule: `Rule`; `p` counts mass among all tokens, also where `k` has left some out, as in keras-hub.

    Returns:
        float32 [B, V].
    """
    logits = ops.cast(logits, "float32")
    # The largest becomes 0 before the division: XLA fuses that with a later subtraction, and the rounding of a biased
    # logit of 1e30 is then large enough for NaN.
    logits = (logits - ops.max(logits, axis=-1, keepdims=True)) / rule.temperature
    kept = ops.softmax(logits, axis=-1)
    if rule.k is not None:
        kept = top_k(kept, rule.k)
    return kept if rule.p is None else top_p(kept, rule.p)


def top_k(probabilities, k):
    """Those of the k most likely tokens, ties with the k-th included, 0 elsewhere; k is an int and may exceed V."""
    smallest = ops.top_k(probabilities, min(k, probabilities.shape[-1]))[0][:, -1:]
    return ops.where(probabilities >= smallest, probabilities, 0.0)


def top_p(probabilities, p):
    """The most likely tokens whose mass reaches `p`, 0 elsewhere (Holtzman et al., 2020, arXiv:1904.09751).

    The token that crosses `p` is kept, and what is as likely as it. The threshold is found by bisection: sorting a
    vocabulary of 256,000 takes many times longer. Probabilities closer than 2^-32 are not told apart.

    Args:
        probabilities: float32 [B, V].
        p: float; 1 or more keeps all, as does a total that does not reach it.

    Returns:
        float32 [B, V].
    """
    # Their sum in float32 may reach 1 without the last of them.
    if p >= 1:
        return probabilities

    def halve(_, bounds):
        low, high = bounds
        middle = (low + high) / 2
        reached = (
            ops.sum(ops.where(probabilities >= middle, probabilities, 0.0), axis=-1, keepdims=True)
            >= p
        )
        return ops.where(reached, middle, low), ops.where(reached, high, middle)

    largest = ops.max(probabilities, axis=-1, keepdims=True)
    low, _ = ops.fori_loop(0, HALVINGS, halve, (ops.zeros_like(largest), largest))
    # The most likely token is kept where it alone reaches p.
    alone = largest >= p
    return ops.where(probabilities >= ops.where(alone, largest, low), probabilities, 0.0)


def min_p(probabilities, threshold):
    """Those of at least `threshold` times the row's largest, 0 elsewhere (Nguyen et al., 2024, arXiv:2407.01082).

    Args:
        probabilities: float32 [B, V].
        threshold: scalar in [0, 1]; 0 keeps all.
    """
    largest = ops.max(probabilities, axis=-1, keepdims=True)
    return ops.where(probabilities >= threshold * largest, probabilities, 0.0)


def repetition_penalty(logits, seen, penalty):
    """Divide positive logits of tokens that have occurred by `penalty`, multiply negative ones (arXiv:1909.05858).

    Args:
        logits: float32 [B, V].
        seen: int32 [B, S] ids, each counted once however often it stands there; below 0 for none.
        penalty: scalar above 0; 1 changes nothing.

    Returns:
        float32 [B, V].
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
    """Add numbers to the logits of some tokens, in every row.

    Args:
        logits: float32 [B, V].
        bias_ids: int32 [n], no id twice; below 0 for none.
        bias: float32 [n]; beyond ±1e30, infinities included, it is ±1e30, which forbids or forces a token as well and
            never makes NaN.

    Returns:
        float32 [B, V].
    """
    size = logits.shape[1]
    places = ops.where(bias_ids < 0, size, bias_ids)[:, None]
    added = ops.scatter_update(
        ops.zeros((size + 1,), "float32"), places, ops.clip(bias, -1e30, 1e30)
    )
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
    blocks = ops.reshape(
        ops.pad(probabilities, ((0, 0), (0, count * width - size))), (batch, count, width)
    )
    masses = ops.sum(blocks, axis=2)
    reached = ops.cumsum(masses, axis=1)
    # Below the total also when rounded: `uniform` is not closer to 1 than 2^-23.
    target = uniform * reached[:, -1]
    block = _first_above(target, masses, reached)[:, None]
    before = ops.take_along_axis(ops.pad(reached, ((0, 0), (1, 0))), block, axis=1)[:, 0]
    inside = ops.take_along_axis(blocks, block[:, :, None], axis=1)[:, 0]
    return block[:, 0] * width + _first_above(target - before, inside, ops.cumsum(inside, axis=1))


def _first_above(target, masses, reached):
    """The first place with a mass whose cumulated mass is above the target: int32 [B].

    Places without a mass are passed over by name: XLA adds up in a tree, so that cumulated sums may change where 0 is
    added, and even decrease. Where rounding leaves no place, it is the one of the largest mass.

    Args:
        target: float32 [B].
        masses, reached: float32 [B, N], and their cumulated sums.
    """
    above = ops.cast(ops.logical_and(masses > 0, reached > target[:, None]), "int32")
    place = ops.where(
        ops.any(above > 0, axis=1), ops.argmax(above, axis=1), ops.argmax(masses, axis=1)
    )
    return ops.cast(place, "int32")


def uniforms(entropy, prompts, count):
    """Random numbers on the host: float32 [B, count], multiples of 2^-23 in [0, 1).

    Those of a row depend on `entropy` and on how many equal prompts stand before it in the batch, on nothing else: a
    prompt gets the same numbers in every batch, and equal prompts get different ones. The first ones do not depend on
    `count`.

    Args:
        entropy: list of ints, 0 or more.
        prompts: list of B lists of ids.
        count: how many numbers a row gets.
    """
    earlier, rows = {}, []
    for prompt in map(tuple, prompts):
        number = earlier.get(prompt, 0)
        earlier[prompt] = number + 1
        # Not one list: entropy [1] of the third prompt would be entropy [1, 2] of the first.
        sequence = np.random.SeedSequence([int(x) for x in entropy], spawn_key=(number,))
        # Raw bits, which NumPy promises never to change.
        bits = np.random.Philox(sequence).random_raw(count)
        rows.append((bits >> np.uint64(64 - 23)) / np.float64(RESOLUTION))
    return np.array(rows, "float32").reshape(len(rows), count)
