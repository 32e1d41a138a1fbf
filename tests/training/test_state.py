import keras
import ml_dtypes
import numpy as np
import pytest
from common import random_backbone, to_numpy

from keras_vaultgemma import VaultGemmaCausalLM
from keras_vaultgemma.training.state import (
    assign_values,
    best_weight_arrays,
    callback_states,
    copy_values,
    enumerate_names,
    metric_variables,
    model_identity,
    restore_callbacks,
    state_nbytes,
    state_variables,
    weights_are_finite,
)


def dense(units=2, optimizer="adam"):
    layers = [
        keras.Input((3,)),
        keras.layers.Dense(units, name="dense"),
        keras.layers.Dropout(0.5, seed=1),
    ]
    model = keras.Sequential(layers, name="dense")
    model.compile(optimizer, "mse")
    model.optimizer.build(model.trainable_variables)
    return model


def lora(**changes):
    model = VaultGemmaCausalLM(random_backbone(num_layers=1, **changes))
    model.backbone.enable_lora(2)
    model.optimizer.build(model.trainable_variables)
    return model


def test_the_state_is_everything_that_training_changes():
    model = dense()
    variables = state_variables(model)
    assert [name for name in variables if not name.startswith("optimizer/")] == [
        "weight/0",
        "weight/1",
        "seed/0",
    ]
    assert variables["weight/0"] is model.layers[0].kernel
    assert list(metric_variables(model)) == ["metric/0", "metric/1"]
    before = copy_values(variables)
    model.fit(np.ones((4, 3)), np.zeros((4, 2)), batch_size=2, verbose=0)
    after = copy_values(variables)
    assert all(
        not np.array_equal(after[name], before[name])
        for name in before
        if name.split("/")[0] != "optimizer"
    )
    assign_values(variables, before.items())
    assert all(np.array_equal(to_numpy(v), before[name]) for name, v in variables.items())
    assert int(to_numpy(model.optimizer.iterations)) == 0


def test_copies_do_not_share_memory_with_the_variables():
    model = dense()
    copy = copy_values(state_variables(model))
    first = to_numpy(model.layers[0].kernel).copy()
    model.layers[0].kernel.assign(first + 1)
    np.testing.assert_array_equal(copy["weight/0"], first)


def test_frozen_weights_are_not_part_of_the_state():
    model = lora()
    names = [v.path for name, v in state_variables(model).items() if name.startswith("weight/")]
    assert len(names) == 4 and all("lora_kernel" in name for name in names)


def test_state_nbytes():
    variables = [
        keras.Variable(np.zeros((2, 3)), dtype="float32"),
        keras.Variable(np.zeros(5), dtype="bfloat16"),
    ]
    assert state_nbytes(enumerate_names("weight", variables)) == 24 + 10


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_weights_are_finite(dtype):
    for bad, expected in [(0, True), (np.nan, False), (-np.inf, False)]:
        weights = {"weight/0": np.zeros(3), "weight/1": np.array([1, bad]).astype(dtype)}
        assert weights_are_finite(weights) is expected
    assert weights_are_finite({"optimizer/0": np.array(np.nan)})


def test_identities_differ_if_states_cannot_be_exchanged():
    def differences(model, other):
        a, b = model_identity(model), model_identity(other)
        return [
            name
            for name in [*a, *(name for name in b if name not in a)]
            if a.get(name) != b.get(name)
        ]

    assert model_identity(dense())["dense/dense/kernel"] == "float32 [3, 2]"
    assert differences(dense(), dense()) == []
    assert differences(dense(), dense(optimizer="adamw")) == ["optimizer"]
    assert differences(dense(), dense(units=4))[0] == "dense/dense/kernel"
    model = lora()
    assert differences(model, model) == []
    other = lora()  # another random base, of the same shapes
    assert differences(model, other) == ["values of frozen weights"]
    other.backbone.set_weights(model.backbone.get_weights())
    assert differences(model, other) == []


def test_callbacks_are_restored():
    model = dense()
    names = ("best", "best_epoch", "wait", "stopped_epoch")
    first, second = (
        keras.callbacks.EarlyStopping(restore_best_weights=True),
        keras.callbacks.EarlyStopping(),
    )
    history, plateau = keras.callbacks.History(), keras.callbacks.ReduceLROnPlateau()
    first.on_train_begin()
    second.on_train_begin()
    first.best, first.best_epoch, first.wait = 0.5, 3, 1
    first.best_weights = [weight + 1 for weight in model.get_weights()]
    second.wait, plateau.cooldown_counter = 4, 2
    history.epoch, history.history = [0, 1], {"loss": [2.0, 1.0]}
    callbacks = [keras.callbacks.TerminateOnNaN(), first, history, second, plateau]
    states = callback_states(callbacks)
    assert states["EarlyStopping 0"] == dict(zip(names, (0.5, 3, 1, 0), strict=True))
    assert (
        states["EarlyStopping 1"]["wait"] == 4
        and states["ReduceLROnPlateau 0"]["cooldown_counter"] == 2
    )
    best = best_weight_arrays(model, callbacks)
    assert list(best) == ["best/EarlyStopping 0/0", "best/EarlyStopping 0/1"]

    again = [keras.callbacks.History(), keras.callbacks.EarlyStopping(restore_best_weights=True)]
    again[0].epoch = []
    again[1].best_epoch = 0
    restore_callbacks(model, again, states, best)
    assert callback_states(again) == {
        name: states[name] for name in ("History 0", "EarlyStopping 0")
    }
    for found, expected in zip(again[1].best_weights, first.best_weights, strict=True):
        np.testing.assert_array_equal(found, expected)


def test_frozen_weights_are_not_part_of_the_best_weights():
    model = lora()
    stopping = keras.callbacks.EarlyStopping(restore_best_weights=True)
    stopping.best_weights = [weight + 1 for weight in model.get_weights()]
    best = best_weight_arrays(model, [stopping])
    assert len(best) == 4
    restore_callbacks(model, [stopping], {}, best)
    for v, weight in zip(model.weights, stopping.best_weights, strict=True):
        np.testing.assert_array_equal(weight, to_numpy(v) + ("lora" in v.path))
