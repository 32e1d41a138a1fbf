"""Rows of token ids on the host: checked, and padded to arrays. NumPy only."""

import numpy as np


def pad_rows(rows, length, pad_id=0):
    """Rows of ids to `(ids, mask)`, int32 [B, length] each, padded on the right; a longer row is cut."""
    ids = np.full((len(rows), length), pad_id, "int32")
    mask = np.zeros((len(rows), length), "int32")
    for i, row in enumerate(rows):
        row = row[:length]
        ids[i, : len(row)], mask[i, : len(row)] = row, 1
    return ids, mask


def unpad_rows(ids, mask):
    """Arrays [B, T] to rows of ids, wherever the padding stands.

    Raises:
        ValueError: where the two differ in shape or are not two-dimensional.
    """
    ids, mask = np.asarray(ids), np.asarray(mask)
    if ids.ndim != 2 or ids.shape != mask.shape:
        raise ValueError(
            f"`token_ids` and `padding_mask` must both be [batch, length]. Received: {ids.shape} and {mask.shape}"
        )
    return [row[kept.astype(bool)].tolist() for row, kept in zip(ids, mask, strict=True)]


def check_ids(ids, vocabulary_size, what="Token ids"):
    """Raise ValueError where ids are outside [0, vocabulary_size): a lookup would clamp or wrap them in silence.

    Args:
        what: the ids are, for the error.
    """
    ids = np.asarray(ids)
    if ids.size and (ids.min() < 0 or ids.max() >= vocabulary_size):
        wrong = ids[(ids < 0) | (ids >= vocabulary_size)].flat[0]
        raise ValueError(f"{what} must be from 0 to {vocabulary_size - 1}. Received: {wrong}")


def check_lengths(rows, max_length):
    """Raise ValueError where a row of ids is longer than `max_length`."""
    for i, row in enumerate(rows):
        if len(row) > max_length:
            raise ValueError(
                f"A prompt must have at most max_length={max_length} tokens, `<bos>` included. "
                f"Received: {len(row)} tokens in prompt {i}"
            )
