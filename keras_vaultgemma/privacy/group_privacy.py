"""Group privacy: what training that protects single rows guarantees to a person with several.

It is the alternative to `DPSGD(unit="user")`, which is compared with it.

**Mechanism.** A person has k rows. Each step of DP-SGD with Poisson sampling draws each of them
independently with probability q, so that the sum changes by at most jC with the probability of j
successes in Binomial(k, q). The privacy loss of a step is dominated by that of a mixture of
Gaussians, N(j, σ²) with these probabilities, against N(0, σ²) (Ganesh, 2024). The textbook bound,
(kε, δ (e^(kε) - 1) / (e^ε - 1)) from the (ε, δ) of one row, follows from less and is much larger.

References:
    - [Ganesh, 2024](https://arxiv.org/abs/2401.10294): tight group privacy of DP-SGD
    - [Vadhan, 2017](https://doi.org/10.1007/978-3-319-57048-8_7): the textbook bound
"""

import math
from collections.abc import Sequence

from keras_vaultgemma._validation import check_integer
from keras_vaultgemma.privacy import accounting
from keras_vaultgemma.privacy.accounting import Steps

POINTS = 1000
"""Smallest number of intervals of the grid of privacy losses."""

PRECISION = 0.01
"""Relative error of ε that the grid may cause; it increases ε and never decreases it."""

UNLIKELY = 1e-3
"""Fraction of δ for numbers of drawn rows that are left out because they are so improbable."""


def group_epsilon(runs: Sequence[Steps], delta: float, size: int) -> float:
    """Return the ε of a person with several rows, if each row is sampled and clipped by itself.

    Args:
        runs: list of `Steps` of training that samples and clips single rows. Their `rows` and
            `max_batch_size` are ignored: batches are taken not to be truncated.
        delta: float in (0, 1).
        size: int. k, the number of the person's rows.

    Returns:
        float, 0 or more: an upper bound, which is at most 2 % too large.

    Raises:
        ValueError: If an argument is out of range.
        ImportError: If dp-accounting is not installed.

    Example:

    ```python
    from keras_vaultgemma.privacy.accounting import Steps
    from keras_vaultgemma.privacy.group_privacy import group_epsilon

    steps = Steps(count=20, rows=1000, sampling_probability=0.05, noise_multiplier=2.0)
    print(group_epsilon([steps], delta=1e-5, size=4))
    ```
    """
    for steps in runs:
        accounting.check_steps(steps)
    accounting.check_delta(delta)
    check_integer("size", size)
    runs = [steps for steps in runs if steps.count]
    count = sum(steps.count for steps in runs)
    if not count:
        return 0.0
    mixtures = [
        (steps.count, _likely(size, steps.sampling_probability, UNLIKELY * delta / count), noise)
        for steps in runs
        if (noise := steps.noise_multiplier)
    ]
    # The largest loss of a step, up to outcomes 10 σ away.
    largest = max(
        (len(found) - 1) * ((len(found) - 1) / (2 * noise) + 10) / noise
        for _, found, noise in mixtures
    )
    interval = min(largest / POINTS, _interval(accounting.LARGEST_EPSILON, count))
    while True:
        value = _epsilon(mixtures, delta * (1 - UNLIKELY), interval) + UNLIKELY * delta
        if value > accounting.LARGEST_EPSILON or interval <= _interval(value, count):
            return value
        interval = _interval(value, count) / 1.5


def _interval(value, count):
    """Return the largest interval of the grid with which ε is precise."""
    # Joining the points of the grid by lines adds about `interval²` / 8 to the mean of a loss.
    return math.sqrt(4 * PRECISION * value / count)


def _epsilon(mixtures, delta, interval):
    try:
        from dp_accounting.pld import privacy_loss_distribution as pld
    except ImportError as error:
        raise ImportError(
            "Privacy accounting needs dp-accounting: pip install 'keras-vaultgemma[privacy]' "
            f"({error})"
        ) from error
    composed = pld.identity(value_discretization_interval=interval)
    for count, probabilities, noise in mixtures:
        one_step = pld.from_mixture_gaussian_mechanism(
            noise,
            sensitivities=list(range(len(probabilities))),
            sampling_probs=probabilities,
            value_discretization_interval=interval,
        )
        composed = composed.compose(one_step.self_compose(count))
    return float(composed.get_epsilon_for_delta(delta))


def _likely(size, probability, unlikely):
    """Return the binomial probabilities of 0 to j successes, conditional on at most j.

    With t the probability of more than j, conditioning changes δ of n steps by at most n t, and ε
    in the reverse direction, where the likelihood of all outcomes loses a factor of 1 - t, by about
    n t.

    Args:
        size: int. Number of trials.
        probability: float. Of a success.
        unlikely: float. Largest t.
    """
    found = [
        math.comb(size, j) * probability**j * (1 - probability) ** (size - j)
        for j in range(size + 1)
    ]
    while len(found) > 2 and math.fsum(found[:-1]) > 1 - unlikely / 2:
        found.pop()
    return [value / math.fsum(found) for value in found]
