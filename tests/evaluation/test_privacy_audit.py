"""A privacy audit: the trained weights must not reveal who took part beyond ε, and do so without clipping."""

import keras
import numpy as np
import pytest
from common import random_backbone
from evaluation_cases import check_schema
from keras import ops

from keras_vaultgemma import VaultGemmaCausalLM, evaluation, privacy
from keras_vaultgemma.privacy import mechanism

# One backend is enough: on each of them other tests compare the mechanism with a plain loop.
pytestmark = [
    pytest.mark.any_backend,
    pytest.mark.usefixtures("own_key"),
    pytest.mark.filterwarnings("ignore::keras_vaultgemma.privacy.NotPrivateWarning"),
]

CANARIES, LENGTH, VOCABULARY = 200, 8, 64
EPSILON, DELTA, CLIP_NORM = 1.0, 1e-5, 0.01


def small_model():
    keras.utils.set_random_seed(0)
    sizes = dict(
        vocabulary_size=VOCABULARY, num_layers=1, hidden_dim=32, intermediate_dim=64, head_dim=16
    )
    return VaultGemmaCausalLM(random_backbone(**sizes, num_query_heads=2, num_key_value_heads=2))


def unclipped(gradients, losses, is_present, clip_norm):
    return ops.cast(is_present, "float32"), is_present, 0.0 * losses


def train_and_audit(path, seed, model, reference, epochs=5):
    """Train on about half of 200 canaries with a claimed ε of 1, and return the `Audit`."""
    rows = evaluation.insert_canaries(
        [], path, count=CANARIES, length=LENGTH + 1, model=model, seed=seed
    )
    ids = np.array(rows)
    model.compile(
        keras.optimizers.Adam(5e-3),
        privacy=privacy.DPSGD(
            epsilon=EPSILON, delta=DELTA, clip_norm=CLIP_NORM, seed_for_tests=seed
        ),
    )
    x = {"token_ids": ids[:, :-1], "padding_mask": np.ones((len(ids), LENGTH), "int32")}
    model.fit(x, ids[:, 1:], batch_size=25, epochs=epochs, verbose=0)
    return evaluation.audit(model, path, reference=reference)


def test_the_audit_finds_no_more_than_epsilon(tmp_path):
    found = train_and_audit(tmp_path / "canaries.json", 1, small_model(), small_model())
    assert 0.9 * EPSILON < found.claim.epsilon <= EPSILON and found.claim.delta == DELTA
    assert found.epsilon_lower_bound <= found.claim.epsilon
    assert found.is_consistent is True
    assert "seed" in found.warnings[0]
    check_schema("audit", found)


def test_the_audit_detects_missing_clipping(monkeypatch, tmp_path):
    """The noise and the claimed ε are the same, but no row's gradient is clipped."""
    monkeypatch.setattr(mechanism, "clip_factors", unclipped)
    found = train_and_audit(tmp_path / "canaries.json", 1, small_model(), small_model())
    assert found.epsilon_lower_bound > 1.5 * found.claim.epsilon
    assert found.is_consistent is False
    assert found.auc > 0.9
    assert found.correct > 0.8 * found.guesses


@pytest.mark.long
def test_the_audit_is_right_20_times_of_20(tmp_path):
    reference = small_model()
    for seed in range(20):
        clipped = train_and_audit(tmp_path / f"{seed}.json", seed, small_model(), reference)
        assert clipped.is_consistent, (seed, clipped)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(mechanism, "clip_factors", unclipped)
            path = tmp_path / f"unclipped_{seed}.json"
            found = train_and_audit(path, seed, small_model(), reference)
        assert found.is_consistent is False, (seed, found)


def test_a_model_without_a_ledger_has_no_claim(tmp_path):
    model, path = small_model(), tmp_path / "canaries.json"
    evaluation.insert_canaries([], path, count=20, length=9, model=model)
    found = evaluation.audit(model, path, delta=1e-6)
    assert found.claim is None and found.is_consistent is None and found.delta == 1e-6
    assert str(found).endswith("no claim") and found.warnings == ()
    check_schema("audit", found)
    found = evaluation.audit(model, path, claim=(2.0, 1e-7))
    assert (found.claim.epsilon, found.delta, found.is_consistent) == (2.0, 1e-7, True)
    with pytest.raises(ValueError, match="`claim\\[1\\]` must be .*Received"):
        evaluation.audit(model, path, claim=(2.0, 1.5))
