"""Limits that a differential privacy guarantee sets to attacks on the membership of a record.

An attack computes a score of a record from the model and decides by a threshold if the record was
among the training data. Of all attacks, also those that know every other record, (ε, δ)-privacy
bounds the rate of true positives by the rate of false positives:

    TPR <= e^ε FPR + δ(ε)   and   1 - FPR <= e^ε (1 - TPR) + δ(ε)   for every ε.

The steps of a ledger have such a δ for every ε. The smallest of all bounds is a curve, whose area
bounds the AUC of every attack.

References:
    - [Kairouz et al., 2015](https://arxiv.org/abs/1311.0776): privacy as a region of error rates
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from keras_vaultgemma.privacy import accounting
from keras_vaultgemma.privacy.accounting import Steps

EPSILONS = np.concatenate([[0.0], np.geomspace(0.05, 30.0, 40)])
"""ε of the bounds. More of them lower the limits by less than 0.001."""

FALSE_POSITIVE_RATES = (0.01, 0.001)


@dataclasses.dataclass(frozen=True)
class AttackLimits:
    """Limits of membership attacks, each rounded up to three significant digits or more.

    Attributes:
        accuracy: float. Largest fraction of right guesses if the record is among the training data
            in half of the cases.
        auc: float. Largest area under the curve of true against false positives: the fraction of
            pairs of a training record and another one in which the attack tells which is which.
        true_positive_rates: dict. Maps each of `FALSE_POSITIVE_RATES` to the largest rate of true
            positives.

    Example:

    ```python
    from keras_vaultgemma.evaluation import AttackLimits

    limits = AttackLimits(accuracy=0.7, auc=0.8, true_positive_rates={0.01: 0.2, 0.001: 0.05})
    print(limits.as_dict())
    ```
    """

    accuracy: float
    auc: float
    true_positive_rates: dict[float, float]

    def as_dict(self) -> dict:
        """Return a dict that is serialisable as JSON."""
        rates = {f"{rate:g}": limit for rate, limit in self.true_positive_rates.items()}
        return {"accuracy": self.accuracy, "auc": self.auc, "true_positive_rates": rates}


def attack_limits(runs: Sequence[Steps]) -> AttackLimits:
    """Return the limits that steps on the same data set to attacks.

    Args:
        runs: list of `privacy.accounting.Steps`, as `ledger.on(dataset)` returns them.

    Raises:
        ImportError: If batches are truncated and SciPy is not installed.

    Example:

    ```python
    from keras_vaultgemma.evaluation import attack_limits
    from keras_vaultgemma.privacy.accounting import Steps

    steps = Steps(
        count=60, rows=1000, sampling_probability=0.1, max_batch_size=140, noise_multiplier=2.0
    )
    limits = attack_limits([steps])
    print(f"right in at most {100 * limits.accuracy:.1f} of 100 guesses")
    ```
    """
    deltas = np.array([accounting.delta(runs, float(epsilon)) for epsilon in EPSILONS])
    rates = np.concatenate([[0.0], np.geomspace(1e-9, 1.0, 4000)])
    curve = _largest_rates(rates, deltas)
    # The curve is concave, so that its chords lie below it, by less than the rounding.
    area = float(((curve[1:] + curve[:-1]) / 2 * np.diff(rates)).sum())
    true_positives = _largest_rates(np.array(FALSE_POSITIVE_RATES), deltas)
    return AttackLimits(
        _round_up((1 + float(deltas[0])) / 2),
        _round_up(area),
        {
            rate: _round_up(float(limit))
            for rate, limit in zip(FALSE_POSITIVE_RATES, true_positives, strict=True)
        },
    )


def _largest_rates(rates, deltas):
    """Return the largest true positive rate at each false positive rate, shape `[n]`."""
    factors = np.exp(EPSILONS)[:, None]
    one = factors * rates + deltas[:, None]
    other = 1 - (1 - rates - deltas[:, None]) / factors
    return np.minimum(np.minimum(one, other).min(axis=0), 1.0)


def _round_up(rate):
    return min(1.0, accounting.round_up(rate))
