"""Tokenization inside `tf.data` maps, by TensorFlow's operations, next to SentencePiece's own."""

import keras
import numpy as np
import pytest
from common import one_layer_preset
from hard_texts import HARD

from keras_vaultgemma import VaultGemmaCausalLM, VaultGemmaCausalLMPreprocessor

pytestmark = pytest.mark.skipif(
    keras.config.backend() != "tensorflow",
    reason="imports TensorFlow, which other backends never do",
)

PAIRS = {
    "prompts": ["", "The fox", "Once upon a time there was a king", "Once upon a time"],
    "responses": ["said no.", "", "a", "who had a daughter that he loved above all the world"],
}


@pytest.fixture(scope="module")
def tokenizer():
    return VaultGemmaCausalLMPreprocessor.from_preset("vaultgemma_tiny").tokenizer


def as_dataset(data, batch_size):
    import tensorflow as tf

    dataset = tf.data.Dataset.from_tensor_slices(data)
    return dataset.batch(batch_size) if batch_size else dataset


@pytest.mark.parametrize("batch_size", [None, 7])
def test_ids_of_hard_texts(tokenizer, batch_size):
    rows = []
    for ids in as_dataset(HARD, batch_size).map(tokenizer):
        rows += ids.to_list() if batch_size else [ids.numpy().tolist()]
    assert rows == [list(row) for row in tokenizer(HARD)]


@pytest.mark.parametrize("truncate", ["prompt_start", "prompt_end", "row_end"])
@pytest.mark.parametrize(
    "data, special, batch_size",
    [(HARD[::2], False, None), (PAIRS, True, 100)],
    ids=["texts", "pairs"],
)
def test_rows(tokenizer, truncate, data, special, batch_size):
    preprocessor = VaultGemmaCausalLMPreprocessor(
        tokenizer, 9, add_start_token=special, add_end_token=special, truncate=truncate
    )
    expected = keras.tree.flatten(preprocessor(data))
    batches = map(keras.tree.flatten, as_dataset(data, batch_size).map(preprocessor))
    for column, array in zip(zip(*batches, strict=True), expected, strict=True):
        column = column[0].numpy() if batch_size else np.stack(column)
        assert np.array_equal(column, array) and column.dtype == "int32"


def test_there_is_no_python_in_the_graph(tokenizer):
    import tensorflow as tf

    preprocessor = VaultGemmaCausalLMPreprocessor(tokenizer, 8)
    graph = tf.function(preprocessor.call).get_concrete_function(tf.TensorSpec([None], tf.string))
    kinds = {operation.type for operation in graph.graph.get_operations()}
    assert "SentencepieceTokenizeOp" in kinds
    assert not any("PyFunc" in kind for kind in kinds)


def test_bytes_that_are_no_text(tokenizer):
    import tensorflow as tf

    with pytest.raises(tf.errors.InvalidArgumentError, match="Invalid formatting"):
        list(as_dataset([b"\xff"], None).map(tokenizer))


def test_fit_counts_truncated_rows():
    model = VaultGemmaCausalLM.from_preset(one_layer_preset())
    model.preprocessor.sequence_length = 4
    with pytest.warns(UserWarning, match="1 of 4 rows were longer than sequence_length=4"):
        model.evaluate(as_dataset(["a"] * 3 + ["Once upon a time there was"], 2), verbose=0)
