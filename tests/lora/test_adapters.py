"""Adapters of a model: training, switching, merging, saving, and unsupported arguments."""

import keras
import numpy as np
import pytest
import reference
from common import count_compilations, random_backbone, to_numpy

from keras_vaultgemma import VaultGemmaCausalLM, lora
from keras_vaultgemma.layers.low_rank import LowRankUpdate
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
    """Train on fixed rows, by default with SGD, which has no state; return the losses."""
    ids = np.random.default_rng(5).integers(3, 128, (8, 9)).astype("int32")
    x = {"token_ids": ids[:, :-1], "padding_mask": np.ones((8, 8), "int32")}
    model.compile(optimizer=optimizer or keras.optimizers.SGD(0.1))
    return model.fit(x, ids[:, 1:], batch_size=4, epochs=epochs, shuffle=False, verbose=0).history[
        "loss"
    ]


@pytest.mark.parametrize(
    ("dtype", "mode"),
    [pytest.param("mixed_bfloat16", None, marks=pytest.mark.first_backend), ("bfloat16", "int8")],
)
def test_a_new_adapter_changes_no_output_and_is_all_that_training_changes(dtype, mode):
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


@pytest.mark.first_backend
@pytest.mark.parametrize("mode", [None, "int8"])
def test_only_merging_computes_the_merged_matrix(mode, monkeypatch):
    """tests/layers/test_low_rank.py shows that A B is not computed elsewhere either."""
    model = make_model(mode=mode)
    model.backbone.enable_lora(2, ALL, dropout=0.1)
    monkeypatch.setattr(LowRankUpdate, "merged", lambda self, matrix: pytest.fail(self.path))
    fit(model)
    model.score(IDS["token_ids"])
    model.generate(ROW, max_new_tokens=2, stop_token_ids=None)
    monkeypatch.undo()
    lora.merge(model)


@pytest.mark.first_backend
@pytest.mark.parametrize(("dtype", "mode"), BASES)
def test_unmerge_restores_the_model_bit_for_bit(dtype, mode):
    model = make_model(dtype, mode)
    model.backbone.enable_lora(3, ALL)
    fill(model, scale=0.02)
    base, factors, before = base_values(model), values(model.trainable_variables), logits(model)
    lora.merge(model)
    assert model.trainable_variables == [] and not any("lora" in v.path for v in model.weights)
    merged = base_values(model)
    assert all(
        not np.array_equal(merged[path], base[path])
        for path in base
        if path.endswith(("/kernel", "/weight", "/embeddings"))
    )
    tolerance = 1e-4 if (dtype, mode) == ("float32", None) else 0.2
    np.testing.assert_allclose(logits(model), before, atol=tolerance * np.abs(before).max())
    lora.unmerge(model)
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
    lora.merge(model)
    kernel, scale = (to_numpy(v.value).astype("float32") for v in (gate.kernel, gate.kernel_scale))
    assert (np.abs(kernel / scale - expected) <= 0.501 / scale).all()


def test_each_named_adapter_has_its_own_output():
    model = make_model()
    base = logits(model)
    model.backbone.enable_lora(2, name="small")
    fill(model, 1, scale=0.4)
    small = logits(model)
    model.backbone.enable_lora(5, ["down", "token_embedding"], alpha=1, name="large")
    np.testing.assert_array_equal(logits(model), base)
    fill(model, 2, scale=0.4)
    large = logits(model)
    assert lora.names(model) == ["small", "large"] and lora.active(model) == "large"
    assert np.abs(small - base).max() > 0.1 and np.abs(large - base).max() > 0.1
    for name, expected in [
        ("small", small),
        ("large", large),
        (None, base),
        ("large", large),
        ("small", small),
    ]:
        lora.use(model, name)
        assert lora.active(model) == name
        np.testing.assert_array_equal(logits(model), expected)
    lora.use(model, "small")
    lora.remove(model, "large")
    assert lora.names(model) == ["small"]
    lora.remove(model, "small")
    assert lora.names(model) == [] and lora.active(model) is None
    np.testing.assert_array_equal(logits(model), base)


@pytest.mark.first_backend
def test_adapters_that_differ_only_in_alpha():
    model = make_model()
    found = {}
    for name, alpha in (("one", 1), ("four", 4)):
        model.backbone.enable_lora(2, alpha=alpha, name=name)
        fill(model)
        model.predict(IDS, verbose=0)
        found[name] = logits(model)
    assert np.abs(found["one"] - found["four"]).max() > 0.01
    for name in ("one", "four", "one"):
        lora.use(model, name)
        np.testing.assert_allclose(model.predict(IDS, verbose=0), found[name], atol=1e-4)


