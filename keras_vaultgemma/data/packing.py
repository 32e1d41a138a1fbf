"""Documents to full sequences: as many to a row as fit, so that no token is spent on padding.

Documents follow one another in order, each as `<bos> ids <eos>`, and every row takes the next `sequence_length` tokens.
A document that does not fit goes on in the next row. There it is a segment of its own, at positions from 0, and does
not see what came before; but the last token of a row still predicts the first of the next, if that is the same
document's. So every token of a document except its first is a label once, wherever rows end. Only the last row has
padding.

`padding_mask` has the number of each token's segment in its row, from 1, and 0 at padding: the backbone keeps segments
apart by it.
"""

import numbers

import keras
import numpy as np

from keras_vaultgemma import backend
from keras_vaultgemma.data.token_ids import check_ids


def batches(documents, preprocessor, batch_size, sequence_length=None):
    """Pack documents into batches as they are read.

    Args:
        documents: iterable of strings, or of rows of ids without `<bos>` and `<eos>`.
        preprocessor: `VaultGemmaCausalLMPreprocessor`.
        batch_size: rows of a batch; the last one may have fewer.
        sequence_length: tokens of a row. Defaults to the preprocessor's.

    Returns:
        Iterator of `(x, y, sample_weight)` for `fit`: `x = {"token_ids", "padding_mask"}` and `y`, `sample_weight`, all
        NumPy int32 [batch_size, sequence_length]. `y` is the next token of the same document; where there is none, `y`
        and `sample_weight` are 0. The same documents give the same batches.

    Raises:
        ValueError: for a size that is not positive or `documents` that are one string; when they are read, for a
            document that is neither a string nor ids of the vocabulary, or for no documents at all.
    """
    length = preprocessor.sequence_length if sequence_length is None else sequence_length
    for name, value in (("batch_size", batch_size), ("sequence_length", length)):
        if not isinstance(value, numbers.Integral) or value < 1:
            raise ValueError(f"`{name}` must be a positive integer. Received: {name}={value!r}")
    if isinstance(documents, (str, bytes, dict)):
        raise ValueError(
            f"`documents` must be an iterable of strings or of rows of ids. Received: {documents!r}"
        )
    return _batches(documents, preprocessor, batch_size * length, length)


def _batches(documents, preprocessor, size, length):
    start, end = preprocessor.special_ids
    tokens, owners = (
        [],
        [],
    )  # The tokens that wait for a row, and the number of each one's document.
    for i, document in enumerate(documents):
        row = start + _row(document, preprocessor.tokenizer, i) + end
        tokens += row
        owners += [i + 1] * len(row)
        # A batch needs one token more than fills it: its last label.
        taken = (len(tokens) - 1) // size * size
        for first in range(0, taken, size):
            part = slice(first, first + size + 1)
            yield _batch(tokens[part], owners[part], length)
        del tokens[:taken], owners[:taken]
    if not tokens:
        raise ValueError("`documents` must have one document or more. Received: none")
    padding = -len(tokens) % length + 1
    yield _batch(
        tokens + [preprocessor.tokenizer.pad_token_id] * padding, owners + [0] * padding, length
    )


def _row(document, tokenizer, i):
    """The ids of document `i`."""
    if isinstance(document, (str, bytes)):
        return tokenizer.tokenize(
            [document.decode("utf-8") if isinstance(document, bytes) else document]
        )[0]
    row = np.asarray(document)
    if row.ndim != 1 or (row.size and row.dtype.kind not in "iu"):
        raise ValueError(
            f"Every document must be a string or a row of ids. Received: document {i} is {document!r}"
        )
    check_ids(row, tokenizer.vocabulary_size())
    return row.tolist()


def _batch(tokens, owners, length):
    """`(x, y, sample_weight)` of whole rows, from their tokens and one more and the document of each, 0 for padding."""
    tokens, owners = np.array(tokens, "int32"), np.array(owners, "int32")
    token_ids, next_ids = tokens[:-1].reshape(-1, length), tokens[1:].reshape(-1, length)
    owner, next_owner = owners[:-1].reshape(-1, length), owners[1:].reshape(-1, length)
    segments = np.where(owner > 0, owner - owner[:, :1] + 1, 0)
    weights = ((next_owner == owner) & (owner > 0)).astype("int32")
    return {"token_ids": token_ids, "padding_mask": segments}, next_ids * weights, weights


class PackedDataset(keras.utils.PyDataset):
    """What `batches` yields, packed once and kept in memory (16 bytes a token): for `fit` on every backend.

    ```python
    model.fit(PackedDataset(texts, model.preprocessor, batch_size=8), epochs=3)
    ```

    Args:
        documents, preprocessor, batch_size, sequence_length: as for `batches`, with the same errors, all of them here.
    """

    def __init__(self, documents, preprocessor, batch_size, sequence_length=None):
        super().__init__()
        self.batches = list(batches(documents, preprocessor, batch_size, sequence_length))

    def __len__(self):
        return len(self.batches)

    def __getitem__(self, index):
        return self.batches[index]


def tensorflow_dataset(documents, preprocessor, batch_size, sequence_length=None):
    """What `batches` yields as a `tf.data.Dataset`, packed as it is read; on the TensorFlow backend.

    Args:
        documents, preprocessor, batch_size, sequence_length: as for `batches`. Documents are iterated over anew in each
            epoch: an iterator lasts for one.

    Raises:
        ValueError: on another backend, and as `batches` does.
    """

    def make_batches():
        return batches(documents, preprocessor, batch_size, sequence_length)

    make_batches()  # It packs nothing yet, but refuses sizes.
    rows = keras.KerasTensor((None, sequence_length or preprocessor.sequence_length), "int32")
    return backend.tensorflow_dataset(
        make_batches, ({"token_ids": rows, "padding_mask": rows}, rows, rows)
    )
