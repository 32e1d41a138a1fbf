"""Memorization: how much of its training records a model reproduces, next to a baseline."""

import os
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np

from keras_vaultgemma._validation import check_integer, check_number
from keras_vaultgemma.evaluation.extraction import Extractor
from keras_vaultgemma.evaluation.extraction_rates import (
    APPROXIMATE,
    Excess,
    Extraction,
    Probabilistic,
    Stratum,
    excess_over_baseline,
    excess_over_controls,
    stratify,
    summarize,
)
from keras_vaultgemma.evaluation.parts import Parts
from keras_vaultgemma.evaluation.results import Result
from keras_vaultgemma.evaluation.texts import read_texts, special_ids

MIN_RECORDS = 30
"""Fewest records about which a claim is made. With fewer, intervals are all there is."""


@dataclass(frozen=True)
class Memorization(Result):
    """Result of `measure_memorization`.

    Attributes:
        prefix_length, suffix_length: int. Tokens that are given, and tokens to reproduce.
        top_k: int or None. Number of tokens that probabilistic extraction samples from.
        confidence: float. Confidence of all intervals.
        members, controls: `Extraction` by the model; None without controls.
        baseline_members, baseline_controls: `Extraction` by the baseline model, or None.
        excess: tuple of `Excess`.
        strata: tuple of `Stratum`, of the members.
        left_out: dict. Number of records that were not tested, for each reason.
        is_claim: bool. False if there are too few records for a claim.
        warnings: tuple of strings.

    Example:

    ```python
    from keras_vaultgemma import VaultGemmaCausalLM, evaluation

    model = VaultGemmaCausalLM.from_preset("vaultgemma_tiny")
    records = [f"Patient {i} has had a sore throat." for i in range(20)]
    found = evaluation.measure_memorization(model, records, prefix_length=4, suffix_length=3)
    print(found.members.exact, found.members.median_distance, found.as_dict())
    ```
    """

    prefix_length: int
    suffix_length: int
    top_k: int | None
    confidence: float
    members: Extraction
    controls: Extraction | None
    baseline_members: Extraction | None
    baseline_controls: Extraction | None
    excess: tuple[Excess, ...]
    strata: tuple[Stratum, ...]
    left_out: dict[str, int]
    is_claim: bool
    warnings: tuple[str, ...]

    def __str__(self):
        lines = [f"greedy exact match: {self.members.exact}"]
        lines.append(f"greedy approximate match: {self.members.approximate}")
        lines += map(_line, self.members.probabilistic)
        lines += [
            f"excess over {x.over}, {x.measure}: {100 * x.value:.2g} % "
            f"({100 * x.low:.2g} % to {100 * x.high:.2g} %)"
            for x in self.excess
        ]
        return "\n".join([*lines, *self.warnings])


