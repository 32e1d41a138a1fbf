"""`DPSGD(unit="user")`: users are sampled and clipped, not rows; against a plain loop over users."""

from collections import deque

import keras
import numpy as np
import pytest
from common import LINES, to_numpy, value_and_gradients
from keras import ops
from privacy_cases import (
    BATCH,
    C,
    distance,
    fit,
    language_model,
    noise_of,
    plain_gradients,
    plain_sum,
    some_rows,
    take,
    tiny_model,
    values,
)

from keras_vaultgemma import TrainingCheckpoint, backend, privacy
from keras_vaultgemma.models.trainer import Trainer
from keras_vaultgemma.privacy import accounting, groups, mechanism
from keras_vaultgemma.privacy.sampling import PrivateBatches, sample_rows
from keras_vaultgemma.privacy.seeds import fixed_secret, noise_seed

pytestmark = [
    pytest.mark.filterwarnings("ignore::keras_vaultgemma.privacy.NotPrivateWarning"),
]

K = 3
SIZES = [1, 2, 3, 5, 9, 1, 2, 4, 1, 2]  # rows of each user; K of 5, 9 and 4 take part in a step
USERS, COUNT = len(SIZES), sum(SIZES)
LABELS = np.random.default_rng(3).permutation(np.repeat([f"p{i}" for i in range(USERS)], SIZES))
USER = dict(unit="user", max_rows_per_group=K)


def user_model(rank=4, microbatch=1, **arguments):
    dpsgd = {**USER, "microbatch_size": microbatch, **arguments.pop("dpsgd", {})}
    model = language_model(rank, dpsgd=dpsgd, **arguments)
    for v in model.trainable_variables if rank else ():  # B starts at 0
        v.assign(np.random.default_rng(len(v.path)).normal(0, 0.3, v.shape))
    return model


def labelled_rows():
    """Rows of all users, two of which have no label, in users of several rows and of one."""
    x, y, weight = some_rows(COUNT)
    several, one = np.flatnonzero(LABELS == "p2")[0], np.flatnonzero(LABELS == "p8")[0]
    weight[[several, one]] = 0
    return x, y, weight


def drawn_by(model, secret, step):
    """Users that a step draws, in the order of their first rows, and the rows that each contributes."""
    run = model.privacy.ledger.runs[0][0]
    parts = groups.Groups([*LABELS], K)
    drawn = sample_rows(secret, step, USERS, run.sampling_probability, run.max_batch_size)
    rows, is_drawn = parts.select(secret, step, drawn)
    return [own[used] for own, used in zip(rows, is_drawn, strict=True)]


def loop_over_users(model, rows, users):
    """Gradient and loss of each user: the mean over the user's rows with a label, by plain autodiff."""
    found, losses = [], []
    for own in users:
        own = [i for i in own if rows[2][i].any()]
        gradients, values = plain_gradients(model, take(rows, own)) if own else ([], [])
        zeros = [np.zeros(v.shape) for v in model.trainable_variables]
        found.append([sum(g) / max(1, len(own)) for g in zip(zeros, *gradients, strict=True)])
        losses.append(sum(values) / max(1, len(own)))
    return found, losses


def first_step(model, rows, labels=LABELS, **arguments):
    """Change of the weights by the first step with SGD of learning rate 1, and its logs."""
    before, seen = values(model), []
    look = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: (
            backend.update_variables(model),
            seen.append((values(model), dict(logs))),
        )
    )
    fit(model, rows, groups=labels, callbacks=[look], **arguments)
    return [old - new for old, new in zip(before, seen[0][0], strict=True)], seen[0][1]


