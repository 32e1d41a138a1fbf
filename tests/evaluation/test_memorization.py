"""Memorization, compared with slow and obvious formulas, and its edge cases."""

import numpy as np
import pytest
from common import one_layer_preset
from evaluation_cases import check_schema

from keras_vaultgemma import VaultGemmaCausalLM, lora
from keras_vaultgemma.evaluation import extraction, extraction_rates, measure_memorization
from keras_vaultgemma.evaluation.parts import Parts

pytestmark = [
    pytest.mark.first_backend,
    pytest.mark.filterwarnings("ignore:Without a baseline or controls"),
]
PREFIX, SUFFIX = 6, 20


@pytest.fixture(scope="module")
def small():
    return VaultGemmaCausalLM.from_preset(one_layer_preset())


@pytest.fixture(scope="module")
def records(small):
    """Rows of ids that greedy decoding reproduces exactly, with two errors, and not at all."""
    generator = np.random.default_rng(0)
    rows = generator.integers(500, 4000, (36, PREFIX + SUFFIX)).tolist()
    rows[:24] = greedy(small, [row[:PREFIX] for row in rows[:24]])
    for row in rows[8:16]:
        del row[PREFIX + 4 : PREFIX + 6]  # two edits: 10 % of the suffix
        row += [5, 6]
    for row in rows[16:24]:
        row[PREFIX + 4 : PREFIX + 8] = [700, 701, 702, 703]
    return rows


def greedy(model, prefixes):
    model.compile(sampler="greedy")
    prompts = [[2, *row] for row in prefixes]
    rows = model.generate(prompts, max_new_tokens=SUFFIX, stop_token_ids=None)
    return [row[1:] for row in rows]


def edit_distance(row, other):
    """The textbook's recursion (Wagner and Fischer, 1974)."""
    table = np.add.outer(np.arange(len(row) + 1), np.arange(len(other) + 1))
    for i, a in enumerate(row):
        for j, b in enumerate(other):
            table[i + 1, j + 1] = min(
                table[i, j] + (a != b), table[i, j + 1] + 1, table[i + 1, j] + 1
            )
    return table[-1, -1]


def measure(model, records, **options):
    options = {"prefix_length": PREFIX, "suffix_length": SUFFIX, **options}
    return measure_memorization(model, records, **options)


def test_matches_and_distances(small, records):
    found = measure(small, records, baseline=small, controls=np.array(records)[:, ::-1])
    continued = greedy(small, [row[:PREFIX] for row in records])
    distances = [
        edit_distance(x[PREFIX:], y[PREFIX:]) / SUFFIX
        for x, y in zip(continued, records, strict=True)
    ]
    assert (distances[0], distances[8]) == (0, 0.1) and distances[16] > 0.1
    assert found.members.exact.count == np.sum(np.array(distances) == 0) >= 8
    assert found.members.approximate.count == np.sum(np.array(distances) <= 0.1) >= 16
    assert found.members.exact.total == 36
    assert found.members.median_distance == pytest.approx(np.median(distances))
    assert found.baseline_members == found.members
    assert found.is_claim and found.warnings == ()
    excess = {(x.over, x.measure): x for x in found.excess}
    assert excess["baseline", "exact"].value == 0
    over_controls = excess["controls", "approximate"]
    assert over_controls.value == pytest.approx(
        over_controls.first.value - over_controls.second.value
    )
    assert 0 < over_controls.low < over_controls.value < over_controls.high <= 1
    check_schema("memorization", found)


def test_probabilities_are_those_of_sampling_from_the_most_likely_tokens(small, records):
    arguments = (PREFIX, SUFFIX, 0.1, 40, Parts(None), False)
    found = extraction.Extractor(small, *arguments)(np.array(records[:18], "int32"), "records")
    rows = np.array([[2, *row] for row in records[:18]])
    logits = small.score(rows, scoring_mode="logits")[:, PREFIX:-1].astype("float64")
    for i, row in enumerate(rows):
        expected = 0.0
        for x, target in zip(logits[i], row[PREFIX + 1 :], strict=True):
            best = np.sort(x)[-40:]
            expected += x[target] - np.log(np.exp(best).sum()) if x[target] >= best[0] else -np.inf
        assert found.log_probabilities[i] == pytest.approx(expected, rel=1e-4, abs=1e-4)


def test_probabilistic_extraction_counts_attempts():
    """By Hayes et al.: 1 - (1 - p_z)^n >= p."""
    log_p = np.log([1.0, 0.6, 0.01, 1e-4, 1e-9])
    extracted = extraction.Extracted(np.ones(5), log_p, 1.0)
    found = extraction_rates.summarize(extracted, 0.95)
    for x in found.probabilistic:
        expected = sum(1 - (1 - np.exp(p)) ** x.attempts >= x.probability for p in log_p)
        assert x.rate.count == expected
    assert found.fewest_attempts == 1
    rare = extraction_rates.summarize(extraction.Extracted(np.ones(2), log_p[3:], 1.0), 0.95)
    assert rare.fewest_attempts == pytest.approx(np.log(2) / 1e-4, rel=1e-3)
    never = extraction.Extracted(np.ones(1), np.array([-np.inf]), 1.0)
    assert extraction_rates.summarize(never, 0.95).fewest_attempts == np.inf


