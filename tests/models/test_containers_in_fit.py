"""`fit`, `evaluate`, `score` and packing take the containers that users bring, as they take lists."""

import warnings

import keras
import numpy as np
import pytest
from common import LINES, one_layer_preset, to_numpy

from keras_vaultgemma import PackedDataset, TrainingCheckpoint, VaultGemmaCausalLM, backend

ROWS = [{"text": line, "id": i} for i, line in enumerate(LINES)]
PAIRS = {"prompts": LINES[:2], "responses": LINES[2:]}


class Again:
    """An iterable that can be read again, without a length."""

    def __init__(self, items):
        self.items = items

    def __iter__(self):
        return iter(self.items)


def frame():
    return pytest.importorskip("pandas").DataFrame(ROWS)


def dataset():
    return pytest.importorskip("datasets").Dataset.from_list(ROWS)


def loader(items, **options):
    if backend.NAME != "torch":
        pytest.skip("imports PyTorch, which other backends never do")
    from torch.utils.data import DataLoader

    return DataLoader(items, **options)


def tf_data(items):
    if backend.NAME != "tensorflow":
        pytest.skip("imports TensorFlow, which other backends never do")
    import tensorflow as tf

    return tf.data.Dataset.from_tensor_slices(items)


def columns():
    return {name: [row[name] for row in ROWS] for name in ROWS[0]}


TABLES = {
    "rows": lambda: ROWS,
    "columns": columns,
    "array": lambda: np.array(LINES),
    "frame": frame,
    "Series": lambda: frame()["text"],
    "Dataset": dataset,
    "Column": lambda: dataset()["text"],
}
STREAMS = {
    "samples": lambda: Again(LINES),
    "batches": lambda: Again([LINES[:2], LINES[2:]]),
    "rows": lambda: Again(ROWS),
    "IterableDataset": lambda: dataset().to_iterable_dataset(),
    "DataLoader of strings": lambda: loader(LINES, batch_size=2),
    "DataLoader of dicts": lambda: loader(ROWS, batch_size=2),
    "DataLoader of a Dataset": lambda: loader(dataset(), batch_size=2),
    "DataLoader of rows": lambda: loader(ROWS, batch_size=2, collate_fn=list),
    "DataLoader without batches": lambda: loader(LINES, batch_size=None),
    "Grain": lambda: pytest.importorskip("grain").MapDataset.source(LINES),
    "Grain batches": lambda: pytest.importorskip("grain").MapDataset.source(ROWS).batch(2),
    "Grain stream": lambda: pytest.importorskip("grain").MapDataset.source(LINES).to_iter_dataset(),
    "tf.data": lambda: tf_data(LINES),
    "tf.data of dicts": lambda: tf_data(columns()),
    "tf.data in batches": lambda: tf_data(columns()).batch(2),
}


@pytest.fixture(scope="module")
def model():
    model = VaultGemmaCausalLM.from_preset(one_layer_preset())
    model.preprocessor.sequence_length = 64
    model.compile(keras.optimizers.SGD(1e-2))
    model.start = [to_numpy(v).copy() for v in model.variables]
    return model


def trained(model, data, **arguments):
    """Two epochs from the same weights: the weights, and what was logged."""
    for variable, value in zip(model.variables, model.start, strict=True):
        variable.assign(value)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        history = model.fit(data, **{"batch_size": 2, "epochs": 2, "verbose": 0, **arguments})
    return [to_numpy(v).copy() for v in model.trainable_variables], history.history


@pytest.fixture(scope="module")
def expected(model):
    return trained(model, LINES, shuffle=False, validation_data=LINES)


def check_equal(found, expected):
    for a, b in zip(found[0], expected[0], strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
    assert found[1].keys() == expected[1].keys()
    for name, values in expected[1].items():
        np.testing.assert_allclose(found[1][name], values, rtol=1e-5)


@pytest.mark.first_backend
@pytest.mark.parametrize("make", TABLES.values(), ids=TABLES)
def test_tables(model, expected, make):
    check_equal(trained(model, make(), shuffle=False, validation_data=make()), expected)
    np.testing.assert_array_equal(model.score(make()), model.score(LINES))


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(
            make,
            id=name,
            # Compiling for a dataset takes seconds on TensorFlow.
            marks=[] if name in ("samples", "tf.data of dicts") else pytest.mark.first_backend,
        )
        for name, make in STREAMS.items()
    ],
)
def test_streams(model, expected, make):
    check_equal(trained(model, make(), validation_data=make()), expected)


