"""Membership inference: can an attacker tell training records from unseen ones?"""

import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np

from keras_vaultgemma._validation import check_integer, check_number
from keras_vaultgemma.evaluation.intervals import Rate, bootstrap
from keras_vaultgemma.evaluation.memorization import MIN_RECORDS
from keras_vaultgemma.evaluation.parts import Parts
from keras_vaultgemma.evaluation.results import Result
from keras_vaultgemma.evaluation.roc import auc, true_positives
from keras_vaultgemma.evaluation.shift import DistributionShift, find_shift
from keras_vaultgemma.evaluation.signals import record_signals, token_losses
from keras_vaultgemma.evaluation.texts import Texts, read_texts, training_rows

FALSE_POSITIVE_RATES = (0.01, 0.001)


@dataclass(frozen=True)
class TruePositiveRate(Result):
    """Members that an attack finds while it accuses few controls.

    Attributes:
        false_positive_rate: float. Largest fraction of controls that it accuses.
        rate: `Rate` of the members that it finds. Its interval holds that of the bootstrap.
    """

    false_positive_rate: float
    rate: Rate


@dataclass(frozen=True)
class Attack(Result):
    """An attack that guesses membership from one number a record.

    Attributes:
        name: string. "loss", "min_k", "min_k_plus_plus", "zlib" or "reference".
        auc: float. Area under the ROC curve: the probability that a random member scores higher
            than a random control. 0.5 is guessing.
        auc_low, auc_high: float. Bootstrap interval.
        true_positive_rates: tuple of `TruePositiveRate`.
    """

    name: str
    auc: float
    auc_low: float
    auc_high: float
    true_positive_rates: tuple[TruePositiveRate, ...]


@dataclass(frozen=True)
class Membership(Result):
    """Result of `measure_membership`.

    Attributes:
        members, controls: int. Number of different records of each kind.
        truncated: int. Number of records of which only the beginning is tested, because training
            rows are no longer.
        confidence: float. Confidence of all intervals.
        attacks: tuple of `Attack`.
        shift: `DistributionShift` between members and controls, without the model.
        left_out: dict. Number of records that were not tested, for each reason.
        is_claim: bool. False if there are too few records for a claim.
        warnings: tuple of strings.

    Example:

    ```python
    from keras_vaultgemma import VaultGemmaCausalLM, evaluation

    model = VaultGemmaCausalLM.from_preset("vaultgemma_tiny")
    records = [f"Patient {i} has had a sore throat." for i in range(20)]
    found = evaluation.measure_membership(model, records[::2], records[1::2])
    print(found.attacks[0].auc, found.attacks[0].true_positive_rates[0].rate, found.as_dict())
    ```
    """

    members: int
    controls: int
    truncated: int
    confidence: float
    attacks: tuple[Attack, ...]
    shift: DistributionShift
    left_out: dict[str, int]
    is_claim: bool
    warnings: tuple[str, ...]

    def __str__(self):
        lines = [
            f"{x.name}: AUC {x.auc:.3f} ({x.auc_low:.3f} to {x.auc_high:.3f})" for x in self.attacks
        ]
        return "\n".join([*lines, *self.warnings])


