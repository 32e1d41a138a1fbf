"""Adapters of a model: trained, named, switched, merged, saved, and what is refused."""

import keras
import numpy as np
import pytest
import reference
from common import count_compilations, random_backbone, to_numpy

from keras_vaultgemma import VaultGemmaCausalLM
from keras_vaultgemma.checkpoints.reader import load_weights
from keras_vaultgemma.layers.low_rank import LowRankUpdate
from keras_vaultgemma.lora import adapters
from keras_vaultgemma.privacy.ledger import FILE

ROW = [2, 17, 5, 99, 31]
IDS = {
    "token_ids": np.array([ROW, [2, 40, 8, 7, 0]]),
    "padding_mask": np.array([[1] * 5, [1] * 4 + [0]]),
}
ALL = ["query", "key", "value", "attention_output", "gate", "up", "down", "token_embedding"]
BASES = [("float32", None), ("bfloat16", None), ("float32", "int8"), ("bfloat16", "int8")]


def make_model(dtype="float32", mode=None, seed=0, **changes):
    keras.utils.set_random_seed(seed)
    model = VaultGemmaCausalLM(random_backbone(dtype=dtype, num_layers=1, **changes))
    if mode:
        model.quantize(mode)
    return model


def fill(model, seed=0, scale=0.1):
    random = np.random.default_rng(seed)
    for variable in model.trainable_variables:
        variable.assign(random.normal(0, scale, variable.shape))


def logits(model):
    return to_numpy(model(IDS))


def values(variables):
    return {v.path: to_numpy(v.value).copy() for v in variables}


def assert_same(one, other):
    assert one.keys() == other.keys()
    assert [path for path in one if not np.array_equal(one[path], other[path])] == []


def base_values(model):
    return values(v for v in model.backbone.weights if "lora" not in v.path)


def fit(model, epochs=1, optimizer=None):
    """Next tokens of fixed rows, by plain gradient descent, which has no state of its own."""
    ids = np.random.default_rng(5).integers(3, 128, (8, 9)).astype("int32")
    x = {"token_ids": ids[:, :-1], "padding_mask": np.ones((8, 8), "int32")}
    model.compile(optimizer=optimizer or keras.optimizers.SGD(0.1))
    return model.fit(x, ids[:, 1:], batch_size=4, epochs=epochs, shuffle=False, verbose=0).history[
        "loss"
    ]


@pytest.mark.parametrize(("dtype", "mode"), [("mixed_bfloat16", None), ("bfloat16", "int8")])
def test_a_new_adapter_changes_nothing_and_training_moves_nothing_else(dtype, mode):
    model = make_model(dtype, mode)
    before = logits(model)
    model.backbone.enable_lora(4, ["value", "down", "token_embedding"], dropout=0.1)
    np.testing.assert_array_equal(logits(model), before)
    assert {v.dtype for v in model.trainable_variables} == {"float32"}
    base, factors = base_values(model), values(model.trainable_variables)
    assert len(factors) == 6
    losses = fit(model, epochs=2, optimizer=keras.optimizers.Adam(1e-2))
    assert losses[-1] < losses[0]
    assert_same(base_values(model), base)
    assert [
        path
        for path, value in values(model.trainable_variables).items()
        if np.array_equal(value, factors[path])
    ] == []


def test_equals_the_model_with_merged_weights():
    """The reference reads `kernel` and `embeddings`, which are the merged matrices."""
    model = make_model(final_logit_soft_cap=5.0)
    model.backbone.enable_lora(3, ALL, alpha=6)
    fill(model, scale=0.2)
    np.testing.assert_allclose(logits(model)[0], reference.logits(model.backbone, ROW), atol=1e-4)


@pytest.mark.parametrize("mode", [None, "int8"])
def test_nothing_but_merging_makes_the_merged_matrix(mode, monkeypatch):
    """That the product of the factors is not made elsewhere is shown in test_low_rank.py."""
    model = make_model(mode=mode)
    model.backbone.enable_lora(2, ALL, dropout=0.1)
    monkeypatch.setattr(LowRankUpdate, "merged", lambda self, matrix: pytest.fail(self.path))
    fit(model)
    model.score(IDS["token_ids"])
    model.generate(ROW, max_new_tokens=2, stop_token_ids=None)
    monkeypatch.undo()
    adapters.merge(model)


