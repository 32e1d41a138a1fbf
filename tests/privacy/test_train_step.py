"""The private training step inside `fit`, against a plain loop over rows."""

import keras
import numpy as np
import pytest
from common import LINES, random_backbone, to_numpy
from keras import ops
from privacy_cases import (
    BATCH,
    CHATS,
    PAIRS,
    ROWS,
    SMALL,
    C,
    TwoTexts,
    distance,
    fit,
    language_model,
    noise_of,
    plain_gradients,
    plain_sum,
    some_rows,
    sum_of,
    take,
    tiny_model,
    values,
)

from keras_vaultgemma import VaultGemmaCausalLM, backend, privacy
from keras_vaultgemma.privacy import mechanism, planning
from keras_vaultgemma.privacy.sampling import sample_rows
from keras_vaultgemma.privacy.seeds import fixed_secret, noise_seed

pytestmark = [
    pytest.mark.filterwarnings("ignore::keras_vaultgemma.privacy.NotPrivateWarning"),
]


@pytest.mark.parametrize(
    "rank, secure", [pytest.param(None, False, marks=pytest.mark.first_backend), (4, True)]
)
def test_a_step_equals_a_plain_loop_over_rows(rank, secure):
    """The sum of the clipped gradients of the drawn rows, plus the noise of its seeds, over the expected batch size."""
    model, rows, secret = (
        language_model(rank, dpsgd=dict(secure=secure)),
        some_rows(ROWS),
        fixed_secret(5),
    )
    for v in model.trainable_variables if rank else ():
        v.assign(np.random.default_rng(len(v.path)).normal(0, 0.3, v.shape))
    before = values(model)
    drawn = sample_rows(secret, 0, ROWS, BATCH / ROWS, max_batch_size(1.0))
    assert 0 < len(drawn) < ROWS
    found, losses = plain_gradients(model, take(rows, drawn))
    noise = [noise_of(noise_seed(secret, 0, i), v.shape, secure) for i, v in enumerate(before)]
    # The first step of an epoch, with SGD of learning rate 1.
    seen = []
    look = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: (
            backend.update_variables(model),
            seen.append((values(model), dict(logs))),
        )
    )
    fit(model, rows, callbacks=[look])
    sizes = min(max_batch_size(1.0), ROWS), model.private_training.microbatch
    longest = C * (1 - mechanism.ROUNDING) / (1 + float(to_numpy(mechanism.sum_rounding(*sizes))))
    clipped, _ = plain_sum(found, longest)
    for old, new, g, z in zip(before, seen[0][0], clipped, noise, strict=True):
        np.testing.assert_allclose(old - new, (g + 1.0 * C * z) / BATCH, atol=2e-6)
    np.testing.assert_allclose(seen[0][1]["unprotected_loss"], np.mean(losses), rtol=1e-5)


def max_batch_size(noise):
    steps = planning.plan(ROWS, BATCH, 1, 1e-4, noise_multiplier=noise)
    return steps.max_batch_size


def test_a_small_run_sums_plainly(monkeypatch):
    """The number of rows is known while the step is compiled, also on TensorFlow, whose batches do not tell it."""
    seen, rounding = [], mechanism.sum_rounding
    monkeypatch.setattr(
        mechanism, "sum_rounding", lambda rows, *sizes: seen.append(rows) or rounding(rows, *sizes)
    )
    fit(language_model(4))
    assert set(seen) == {min(max_batch_size(1.0), ROWS)}


def test_steps_without_any_gradient_are_pure_noise():
    """Rows with weights of 0 have no gradient, so the updates have the standard deviation of the noise."""
    x, y, weight = some_rows(ROWS)
    model = language_model(dpsgd=dict(noise_multiplier=2.0))
    before, epochs = values(model), 3
    history = fit(model, (x, y, 0 * weight), epochs=epochs)
    moved = np.concatenate(
        [(new - old).ravel() for new, old in zip(values(model), before, strict=True)]
    )
    deviation = 2.0 * C / BATCH * (epochs * ROWS / BATCH) ** 0.5
    assert moved.size > 5000
    np.testing.assert_allclose(moved.std(), deviation, rtol=4 / (2 * moved.size) ** 0.5)
    assert abs(moved.mean()) < 4 * deviation / moved.size**0.5
    assert history["unprotected_loss"] == [0] * epochs


