"""Choice of tokens: pure functions of logits [B, V] and of random numbers that are arguments."""

from typing import NamedTuple

import keras_hub
import numpy as np
from keras import ops

from keras_vaultgemma import backend

BISECTION_STEPS = 32
"""Steps of the search for the threshold of `top_p`, which then ignores differences below 2^-32."""

RESOLUTION = 2**23
"""Random numbers are multiples of 1 / RESOLUTION.

Their product with a total then stays below the total in float32.
"""


class Rule(NamedTuple):
    """The rule by which a sampler chooses tokens.

    Attributes:
        kind: "greedy" or "random".
        temperature: float, or float tensor [B, 1]. Logits are divided by it first. Defaults to 1.0.
        k: int. Argument of `top_k`. Defaults to None, for all tokens.
        p: float, or float tensor [B, 1]. Argument of `top_p`. Defaults to None, for all tokens.
    """

    kind: str
    temperature: float = 1.0
    k: int | None = None
    p: float | None = None


def rule_of(sampler):
    """Return the `Rule` of a keras-hub sampler.

    Returns:
        `Rule`, or None unless the sampler's class is exactly greedy, random, top-k or top-p.
    """
    greedy, *others = (
        getattr(keras_hub.samplers, f"{name}Sampler")
        for name in ("Greedy", "Random", "TopK", "TopP")
    )
    kind = type(sampler)
    # Not `isinstance`, because subclasses may choose differently.
    if kind is not greedy and kind not in others:
        return None
    if kind is greedy:
        return Rule("greedy")
    return Rule(
        "random", sampler.temperature, getattr(sampler, "k", None), getattr(sampler, "p", None)
    )


def probabilities(logits, rule):
    """Return the probabilities of tokens under a rule.

    Args:
        logits: float tensor [B, V].
        rule: `Rule`. `p` is a mass among all tokens, even if `k` excludes some, as in keras-hub.

    Returns:
        float32 tensor [B, V]: the softmax of `logits / temperature`, set to 0 where the rule
        excludes a token, without normalisation after that.
    """
    logits = ops.cast(logits, "float32")
    # The maximum is subtracted before the division, because XLA fuses a later subtraction with it,
    # and the rounding of a biased logit of 1e30 then gives NaN.
    logits = (logits - ops.max(logits, axis=-1, keepdims=True)) / rule.temperature
    result = ops.softmax(logits, axis=-1)
    if rule.k is not None:
        result = top_k(result, rule.k)
    return result if rule.p is None else top_p(result, rule.p)


def top_k(probabilities, k):
    """Set all but the k most likely tokens to 0. Ties with the k-th are included.

    Args:
        probabilities: float tensor [B, V].
        k: int. May exceed V.
    """
    smallest = backend.top_k(probabilities, min(k, probabilities.shape[-1]))[0][:, -1:]
    return ops.where(probabilities >= smallest, probabilities, 0.0)


def top_p(probabilities, p):
    """Set all but the most likely tokens whose mass reaches `p` to 0 (nucleus sampling).

    The token at which the mass reaches `p` is included, and so are tokens of the same probability.
    The threshold is found by bisection, because sorting a vocabulary of 256,000 takes many times
    longer.

    Args:
        probabilities: float32 tensor [B, V].
        p: float, or float tensor [B, 1]. All tokens are included if it is 1 or more, or above
            their total.

    Returns:
        float32 tensor [B, V].

    References:
        - [Holtzman et al., 2020](https://arxiv.org/abs/1904.09751)
    """
    # Because a float32 sum may reach 1 without the last tokens.
    is_number = isinstance(p, (int, float))
    if is_number and p >= 1:
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
    low, _ = ops.fori_loop(0, BISECTION_STEPS, halve, (ops.zeros_like(largest), largest))
    # The most likely token is included where it alone reaches p.
    threshold = ops.where(largest >= p, largest, low)
    if not is_number:
        threshold = ops.where(p >= 1, 0.0, threshold)
    return ops.where(probabilities >= threshold, probabilities, 0.0)


def min_p(probabilities, threshold):
    """Set probabilities below `threshold` times the row's largest to 0.

    Args:
        probabilities: float32 tensor [B, V].
        threshold: float scalar from 0 to 1. 0 changes nothing.

    References:
        - [Nguyen et al., 2024](https://arxiv.org/abs/2407.01082)
    """
    largest = ops.max(probabilities, axis=-1, keepdims=True)
    return ops.where(probabilities >= threshold * largest, probabilities, 0.0)


