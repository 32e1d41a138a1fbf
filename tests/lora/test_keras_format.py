"""Every way in which Keras moves weights and configs gives the same model with the same adapters."""

import copy
import pickle
import warnings

import keras
import numpy as np
import pytest
from common import IDS, random_backbone, to_numpy

from keras_vaultgemma import VaultGemmaBackbone, VaultGemmaCausalLM, lora

pytestmark = pytest.mark.first_backend

ALL = ["query", "down", "token_embedding"]


def make_model(mode=None, seed=0, num_layers=1, **options):
    keras.utils.set_random_seed(seed)
    model = VaultGemmaCausalLM(random_backbone(num_layers=num_layers, **options))
    if mode:
        model.quantize(mode)
    return model


def fill(model, seed=0, scale=0.2):
    random = np.random.default_rng(seed)
    for variable in model.trainable_variables:
        variable.assign(random.normal(0, scale, variable.shape))


def adapted_model(mode=None, state="active"):
    """A model with two adapters, of which the second is active, merged or not active either."""
    model = make_model(mode)
    model.backbone.enable_lora(2, ["query", "value"], alpha=3, name="first")
    fill(model, 1)
    model.backbone.enable_lora(3, ALL, alpha=5, dropout=0.25, name="second")
    fill(model, 2)
    if state == "merged":
        lora.merge(model)
    elif state == "inactive":
        lora.use(model, None)
    return model


def logits(model):
    return to_numpy(model(IDS))


def fit(model, callbacks=(), epochs=1, **options):
    ids = np.random.default_rng(5).integers(3, 128, (4, 7)).astype("int32")
    x = {"token_ids": ids[:, :-1], "padding_mask": np.ones((4, 6), "int32")}
    model.compile(keras.optimizers.Adam(3e-2))
    options = dict(batch_size=4, epochs=epochs, verbose=0, callbacks=list(callbacks), **options)
    return model.fit(x, ids[:, 1:], **options)


def flags(model):
    return {v.path: v.trainable for v in model.backbone.weights}


def settings(model):
    layers = {
        f"{block.name}/{name}": getattr(block.attention, name, None) or getattr(block, name)
        for block in model.backbone.transformer_layers
        for name in ("query", "key", "value", "attention_output", "gate", "up", "down")
    }
    layers["token_embedding"] = model.backbone.token_embedding
    return {
        path: (layer.lora_rank, layer.lora_alpha, layer.lora_dropout)
        for path, layer in layers.items()
    }


def assert_same(copied, model):
    """The copy computes the same with each adapter and is trained in the same way."""
    assert type(copied) is VaultGemmaCausalLM
    np.testing.assert_array_equal(logits(copied), logits(model))
    assert flags(copied) == flags(model)
    assert settings(copied) == settings(model)
    assert lora.names(copied) == lora.names(model) and lora.active(copied) == lora.active(model)
    for one in (copied, model):
        if one.backbone.adapters.is_merged:
            lora.unmerge(one)
    np.testing.assert_array_equal(logits(copied), logits(model))
    for name in ("first", None, "second"):
        for one in (copied, model):
            lora.use(one, name)
        np.testing.assert_array_equal(logits(copied), logits(model))


def through_keras_file(model, folder):
    model.save(folder / "model.keras")
    return keras.saving.load_model(folder / "model.keras")


def through_folder(model, folder):
    model.save(folder / "model", zipped=False)
    return keras.saving.load_model(folder / "model")


def through_weights(model, folder):
    model.save_weights(folder / "model.weights.h5")
    copied = make_model(model.backbone.token_embedding.quantization_mode, seed=1)
    copied.load_weights(folder / "model.weights.h5")
    return copied


def through_shards(model, folder):
    model.save_weights(folder / "model.weights.json", max_shard_size=3e-5)
    assert len(list(folder.glob("*.h5"))) > 2
    copied = make_model(model.backbone.token_embedding.quantization_mode, seed=1)
    copied.load_weights(folder / "model.weights.json")
    return copied


def through_config_and_weights(model, folder):
    model.backbone.save_weights(folder / "model.weights.h5")
    copied = VaultGemmaCausalLM.from_config(model.get_config())
    copied.backbone.load_weights(folder / "model.weights.h5")
    return copied


WAYS = {
    ".keras": through_keras_file,
    "folder": through_folder,
    "save_weights": through_weights,
    "shards": through_shards,
    "from_config": through_config_and_weights,
    "deepcopy": lambda model, folder: copy.deepcopy(model),
    "pickle": lambda model, folder: pickle.loads(pickle.dumps(model)),
}


@pytest.mark.parametrize(
    "way",
    [pytest.param(way, marks=pytest.mark.every_backend if way == ".keras" else ()) for way in WAYS],
)
def test_a_copy_has_the_same_adapters(way, tmp_path):
    model = adapted_model()
    assert_same(WAYS[way](model, tmp_path), model)