def test_keras_makes_its_functions_again_for_other_variables():
    """It would reuse functions with the variables and the scale that they were compiled with."""
    model = make_model()
    model.backbone.enable_lora(2, name="query")
    lora.add(model, 2, ["down"], name="down")
    model.compile()

    def functions():
        model.evaluate(IDS, IDS["token_ids"], verbose=0)
        model.predict(IDS, verbose=0)
        return [model.test_function, model.predict_function]

    before = functions()
    for change in (
        lambda: lora.use(model, "query"),
        lambda: lora.merge(model),
        lambda: lora.unmerge(model),
        lambda: lora.use(model, None),
    ):
        change()
        after = functions()
        assert not any(one is other for one, other in zip(before, after, strict=True))
        before = after


def test_generation_uses_the_active_adapter_and_compiles_only_for_new_shapes():
    model = make_model()
    for i, (name, rank) in enumerate([("a", 2), ("b", 2), ("c", 3)]):
        model.backbone.enable_lora(rank, ["query", "down"], name=name)
        fill(model, i, scale=1.0)

    def generate():
        return model.generate(ROW, max_new_tokens=6, stop_token_ids=None, strip_prompt=True)

    tokens = {}
    for name in ("c", "a", "b"):
        lora.use(model, name)
        tokens[name] = generate()
        assert tokens[name] == reference.greedy(model.backbone, ROW, 6)
    assert len({*map(tuple, tokens.values())}) == 3
    with count_compilations() as compilations:
        for name in ("a", "b"):
            lora.use(model, name)
            assert generate() == tokens[name]
    assert not compilations.count


@pytest.mark.first_backend
def test_changing_one_adapter_leaves_the_others_unchanged():
    model = make_model()
    model.backbone.enable_lora(2, name="first")
    fill(model)
    first = values(model.trainable_variables)
    model.backbone.enable_lora(2, name="second")
    fill(model, 1)
    second = values(model.trainable_variables)
    lora.use(model, "first")
    assert_same(values(model.trainable_variables), first)
    lora.use(model, "second")
    assert_same(values(model.trainable_variables), second)


def test_training_continues_from_a_saved_adapter(tmp_path):
    first, second = make_model(), make_model()
    first.backbone.enable_lora(4, ["query", "token_embedding"], alpha=6)
    fit(first)
    lora.save_adapter(first, tmp_path / "adapter")
    lora.load_adapter(second, tmp_path / "adapter", name="mine")
    assert lora.active(second) == "mine"
    assert_same(values(second.trainable_variables), values(first.trainable_variables))
    np.testing.assert_array_equal(logits(second), logits(first))
    fit(first)
    fit(second)
    one, other = values(second.trainable_variables), values(first.trainable_variables)
    assert one.keys() == other.keys() and all(
        np.allclose(one[path], other[path], atol=1e-6) for path in one
    )
    assert_same(base_values(second), base_values(first))


@pytest.mark.first_backend
def test_saving_an_inactive_or_merged_adapter(tmp_path):
    model = make_model()
    model.backbone.enable_lora(2, name="first")
    fill(model)
    first = values(model.trainable_variables)
    model.backbone.enable_lora(3, ["gate"], name="second")
    lora.save_adapter(model, tmp_path / "first", name="first")
    lora.use(model, "first")
    lora.merge(model)
    lora.save_adapter(model, tmp_path / "merged")
    for folder in ("first", "merged"):
        other = make_model()
        lora.load_adapter(other, tmp_path / folder)
        assert_same(values(other.trainable_variables), first)


@pytest.mark.first_backend
@pytest.mark.parametrize(("dtype", "mode"), BASES)
def test_a_preset_is_saved_merged(dtype, mode, tmp_path):
    model = make_model(dtype, mode)
    model.backbone.enable_lora(3, ALL, dropout=0.1)
    fill(model, scale=0.02)
    model.save_to_preset(tmp_path / "preset")
    lora.merge(model)
    saved = VaultGemmaCausalLM.from_preset(tmp_path / "preset", preprocessor=None)
    expected = base_values(model)
    # keras-hub builds a quantized preset with float32 scales.
    found = {
        path: value.astype(expected[path].dtype)
        for path, value in values(saved.backbone.weights).items()
    }
    assert_same(found, expected)


@pytest.mark.first_backend
def test_a_failed_load_leaves_the_model_unchanged(tmp_path):
    model, other = make_model(), make_model(hidden_dim=32)
    for one in (model, other):
        one.backbone.enable_lora(2)
        fill(one)
    lora.save_adapter(other, tmp_path / "other")
    before = logits(model)
    with pytest.raises(
        ValueError,
        match=r"q_proj.lora_A.weight is misshapen.*Expected shape: \(2, 48\). Found: \(2, 32\)",
    ):
        lora.load_adapter(model, tmp_path / "other", name="other")
    assert lora.names(model) == ["default"]
    np.testing.assert_array_equal(logits(model), before)