@pytest.mark.first_backend
def test_empty_batches_are_steps():
    """With one expected row of 2,000 a third of the batches is empty, and is noised and counted like any other."""
    rows, seen = take(some_rows(4), [0, 1, 2, 3] * 500), []
    model = language_model(4)
    moved = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: (
            backend.update_variables(model),
            seen.append(values(model)[0]),
        )
    )
    stop = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: setattr(model, "stop_training", batch == 29)
    )
    fit(model, rows, batch_size=1, callbacks=[moved, stop])
    counts = [len(sample_rows(fixed_secret(5), i, 2000, 1 / 2000)) for i in range(30)]
    assert counts.count(0) > 5
    steps = [np.abs(new - old).max() for new, old in zip(seen[1:], seen, strict=False)]
    assert min(steps) > 0 and model.privacy.spent().steps == 30
    # The update of a step without rows is the noise of its seed, σ C, over the one expected row.
    for i in [i for i in range(1, 30) if counts[i] == 0]:
        noise = noise_of(noise_seed(fixed_secret(5), i, 0), seen[i].shape)
        np.testing.assert_allclose(seen[i - 1] - seen[i], C * noise, atol=1e-6)


@pytest.mark.first_backend
@pytest.mark.parametrize(
    "data", [LINES, PAIRS, CHATS, TwoTexts()], ids=["texts", "pairs", "chats", "dataset"]
)
@pytest.mark.filterwarnings("ignore:.*rows were longer")
def test_all_kinds_of_text_data(data):
    model = tiny_model()
    history = model.fit(data, batch_size=2, verbose=0).history
    assert np.isfinite(history["unprotected_loss"]).all() and model.privacy.spent().steps == 2
    assert model.privacy.ledger.runs[0][0].rows == 4
    assert isinstance(model.generate("Once upon", max_new_tokens=2), str)


@pytest.mark.first_backend
def test_a_custom_loss_and_metric():
    """They get the logits of one row at a time."""
    metric = keras.metrics.SparseCategoricalAccuracy(name="unprotected_accuracy")
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model = language_model(4, compile_arguments=dict(loss=loss, weighted_metrics=[metric]))
    x, y, _ = some_rows(ROWS)
    history = model.fit(x, y, batch_size=ROWS, verbose=0).history
    plain = language_model(4)
    expected = plain.fit(x, y, batch_size=ROWS, verbose=0).history
    np.testing.assert_allclose(history["unprotected_loss"], expected["unprotected_loss"], rtol=1e-5)
    assert 0 <= history["unprotected_accuracy"][0] <= 1
    for one, two in zip(values(model), values(plain), strict=True):
        np.testing.assert_allclose(one, two, atol=1e-5)


@pytest.mark.parametrize(
    "changes",
    [pytest.param(dict(), marks=pytest.mark.first_backend), dict(lora_arguments=dict(dropout=0.3))],
)
def test_gradient_checkpointing_changes_nothing(changes):
    found = []
    for checkpointing in (False, True):
        model = language_model(
            4, compile_arguments=dict(gradient_checkpointing=checkpointing), **changes
        )
        for v in model.trainable_variables:
            v.assign(np.random.default_rng(len(v.path)).normal(0, 0.2, v.shape))
        keras.utils.set_random_seed(2)
        fit(model)
        found.append(values(model))
    for one, two in zip(*found, strict=True):
        np.testing.assert_allclose(one, two, atol=1e-6)
        assert np.abs(one).max() > 0


def dropping_model(**arguments):
    """A model of adapters with dropout, none of whose factors is zero."""
    model = language_model(4, lora_arguments=dict(dropout=0.5), **arguments)
    for v in model.trainable_variables:
        v.assign(np.random.default_rng(len(v.path)).normal(0, 0.2, v.shape))
    return model


def test_dropout_draws_new_masks_for_each_microbatch():
    """With equal masks, two copies of a row would have twice the gradient of one."""
    model, rows = dropping_model(), take(some_rows(1), [0, 0])
    backend.seed_global_generator(1)  # The generator of PyTorch's dropout.
    one = sum_of(model, rows, 1).gradients
    backend.seed_global_generator(1)
    two = sum_of(model, rows, 2).gradients
    assert distance([2 * g for g in one], two) > 0.1 * C


def test_the_seeds_of_layers_do_not_reveal_how_many_rows_were_drawn():
    """Checkpoints save these seeds: runs that drew different numbers of rows end with the same ones."""
    left, drawn = [], []
    for secret in (5, 6):
        model = language_model(
            4, lora_arguments=dict(dropout=0.5), dpsgd=dict(seed_for_tests=secret)
        )
        fit(model)
        left.append(
            [to_numpy(v).tolist() for v in model.non_trainable_variables if "seed" in v.path]
        )
        largest = model.privacy.ledger.runs[0][0].max_batch_size
        steps = [
            sample_rows(fixed_secret(secret), i, ROWS, BATCH / ROWS, largest) for i in range(4)
        ]
        drawn.append(sum(map(len, steps)))
    assert drawn[0] != drawn[1]
    assert len(left[0]) > 0 and left[0] == left[1]