@pytest.mark.parametrize("way", [".keras", "save_weights"])
@pytest.mark.parametrize(
    "mode, state", [(None, "merged"), (None, "inactive"), ("int8", "active"), ("int8", "merged")]
)
def test_a_copy_of_a_model_in_another_state(mode, state, way, tmp_path):
    model = adapted_model(mode, state)
    assert_same(WAYS[way](model, tmp_path), model)


def test_weights_that_are_trained_beside_an_adapter(tmp_path):
    model = adapted_model()
    model.backbone.final_norm.trainable = True
    copied = through_keras_file(model, tmp_path)
    assert flags(copied)["final_norm/scale"]
    assert [v.path for v in copied.trainable_variables] == [
        v.path for v in model.trainable_variables
    ]
    with pytest.warns(
        UserWarning, match="`save_adapter` saves the adapter alone.*final_norm/scale"
    ):
        lora.save_adapter(model, tmp_path / "adapter")


def test_frozen_weights_stay_frozen_without_adapters(tmp_path):
    model = make_model()
    model.backbone.token_embedding.trainable = False
    copied = through_keras_file(model, tmp_path)
    assert flags(copied) == flags(model)
    model.backbone.trainable = False
    copied = copy.deepcopy(model)
    assert copied.trainable_variables == [] and not copied.backbone.trainable
    copied.backbone.trainable = True
    assert len(copied.trainable_variables) == len(copied.weights)


def test_a_config_without_frozen_weights_and_adapters_is_as_before():
    assert not {"adapters", "trainable_weights"} & make_model().backbone.get_config().keys()


# Weights that come from somewhere else


@pytest.mark.every_backend
def test_the_best_weights_of_a_run_have_the_trained_adapter(tmp_path):
    model = make_model()
    model.backbone.enable_lora(2, ALL)
    path = tmp_path / "best.weights.h5"
    best = keras.callbacks.ModelCheckpoint(
        path, monitor="loss", save_best_only=True, save_weights_only=True
    )
    fit(model, [best], epochs=2)
    loaded = make_model()
    loaded.backbone.enable_lora(2, ALL)
    loaded.load_weights(path)
    np.testing.assert_allclose(logits(loaded), logits(model), atol=1e-5)
    lora.save_adapter(loaded, tmp_path / "adapter")
    other = make_model()
    lora.load_adapter(other, tmp_path / "adapter")
    np.testing.assert_allclose(logits(other), logits(model), atol=1e-5)
    before = [to_numpy(v).copy() for v in loaded.trainable_variables]
    fit(loaded)
    assert all(
        not np.array_equal(old, to_numpy(v))
        for old, v in zip(before, loaded.trainable_variables, strict=True)
    )


class Interruption(Exception):
    pass


class Interrupt(keras.callbacks.Callback):
    def on_epoch_begin(self, epoch, logs=None):
        if epoch == 2:
            raise Interruption


@pytest.mark.every_backend
def test_an_interrupted_run_with_an_adapter_is_restored(tmp_path):
    whole = make_model()
    whole.backbone.enable_lora(2, ALL)
    initial = [to_numpy(v).copy() for v in whole.weights]
    fit(whole, epochs=3)
    models = []
    for callbacks in ([Interrupt()], []):
        model = make_model()
        model.backbone.enable_lora(2, ALL)
        for variable, value in zip(model.weights, initial, strict=True):
            variable.assign(value)
        callbacks.append(keras.callbacks.BackupAndRestore(tmp_path / "backup"))
        try:
            fit(model, callbacks, epochs=3)
        except Interruption:
            assert len(callbacks) == 2
        models.append(model)
    np.testing.assert_allclose(logits(models[1]), logits(whole), atol=1e-5)
    assert np.abs(logits(models[0]) - logits(whole)).max() > 1e-3


def base_weights(path, seed=3):
    model = make_model(seed=seed)
    model.save_weights(path)
    return model


def test_base_weights_into_a_new_adapter(tmp_path):
    base = base_weights(tmp_path / "base.weights.h5")
    model = make_model()
    model.backbone.enable_lora(2, ALL)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model.load_weights(tmp_path / "base.weights.h5")
    np.testing.assert_array_equal(logits(model), logits(base))
    before = [to_numpy(v).copy() for v in model.trainable_variables]
    fit(model, epochs=2)
    for old, variable in zip(before, model.trainable_variables, strict=True):
        assert not np.array_equal(old, to_numpy(variable))


def test_base_weights_into_a_trained_adapter(tmp_path):
    base = base_weights(tmp_path / "base.weights.h5")
    model = adapted_model()
    with pytest.warns(UserWarning, match="the update of 'second' was set to zero"):
        model.load_weights(tmp_path / "base.weights.h5")
    np.testing.assert_array_equal(logits(model), logits(base))
    before = [to_numpy(v).copy() for v in model.trainable_variables]
    fit(model, epochs=2)
    for old, variable in zip(before, model.trainable_variables, strict=True):
        assert not np.array_equal(old, to_numpy(variable))
    lora.use(model, "first")
    assert np.abs(logits(model) - logits(base)).max() > 0.01