def test_records_outside_the_sample_have_the_same_matches(small, records, monkeypatch):
    whole = measure(small, records)
    monkeypatch.setattr(extraction, "SAMPLE", 3)
    monkeypatch.setattr(extraction, "BATCH_ROWS", 16)
    found = measure(small, records)
    assert (found.members.exact, found.members.approximate) == (
        whole.members.exact,
        whole.members.approximate,
    )
    assert found.strata == whole.strata


def test_equal_records_are_tested_once_and_are_a_stratum(small, records):
    found = measure(small, records[:10] * 5 + records[10:])
    assert found.members.exact.total == 36
    strata = [x for x in found.strata if x.by == "duplicates"]
    assert [(x.low, x.high, x.exact.total) for x in strata] == [(1, 1, 26), (5, 5, 10)]
    assert sum(x.exact.total for x in found.strata if x.by == "entropy") == 36


def test_a_killed_measurement_resumes(small, records, monkeypatch, tmp_path):
    monkeypatch.setattr(extraction, "BATCH_ROWS", 16)
    expected, calls = measure(small, records), []
    begin = extraction.Extractor._begin

    def counted(self, windows):
        calls.append(len(windows))
        if len(calls) == 3:
            raise InterruptedError
        return begin(self, windows)

    monkeypatch.setattr(extraction.Extractor, "_begin", counted)
    with pytest.raises(InterruptedError):
        measure(small, records, checkpoint=tmp_path / "parts")
    assert measure(small, records, checkpoint=tmp_path / "parts") == expected
    assert len(calls) == 4
    next((tmp_path / "parts").glob("*.npz")).write_bytes(b"damaged")
    assert measure(small, records, checkpoint=tmp_path / "parts") == expected
    # Parts of another model are not taken; without its adapter it is the same model again.
    other = VaultGemmaCausalLM.from_preset(one_layer_preset())
    other.backbone.enable_lora(2)
    for v in other.backbone.trainable_variables:
        v.assign(v + 1.0)
    count = len(calls)
    assert measure(other, records, checkpoint=tmp_path / "parts") != expected
    assert len(calls) == count + 3
    lora.use(other, None)
    assert measure(other, records, checkpoint=tmp_path / "parts") == expected
    assert len(calls) == count + 3


@pytest.mark.parametrize("as_text", [False, True])
def test_records_that_cannot_be_tested_are_counted(small, as_text):
    texts = [f"Patient {i} has had a sore throat for {i % 9} days." for i in range(6)]
    records = [*texts, "", " ", "Short"]
    controls = [texts[0], "Another text of a few more words."]
    if as_text:
        records += [
            "half a character: \udcff in a long enough text",
            b"\xff\xfe are no bytes of a text",
        ]
    else:
        tokenize = small.preprocessor.tokenizer.tokenize
        records, controls = ([[2, *tokenize(x)] for x in rows] for rows in (records, controls))
        records[1] = []
    with pytest.warns(UserWarning) as caught:
        found = measure(small, records, controls=controls, prefix_length=4, suffix_length=3)
    assert found.left_out == {
        "records_too_short": 1 if as_text else 2,
        "records_empty": 2,
        "records_not_utf8": 2 if as_text else 0,
        "controls_too_short": 0,
        "controls_empty": 0,
        "controls_not_utf8": 0,
        "controls_among_records": 1,
    }
    assert found.members.exact.total == (6 if as_text else 5)
    assert found.controls.exact.total == 1
    assert not found.is_claim
    assert [str(x.message) for x in caught if x.category is UserWarning] == list(found.warnings)
    assert "1 controls begin like records" in found.warnings[0]
    assert "fewer than 30" in found.warnings[1]


def test_wrong_arguments(small):
    with pytest.raises(
        ValueError, match="`records` must have a record of at least 26 tokens.*Received"
    ):
        measure(small, ["", "The fox"])
    with pytest.raises(
        ValueError, match="must fit into the model's 512 positions.*Received: 500 and 20"
    ):
        measure(small, ["The fox"], prefix_length=500)
    with pytest.raises(ValueError, match="`records` must be all strings or all lists.*Received"):
        measure(small, ["The fox", [5, 6]])
    with pytest.raises(ValueError, match="Token ids of `records\\[0\\]` must be from 0 to 4095"):
        measure(small, [[5, 4096]])
    with pytest.raises(ValueError, match="`records` must be a list.*Received: str"):
        measure(small, "The fox")
    with pytest.raises(ValueError, match="`top_k` must be"):
        measure(small, ["The fox"], top_k=0)