def test_dropout_follows_the_seeds_of_the_step():
    """Equal seeds give equal masks, and different seeds different ones."""
    model, rows = dropping_model(), keras.tree.map_structure(ops.convert_to_tensor, some_rows(1))
    found = []
    for seed in (1, 2, 1):
        backend.seed_global_generator(seed)
        seeds = ops.convert_to_tensor(
            np.full((1, len(model.private_training.seeds), 2), seed, "int32")
        )
        clipped, _ = model.private_training.clipped_sum(
            rows, ops.convert_to_tensor(np.int32(1)), seeds
        )
        found.append([to_numpy(g) for g in clipped.gradients])
    assert distance(found[0], found[2]) == 0 and distance(found[0], found[1]) > 0.1 * C


@pytest.mark.first_backend
def test_dropout_differs_from_step_to_step():
    """Each step has all rows and moves no weight, so that nothing but dropout tells its loss from another one's."""
    model = dropping_model(optimizer=keras.optimizers.SGD(0.0))
    losses = fit(model, batch_size=ROWS, epochs=4)["unprotected_loss"]
    assert len({round(loss, 4) for loss in losses}) == 4


@pytest.mark.parametrize(
    "base",
    [
        "bfloat16",
        *(pytest.param(x, marks=pytest.mark.first_backend) for x in ("int8", "mixed_bfloat16")),
    ],
)
def test_low_precision_bases(base):
    """The standard deviation of the noise of float32 factors does not depend on the base's dtype."""
    keras.utils.set_random_seed(1)
    model = VaultGemmaCausalLM(
        random_backbone(**SMALL, dtype="float32" if base == "int8" else base)
    )
    if base == "int8":
        model.quantize("int8")
    model.backbone.enable_lora(4)
    model.compile(
        keras.optimizers.SGD(1.0),
        privacy=privacy.DPSGD(noise_multiplier=50.0, delta=1e-4, clip_norm=C),
    )
    before = values(model)
    fit(model)
    moved = np.concatenate(
        [(new - old).ravel() for new, old in zip(values(model), before, strict=True)]
    )
    np.testing.assert_allclose(moved.std(), 50 * C / BATCH * 4**0.5, rtol=0.2)


def test_training_without_privacy_after_private_training():
    model = language_model(4)
    fit(model)
    model.compile(keras.optimizers.SGD(0.1))
    x, y, weight = some_rows(ROWS)
    history = model.fit(
        x, y, sample_weight=weight, batch_size=BATCH, verbose=0, shuffle=True
    ).history
    assert set(history) == {"loss", "sparse_categorical_accuracy"}
    assert model.privacy.spent().steps == 4, "the record keeps what was spent"
    model.train_on_batch(x, y)


@pytest.mark.first_backend
def test_evaluation_has_no_metrics_of_training():
    model = language_model(4)
    x, y, weight = some_rows(ROWS)
    fit(model)
    assert set(model.evaluate(x, y, sample_weight=weight, verbose=0, return_dict=True)) == {
        "loss",
        "sparse_categorical_accuracy",
    }


@pytest.mark.parametrize("size", [pytest.param(2, marks=pytest.mark.first_backend), 5])
def test_microbatches_change_nothing(size, monkeypatch):
    """Except for rounding."""
    monkeypatch.setattr(mechanism, "sum_rounding", lambda *sizes: 0.0)
    models = [language_model(4, dpsgd=dict(microbatch_size=m)) for m in (1, size)]
    for model in models:
        for v in model.trainable_variables:
            v.assign(np.random.default_rng(len(v.path)).normal(0, 0.2, v.shape))
        fit(model, batch_size=3)
    for one, two in zip(*map(values, models), strict=True):
        np.testing.assert_allclose(one, two, atol=1e-6)


@pytest.mark.skipif(backend.NAME != "tensorflow", reason="other backends compile one way")
def test_a_step_compiled_by_xla_equals_one_that_is_not(monkeypatch):
    """XLA needs blocks whose lengths are compiled; otherwise TensorFlow's have as many rows as were drawn."""
    monkeypatch.setattr(mechanism, "sum_rounding", lambda *sizes: 0.0)
    models = [
        language_model(4, dpsgd=dict(microbatch_size=4), compile_arguments=dict(jit_compile=jit))
        for jit in (False, True)
    ]
    for model in models:
        fit(model, batch_size=6)
    for one, two in zip(*map(values, models), strict=True):
        np.testing.assert_allclose(one, two, atol=1e-5)
