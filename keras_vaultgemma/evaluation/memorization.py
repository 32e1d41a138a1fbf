"""Memorization: how much of its training records a model reproduces, next to a baseline."""

import math
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
from keras_vaultgemma.evaluation.intervals import Rate, clopper_pearson
from keras_vaultgemma.evaluation.parts import Parts
from keras_vaultgemma.evaluation.results import Result
from keras_vaultgemma.evaluation.texts import compressed_size, contents_of, read_texts, special_ids

APPROXIMATE = 0.1
"""Largest edit distance, as a fraction of the suffix, that counts as an approximate match."""

ATTEMPTS = ((1, 0.5), (100, 0.5), (10_000, 0.5), (10_000, 0.1))
"""The (n, p) of probabilistic extraction that are reported."""

MIN_RECORDS = 30
"""Fewest records about which a claim is made. With fewer, intervals are all there is."""


@dataclass(frozen=True)
class Probabilistic(Result):
    """Rate of records that n sampled continuations contain with probability p or more.

    Attributes:
        attempts: int. n.
        probability: float. p.
        rate: `Rate`.
    """

    attempts: int
    probability: float
    rate: Rate


@dataclass(frozen=True)
class Extraction(Result):
    """What one model reveals about one set of records.

    Attributes:
        exact: `Rate` of records whose suffix the greedy continuation equals.
        approximate: `Rate` of records whose suffix it equals up to an edit distance of 10 %.
        probabilistic: tuple of `Probabilistic`.
        median_distance: float. Median edit distance, from 0 (equal) to 1, of 1,000 random records.
        fewest_attempts: float. Sampled continuations that find the suffix of the most exposed
            record with probability one half.
    """

    exact: Rate
    approximate: Rate
    probabilistic: tuple[Probabilistic, ...]
    median_distance: float
    fewest_attempts: float


@dataclass(frozen=True)
class Excess(Result):
    """Difference of two rates of extraction, with a confidence interval.

    Attributes:
        over: string. What is subtracted: "baseline" (records that only the baseline model reveals,
            from those that only the model reveals) or "controls".
        measure: string. "exact" or "approximate".
        value, low, high: float. The difference and its bounds, from Clopper-Pearson bounds of both
            rates.
        first, second: `Rate`. What the difference is of.
    """

    over: str
    measure: str
    value: float
    low: float
    high: float
    first: Rate
    second: Rate


@dataclass(frozen=True)
class Stratum(Result):
    """Extraction of a part of the records.

    Attributes:
        by: string. "duplicates" (number of equal records) or "entropy" (bytes that zlib compresses
            a byte of the text to).
        low, high: float. Smallest and largest value in the stratum.
        exact, approximate: `Rate`.
        baseline_exact, baseline_approximate: `Rate` of the baseline model, or None.
    """

    by: str
    low: float
    high: float
    exact: Rate
    approximate: Rate
    baseline_exact: Rate | None
    baseline_approximate: Rate | None


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
    left_out, found = {}, []
    counts = _windows(records, length, model, "records", left_out)
    if not counts:
        raise ValueError(
            f"`records` must have a record of at least {length} tokens, which `prefix_length` and "
            f"`suffix_length` ask for. Received: {left_out}"
        )
    control_counts = _windows(controls or [], length, model, "controls", left_out)
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
    everything = (extracted, of_controls, by_baseline, controls_by_baseline)
    summaries = [None if x is None else _summary(x, confidence) for x in everything]
    return Memorization(
        prefix_length,
        suffix_length,
        top_k,
        confidence,
        *summaries,
        excess=(
            *_paired_excess(extracted, by_baseline, confidence),
            *_unpaired_excess(extracted, of_controls, confidence),
        ),
        strata=_strata(windows, [*counts.values()], model, extracted, by_baseline, confidence),
        left_out=left_out,
        is_claim=is_claim,
        warnings=tuple(found),
    )


def _windows(records, length, model, name, left_out):
    """Return a `Counter` of the first `length` ids of records that have as many."""
    texts = read_texts(records, model, name)
    whole = [tuple(row[:length]) for row in texts.rows if len(row) >= length]
    left_out[f"{name}_too_short"] = len(texts.rows) - len(whole)
    left_out[f"{name}_empty"] = texts.empty
    left_out[f"{name}_not_utf8"] = texts.undecodable
    return Counter(whole)


def _matches(extracted):
    """Return bool arrays of exact and of approximate matches."""
    distances = extracted.distances
    return {"exact": distances == 0, "approximate": distances <= APPROXIMATE}


def _rate(matches, confidence):
    return Rate.of(np.sum(matches), len(matches), confidence)


def _summary(extracted, confidence):
    rates = {name: _rate(x, confidence) for name, x in _matches(extracted).items()}
    with np.errstate(divide="ignore"):
        log_missed = np.log1p(-np.exp(np.minimum(extracted.log_probabilities, 0.0)))
    fewest = math.log(2) / -log_missed.min() if log_missed.min() else math.inf
    return Extraction(
        **rates,
        probabilistic=tuple(
            Probabilistic(n, p, _rate(n * log_missed <= math.log1p(-p), confidence))
            for n, p in ATTEMPTS
        ),
        median_distance=extracted.median_distance,
        fewest_attempts=max(1.0, float(fewest)),
    )


def _difference(over, measure, counts, totals, confidence):
    """Return the `Excess` of one rate over another; each bound has half of the error."""
    first, second = (Rate.of(n, of, confidence) for n, of in zip(counts, totals, strict=True))
    half = (1 + confidence) / 2
    (a, b), (c, d) = (clopper_pearson(n, of, half) for n, of in zip(counts, totals, strict=True))
    return Excess(over, measure, first.value - second.value, a - d, b - c, first, second)


def _paired_excess(extracted, baseline, confidence):
    if baseline is None:
        return
    ours, theirs = _matches(extracted), _matches(baseline)
    for name in ours:
        counts = [int(np.sum(ours[name] & ~theirs[name])), int(np.sum(theirs[name] & ~ours[name]))]
        yield _difference("baseline", name, counts, [len(ours[name])] * 2, confidence)


def _unpaired_excess(extracted, controls, confidence):
    if controls is None:
        return
    ours, theirs = _matches(extracted), _matches(controls)
    for name in ours:
        counts = [int(ours[name].sum()), int(theirs[name].sum())]
        totals = [len(ours[name]), len(theirs[name])]
        yield _difference("controls", name, counts, totals, confidence)


def _strata(windows, duplicates, model, extracted, baseline, confidence):
    """Return strata by powers of two of the duplicates, and by thirds of the zlib entropy."""
    contents = contents_of(windows.tolist(), model)
    entropy = np.array([compressed_size(x) / max(len(x), 1) for x in contents])
    thirds = np.searchsorted(np.quantile(entropy, [1 / 3, 2 / 3]), entropy)
    doublings = np.log2(duplicates).astype(int)
    ours, theirs = _matches(extracted), None if baseline is None else _matches(baseline)
    strata = []
    for by, values, groups in (
        ("duplicates", np.array(duplicates, float), doublings),
        ("entropy", entropy, thirds),
    ):
        for group in np.unique(groups):
            chosen = groups == group
            rates = [_rate(ours[name][chosen], confidence) for name in ours]
            rates += [
                None if theirs is None else _rate(theirs[name][chosen], confidence) for name in ours
            ]
            low, high = float(values[chosen].min()), float(values[chosen].max())
            strata.append(Stratum(by, low, high, *rates))
    return tuple(strata)
