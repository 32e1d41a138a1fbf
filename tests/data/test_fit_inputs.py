import warnings

import keras
import numpy as np
import pytest

from keras_vaultgemma.data.fit_inputs import TruncationCounter, prepare_fit_inputs


def count_letters(x, y=0, sample_weight=0):
    """Preprocess a batch of texts to their lengths."""
    ids = np.array([[len(text)] for text in x])
    return {"token_ids": ids, "padding_mask": np.ones_like(ids)}, y, sample_weight


class Batches(keras.utils.PyDataset):
    def __len__(self):
        return 2

    def __getitem__(self, index):
        return ["a" * (index + 1), "b"]


def lengths(batch):
    return batch[0]["token_ids"].tolist()


def test_texts_are_preprocessed_at_once():
    assert lengths(prepare_fit_inputs(["a", "bcd"], None, None, count_letters, 10)) == [[1], [3]]


def test_streams_are_preprocessed_batch_by_batch():
    dataset, y, weight = prepare_fit_inputs(Batches(), None, None, count_letters, 10)
    assert isinstance(dataset, keras.utils.PyDataset) and (y, weight) == (None, None)
    assert [lengths(dataset[i]) for i in range(len(dataset))] == [[[1], [1]], [[2], [1]]]
    stream, _, _ = prepare_fit_inputs(iter([["a"], (["bc"], 1)]), None, None, count_letters, 10)
    first, second = stream
    assert lengths(first) == [[1]] and lengths(second) == [[2]] and second[1] == 1


def test_a_single_sample_gets_a_batch_axis(tiny):
    x, y, weight = prepare_fit_inputs("The fox", None, None, tiny.preprocess_samples, 4096)
    assert x["token_ids"].shape == x["padding_mask"].shape == y.shape == weight.shape == (1, 512)


@pytest.mark.skipif(
    keras.config.backend() != "tensorflow",
    reason="imports TensorFlow, which other backends never do",
)
def test_tf_data(tiny):
    import tensorflow as tf

    texts = ["Once upon a time", "The fox"]
    dataset = tf.data.Dataset.from_tensor_slices(texts).batch(2)
    mapped, _, _ = prepare_fit_inputs(dataset, None, None, tiny.preprocess_samples, 4096)
    (batch,) = mapped.as_numpy_iterator()
    assert lengths(batch) == tiny.preprocessor(texts)[0]["token_ids"].tolist()


def test_ids_pass_unchanged_and_are_checked():
    x = {"token_ids": np.array([[1, 9]]), "padding_mask": np.ones((1, 2))}
    assert prepare_fit_inputs(x, "labels", "weights", count_letters, 10) == (x, "labels", "weights")
    with pytest.raises(ValueError, match="from 0 to 8. Received: 9"):
        prepare_fit_inputs(x, None, None, None, 9)


@pytest.mark.parametrize("weights", [None, np.ones(2), np.ones((2, 1)), np.array([[1, 0], [1, 1]])])
@pytest.mark.parametrize("label", [-100, 10])
def test_labels_of_nonzero_weight_are_checked(label, weights):
    x = {"token_ids": np.array([[1, 9], [2, 3]]), "padding_mask": np.ones((2, 2))}
    message = f"^Labels `y` whose sample weight is not 0 must be from 0 to 9. Received: {label}$"
    with pytest.raises(ValueError, match=message):
        prepare_fit_inputs(x, np.array([[label, 1], [3, 4]]), weights, None, 10)
    with pytest.raises(ValueError, match=message):
        next(
            prepare_fit_inputs(
                iter([(x, np.array([[label, 1], [3, 4]]), weights)]),
                None,
                None,
                lambda *batch: batch,
                10,
            )[0]
        )
    y = np.array([[label, 1], [3, 4]])
    assert prepare_fit_inputs(x, y, weights, None, 10, labels_are_ids=False) == (x, y, weights)