def repetition_penalty(logits, seen, penalty):
    """Divide positive logits of tokens that have occurred by `penalty`, and multiply negative ones.

    Args:
        logits: float32 tensor [B, V].
        seen: int32 tensor [B, S]. Ids that have occurred; negative ones are ignored, and repeated
            ones are penalised once.
        penalty: float scalar above 0. 1 changes nothing.

    Returns:
        float32 tensor [B, V].

    References:
        - [Keskar et al., 2019](https://arxiv.org/abs/1909.05858)
    """
    batch, size = logits.shape
    rows = ops.arange(batch, dtype="int32")[:, None]
    # Negative ids write to an additional column.
    padded = ops.pad(logits, ((0, 0), (0, 1)))
    columns = ops.where(seen < 0, size, seen)
    found = ops.take_along_axis(padded, columns, axis=1)
    found = ops.where(found > 0, found / penalty, found * penalty)
    flat = ops.reshape(rows * (size + 1) + columns, (-1, 1))
    updated = ops.scatter_update(ops.reshape(padded, (-1,)), flat, ops.reshape(found, (-1,)))
    return ops.reshape(updated, (batch, size + 1))[:, :size]


def logit_bias(logits, bias_ids, bias):
    """Add numbers to the logits of some tokens, in every row.

    Args:
        logits: float32 tensor [B, V].
        bias_ids: int32 tensor [n] without repeated ids. Negative ids are ignored.
        bias: float32 tensor [n]. Clipped to ±1e30, which forbids or forces a token like an infinity
            and never gives NaN.

    Returns:
        float32 tensor [B, V].
    """
    size = logits.shape[1]
    columns = ops.where(bias_ids < 0, size, bias_ids)[:, None]
    added = ops.scatter_update(
        ops.zeros((size + 1,), "float32"), columns, ops.clip(bias, -1e30, 1e30)
    )
    return logits + added[None, :size]


def draw(probabilities, uniform):
    """Draw a token from each row: the first whose cumulative probability exceeds `uniform`.

    Args:
        probabilities: float32 tensor [B, V], non-negative, of any total. Tokens of probability 0
            are never drawn.
        uniform: float32 tensor [B]. Multiples of 2^-23 in [0, 1), as parts of the total.

    Returns:
        int32 tensor [B].
    """
    batch, size = probabilities.shape
    # In two levels of about sqrt(V) numbers, because one float32 sum over 256,000 tokens would lose
    # the unlikely ones.
    width = int(np.ceil(np.sqrt(size)))
    count = -(-size // width)
    blocks = ops.reshape(
        ops.pad(probabilities, ((0, 0), (0, count * width - size))), (batch, count, width)
    )
    masses = ops.sum(blocks, axis=2)
    reached = ops.cumsum(masses, axis=1)
    # Below the total even after rounding, because `uniform` is at most 1 - 2^-23.
    target = uniform * reached[:, -1]
    block = _first_above(target, masses, reached)[:, None]
    before = ops.take_along_axis(ops.pad(reached, ((0, 0), (1, 0))), block, axis=1)[:, 0]
    inside = ops.take_along_axis(blocks, block[:, :, None], axis=1)[:, 0]
    return block[:, 0] * width + _first_above(target - before, inside, ops.cumsum(inside, axis=1))


def _first_above(target, masses, reached):
    """Return the first index with a positive mass whose cumulative mass exceeds the target.

    Masses of 0 are excluded explicitly, because XLA sums in a tree, whose cumulative sums can
    change where 0 is added. If rounding leaves no index, the one of the largest mass is returned.

    Args:
        target: float32 tensor [B].
        masses: float32 tensor [B, n].
        reached: float32 tensor [B, n]. Cumulative sums of `masses`.

    Returns:
        int32 tensor [B].
    """
    above = ops.cast(ops.logical_and(masses > 0, reached > target[:, None]), "int32")
    index = ops.where(
        ops.any(above > 0, axis=1), ops.argmax(above, axis=1), ops.argmax(masses, axis=1)
    )
    return ops.cast(index, "int32")


def uniforms(entropy, prompts, count):
    """Draw uniform random numbers on the host.

    Those of a row depend on `entropy` and on the number of equal prompts before it in the batch
    alone, so that a prompt gets the same numbers in every batch, and equal prompts get different
    ones. The first numbers do not depend on `count`.

    Args:
        entropy: list of non-negative ints.
        prompts: list of B lists of ids.
        count: int. Numbers of each row.

    Returns:
        float32 NumPy array [B, count], multiples of 2^-23 in [0, 1).
    """
    earlier, rows = {}, []
    for prompt in map(tuple, prompts):
        number = earlier.get(prompt, 0)
        earlier[prompt] = number + 1
        # A spawn key, because entropy [1] followed by number 2 would equal entropy [1, 2].
        sequence = np.random.SeedSequence([int(x) for x in entropy], spawn_key=(number,))
        # Raw bits, because NumPy guarantees them across versions.
        bits = np.random.Philox(sequence).random_raw(count)
        rows.append((bits >> np.uint64(64 - 23)) / np.float64(RESOLUTION))
    return np.array(rows, "float32").reshape(len(rows), count)