@pytest.mark.first_backend
def test_a_damaged_ledger_leaves_the_model_unchanged(tmp_path):
    model = make_model()
    before, variables = logits(model), [v.path for v in model.variables]
    other = make_model()
    other.backbone.enable_lora(2)
    fill(other)
    lora.save_adapter(other, tmp_path / "other")
    (tmp_path / "other" / FILE).write_bytes(b'{"kind": "steps", "run": "none", "steps": 3}\n')
    with pytest.raises(ValueError, match="line 1 is not an entry of a privacy ledger"):
        lora.load_adapter(model, tmp_path / "other")
    assert lora.names(model) == [] and lora.active(model) is None
    assert [v.path for v in model.variables] == variables and len(model.trainable_variables) > 2
    np.testing.assert_array_equal(logits(model), before)


@pytest.mark.first_backend
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
            "`dropout` must be a number of at least 0 and below 1. Received: dropout=1.0",
        ),
        (dict(rank=2, target_layer_names=["q_proj"]), "Received: 'q_proj'"),
        (dict(rank=2, name=""), "`name` must be a non-empty string other than .*Received: name=''"),
        (dict(rank=2, name=3), "`name` must be .*Received: name=3"),
        (dict(rank=2, name="taken"), r"`name` must be .*\['taken'\]. Received: name='taken'"),
    ],
)
def test_arguments_out_of_range_raise(taken, arguments, message):
    with pytest.raises(ValueError, match=message):
        taken.backbone.enable_lora(**arguments)
    assert lora.names(taken) == ["taken"] and len(taken.trainable_variables) == 4


@pytest.fixture(scope="module")
def taken():
    model = make_model()
    model.backbone.enable_lora(2, name="taken")
    return model


@pytest.mark.first_backend
def test_functions_that_need_another_adapter_state_raise(tmp_path):
    model = make_model()
    for function in (lora.merge, lora.unmerge):
        with pytest.raises(
            ValueError, match=f"`{function.__name__}` needs .*, and the model has none"
        ):
            function(model)
    with pytest.raises(ValueError, match=r"`name` must be one of \[\]. Received: name=None"):
        lora.save_adapter(model, tmp_path / "none")
    for function in (lora.use, lora.remove):
        with pytest.raises(ValueError, match="Received: name='other'"):
            function(model, "other")
    model.backbone.enable_lora(2)
    lora.save_adapter(model, tmp_path / "a")
    lora.merge(model)
    for change in (
        lora.merge,
        lambda model: lora.use(model, None),
        lambda model: lora.remove(model, "default"),
        lambda model: lora.load_adapter(model, tmp_path / "a", name="b"),
        lambda model: model.backbone.enable_lora(2, name="b"),
    ):
        with pytest.raises(
            ValueError, match="'default' is merged into the model; call `lora.unmerge` first"
        ):
            change(model)
    model.quantize("int8")
    with pytest.raises(
        ValueError, match="as `merge` left them. Received: .*query, which was quantized afterwards"
    ):
        lora.unmerge(model)


@pytest.mark.first_backend
def test_a_float8_base_is_unsupported():
    model = make_model()
    model.backbone.transformer_layers[0].attention.query.quantize("float8")
    with pytest.raises(
        ValueError,
        match="base in floating point, int8 or int4. Received: decoder_block_0/attention/query in",
    ):
        model.backbone.enable_lora(2)
    assert lora.names(model) == []


@pytest.mark.first_backend
def test_keras_hubs_lora_files_are_unsupported(tmp_path):
    model = make_model()
    for method in (model.backbone.save_lora_weights, model.backbone.load_lora_weights):
        with pytest.raises(NotImplementedError, match="lora.*_adapter"):
            method(tmp_path / "a.lora.h5")


@pytest.mark.first_backend
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_training_16_bit_weights_is_unsupported(dtype):
    model = make_model(dtype)
    with pytest.raises(
        ValueError,
        match=f'load the model with dtype="mixed_bfloat16".*enable_lora.*of dtype {dtype}',
    ):
        fit(model)


def test_full_fine_tuning_changes_every_weight():
    model = make_model("mixed_bfloat16")
    before = base_values(model)
    fit(model, epochs=2, optimizer=keras.optimizers.Adam(1e-2))
    assert [
        path for path, value in base_values(model).items() if np.array_equal(value, before[path])
    ] == []