@pytest.mark.first_backend
def test_generators_of_samples(model, expected):
    once = trained(model, LINES, shuffle=False, epochs=1)
    for make in (lambda: iter(LINES), lambda: iter(ROWS), lambda: iter([LINES[:2], LINES[2:]])):
        check_equal(trained(model, make(), epochs=1, steps_per_epoch=2), once)


@pytest.mark.first_backend
def test_steps_of_an_endless_stream(model, expected):
    class Endless(Again):
        def __iter__(self):
            while True:
                yield from self.items

    for stream in (Again(LINES), Endless(LINES)):
        found = trained(
            model, stream, steps_per_epoch=2, validation_data=stream, validation_steps=2
        )
        check_equal(found, expected)


@pytest.mark.first_backend
@pytest.mark.parametrize(
    "make",
    [
        lambda texts, pairs, chats: (texts, pairs, chats),
        lambda *data: map(Again, ([{"text": t} for t in data[0]], trl_rows(), chat_rows())),
        lambda *data: (loader(data[0]), loader(trl_rows()), loader(chat_rows(), collate_fn=list)),
    ],
    ids=["lists", "streams", "DataLoader"],
)
def test_evaluate(model, make):
    chats = [row["messages"] for row in chat_rows()]
    kinds = [LINES, PAIRS, chats]
    for data, plain in zip(make(LINES, PAIRS, chats), kinds, strict=True):
        found = model.evaluate(data, batch_size=1, verbose=0)
        np.testing.assert_allclose(found, model.evaluate(plain, batch_size=1, verbose=0), rtol=1e-5)


def trl_rows():
    return [
        {"prompt": prompt, "completion": answer}
        for prompt, answer in zip(*PAIRS.values(), strict=True)
    ]


def chat_rows():
    return [
        {
            "messages": [
                {"role": "user", "content": row["prompt"]},
                {"role": "assistant", "content": row["completion"]},
            ]
        }
        for row in trl_rows()
    ]


@pytest.mark.first_backend
def test_a_resumable_run_takes_tables_and_no_streams(model, expected, tmp_path):
    checkpoint = TrainingCheckpoint(tmp_path)
    trained(model, ROWS, callbacks=[checkpoint], epochs=1)
    with pytest.raises(
        ValueError, match="type stream, which can be read into a list of rows first"
    ):
        trained(model, Again(LINES), callbacks=[TrainingCheckpoint(tmp_path / "stream")])


@pytest.mark.parametrize(
    "items, message",
    [
        ({"note": LINES}, r"^Data with columns must have 'text'.*Received: \['note'\]"),
        ((LINES, LINES), "^Pairs in a `tf.data.Dataset` must be dicts"),
        ({"text": [1, 2]}, "^A `tf.data.Dataset` must have texts or pairs as strings"),
        ({"messages": ["a"]}, "^A `tf.data.Dataset` must have .*; pass chats in a list"),
        ({"messages": {"role": [["user"]], "content": [["a"]]}}, "; pass chats in a list"),
    ],
)
def test_what_tf_data_cannot_have(model, items, message):
    with pytest.raises(ValueError, match=message):
        model.fit(tf_data(items).batch(2), verbose=0)


@pytest.mark.parametrize(
    "data",
    [
        lambda: iter([{"token_ids": np.ones(5, "int32"), "padding_mask": np.ones(5, "int32")}]),
        lambda: tf_data({"token_ids": np.ones((2, 5)), "padding_mask": np.ones((2, 5))}),
    ],
    ids=["generator", "tf.data"],
)
def test_ids_without_a_batch_axis(model, data):
    with pytest.raises(ValueError, match=r"\[batch, length\].*Received: shape \(5,\)"):
        model.fit(data(), verbose=0)


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(
            make, id=name, marks=[] if name.startswith("tf") else pytest.mark.first_backend
        )
        for kinds in (TABLES, STREAMS)
        for name, make in kinds.items()
    ],
)
def test_packing(tiny, make):
    packed = PackedDataset(make(), tiny.preprocessor, 2)
    expected = PackedDataset(LINES, tiny.preprocessor, 2)
    assert len(packed) == len(expected)
    for i in range(len(expected)):
        keras.tree.map_structure(np.testing.assert_array_equal, packed[i], expected[i])
