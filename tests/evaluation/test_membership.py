"""Membership inference, compared with slow and obvious formulas, and its edge cases."""

import zlib

import numpy as np
import pytest
from common import LINES, one_layer_preset
from evaluation_cases import check_schema

from keras_vaultgemma import VaultGemmaCausalLM
from keras_vaultgemma.evaluation import measure_membership, signals
from keras_vaultgemma.evaluation.membership import measure_attack
from keras_vaultgemma.evaluation.parts import Parts
from keras_vaultgemma.evaluation.shift import find_shift
from keras_vaultgemma.evaluation.texts import read_texts, training_rows

pytestmark = pytest.mark.first_backend
LETTERS = np.random.default_rng(0).choice([*"ABCDEFGH"], (64, 12))
TEXTS = [" ".join(row[: 6 + i // 2 % 7]) for i, row in enumerate(LETTERS)]


@pytest.fixture(scope="module")
def small():
    return VaultGemmaCausalLM.from_preset(one_layer_preset())


def test_signals(small):
    texts = read_texts(LINES[:3], small)
    rows, contents, _ = training_rows(texts, small)
    losses = signals.token_losses(small, rows, Parts(None), "rows", False)
    found = signals.record_signals(losses, contents, 0.3)
    for i, row in enumerate(rows):
        assert row == [2, *small.preprocessor.tokenizer.tokenize(LINES[i]), 1]
        logits = small.score(np.array([row]), scoring_mode="logits")[0, :-1].astype("float64")
        log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        p = np.exp(log_p)
        mean = (p * log_p).sum(axis=1)
        std = np.sqrt((p * log_p**2).sum(axis=1) - mean**2)
        chosen = log_p[np.arange(len(row) - 1), row[1:]]
        count = int(0.3 * len(chosen))
        expected = {
            "loss": chosen.mean(),
            "min_k": np.sort(chosen)[:count].mean(),
            "min_k_plus_plus": np.sort((chosen - mean) / std)[:count].mean(),
            "zlib": chosen.sum() / len(zlib.compress(LINES[i].encode(), 9)),
        }
        for name, value in expected.items():
            assert found[name][i] == pytest.approx(value, rel=1e-3)


@pytest.mark.filterwarnings("ignore:Members and controls differ")
def test_what_the_model_predicts_best_counts_as_members(small):
    small.compile(sampler="greedy")
    members = small.generate([[2, i] for i in range(500, 532)], max_new_tokens=9)
    controls = np.random.default_rng(1).integers(500, 4000, (32, 10)).tolist()
    found = measure_membership(small, members, controls, reference=small)
    assert [x.name for x in found.attacks] == [*signals.SIGNALS, "reference"]
    by_name = {x.name: x for x in found.attacks}
    assert by_name["loss"].auc > 0.9
    assert 0.8 < by_name["loss"].auc_low <= by_name["loss"].auc <= by_name["loss"].auc_high <= 1
    assert by_name["reference"].auc == 0.5  # both are one model
    rate = by_name["loss"].true_positive_rates[0]
    assert rate.false_positive_rate == 0.01 and rate.rate.total == found.members
    assert rate.rate.low < rate.rate.value <= rate.rate.high
    assert found.is_claim and found.truncated == 0
    check_schema("membership", found)


def test_a_killed_measurement_resumes(small, monkeypatch, tmp_path):
    monkeypatch.setattr(signals, "BATCH_TOKENS", 512)
    options = dict(checkpoint=tmp_path, seed=3)
    found = measure_membership(small, TEXTS[::2], TEXTS[1::2], **options)
    monkeypatch.setattr(signals, "TokenStatistics", lambda model: None)  # nothing is computed again
    assert measure_membership(small, TEXTS[::2], TEXTS[1::2], **options) == found


@pytest.mark.filterwarnings("ignore:Members and controls differ")
def test_edge_cases(small):
    small_rows = VaultGemmaCausalLM.from_preset(one_layer_preset())
    small_rows.preprocessor.sequence_length = 8
    with pytest.warns(UserWarning) as caught:
        found = measure_membership(
            small_rows,
            [*TEXTS[:8], TEXTS[0], "", "half a character: \udcff"],
            [*TEXTS[6:20], b"\xff"],
        )
    assert (found.members, found.controls, found.truncated) == (8, 12, 12)
    assert {name: n for name, n in found.left_out.items() if n} == {
        "members_empty": 1,
        "members_not_utf8": 1,
        "members_repeated": 1,
        "controls_not_utf8": 1,
        "controls_among_members": 2,
    }
    assert not found.is_claim
    assert "2 controls are members as well" in found.warnings[0]
    assert "fewer than 30" in found.warnings[1]
    assert {str(x.message) for x in caught} >= set(found.warnings)
    check_schema("membership", found)
    with pytest.raises(ValueError, match="`controls` must have a record to test. Received"):
        measure_membership(small, TEXTS[:8], TEXTS[:8])
    with pytest.raises(ValueError, match="`k` must be a number above 0 and at most 1. Received"):
        measure_membership(small, TEXTS[:8], TEXTS[8:], k=0)


def test_a_model_that_diverged_is_named(small):
    model = VaultGemmaCausalLM.from_preset(one_layer_preset())
    table = model.backbone.token_embedding.embeddings
    table.assign(table * np.nan)
    with pytest.raises(ValueError, match="losses must be finite"):
        measure_membership(model, TEXTS[:8], TEXTS[8:])


def rows_of(generator, count, low=0, length=20):
    return generator.integers(low, 1000, (count, length)).tolist()


def test_shifts_are_found_and_chance_is_not():
    generator, is_member = np.random.default_rng(0), np.arange(200) < 100
    found = [find_shift(rows_of(generator, 200), is_member) for _ in range(10)]
    assert not any(x.is_found for x in found)
    assert np.mean([x.words for x in found]) == pytest.approx(0.5, abs=0.06)
    for other in (dict(low=300), dict(length=21)):
        rows = rows_of(generator, 100) + rows_of(generator, 100, **other)
        shift = find_shift(rows, is_member)
        assert shift.is_found
        assert max(shift.words, shift.length) > 0.8
    loss = generator.normal(size=200) + 2 * is_member
    shift = find_shift(rows_of(generator, 200), is_member, loss)
    assert shift.is_found and shift.reference_loss > 0.8


def test_shift_is_a_warning(small):
    members, controls = [f"One {x}" for x in TEXTS[:32]], [f"Two {x}" for x in TEXTS[32:]]
    with pytest.warns(UserWarning, match="Members and controls differ in their words"):
        found = measure_membership(small, members, controls)
    assert found.shift.is_found and found.is_claim


def test_intervals_of_an_attack_cover_its_true_value():
    """Scores of two normal distributions one standard deviation apart: the AUC is Φ(1/√2)."""
    generator, covered = np.random.default_rng(0), 0
    for seed in range(10):
        attack = measure_attack(
            "loss", generator.normal(1, size=60), generator.normal(size=80), 0.95, seed
        )
        covered += attack.auc_low <= 0.7602 <= attack.auc_high
    assert covered >= 8
    for x in attack.true_positive_rates:
        assert x.rate.low <= x.rate.count / x.rate.total == x.rate.value <= x.rate.high
