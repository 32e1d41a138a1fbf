import keras
import numpy as np
import pytest

from keras_vaultgemma.training_data import prepare


def count_letters(x, y=None, sample_weight=None):
    """Stands in for a preprocessor: a batch of texts to the lengths of its texts."""
    return {"token_ids": np.array([[len(text)] for text in x])}, y, sample_weight


class Batches(keras.utils.PyDataset):
    def __len__(self):
        return 2

    def __getitem__(self, index):
        return ["a" * (index + 1), "b"]


def lengths(batch):
    return batch[0]["token_ids"].tolist()


def test_texts_are_preprocessed_at_once():
    assert lengths(prepare(["a", "bcd"], None, None, count_letters, 10)) == [[1], [3]]


def test_streams_are_preprocessed_batch_by_batch():
    dataset, y, weight = prepare(Batches(), None, None, count_letters, 10)
    assert isinstance(dataset, keras.utils.PyDataset) and (y, weight) == (None, None)
    assert [lengths(dataset[i]) for i in range(len(dataset))] == [[[1], [1]], [[2], [1]]]
    stream, _, _ = prepare(iter([["a"], (["bc"], 1)]), None, None, count_letters, 10)
    first, second = stream
    assert lengths(first) == [[1]] and lengths(second) == [[2]] and second[1] == 1


@pytest.mark.skipif(keras.config.backend() != "tensorflow", reason="imports TensorFlow, which other backends never do")
def test_tf_data(tiny):
    import tensorflow as tf

    texts = ["Once upon a time", "The fox"]
    dataset = tf.data.Dataset.from_tensor_slices(texts).batch(2)
    mapped, _, _ = prepare(dataset, None, None, tiny.preprocess_samples, 4096)
    (batch,) = mapped.as_numpy_iterator()
    assert lengths(batch) == tiny.preprocessor(texts)[0]["token_ids"].tolist()


def test_ids_pass_unchanged_and_are_checked():
    x = {"token_ids": np.array([[1, 9]]), "padding_mask": np.ones((1, 2))}
    assert prepare(x, "labels", "weights", count_letters, 10) == (x, "labels", "weights")
    with pytest.raises(ValueError, match="from 0 to 8. Received: 9"):
        prepare(x, None, None, None, 9)


@pytest.mark.parametrize("x, message", [([], "non-empty list"), (["a", None], "item 1 is None")])
def test_bad_data(x, message):
    with pytest.raises(ValueError, match=message):
        prepare(x, None, None, count_letters, 10)
