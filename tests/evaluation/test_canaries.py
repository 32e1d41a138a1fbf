"""Canaries and the sealed file of their coins."""

import json
import os
import stat

import numpy as np
import pytest
from common import LINES, one_layer_preset

from keras_vaultgemma import VaultGemmaCausalLM
from keras_vaultgemma.evaluation import audit, insert_canaries
from keras_vaultgemma.evaluation.canaries import KINDS, read_canaries

pytestmark = pytest.mark.first_backend


@pytest.fixture(scope="module")
def small():
    return VaultGemmaCausalLM.from_preset(one_layer_preset())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("as_text", [False, True])
def test_canaries_are_added_by_coins(small, tmp_path, kind, as_text):
    path, records = tmp_path / "canaries.json", LINES
    if not as_text:
        records = [list(row) for row in small.preprocessor.tokenizer.tokenize(LINES)]
    found = insert_canaries(records, path, kind=kind, count=60, length=8, model=small)
    sealed = read_canaries(path)
    assert found[:4] == records
    assert found[4:] == [x for x, is_in in zip(sealed.canaries, sealed.is_in, strict=True) if is_in]
    assert 10 < sealed.is_in.sum() < 50  # but for a chance of 1e-7
    assert not sealed.is_seeded and sealed.kind == kind
    assert len(set(map(str, sealed.canaries))) == 60
    if os.name == "posix":
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    rows = small.preprocessor.tokenizer.tokenize(sealed.canaries) if as_text else sealed.canaries
    if kind == "new_token":
        known = {i for row in small.preprocessor.tokenizer.tokenize(LINES) for i in row}
        last = [row[-1] for row in rows]
        assert len(set(last)) == 60 and not known & {*last}
    elif not as_text:
        assert {len(row) for row in rows} == {8}
    result = audit(small, path)
    assert result.canaries == 60 and result.included == sealed.is_in.sum()
    assert result.epsilon_lower_bound < 1  # nothing was trained


def test_only_the_new_token_is_scored(small, tmp_path):
    """A model that has learned the token after this prefix, and nothing else, gives them away."""
    path = tmp_path / "canaries.json"
    insert_canaries([[5, 6, 7]], path, kind="new_token", count=40, length=4, model=small)
    sealed = read_canaries(path)
    rows = np.array([[2, *row] for row in sealed.canaries])
    logits = small.score(rows, scoring_mode="logits")[:, 3].astype("float64")
    log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    scores = log_p[np.arange(40), rows[:, -1]]
    pairs = scores[sealed.is_in][:, None] > scores[~sealed.is_in][None]
    assert audit(small, path).auc == pytest.approx(pairs.mean(), abs=1e-6)


def test_seeds(small, tmp_path):
    options = dict(count=30, length=6, model=small)
    first, second = (
        insert_canaries(LINES, tmp_path / f"{i}.json", seed=seed, **options)
        for i, seed in enumerate((7, 7))
    )
    assert first == second != insert_canaries(LINES, tmp_path / "other.json", seed=8, **options)
    assert "seed" in audit(small, tmp_path / "0.json").warnings[0]
    one, other = (insert_canaries(LINES, tmp_path / name, **options) for name in ("a", "b"))
    assert one != other


def test_a_sealed_file_is_never_replaced_nor_changed(small, tmp_path):
    path = tmp_path / "canaries.json"
    insert_canaries(LINES, path, count=10, tokenizer=small.preprocessor.tokenizer)
    content = path.read_text()
    with pytest.raises(FileExistsError, match="must not be replaced"):
        insert_canaries(LINES, path, count=10, tokenizer=small.preprocessor.tokenizer)
    assert path.read_text() == content
    changed = json.loads(content)
    changed["is_in"][0] = not changed["is_in"][0]
    path.write_text(json.dumps(changed))
    with pytest.raises(ValueError, match="must be as `insert_canaries` wrote it"):
        audit(small, path)
    path.write_text("{}")
    with pytest.raises(ValueError, match="must be as `insert_canaries` wrote it"):
        audit(small, path)


def test_wrong_arguments(small, tmp_path):
    path, tokenizer = tmp_path / "canaries.json", small.preprocessor.tokenizer
    for options, message in (
        (dict(kind="none", model=small), "`kind` must be one of 'random'"),
        (dict(count=1, model=small), "`count` must be an integer of at least 2"),
        (dict(kind="high_temperature", tokenizer=tokenizer), "`model` must be given"),
        (dict(), "`tokenizer` or `model` must be given"),
        (
            dict(kind="new_token", count=5000, model=small),
            "`count` must be at most the number of tokens",
        ),
        (
            dict(kind="new_token", count=5, length=1, model=small),
            "`length` must be an integer of at least 2",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            insert_canaries(LINES, path, **options)
    with pytest.raises(ValueError, match="`records` must be all strings"):
        insert_canaries(["text", [5]], path, model=small)
    with pytest.raises(ValueError, match="must have one that is not empty"):
        insert_canaries([], path, kind="new_token", model=small)
    assert not path.exists()


def test_canaries_that_the_model_cannot_hold_are_rejected(small, tmp_path):
    insert_canaries(LINES, tmp_path / "canaries.json", count=4, length=600, model=small)
    with pytest.raises(
        ValueError, match="must fit into the model's training rows.*4 that are longer"
    ):
        audit(small, tmp_path / "canaries.json")
