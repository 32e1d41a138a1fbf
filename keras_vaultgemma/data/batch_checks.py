"""Checks of token ids, labels and weights before Keras gets them."""

import keras
import numpy as np

from keras_vaultgemma import backend
from keras_vaultgemma.data.token_ids import check_ids, check_rank


def check_batch(x, y, sample_weight, vocabulary_size, labels_are_ids=True, needs_labels=False):
    """Raise ValueError for token ids, labels or weights that a model cannot be trained on.

    Values are checked where they are known, which is not so in the graph of a `tf.data.Dataset`.

    Args:
        x: dict of `token_ids` and `padding_mask`.
        y: labels, or None.
        sample_weight: weights of the labels, or None.
        vocabulary_size: int. V, against which ids are checked.
        labels_are_ids: bool. If True, labels whose weight is not 0 are checked against V too.
            Defaults to True.
        needs_labels: bool. If True, also check that there are labels and a mask, their shapes, and
            the signs of the weights. Defaults to False.
    """
    check_token_ids(x)
    if needs_labels:
        _check_form(x, y, sample_weight)
    token_ids, weights = _array(x["token_ids"]), _array(sample_weight)
    if token_ids is not None:
        check_ids(token_ids, vocabulary_size)
    if needs_labels and weights is not None and (weights < 0).any():
        raise ValueError(
            "`sample_weight` must be at least 0, because the loss is a mean over the weights. "
            f"Received: {weights[weights < 0].flat[0]}"
        )
    if labels_are_ids:
        mask = _array(x["padding_mask"]) if needs_labels and sample_weight is None else None
        _check_labels(_array(y), weights if mask is None else mask, vocabulary_size)


def as_array(x, name):
    """Return nested lists as a NumPy array, and anything else as it is.

    Args:
        x: list, array, tensor or None.
        name: string. Name of the argument in the message.

    Raises:
        ValueError: If the lists differ in length.
    """
    if not isinstance(x, (list, tuple)):
        return x
    try:
        return np.array(x)
    except ValueError as error:
        raise ValueError(
            f"`{name}` must have rows of one length, padded on the right. "
            f"Received: a list of {len(x)} items of different shapes"
        ) from error


def check_token_ids(x):
    """Raise ValueError unless `x` is a dict of a batch of token ids with its mask."""
    if "padding_mask" not in x:
        raise ValueError(
            "A dict of token ids must have the keys 'token_ids' and 'padding_mask', which is 1 at "
            f"tokens and 0 at padding. Received: {sorted(x)}"
        )
    check_rank(x["token_ids"])


def _check_form(x, y, sample_weight):
    if y is None:
        raise ValueError(
            "Token ids need labels `y`: the id of the next token at each position, with "
            "`sample_weight` 0 where there is none. Texts, pairs and chats have their own. "
            "Received: y=None"
        )
    shape = _known_shape(x["token_ids"])
    for name, value, shapes in (
        ("padding_mask", x["padding_mask"], [shape]),
        ("y", y, [shape]),
        ("sample_weight", sample_weight, [shape, shape[:1], (*shape[:1], 1)]),
    ):
        received = _known_shape(value)
        if received is not None and None not in (*received, *shape) and received not in shapes:
            legal = " or ".join(str(one) for one in shapes[:2])
            raise ValueError(
                f"`{name}` must have the shape {legal}, as `token_ids` have {shape}. "
                f"Received: {received}"
            )


def _known_shape(x):
    shape = getattr(x, "shape", None)
    return None if shape is None else tuple(shape)


def _array(x):
    """Return an array or tensor with a concrete value as a NumPy array, anything else as None."""
    if not hasattr(x, "shape") or backend.is_symbolic_tensorflow(x):
        return None
    return keras.ops.convert_to_numpy(x)


def _check_labels(y, weights, vocabulary_size):
    """Raise ValueError for labels outside the vocabulary whose weight is not 0. `y` may be None."""
    if y is None:
        return
    if weights is not None:
        # The loss broadcasts weights of whole rows in the same way.
        weights = weights.reshape(*weights.shape, *[1] * (y.ndim - weights.ndim))
        y = y[np.broadcast_to(weights, y.shape) != 0]
    check_ids(y, vocabulary_size, "Labels `y` whose sample weight is not 0")