def measure_membership(
    model: keras.Model,
    members: Sequence[Any],
    controls: Sequence[Any],
    *,
    reference: keras.Model | None = None,
    k: float = 0.2,
    confidence: float = 0.95,
    seed: int = 0,
    checkpoint: str | os.PathLike | None = None,
    verbose: bool = True,
) -> Membership:
    """Measure how well attacks tell records that a model was trained on from unseen ones.

    Each attack orders the records by one number: the mean loss; the mean of the least likely
    fraction `k` of tokens, as it is (min-k %) and standardised by each token's distribution
    (min-k++); the loss in relation to the size that zlib compresses the text to; and the gain over
    a reference model that was not trained on the members.

    Args:
        model: `VaultGemmaCausalLM` with a preprocessor.
        members: list of strings, or of lists of token ids. Records that the model was trained on.
        controls: list of the same kind. Unseen records from the same source.
        reference: `VaultGemmaCausalLM` with the same vocabulary, such as the model before training.
            Defaults to None, without that attack.
        k: float in (0, 1]. Fraction of tokens of min-k % and min-k++. Defaults to 0.2.
        confidence: float. Confidence of the intervals. Defaults to 0.95.
        seed: int. Seed of the bootstrap. Defaults to 0.
        checkpoint: path of a folder, as for `measure_memorization`. Defaults to None.
        verbose: bool. True for progress bars. Defaults to True.

    Returns:
        `Membership`.

    Raises:
        ValueError: If an argument is out of its range, or no member or no control is left.

    Example:

    ```python
    from keras_vaultgemma import VaultGemmaCausalLM, evaluation

    model = VaultGemmaCausalLM.from_preset("vaultgemma_tiny")
    records = [f"Patient {i} has had a sore throat for {i % 9} days." for i in range(64)]
    print(evaluation.measure_membership(model, records[::2], records[1::2]))
    ```

    References:
        - [Shi et al., 2023](https://arxiv.org/abs/2310.16789) (min-k %)
        - [Zhang et al., 2024](https://arxiv.org/abs/2404.02936) (min-k++)
        - [Carlini et al., 2020](https://arxiv.org/abs/2012.07805) (zlib)
        - [Carlini et al., 2021](https://arxiv.org/abs/2112.03570) (TPR at low FPR)
    """
    check_number("k", k, above=0, maximum=1)
    check_number("confidence", confidence, minimum=0.5, below=1)
    check_integer("seed", seed, 0)
    found, left_out, sets = [], {}, {}
    for name, records in (("members", members), ("controls", controls)):
        texts = read_texts(records, model, name)
        left_out[f"{name}_empty"], left_out[f"{name}_not_utf8"] = texts.empty, texts.undecodable
        sets[name] = dict(zip(map(tuple, texts.rows), texts.contents, strict=True))
        left_out[f"{name}_repeated"] = len(texts.rows) - len(sets[name])
    if shared := sets["members"].keys() & sets["controls"].keys():
        left_out["controls_among_members"] = len(shared)
        found.append(f"{len(shared)} controls are members as well: they were left out")
    sets["controls"] = {row: x for row, x in sets["controls"].items() if row not in shared}
    for name, pairs in sets.items():
        if not pairs:
            raise ValueError(f"`{name}` must have a record to test. Received: {left_out}")
    count, unseen = len(sets["members"]), len(sets["controls"])
    is_member = np.arange(count + unseen) < count
    texts = Texts(
        [*sets["members"], *sets["controls"]],
        [*sets["members"].values(), *sets["controls"].values()],
    )
    rows, contents, truncated = training_rows(texts, model)
    parts = Parts(checkpoint)
    losses = token_losses(model, rows, parts, "records", verbose)
    scores, reference_loss = record_signals(losses, contents, k), None
    if reference is not None:
        losses = token_losses(reference, rows, parts, "records, reference", verbose)
        reference_loss = -record_signals(losses, contents, k)["loss"]
        scores["reference"] = scores["loss"] + reference_loss
    is_claim = min(count, unseen) >= MIN_RECORDS
    if not is_claim:
        found.append(
            f"{count} members and {unseen} controls: with fewer than {MIN_RECORDS} of either there "
            "are intervals, but no claim"
        )
    shift = find_shift(rows, is_member, reference_loss)
    if shift.is_found:
        found.append(
            "Members and controls differ in their words, lengths or difficulty, so that an attack "
            "may detect the difference instead of membership. Take both from one source at random"
        )
    for message in found:
        warnings.warn(message, stacklevel=2)
    return Membership(
        count,
        unseen,
        truncated,
        confidence,
        tuple(
            measure_attack(name, x[is_member], x[~is_member], confidence, seed)
            for name, x in scores.items()
        ),
        shift,
        left_out,
        is_claim,
        tuple(found),
    )


def measure_attack(name, members, controls, confidence=0.95, seed=0):
    """Return the `Attack` of the scores of members and controls; members should score higher."""

    def statistic(members, controls):
        rates = [true_positives(members, controls, x) / len(members) for x in FALSE_POSITIVE_RATES]
        return np.array([auc(members, controls), *rates])

    low, high = bootstrap(statistic, [members, controls], confidence, seed)
    rates = []
    for i, limit in enumerate(FALSE_POSITIVE_RATES, 1):
        exact = Rate.of(true_positives(members, controls, limit), len(members), confidence)
        low_rate, high_rate = min(exact.low, float(low[i])), max(exact.high, float(high[i]))
        rates.append(
            TruePositiveRate(
                limit,
                Rate(
                    exact.count,
                    exact.total,
                    exact.value,
                    low_rate,
                    high_rate,
                    max(exact.at_most, high_rate),
                    confidence,
                ),
            )
        )
    value = float(auc(members, controls))
    return Attack(name, value, float(low[0]), float(high[0]), tuple(rates))
