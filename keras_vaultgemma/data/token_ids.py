"""Rows of token ids on the host: checked, padded to arrays, and cut to the columns in use."""

import itertools

import keras
import numpy as np


def pad_rows(rows, length, pad_id=0):
    """Pad rows of token ids to one length, on the right.

    Args:
        rows: list of B lists of ints.
        length: int. Number of columns T of the result. Longer rows are truncated.
        pad_id: int. Id that fills the end of short rows. Defaults to 0.

    Returns:
        Tuple `(token_ids, mask)`, int32 NumPy arrays of shape `[B, T]`. The mask is 1 at tokens and
        0 at padding.
    """
    ids = np.full((len(rows), length), pad_id, "int32")
    mask = np.zeros((len(rows), length), "int32")
    for i, row in enumerate(rows):
        row = row[:length]
        ids[i, : len(row)], mask[i, : len(row)] = row, 1
    return ids, mask


def columns_in_use(*masks):
    """Return how many columns rows need, those at the end left out that are padding in all of them.

    The number is rounded up to 16, 24, 32, 48, 64, 96 and so on, because each is compiled once.

    Args:
        *masks: arrays of shape `[B, T]`, at least one. 0 at padding.
    """
    used = [np.flatnonzero(mask.any(axis=0)).max(initial=0) + 1 for mask in masks]
    sizes = (size << doublings for doublings in itertools.count() for size in (16, 24))
    return min(next(size for size in sizes if size >= max(used)), masks[0].shape[1])


def first_columns(data, columns):
    """Return nested arrays with the first `columns` of those with a second axis; None means all."""
    if columns is None:
        return data
    return keras.tree.map_structure(lambda x: x[:, :columns] if np.ndim(x) > 1 else x, data)


def unpad_rows(ids, mask):
    """Return the token ids of each row without its padding, on whichever side that is.

    Args:
        ids: int array of shape `[B, T]`.
        mask: int array of shape `[B, T]`. 0 at padding.

    Returns:
        List of B lists of ints.

    Raises:
        ValueError: If the two arrays differ in shape or are not two-dimensional.
    """
    ids, mask = np.asarray(ids), np.asarray(mask)
    if ids.ndim != 2 or ids.shape != mask.shape:
        raise ValueError(
            "`token_ids` and `padding_mask` must both have the shape [batch, length]. "
            f"Received: {ids.shape} and {mask.shape}"
        )
    return [row[is_token].tolist() for row, is_token in zip(ids, mask.astype(bool), strict=True)]


def check_ids(ids, vocabulary_size, what="Token ids"):
    """Raise ValueError for ids outside the vocabulary, which a lookup would silently clamp or wrap.

    Args:
        ids: int array or nested list of any shape.
        vocabulary_size: int. V; legal ids are from 0 to V - 1.
        what: string. Subject of the message. Defaults to "Token ids".
    """
    ids = np.asarray(ids)
    if ids.size and (ids.min() < 0 or ids.max() >= vocabulary_size):
        wrong = ids[(ids < 0) | (ids >= vocabulary_size)].flat[0]
        raise ValueError(f"{what} must be from 0 to {vocabulary_size - 1}. Received: {wrong}")


def check_rank(token_ids):
    """Raise ValueError for token ids that are known to have no batch axis."""
    shape = token_ids.shape if hasattr(token_ids, "shape") else None
    if shape is not None and getattr(shape, "rank", 2) is not None and len(shape) != 2:
        raise ValueError(
            "Token ids must have the shape [batch, length]: a stream or `PyDataset` has batches, "
            f"as `.batch(batch_size)` of a dataset makes them. Received: shape {tuple(shape)}"
        )


def check_lengths(rows, max_length):
    """Raise ValueError if a row of token ids is longer than `max_length`.

    Args:
        rows: list of lists of ints.
        max_length: int. Largest legal number of tokens.
    """
    for i, row in enumerate(rows):
        if len(row) > max_length:
            raise ValueError(
                f"A prompt must have at most max_length={max_length} tokens, `<bos>` included. "
                f"Received: {len(row)} tokens in prompt {i}"
            )