def measure_memorization(
    model: keras.Model,
    records: Sequence[Any],
    *,
    controls: Sequence[Any] | None = None,
    baseline: keras.Model | None = None,
    prefix_length: int = 50,
    suffix_length: int = 50,
    top_k: int | None = 40,
    confidence: float = 0.95,
    checkpoint: str | os.PathLike | None = None,
    verbose: bool = True,
) -> Memorization:
    """Measure how many records a model reproduces when it is given their beginnings.

    The first `prefix_length` tokens of each record are the prompt, and the next `suffix_length`
    tokens are what an attacker wants. Equal beginnings are tested once; how often they occur is a
    stratum. Matches alone prove nothing, because any model continues some texts correctly: compare
    with a `baseline` that was not trained on the records and with `controls` that no model saw.

    Args:
        model: `VaultGemmaCausalLM` with a preprocessor.
        records: list of strings, or of lists of token ids. Records that the model was trained on.
        controls: list of the same kind. Unseen records from the same source. Defaults to None.
        baseline: `VaultGemmaCausalLM` with the same vocabulary, such as the model before training.
            Defaults to None.
        prefix_length: int. Defaults to 50.
        suffix_length: int. Defaults to 50.
        top_k: int or None. Probabilistic extraction samples from the `top_k` most likely tokens;
            None is all tokens. Defaults to 40, as in Hayes et al.
        confidence: float. Confidence of the intervals. Defaults to 0.95.
        checkpoint: path of a folder in which finished parts are stored, so that the same call
            resumes after a kill. Its numbers come from the records: protect it like them. Defaults
            to None.
        verbose: bool. True for progress bars. Defaults to True.

    Returns:
        `Memorization`.

    Raises:
        ValueError: If an argument is out of its range, or no record is long enough.

    Example:

    ```python
    from keras_vaultgemma import VaultGemmaCausalLM, evaluation

    model = VaultGemmaCausalLM.from_preset("vaultgemma_tiny")
    records = [f"Patient {i} has had a sore throat for {i % 9} days now." for i in range(60)]
    options = dict(controls=records[1::2], prefix_length=6, suffix_length=4)
    print(evaluation.measure_memorization(model, records[::2], **options))
    ```

    References:
        - [Carlini et al., 2022](https://arxiv.org/abs/2202.07646)
        - [Hayes et al., 2024](https://arxiv.org/abs/2410.19482)
    """
    check_integer("prefix_length", prefix_length)
    check_integer("suffix_length", suffix_length)
    check_integer("top_k", top_k, allow_none=True)
    check_number("confidence", confidence, minimum=0.5, below=1)
    length = prefix_length + suffix_length
    longest = model.backbone.max_sequence_length
    if len(special_ids(model)[0]) + length > longest:
        raise ValueError(
            f"`prefix_length` and `suffix_length` must fit into the model's {longest} positions "
            f"with `<bos>`. Received: {prefix_length} and {suffix_length}"
        )
    left_out: dict[str, int] = {}
    found: list[str] = []
    counts = _windows(records, length, model, "records", left_out)
    if not counts:
        raise ValueError(
            f"`records` must have a record of at least {length} tokens, which `prefix_length` and "
            f"`suffix_length` ask for. Received: {left_out}"
        )
    control_counts = _windows(
        [] if controls is None else controls, length, model, "controls", left_out
    )
    if shared := counts.keys() & control_counts.keys():
        left_out["controls_among_records"] = len(shared)
        found.append(
            f"{len(shared)} controls begin like records, so they are not unseen and were left out"
        )
    windows = np.array([*counts], "int32")
    unseen = np.array([x for x in control_counts if x not in shared], "int32").reshape(-1, length)
    parts = Parts(checkpoint)

    def extract(model, name):
        if model is None:
            return None, None
        arguments = (prefix_length, suffix_length, APPROXIMATE, top_k, parts, verbose)
        extractor = Extractor(model, *arguments)
        of_controls = extractor(unseen, f"{name}controls") if len(unseen) else None
        return extractor(windows, f"{name}records"), of_controls

    extracted, of_controls = extract(model, "")
    by_baseline, controls_by_baseline = extract(baseline, "baseline, ")

    def summary(extracted):
        return None if extracted is None else summarize(extracted, confidence)

    excess: list[Excess] = []
    if by_baseline is not None:
        excess += excess_over_baseline(extracted, by_baseline, confidence)
    if of_controls is not None:
        excess += excess_over_controls(extracted, of_controls, confidence)
    is_claim = len(windows) >= MIN_RECORDS
    if not is_claim:
        found.append(
            f"{len(windows)} records are fewer than {MIN_RECORDS}: intervals, but no claim"
        )
    if baseline is None and not len(unseen):
        found.append(
            "Without a baseline or controls nobody can tell memorized text from text that any "
            "model would write"
        )
    for message in found:
        warnings.warn(message, stacklevel=2)
    return Memorization(
        prefix_length=prefix_length,
        suffix_length=suffix_length,
        top_k=top_k,
        confidence=confidence,
        members=summarize(extracted, confidence),
        controls=summary(of_controls),
        baseline_members=summary(by_baseline),
        baseline_controls=summary(controls_by_baseline),
        excess=tuple(excess),
        strata=stratify(windows, [*counts.values()], model, extracted, by_baseline, confidence),
        left_out=left_out,
        is_claim=is_claim,
        warnings=tuple(found),
    )


def _line(found: Probabilistic) -> str:
    return (
        f"extracted by {found.attempts:,} samples with probability {found.probability:g}: "
        f"{found.rate}"
    )


def _windows(records, length, model, name, left_out):
    """Return a `Counter` of the first `length` ids of records that have as many."""
    texts = read_texts(records, model, name)
    whole = [tuple(row[:length]) for row in texts.rows if len(row) >= length]
    left_out[f"{name}_too_short"] = len(texts.rows) - len(whole)
    left_out[f"{name}_empty"] = texts.empty
    left_out[f"{name}_not_utf8"] = texts.undecodable
    return Counter(whole)