@pytest.mark.parametrize(("dtype", "mode"), BASES)
def test_merge_and_unmerge_to_the_bit(dtype, mode):
    model = make_model(dtype, mode)
    model.backbone.enable_lora(3, ALL)
    fill(model, scale=0.02)
    base, factors, before = base_values(model), values(model.trainable_variables), logits(model)
    adapters.merge(model)
    assert model.trainable_variables == [] and not any("lora" in v.path for v in model.weights)
    merged = base_values(model)
    assert all(
        not np.array_equal(merged[path], base[path])
        for path in base
        if path.endswith(("/kernel", "/weight", "/embeddings"))
    )
    tolerance = 1e-4 if (dtype, mode) == ("float32", None) else 0.2
    np.testing.assert_allclose(logits(model), before, atol=tolerance * np.abs(before).max())
    adapters.unmerge(model)
    assert_same(base_values(model), base)
    assert_same(values(model.trainable_variables), factors)
    np.testing.assert_array_equal(logits(model), before)
    assert {v.path for v in model.trainable_variables} == factors.keys()


def test_merging_into_int8_requantizes():
    model = make_model("float32", "int8")
    model.backbone.enable_lora(3, ["gate"], alpha=6)
    fill(model)
    gate = model.backbone.transformer_layers[0].gate
    kernel, scale = (to_numpy(v.value).astype("float32") for v in (gate.kernel, gate.kernel_scale))
    a, b = map(to_numpy, gate.lora_factors)
    expected = kernel / scale + 6 / 3 * a @ b
    adapters.merge(model)
    kernel, scale = (to_numpy(v.value).astype("float32") for v in (gate.kernel, gate.kernel_scale))
    assert (np.abs(kernel / scale - expected) <= 0.501 / scale).all()


def test_named_adapters():
    model = make_model()
    base = logits(model)
    model.backbone.enable_lora(2, name="small")
    fill(model, 1, scale=0.4)
    small = logits(model)
    model.backbone.enable_lora(5, ["down", "token_embedding"], alpha=1, name="large")
    np.testing.assert_array_equal(logits(model), base)
    fill(model, 2, scale=0.4)
    large = logits(model)
    assert adapters.names(model) == ["small", "large"] and adapters.active(model) == "large"
    assert np.abs(small - base).max() > 0.1 and np.abs(large - base).max() > 0.1
    for name, expected in [
        ("small", small),
        ("large", large),
        (None, base),
        ("large", large),
        ("small", small),
    ]:
        adapters.use(model, name)
        assert adapters.active(model) == name
        np.testing.assert_array_equal(logits(model), expected)
    adapters.use(model, "small")
    adapters.remove(model, "large")
    assert adapters.names(model) == ["small"]
    adapters.remove(model, "small")
    assert adapters.names(model) == [] and adapters.active(model) is None
    np.testing.assert_array_equal(logits(model), base)


def test_adapters_that_differ_in_alpha_alone():
    model = make_model()
    found = {}
    for name, alpha in (("one", 1), ("four", 4)):
        model.backbone.enable_lora(2, alpha=alpha, name=name)
        fill(model)
        model.predict(IDS, verbose=0)
        found[name] = logits(model)
    assert np.abs(found["one"] - found["four"]).max() > 0.01
    for name in ("one", "four", "one"):
        adapters.use(model, name)
        np.testing.assert_allclose(model.predict(IDS, verbose=0), found[name], atol=1e-4)


def test_generation_follows_the_adapter_and_compiles_for_another_shape_alone():
    model = make_model()
    for i, (name, rank) in enumerate([("a", 2), ("b", 2), ("c", 3)]):
        model.backbone.enable_lora(rank, ["query", "down"], name=name)
        fill(model, i, scale=1.0)

    def generate():
        return model.generate(ROW, max_new_tokens=6, stop_token_ids=None, strip_prompt=True)

    tokens = {}
    for name in ("c", "a", "b"):
        adapters.use(model, name)
        tokens[name] = generate()
        assert tokens[name] == reference.greedy(model.backbone, ROW, 6)
    assert len({*map(tuple, tokens.values())}) == 3
    with count_compilations() as compilations:
        for name in ("a", "b"):
            adapters.use(model, name)
            assert generate() == tokens[name]
    assert not compilations.count