@pytest.mark.parametrize(
    ("rank", "microbatch"),
    [
        (None, 1),
        pytest.param(None, 2, marks=pytest.mark.first_backend),
        pytest.param(4, 1, marks=pytest.mark.first_backend),
        (4, 2),
    ],
)
def test_the_clipped_sum_equals_a_plain_loop_over_users(rank, microbatch):
    """Within 1e-5 of its norm, with one expected user of two of each microbatch clipped."""
    model, rows, secret = user_model(rank, microbatch), labelled_rows(), fixed_secret(5)
    steps = accounting.Steps(1, USERS, BATCH / USERS, USERS, 1.0)
    parts = groups.Groups([*LABELS], K)
    batches = PrivateBatches(rows, steps, 1, 1, secret, 0, "", groups=parts)
    x, y, step = batches[0]
    training = model.private_training
    training.prepare(rows, microbatch, batches.capacity, K)

    def function(inputs, count, is_drawn):
        clipped, _ = training.clipped_sum(inputs, count, is_drawn=is_drawn)
        return clipped.gradients, clipped.loss, clipped.clipped

    variables = [*model.variables, *model.metrics_variables]
    inputs = ((x, y, step["sample_weight"]), step["count"][0], step["is_drawn"])
    found, loss, clipped = backend.compile_function(function, variables, jit_compile=False)(
        *keras.tree.map_structure(ops.convert_to_tensor, inputs)
    )
    drawn = sample_rows(secret, 0, USERS, BATCH / USERS)
    assert len(x["token_ids"]) == K * len(step["is_drawn"]) == K * batches.capacity
    assert 3 < len(drawn) < USERS
    chosen, is_drawn = parts.select(secret, 0, drawn)
    users = [own[used] for own, used in zip(chosen, is_drawn, strict=True)]
    gradients, losses = loop_over_users(model, rows, users)
    rounding = float(to_numpy(mechanism.sum_rounding(batches.capacity, microbatch)))
    norms = [np.sqrt(sum((g**2).sum() for g in user)) for user in gradients]
    assert min(norms) < C < max(norms)
    longest = C * (1 - mechanism.ROUNDING) / (1 + rounding)
    expected = [
        sum(g * min(1, longest / max(norm, 1e-9)) for g, norm in zip(column, norms, strict=True))
        for column in zip(*gradients, strict=True)
    ]
    size = distance(expected, [np.zeros(g.shape) for g in expected])
    assert distance([to_numpy(g) for g in found], expected) < 1e-5 * size
    np.testing.assert_allclose(float(to_numpy(loss)), sum(losses), rtol=1e-5)
    assert int(to_numpy(clipped)) == sum(norm > C for norm in norms)


def test_a_step_of_fit_releases_the_loop_over_users_and_noise():
    """Users are drawn with probability batch size over users, each with K rows at most, and B is their expected number."""
    model, rows, secret = user_model(microbatch=2), labelled_rows(), fixed_secret(5)
    before = [to_numpy(v) for v in model.trainable_variables]
    found, logs = first_step(model, rows)
    run = model.privacy.ledger.runs[0][0]
    assert (run.rows, run.sampling_probability) == (USERS, BATCH / USERS)
    users = drawn_by(model, secret, 0)
    for v, value in zip(model.trainable_variables, before, strict=True):
        v.assign(value)
    gradients, losses = loop_over_users(model, rows, users)
    rounding = float(to_numpy(mechanism.sum_rounding(min(run.max_batch_size, USERS), 2)))
    nonzero = [user for user in gradients if any(g.any() for g in user)]
    clipped, _ = plain_sum(nonzero, C * (1 - mechanism.ROUNDING) / (1 + rounding))
    for i, (moved, g) in enumerate(zip(found, clipped, strict=True)):
        noise = C * noise_of(noise_seed(secret, 0, i), g.shape)
        np.testing.assert_allclose(moved, (g + noise) / BATCH, atol=2e-6)
    np.testing.assert_allclose(logs["unprotected_loss"], np.mean(losses), rtol=1e-5)


def test_a_user_changes_the_sum_by_the_clipping_norm_at_most():
    """All nine rows of one user lose their labels, or are others."""
    rows, others = some_rows(COUNT), some_rows(COUNT, seed=1)
    own = LABELS == "p4"
    assert own.sum() == 9

    def changed(array, other):
        array = array.copy()
        array[own] = other[own]
        return array

    small = 0.1  # so that the user's gradient is clipped
    removed = keras.tree.map_structure(changed, rows, (rows[0], rows[1], 0 * rows[2]))
    replaced = keras.tree.map_structure(changed, rows, others)
    whole, less, other = (
        first_step(user_model(2, 2, dpsgd=dict(clip_norm=small)), data, batch_size=USERS)[0]
        for data in (rows, removed, replaced)
    )
    assert 0.9 * small < USERS * distance(whole, less) <= small + 1e-5
    assert 0.2 * small < USERS * distance(whole, other) <= 2 * small + 1e-5


