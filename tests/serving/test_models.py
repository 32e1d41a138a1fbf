"""Adapters as models of their own."""

import concurrent.futures
import json

import numpy as np
import pytest
from served import serving

from keras_vaultgemma import VaultGemmaCausalLM, lora
from keras_vaultgemma.lora.adapters import adapter_with_values
from keras_vaultgemma.lora.alignment import align
from keras_vaultgemma.serving.server import load_models

pytestmark = pytest.mark.first_backend

SHAPES = {
    "tales": dict(rank=2, targets=["query", "up"], alpha=3),
    "letters": dict(rank=4, targets=["query"]),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Adapters of two shapes with random values, and the answer of each to a prompt."""
    root, answers = tmp_path_factory.mktemp("adapters"), {}
    for name, shape in SHAPES.items():
        model = VaultGemmaCausalLM.from_preset("vaultgemma_tiny")
        answers["vaultgemma_tiny"] = model.generate("The fox", max_new_tokens=8, strip_prompt=True)
        lora.add(model, **shape)
        for v in model.trainable_variables:
            v.assign(np.random.default_rng(len(name)).normal(0, 0.5, v.shape))
        lora.save_adapter(model, root / name)
        answers[name] = model.generate("The fox", max_new_tokens=8, strip_prompt=True)
    return root, answers


def test_adapters_are_models(folders):
    root, answers = folders
    assert len(set(answers.values())) == 3
    adapters = [f"{root / 'tales'}", f"letters={root / 'letters'}"]
    models = load_models("vaultgemma_tiny", adapters)
    variables = list(map(id, models.model.variables))
    with serving(models) as served:
        data = json.loads(served.request("GET", "/v1/models")[2])["data"]
        assert [(m["id"], m["parent"]) for m in data] == [
            ("vaultgemma_tiny", None), ("tales", "vaultgemma_tiny"), ("letters", "vaultgemma_tiny"),
        ]  # fmt: skip
        names = ["tales", "vaultgemma_tiny", "letters", "vaultgemma_tiny", "tales", "letters"] * 2
        with concurrent.futures.ThreadPoolExecutor(len(names)) as pool:
            found = pool.map(lambda name: served.text("The fox", model=name), names)
            assert list(found) == [answers[name] for name in names]
        # Nothing is compiled again, because the variables are the same.
        assert list(map(id, models.model.variables)) == variables


def test_a_model_that_others_wait_for_gets_its_turn(folders, monkeypatch):
    """Although rows of another model could join the batch all the time."""
    root, answers = folders
    monkeypatch.setattr("keras_vaultgemma.serving.scheduler.PATIENCE", 0.0)
    models = load_models("vaultgemma_tiny", [str(root / "tales")])
    with serving(models) as served, concurrent.futures.ThreadPoolExecutor(8) as pool:
        calls = [pool.submit(served.text, "The fox", 30) for _ in range(4)]
        while not served.scheduler.load[1]:
            pass
        other = pool.submit(served.text, "The fox", model="tales")
        assert other.result() == answers["tales"]
        assert len({call.result() for call in calls}) == 1


def test_a_preset_that_is_an_adapter(folders):
    root, _ = folders
    models = load_models(str(root / "tales"))
    assert models.names == ["vaultgemma_tiny", "tales"]


def test_names_differ(folders):
    root, _ = folders
    with pytest.raises(ValueError, match="`adapters` must have different names"):
        load_models("vaultgemma_tiny", [f"a={root / 'tales'}", f"a={root / 'letters'}"])
    with pytest.raises(ValueError, match="another name than the model"):
        load_models("vaultgemma_tiny", [f"vaultgemma_tiny={root / 'tales'}"])


def test_aligned_adapters_compute_the_same():
    model = VaultGemmaCausalLM.from_preset("vaultgemma_tiny")
    adapters = []
    for name, shape in SHAPES.items():
        lora.add(model, **shape, name=name)
        for v in model.trainable_variables:
            v.assign(np.random.default_rng(len(name)).normal(0, 0.5, v.shape))
        adapters.append(adapter_with_values(model.backbone, name))
    aligned, neutral = align(adapters)
    for old, new in zip(adapters, aligned, strict=True):
        assert new.factors.keys() == neutral.factors.keys() and new.ranks == neutral.ranks
        for path, (a, b) in new.factors.items():
            scale = new.alpha_of(path) / new.rank_of(path)
            expected = 0
            if path in old.factors:
                first, second = old.factors[path]
                expected = old.alpha_of(path) / old.rank_of(path) * first @ second
            np.testing.assert_allclose(scale * a @ b, np.zeros_like(a @ b) + expected, atol=1e-5)
    assert not any(np.any(a) or np.any(b) for a, b in neutral.factors.values())
