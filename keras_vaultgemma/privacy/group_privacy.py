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

from keras_vaultgemma._validation import check_integer
from keras_vaultgemma.privacy import accounting
from keras_vaultgemma.privacy.accounting import Steps

POINTS = 1000
"""Smallest number of intervals of the grid of privacy losses."""

PRECISION = 0.01
"""Relative error of ε that the grid may cause; it increases ε and never decreases it."""


def group_epsilon(steps: Steps, delta: float, size: int) -> float:
    """Return the ε of a person with several rows, if each row is sampled and clipped by itself.

    Args:
        steps: `Steps` of training that samples and clips single rows. Its `rows` and
            `max_batch_size` are ignored: batches are taken not to be truncated.
        delta: float in (0, 1).
        size: int. k, the number of the person's rows.

    Returns:
        float, 0 or more; infinity if there is no bound.

    Raises:
        ValueError: If an argument is out of range.
        ImportError: If dp-accounting is not installed.

    Example:

    ```python
    from keras_vaultgemma.privacy.accounting import Steps
    from keras_vaultgemma.privacy.group_privacy import group_epsilon

    steps = Steps(count=20, rows=1000, sampling_probability=0.05, noise_multiplier=2.0)
    print(group_epsilon(steps, delta=1e-5, size=4))
    ```
    """
    accounting.check_steps(steps)
    accounting.check_delta(delta)
    check_integer("size", size)
    if not steps.count:
        return 0.0
    noise = steps.noise_multiplier
    probabilities = _binomial(size, steps.sampling_probability)
    # The largest loss of a step, up to outcomes 10 σ away.
    interval = (size**2 / (2 * noise) + 10 * size) / noise / POINTS
    while True:
        value = _epsilon(steps.count, delta, noise, probabilities, interval)
        # Joining the points of the grid by lines adds about `interval²` / 8 to the mean of a loss.
        wanted = math.sqrt(4 * PRECISION * value / steps.count)
        if interval <= wanted or not math.isfinite(value):
            return value
        interval = wanted / 1.5


def _epsilon(count, delta, noise, probabilities, interval):
    try:
        from dp_accounting.pld import privacy_loss_distribution as pld
    except ImportError as error:
        raise ImportError(
            "Privacy accounting needs dp-accounting: pip install keras-vaultgemma[privacy] "
            f"({error})"
        ) from error
    one_step = pld.from_mixture_gaussian_mechanism(
        noise,
        sensitivities=list(range(len(probabilities))),
        sampling_probs=probabilities,
        value_discretization_interval=interval,
    )
    return float(one_step.self_compose(count).get_epsilon_for_delta(delta))


def _binomial(size, probability):
    """Return the probabilities of 0 to `size` successes, whose sum is 1."""
    found = [
        math.comb(size, j) * probability**j * (1 - probability) ** (size - j)
        for j in range(size + 1)
    ]
    return [value / math.fsum(found) for value in found]