@pytest.mark.any_backend
def test_the_rows_of_a_user():
    """K at most, the user's own, each once, by chance alike, afresh in each step and from the secret alone."""
    parts, secret = groups.Groups([*LABELS], K), fixed_secret(1)
    users = np.arange(USERS)
    of_label = {label: i for i, label in enumerate(dict.fromkeys(LABELS))}
    rows, is_drawn = parts.select(secret, 0, users)
    assert rows.shape == is_drawn.shape == (USERS, K)
    for label, i in of_label.items():
        used = rows[i][is_drawn[i]]
        assert set(LABELS[rows[i]]) == {label}
        assert len(used) == len(set(used)) == min(K, (label == LABELS).sum())
    counts = np.zeros(COUNT)
    for step in range(600):
        found, is_drawn = parts.select(secret, step, users)
        np.add.at(counts, found[is_drawn], 1)
    expected = np.array([min(1, K / (label == LABELS).sum()) for label in LABELS])
    assert (counts[expected == 1] == 600).all()
    deviation = np.sqrt(600 * expected * (1 - expected))
    assert (np.abs(counts - 600 * expected) <= 4.5 * deviation).all()
    again, _ = parts.select(secret, 0, users)
    other, _ = parts.select(fixed_secret(2), 0, users)
    assert (again == rows).all() and (other != rows).any()
    # A user's draw does not depend on who else is drawn, nor on the labels of others.
    alone, _ = parts.select(secret, 0, users[3:4])
    assert (alone[0] == rows[3]).all()


@pytest.mark.first_backend
def test_accounting_ledger_and_unit_are_of_users():
    model = user_model()
    fit(model, groups=LABELS.tolist(), rows=labelled_rows())
    run, count = model.privacy.ledger.runs[0]
    assert (run.rows, run.sampling_probability, count) == (USERS, BATCH / USERS, 2)
    spent = model.privacy.spent()
    assert spent.unit == "one user of at most 3 rows of at most 9 tokens"
    steps = accounting.Steps(2, USERS, BATCH / USERS, run.max_batch_size, 1.0)
    assert spent.epsilon == accounting.round_up(accounting.epsilon([steps], 1e-4))
    assert (
        f"on {USERS} users, each drawn with probability 0.6" in model.privacy.ledger.describe()[0]
    )