def test_base_weights_into_a_merged_model(tmp_path):
    base = base_weights(tmp_path / "base.weights.h5")
    model = adapted_model(state="merged")
    with pytest.warns(UserWarning, match="'second', which was merged .* is no longer active"):
        model.load_weights(tmp_path / "base.weights.h5")
    np.testing.assert_array_equal(logits(model), logits(base))
    assert lora.names(model) == ["first", "second"] and lora.active(model) is None
    lora.use(model, "second")
    assert np.abs(logits(model) - logits(base)).max() > 0.01


@pytest.mark.every_backend
def test_weights_with_another_adapter_replace_that_of_the_model(tmp_path):
    saved = adapted_model()
    saved.save_weights(tmp_path / "model.weights.h5")
    model = make_model(seed=2)
    model.predict(IDS, verbose=0)
    model.backbone.enable_lora(4, name="mine")
    fill(model)
    model.predict(IDS, verbose=0)
    with pytest.warns(UserWarning, match=r"\['mine'\] of the model were replaced .*'first', 'sec"):
        model.load_weights(tmp_path / "model.weights.h5")
    np.testing.assert_allclose(model.predict(IDS, verbose=0), logits(saved), atol=1e-4)
    assert_same(model, saved)


def test_loading_equal_adapters_keeps_their_variables(tmp_path):
    """An optimizer that was built for them stays theirs."""
    saved = adapted_model()
    saved.save_weights(tmp_path / "model.weights.h5")
    model = adapted_model()
    fill(model, 7)
    variables = list(map(id, model.variables))
    model.load_weights(tmp_path / "model.weights.h5")
    assert list(map(id, model.variables)) == variables
    assert_same(model, saved)


def test_a_layer_without_an_adapter_rejects_one(tmp_path):
    source = adapted_model().backbone.transformer_layers[0]
    with pytest.raises(ValueError, match="must have an adapter to load weights with one of rank 3"):
        copy.deepcopy(source)


def test_weights_of_a_part_of_the_model(tmp_path):
    """A model of blocks alone has the factors, too."""
    parts = []
    for seed in (1, 2):
        backbone = make_model(seed=seed).backbone
        backbone.enable_lora(2, ["down"])
        fill(backbone, seed)
        block = backbone.transformer_layers[0]
        parts.append(keras.Model(backbone.inputs, block.output))
    parts[0].save_weights(tmp_path / "part.weights.h5")
    parts[1].load_weights(tmp_path / "part.weights.h5")
    np.testing.assert_array_equal(to_numpy(parts[1](IDS)), to_numpy(parts[0](IDS)))


def test_weights_of_a_model_around_the_backbone(tmp_path):
    saved, loaded = adapted_model().backbone, make_model(seed=2).backbone
    for backbone, way in ((saved, "save_weights"), (loaded, "load_weights")):
        pooled = keras.ops.mean(backbone(backbone.input), axis=1)
        outer = keras.Model(backbone.input, keras.layers.Dense(2, name="classes")(pooled))
        getattr(outer, way)(tmp_path / "outer.weights.h5")
    np.testing.assert_array_equal(to_numpy(loaded(IDS)), to_numpy(saved(IDS)))


def test_set_weights():
    model, other = adapted_model(), adapted_model()
    fill(other, 9)
    other.set_weights(model.get_weights())
    np.testing.assert_array_equal(logits(other), logits(model))
    lora.merge(model)
    with pytest.raises(ValueError, match="'second' is merged into the model; call `lora.unmerge`"):
        model.set_weights(model.get_weights())
    with pytest.raises(ValueError):
        make_model().set_weights(other.get_weights())


@pytest.mark.parametrize("part", ["model", "backbone"])
def test_cloning_layer_by_layer_is_rejected(part):
    model = adapted_model()
    model = model if part == "model" else model.backbone
    with pytest.raises(ValueError, match=rf"must not be a {type(model).__name__}.*from_config"):
        keras.models.clone_model(model)
    again = type(model).from_config(model.get_config())
    assert type(again) is type(model)
    assert lora.names(again) == ["first", "second"] and lora.active(again) == "second"
    assert [v.path for v in again.weights] == [v.path for v in model.weights]


def test_a_preset_is_merged_and_keeps_no_adapter(tmp_path):
    model = adapted_model()
    model.backbone.save_to_preset(tmp_path / "preset")
    loaded = VaultGemmaBackbone.from_preset(tmp_path / "preset")
    assert lora.names(loaded) == [] and len(loaded.trainable_variables) == len(loaded.weights)
    assert not {"adapters", "trainable_weights"} & loaded.get_config().keys()
    np.testing.assert_allclose(to_numpy(loaded(IDS)), to_numpy(model.backbone(IDS)), atol=1e-4)
    assert lora.names(model) == ["first", "second"]
    model.save_weights(tmp_path / "model.weights.h5")  # which is not merged again afterwards
    copied = make_model(seed=4)
    copied.load_weights(tmp_path / "model.weights.h5")
    assert lora.names(copied) == ["first", "second"]