def test_what_changes_one_adapter_leaves_the_others():
    model = make_model()
    model.backbone.enable_lora(2, name="first")
    fill(model)
    first = values(model.trainable_variables)
    model.backbone.enable_lora(2, name="second")
    fill(model, 1)
    second = values(model.trainable_variables)
    adapters.use(model, "first")
    assert_same(values(model.trainable_variables), first)
    adapters.use(model, "second")
    assert_same(values(model.trainable_variables), second)


def test_training_goes_on_from_a_saved_adapter(tmp_path):
    first, second = make_model(), make_model()
    first.backbone.enable_lora(4, ["query", "token_embedding"], alpha=6)
    fit(first)
    adapters.save_adapter(first, tmp_path / "adapter")
    adapters.load_adapter(second, tmp_path / "adapter", name="mine")
    assert adapters.active(second) == "mine"
    assert_same(values(second.trainable_variables), values(first.trainable_variables))
    np.testing.assert_array_equal(logits(second), logits(first))
    fit(first)
    fit(second)
    one, other = values(second.trainable_variables), values(first.trainable_variables)
    assert one.keys() == other.keys() and all(
        np.allclose(one[path], other[path], atol=1e-6) for path in one
    )
    assert_same(base_values(second), base_values(first))


def test_saving_one_that_is_not_active(tmp_path):
    model = make_model()
    model.backbone.enable_lora(2, name="first")
    fill(model)
    first = values(model.trainable_variables)
    model.backbone.enable_lora(3, ["gate"], name="second")
    adapters.save_adapter(model, tmp_path / "first", name="first")
    adapters.use(model, "first")
    adapters.merge(model)
    adapters.save_adapter(model, tmp_path / "merged")
    for folder in ("first", "merged"):
        other = make_model()
        adapters.load_adapter(other, tmp_path / folder)
        assert_same(values(other.trainable_variables), first)


@pytest.mark.parametrize(("dtype", "mode"), BASES)
def test_a_preset_is_saved_merged(dtype, mode, tmp_path):
    model = make_model(dtype, mode)
    model.backbone.enable_lora(3, ALL, dropout=0.1)
    fill(model, scale=0.02)
    model.save_to_preset(tmp_path / "preset")
    adapters.merge(model)
    saved = VaultGemmaCausalLM.from_preset(tmp_path / "preset", preprocessor=None)
    expected = base_values(model)
    # keras-hub builds a quantized preset with float32 scales.
    found = {
        path: value.astype(expected[path].dtype)
        for path, value in values(saved.backbone.weights).items()
    }
    assert_same(found, expected)


def test_a_checkpoint_loads_beside_an_adapter_with_dropout(tmp_path):
    make_model(seed=3).save_to_preset(tmp_path / "other")
    model = make_model()
    model.backbone.enable_lora(2, dropout=0.5)
    load_weights(model.backbone, tmp_path / "other")
    assert_same(base_values(model), base_values(make_model(seed=3)))


def test_a_failed_load_changes_nothing(tmp_path):
    model, other = make_model(), make_model(hidden_dim=32)
    for one in (model, other):
        one.backbone.enable_lora(2)
        fill(one)
    adapters.save_adapter(other, tmp_path / "other")
    before = logits(model)
    with pytest.raises(
        ValueError,
        match=r"q_proj.lora_A.weight is misshapen.*Expected shape: \(2, 48\). Found: \(2, 32\)",
    ):
        adapters.load_adapter(model, tmp_path / "other", name="other")
    assert adapters.names(model) == ["default"]
    np.testing.assert_array_equal(logits(model), before)