@pytest.mark.parametrize(
    "weights", [np.array([0, 1]), np.array([[0], [1]]), np.array([[0, 1], [1, 1]])]
)
def test_labels_of_weight_zero_are_not_checked(weights):
    x = {"token_ids": np.array([[1, 9], [2, 3]]), "padding_mask": np.ones((2, 2))}
    y = np.array([[-100, 1], [3, 4]])
    assert prepare_fit_inputs(x, y, weights, None, 10) == (x, y, weights)


@pytest.mark.parametrize("name", ["y", "sample_weight"])
@pytest.mark.parametrize(
    "make", [lambda: ["a", "b"], Batches, lambda: iter([["a"]])], ids=["texts", "PyDataset", "iter"]
)
def test_labels_with_texts_raise(make, name):
    labels = {"y": None, "sample_weight": None, name: [1, 0]}
    with pytest.raises(
        ValueError, match=f"^`{name}` must be None with texts.*Received: {name} of type list"
    ):
        prepare_fit_inputs(make(), preprocess=count_letters, vocabulary_size=10, **labels)


def test_no_rows_raise():
    x = {"token_ids": np.zeros((0, 5), int), "padding_mask": np.zeros((0, 5), int)}
    with pytest.raises(ValueError, match="at least one batch. Received: none"):
        prepare_fit_inputs(x, np.zeros((0, 5), int), None, None, 10)


@pytest.mark.parametrize(
    "x, message",
    [
        ([], "non-empty list"),
        (["a", None], "item 1 is None"),
        ({"prompts": [], "responses": []}, "non-empty list"),
        (
            {"prompt": ["a"], "responses": ["b"]},
            r"keys 'prompts' and 'responses'.*Received: \['prompt', 'responses'\]",
        ),
    ],
)
def test_bad_data(tiny, x, message):
    with pytest.raises(ValueError, match=message):
        prepare_fit_inputs(x, None, None, tiny.preprocess_samples, 4096)


def test_empty_streams_raise():
    class NoBatches(Batches):
        def __len__(self):
            return 0

    with pytest.raises(ValueError, match="at least one batch. Received: none"):
        prepare_fit_inputs(NoBatches(), None, None, count_letters, 10)
    stream, _, _ = prepare_fit_inputs(iter([]), None, None, count_letters, 10)
    with pytest.raises(ValueError, match="at least one batch. Received: none"):
        next(stream)


@pytest.mark.skipif(
    keras.config.backend() != "tensorflow",
    reason="imports TensorFlow, which other backends never do",
)
def test_empty_tf_data_raises():
    import tensorflow as tf

    with pytest.raises(ValueError, match="at least one batch. Received: none"):
        prepare_fit_inputs(
            tf.data.Dataset.from_tensor_slices(["a"]).batch(1).take(0),
            None,
            None,
            count_letters,
            10,
        )


def test_truncations_are_counted():
    """Of three labels: the first row just fits, the second is truncated, the third loses its labels."""
    rows, weights = [[1] * 4, [1] * 5, [1] * 9], np.array([[0, 0, 0], [0, 1, 1], [0, 0, 0]])
    truncations = TruncationCounter()
    truncations.count(rows, weights)
    truncations.count(rows[:2], weights[:2])
    truncations.count(rows, weights)  # read again
    message = (
        "3 of 5 rows were longer than sequence_length=3 and were truncated. "
        "3 of 5 rows have no label to learn and are left out."
    )
    with pytest.warns(UserWarning) as caught:
        truncations.report()
    assert [str(warning.message) for warning in caught] == [message]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        truncations.report()
        truncations.count(rows[:1], weights[1:2])
        truncations.report()
    with (
        pytest.warns(
            UserWarning,
            match=r"^1 of 1 rows were longer than sequence_length=3 and were truncated\.$",
        ),
        truncations,
    ):
        truncations.count(rows[1:2], weights[1:2])