@pytest.mark.first_backend
def test_the_default_delta_is_that_of_the_number_of_users():
    rows, count = take(some_rows(4), [0, 1, 2, 3] * 4), 16
    model = user_model(dpsgd=dict(delta=None, noise_multiplier=5.0))
    fit(model, rows, groups=np.arange(count) // 2, batch_size=4)
    run = model.privacy.ledger.runs[0][0]
    assert run.rows == 8 and run.delta == min(8**-1.1, 1e-5)


@pytest.mark.first_backend
def test_the_same_rows_in_other_units_are_the_same_data():
    """So that what was spent on them counts; together they protect persons with one row only."""
    model, rows = user_model(dpsgd=dict(extend_budget=True)), labelled_rows()
    fit(model, rows, groups=LABELS)
    model.compile(
        keras.optimizers.SGD(1.0),
        privacy=privacy.DPSGD(noise_multiplier=1.0, delta=1e-4, extend_budget=True),
    )
    with pytest.warns(UserWarning, match="protected one user of .*, this one protects one row of"):
        fit(model, rows, batch_size=COUNT)
    assert len(model.privacy.ledger.spent()) == 1 and model.privacy.spent().steps == 3
    assert model.privacy.spent().unit == (
        "one user of at most 3 rows of at most 9 tokens; one row of at most 9 tokens"
    )


@pytest.mark.any_backend
@pytest.mark.parametrize(
    "labels",
    [["a", "b", "a"], np.array([1, 2, 1]), (7, "8 ", b"7"), np.array(["x", 3, "x"], object)],
)
def test_labels_of_all_kinds(labels):
    one, two, three = groups.group_labels(labels, 3)
    assert groups.group_labels(deque(labels), 3) == [one, two, three]
    assert one == three != two


@pytest.mark.first_backend
@pytest.mark.filterwarnings("ignore:.*rows were longer")
def test_texts():
    model = tiny_model(unit="user", max_rows_per_group=2)
    labels = ops.convert_to_tensor(np.array([1, 2, 1, 2]))
    history = model.fit(LINES, groups=labels, batch_size=1, verbose=0).history
    assert np.isfinite(history["unprotected_loss"]).all()
    assert model.privacy.ledger.runs[0][0].rows == 2


class Killed(Exception):
    pass


@pytest.mark.first_backend
def test_a_killed_run_resumes_with_the_same_users_only(tmp_path):
    def train(folder, killed_at=None, labels=LABELS):
        model, begun = user_model(optimizer=keras.optimizers.Adam(1e-2)), []

        def begin(batch, logs):
            begun.append(batch)
            if len(begun) == killed_at:
                raise Killed

        callbacks = [
            TrainingCheckpoint(folder, save_freq=1),
            keras.callbacks.LambdaCallback(on_train_batch_begin=begin),
        ]
        fit(model, labelled_rows(), groups=labels, callbacks=callbacks)
        return model

    uninterrupted = train(tmp_path / "uninterrupted")
    with pytest.raises(Killed):
        train(tmp_path / "killed", 2)
    with pytest.raises(ValueError, match="belongs to another run: its data had users"):
        train(tmp_path / "killed", labels=np.roll(LABELS, 1))
    # Other names of the same users are no other users.
    resumed = train(tmp_path / "killed", labels=[label + "!" for label in LABELS])
    for one, two in zip(values(uninterrupted), values(resumed), strict=True):
        np.testing.assert_allclose(one, two, rtol=0, atol=1e-6)
    assert uninterrupted.privacy.spent().steps == 2 and resumed.privacy.spent().steps == 2 + 1


class Private(Trainer, keras.Model):
    """Any Keras model."""


@pytest.mark.parametrize("weighted", [pytest.param(False, marks=pytest.mark.first_backend), True])
def test_any_model_loss_and_metric(weighted):
    """The mean of Keras's own loss over a user's rows, one by one; rows that fill the shape enter no metric."""
    rng = np.random.default_rng(0)
    x, y = (
        rng.normal(size=(COUNT, 3)).astype("float32"),
        rng.normal(size=(COUNT, 2)).astype("float32"),
    )
    weight = rng.integers(0, 2, COUNT).astype("float32") if weighted else None
    keras.utils.set_random_seed(0)
    inputs = keras.Input((3,))
    model = Private(inputs, keras.layers.Dense(2)(inputs))
    metrics = [keras.metrics.MeanSquaredError(name="unprotected_error")]
    model.compile(
        keras.optimizers.SGD(1.0),
        "mse",
        metrics=metrics,
        privacy=privacy.DPSGD(
            noise_multiplier=1.0, delta=1e-4, clip_norm=C, seed_for_tests=5, **USER
        ),
    )

    def loss(x, y):
        return ops.mean((model(x) - y) ** 2)

    parts = groups.Groups([*LABELS], K)
    chosen, is_drawn = parts.select(fixed_secret(5), 0, np.arange(USERS))
    of_row, found, used = value_and_gradients(loss, model.trainable_variables), [], []
    for own, drawn in zip(chosen, is_drawn, strict=True):
        own = [i for i in own[drawn] if weight is None or weight[i] > 0]
        rows = [of_row(*map(ops.convert_to_tensor, (x[[i]], y[[i]]))) for i in own]
        used += [float(value) for value, _ in rows]
        if rows:
            found.append([sum(g) / len(rows) for g in zip(*(g for _, g in rows), strict=True)])
    before = values(model)
    history = model.fit(
        x, y, sample_weight=weight, groups=LABELS, batch_size=USERS, verbose=0
    ).history
    rounding = float(to_numpy(mechanism.sum_rounding(USERS, 1)))
    clipped, norms = plain_sum(found, C * (1 - mechanism.ROUNDING) / (1 + rounding))
    assert norms.max() > C
    for i, (old, new, g) in enumerate(zip(before, values(model), clipped, strict=True)):
        noise = C * noise_of(noise_seed(fixed_secret(5), 0, i), g.shape)
        np.testing.assert_allclose(old - new, (g + noise) / USERS, atol=2e-6)
    np.testing.assert_allclose(history["unprotected_error"], np.mean(used), rtol=1e-5)


def test_several_users_at_once_need_layers_that_take_their_copies():
    embedding = dict(target_layer_names=["token_embedding"])
    model = user_model(microbatch=2, lora_arguments=embedding)
    with pytest.raises(ValueError, match="`microbatch_size` must be 1 or None"):
        fit(model, labelled_rows(), groups=LABELS)


REJECTED = {
    "`groups` in `fit`: for each row, the label .* Received: groups=None": dict(groups=None),
    "one label per row, 30. Received: 29 labels": dict(groups=LABELS[:-1]),
    "list or array with one label per row. Received: str": dict(groups="patient_id"),
    "for every row, .* Received: None in row 2": dict(groups=["a", "b", None, *LABELS[3:]]),
    "for every row, .* Received: nan in row 1": dict(groups=["a", float("nan"), *LABELS[2:]]),
    "for every row, .* Received: ' ' in row 0": dict(groups=[" ", *LABELS[1:]]),
    "for every row, .* Received: 1.0 in row 0": dict(groups=np.ones(COUNT)),
    "for every row, .* Received: True in row 0": dict(groups=np.ones(COUNT, bool)),
    r"for every row, .* Received: \['p.'\] in row 0": dict(groups=LABELS[:, None]),
    "at least 2 users, .* Received: 1 user": dict(groups=["a"] * COUNT, batch_size=1),
    "`batch_size`, .* at most 10, .* Received: batch_size=11": dict(groups=LABELS, batch_size=11),
    "at most 10, .* Received: batch_size=32": dict(groups=LABELS, batch_size=None),
    "`sample_weight` must be from 0 to 1": dict(groups=LABELS, rows="heavy"),
    "protects one user. .* Received: 2 documents in a row": dict(groups=LABELS[:2], rows="packed"),
}


@pytest.mark.first_backend
@pytest.mark.parametrize("message", REJECTED)
def test_what_fit_rejects(message):
    arguments = {"rows": "plain", **REJECTED[message]}
    x, y, weight = some_rows(COUNT)
    rows = {
        "plain": (x, y, weight),
        "heavy": (x, y, 2 * weight),
        "packed": take(
            ({**x, "padding_mask": np.tile(np.array([1] * 4 + [2] * 5), (COUNT, 1))}, y, weight),
            [0, 1],
        ),
    }[arguments.pop("rows")]
    model = user_model()
    with pytest.raises(ValueError, match=message):
        fit(model, rows, **arguments)
    assert not model.privacy.ledger.runs


@pytest.mark.first_backend
def test_groups_without_users():
    model = language_model(2)
    with pytest.raises(ValueError, match="Received: `groups` and unit='row'"):
        fit(model, groups=["a"] * 24)
    model.compile(keras.optimizers.SGD(0.1))
    with pytest.raises(ValueError, match="Received: `groups` and no `privacy`"):
        fit(model, groups=["a"] * 24)


@pytest.mark.any_backend
def test_settings():
    assert privacy.DPSGD(1.0, unit="user").max_rows_per_group == 4
    assert privacy.DPSGD(1.0).max_rows_per_group is None
    with pytest.raises(ValueError, match='goes with `unit="user"`. Received: max_rows_per_group=2'):
        privacy.DPSGD(1.0, max_rows_per_group=2)
    with pytest.raises(ValueError, match="`max_rows_per_group` must be None or a positive integer"):
        privacy.DPSGD(1.0, unit="user", max_rows_per_group=0)