def test_a_damaged_ledger_changes_nothing(tmp_path):
    model = make_model()
    before, variables = logits(model), [v.path for v in model.variables]
    other = make_model()
    other.backbone.enable_lora(2)
    fill(other)
    adapters.save_adapter(other, tmp_path / "other")
    (tmp_path / "other" / FILE).write_bytes(b'{"kind": "steps", "run": "none", "steps": 3}\n')
    with pytest.raises(ValueError, match="line 1 is not an entry of a privacy ledger"):
        adapters.load_adapter(model, tmp_path / "other")
    assert adapters.names(model) == [] and adapters.active(model) is None
    assert [v.path for v in model.variables] == variables and len(model.trainable_variables) > 2
    np.testing.assert_array_equal(logits(model), before)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(rank=0), "`rank` must be a positive integer. Received: rank=0"),
        (dict(rank=2.5), "`rank` must be a positive integer. Received: rank=2.5"),
        (dict(rank=True), "`rank` must be a positive integer. Received: rank=True"),
        (dict(rank=2, alpha=0), "`alpha` must be a finite number above 0. Received: alpha=0"),
        (
            dict(rank=2, alpha=float("inf")),
            "`alpha` must be a finite number above 0. Received: alpha=inf",
        ),
        (
            dict(rank=2, dropout=1.0),
            "`dropout` must be a number from 0 to below 1. Received: dropout=1.0",
        ),
        (dict(rank=2, target_layer_names=["q_proj"]), "Received: 'q_proj'"),
        (dict(rank=2, name=""), "`name` must be a string that no adapter of this model has"),
        (dict(rank=2, name=3), "`name` must be .*Received: 3"),
        (dict(rank=2, name="taken"), r"`name` must be .*\['taken'\]. Received: 'taken'"),
    ],
)
def test_arguments_out_of_their_range(taken, arguments, message):
    with pytest.raises(ValueError, match=message):
        taken.backbone.enable_lora(**arguments)
    assert adapters.names(taken) == ["taken"] and len(taken.trainable_variables) == 4


@pytest.fixture(scope="module")
def taken():
    model = make_model()
    model.backbone.enable_lora(2, name="taken")
    return model


def test_what_needs_another_state(tmp_path):
    model = make_model()
    for function in (adapters.merge, adapters.unmerge):
        with pytest.raises(
            ValueError, match=f"`{function.__name__}` needs .*, and the model has none"
        ):
            function(model)
    with pytest.raises(ValueError, match=r"`name` must be one of \[\]. Received: None"):
        adapters.save_adapter(model, tmp_path / "none")
    for function in (adapters.use, adapters.remove):
        with pytest.raises(ValueError, match="Received: 'other'"):
            function(model, "other")
    model.backbone.enable_lora(2)
    adapters.save_adapter(model, tmp_path / "a")
    adapters.merge(model)
    for change in (
        adapters.merge,
        lambda model: adapters.use(model, None),
        lambda model: adapters.remove(model, "default"),
        lambda model: adapters.load_adapter(model, tmp_path / "a", name="b"),
        lambda model: model.backbone.enable_lora(2, name="b"),
    ):
        with pytest.raises(
            ValueError, match="'default' is merged into the model; call `lora.unmerge` first"
        ):
            change(model)
    model.quantize("int8")
    with pytest.raises(ValueError, match="as `merge` left them, and .*query was quantized since"):
        adapters.unmerge(model)


def test_an_int4_base_is_refused():
    model = make_model(mode="int4")
    with pytest.raises(
        ValueError,
        match="base in floating point or int8. Received: decoder_block_0/attention/query in int4",
    ):
        model.backbone.enable_lora(2)
    assert adapters.names(model) == []


def test_keras_hubs_own_files_are_refused(tmp_path):
    model = make_model()
    for method in (model.backbone.save_lora_weights, model.backbone.load_lora_weights):
        with pytest.raises(NotImplementedError, match="lora.*_adapter"):
            method(tmp_path / "a.lora.h5")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_training_16_bit_weights_is_refused(dtype):
    model = make_model(dtype)
    with pytest.raises(
        ValueError,
        match=f'load the model with dtype="mixed_bfloat16".*enable_lora.*of dtype {dtype}',
    ):
        fit(model)


def test_full_fine_tuning_moves_every_weight():
    model = make_model("mixed_bfloat16")
    before = base_values(model)
    fit(model, epochs=2, optimizer=keras.optimizers.Adam(1e-2))
    assert [
        path for path, value in base_values(model).items() if np.array_equal(value, before[path])
    ] == []
