"""Cross-entropy from hidden states and the head's table, a chunk of tokens at a time: never a [B, T, V] tensor.

The logits of one row of 1,024 tokens are 1.05 GB in float32 with a vocabulary of 256,000, before softmax and gradients.
Here those of a chunk live only until the gradient of its losses is known, and that is known in the forward pass: the
gradient of a weighted sum of losses with respect to a token's logits, w (softmax - one-hot), needs nothing that comes
later but one factor. So each product with the table is computed once, the backward pass multiplies by that factor, and
the loop over chunks, which is not differentiated, ends where the tokens that count end.
"""

from typing import NamedTuple

from keras import ops

from keras_vaultgemma import backend
from keras_vaultgemma.layers.int8 import int8_matmul
from keras_vaultgemma.layers.soft_cap import soft_cap

CHUNK_LOGITS = 2**25
"""Logits of a chunk at most: 128 MiB in float32, of which three copies are alive at a time.

Every chunk reads the whole table. With VaultGemma's vocabulary these are 131 tokens; half as many take half as long
again, twice as many are 20 % faster on JAX and 4 % on TensorFlow in training (2 cores).
"""

PART = 2**14
"""Rows of an int8 table that are floats at a time."""


class Factor(NamedTuple):
    """One of the products `rows @ table^T` whose sum is the logits before the soft cap.

    Attributes:
        rows: [N, K], hidden states or what an adapter makes of them.
        table: [V, K].
        scale: None; or [V], which the rows of an int8 table were multiplied by before they were rounded.
        quantizer: of the rows, where the table is int8; None where these stay as they are.
        is_trained: whether the table gets a gradient. The rows always do.
    """

    rows: object
    table: object
    scale: object = None
    quantizer: object = None
    is_trained: bool = False

    def product(self):
        """[N, V], float32."""
        if self.scale is not None:
            return int8_matmul(self.rows, self.table, self.scale, self.quantizer, transposed=True)
        return ops.cast(backend.matmul(self.rows, self.table, transposed=True), "float32")

    def gradients(self, upstream):
        """(that of rows, that of the table in float32 or None) for the gradient of the product, float32 [N, V]."""
        if self.scale is not None:
            # Straight through the rounding of the rows.
            return _matmul_in_parts(upstream / ops.cast(self.scale, "float32"), self.table), None
        upstream = ops.cast(upstream, self.rows.dtype)
        of_rows = ops.matmul(upstream, self.table)
        if not self.is_trained:
            return of_rows, None
        return of_rows, ops.cast(ops.matmul(ops.transpose(upstream), self.rows), "float32")


def check_table(embedding):
    """Raise ValueError for a `ReversibleEmbedding` whose table is neither in floating point nor int8."""
    if embedding.quantization_mode not in (None, "int8"):
        raise ValueError(
            "The loss needs an embedding in floating point or int8; `predict` and `score` with scoring_mode='logits' "
            f"work with others. Received: {embedding.path} in {embedding.quantization_mode}"
        )


def head_factors(embedding, rows):
    """The factors of the logits that a `ReversibleEmbedding` makes of `rows` [N, D] in reverse."""
    is_int8 = embedding.quantization_mode == "int8"
    table = embedding.table
    scale, quantizer = (
        (embedding.embeddings_scale, embedding.inputs_quantizer) if is_int8 else (None, None)
    )
    first = Factor(rows, table, scale, quantizer, table.trainable)
    if not embedding.lora_enabled:
        return [first]
    a, b = embedding.lora_factors
    adapted = embedding.lora_scale * ops.matmul(ops.cast(rows, "float32"), ops.transpose(b))
    return [first, Factor(adapted, a, is_trained=True)]


def cross_entropy(factors, targets, weights, cap=None, with_gradient=True, chunk_size=None):
    """-log softmax(logits)[target] of each token, for `logits = soft_cap(sum of the factors' products, cap)`.

    Tokens of weight 0 have no part in it, and are left out of the work where there is more than a chunk of tokens.

    Args:
        factors: list of `Factor`.
        targets: int [N], each in [0, V) where the weight is not 0.
        weights: [N], not negative.
        cap: soft cap on the logits, or None.
        with_gradient: False saves the work for gradients.
        chunk_size: tokens in a chunk. Defaults to `CHUNK_LOGITS / V`.

    Returns:
        (total, losses, is_correct). The sum of weights * losses, a float32 scalar and the only one of the three with a
        gradient; float32 [N], in nats, 0 where the weight is 0; float32 [N], 1 where the weight is not 0 and no logit
        is above the target's, nor an earlier one equal to it: as argmax, and Keras's accuracy, decide.
    """
    count = ops.shape(targets)[0]
    chunk_size = chunk_size or max(1, CHUNK_LOGITS // factors[0].table.shape[0])
    targets, weights = ops.cast(targets, "int32"), ops.cast(weights, "float32")
    if not with_gradient:
        (losses, is_correct, _), _ = _per_device(
            factors, targets, weights, cap, with_gradient, chunk_size
        )
        return ops.sum(weights * losses), losses, is_correct

    @ops.custom_gradient
    def packed(targets, weights, *tensors):
        tensors = iter(tensors)
        given = [
            Factor(*[x if x is None else next(tensors) for x in factor[:3]], *factor[3:])
            for factor in factors
        ]
        (losses, is_correct, of_rows), of_tables = _per_device(
            given, targets, weights, cap, with_gradient, chunk_size
        )
        gradients = []
        for of_row, of_table, x in zip(of_rows, of_tables, given, strict=True):
            gradients += [of_row, of_table, *([] if x.scale is None else [None])]

        def gradient(*args, upstream=None):
            factor = (args[0] if upstream is None else upstream)[0]
            return (
                None,
                None,
                *(None if g is None else ops.cast(factor, g.dtype) * g for g in gradients),
            )

        # One output, for on PyTorch there can be no more.
        return ops.concatenate([ops.sum(weights * losses)[None], losses, is_correct]), gradient

    tensors = [backend.value_of(x) for factor in factors for x in factor[:3] if x is not None]
    result = packed(targets, weights, *tensors)
    return result[0], result[1 : 1 + count], result[1 + count :]


def _per_device(factors, targets, weights, cap, with_gradient, size):
    """`_in_chunks`, of which each device of a distribution computes the tokens that it has."""

    def share(divided, whole):
        rows, targets, weights = divided
        given = [
            f._replace(rows=x, table=y, scale=z)
            for f, x, (y, z) in zip(factors, rows, whole, strict=True)
        ]
        return _in_chunks(given, targets, weights, cap, with_gradient, size)

    rows = [factor.rows for factor in factors]
    return backend.per_device(
        share, (rows, targets, weights), [(factor.table, factor.scale) for factor in factors]
    )


def _in_chunks(factors, targets, weights, cap, with_gradient, size):
    """((losses [N], is_correct [N], gradients of rows), gradients of tables or None): those of the total."""
    count = ops.shape(targets)[0]
    # Once, and not for every chunk.
    tables = [f.table if f.scale is not None else ops.cast(f.table, f.rows.dtype) for f in factors]
    # What has weight 0 may be no token at all; out of range or not finite its loss, and 0 times it, would be no number.
    targets, counts = ops.where(weights > 0, targets, 0), weights[:, None] > 0
    parts = [
        f._replace(rows=ops.where(counts, f.rows, 0), table=x)
        for f, x in zip(factors, tables, strict=True)
    ]
    if isinstance(count, int) and count <= size:
        # A loop would begin with tables of zeros, and hold them beside the gradients that it adds.
        losses, is_correct, of_rows, of_tables = _of_chunk(
            parts, targets, weights, cap, with_gradient
        )
    else:
        losses, is_correct, of_rows, of_tables = _in_loop(
            parts, targets, weights, cap, with_gradient, size
        )
    of_tables = iter(of_tables)
    is_wanted = [with_gradient and factor.is_trained for factor in factors]
    tables = [
        ops.cast(next(of_tables), f.table.dtype) if w else None
        for f, w in zip(factors, is_wanted, strict=True)
    ]
    return (losses, is_correct, of_rows), tables


def _in_loop(factors, targets, weights, cap, with_gradient, size):
    """As `_of_chunk`, `size` tokens at a time, as far as there are any that count."""
    count = ops.shape(targets)[0]
    if isinstance(count, int):
        # All chunks of one size, or nearly: what is beyond the last token is computed, too.
        size = -(-count // -(-count // size))
    padded = -(-count // size) * size
    place = ops.arange(count, dtype="int32")
    # Tokens that count come first, in their order.
    order = ops.cast(ops.argsort(ops.where(weights > 0, place, place + count)), "int32")
    back = ops.argsort(order)
    order = ops.concatenate([order, ops.zeros((padded - count,), "int32")])
    used = ops.sum(ops.cast(weights > 0, "int32"))
    rows = [ops.take(factor.rows, order, axis=0) for factor in factors]
    targets = ops.take(targets, order, axis=0)
    weights = ops.where(
        ops.arange(padded, dtype="int32") < used, ops.take(weights, order, axis=0), 0.0
    )

    def add_chunk(start, losses, is_correct, of_rows, of_tables):
        def part(x):
            return ops.slice(x, (start, *[0] * (len(x.shape) - 1)), (size, *x.shape[1:]))

        def write(buffer, update):
            return backend.write_slice(buffer[None], update[None], start)[0]

        parts = [factor._replace(rows=part(x)) for factor, x in zip(factors, rows, strict=True)]
        new = _of_chunk(parts, part(targets), part(weights), cap, with_gradient)
        losses, is_correct = write(losses, new[0]), write(is_correct, new[1])
        of_rows = [write(buffer, update) for buffer, update in zip(of_rows, new[2], strict=True)]
        of_tables = [buffer + update for buffer, update in zip(of_tables, new[3], strict=True)]
        return start + size, losses, is_correct, of_rows, of_tables

    state = (
        ops.zeros((), "int32"),
        ops.zeros((padded,)),
        ops.zeros((padded,)),
        [ops.zeros_like(x) for x in rows] if with_gradient else [],
        [backend.zeros(factor.table.shape) for factor in factors if factor.is_trained]
        if with_gradient
        else [],
    )
    _, losses, is_correct, of_rows, of_tables = backend.while_loop(
        lambda start, *_: start < used, add_chunk, state
    )
    of_rows = [ops.take(x, back, axis=0) for x in of_rows]
    return ops.take(losses, back, axis=0), ops.take(is_correct, back, axis=0), of_rows, of_tables


def _of_chunk(factors, targets, weights, cap, with_gradient):
    """(losses [n], is_correct [n], gradients of rows, gradients of the trained tables): the latter of the total."""
    logits = sum(factor.product() for factor in factors)
    losses, is_correct, of_logits = backend.fused(_of_logits)(
        logits, targets, weights, cap, with_gradient
    )
    if not with_gradient:
        return losses, is_correct, [], []
    gradients = [factor.gradients(of_logits) for factor in factors]
    of_rows = [
        ops.cast(new, factor.rows.dtype)
        for factor, (new, _) in zip(factors, gradients, strict=True)
    ]
    return losses, is_correct, of_rows, [new for _, new in gradients if new is not None]


def _of_logits(logits, target, weight, cap, with_gradient):
    """(losses [n], is_correct [n], gradient of the total with respect to the logits before the cap, or None)."""
    capped = soft_cap(logits, cap)
    total = ops.logsumexp(capped, axis=1)
    chosen = ops.take_along_axis(capped, target[:, None], axis=1)[:, 0]
    counts = ops.cast(weight > 0, "float32")
    losses = counts * (total - chosen)
    is_correct = counts * ops.cast(backend.is_argmax(capped, target), "float32")
    if not with_gradient:
        return losses, is_correct, None
    one_hot = ops.arange(capped.shape[1], dtype="int32")[None] == target[:, None]
    # Exponentials anew, for those of the sum would have to be kept.
    gradient = ops.exp(capped - total[:, None]) * weight[:, None] - ops.where(
        one_hot, weight[:, None], 0.0
    )
    if cap is not None:
        gradient = gradient * (1.0 - ops.square(capped / cap))
    return losses, is_correct, gradient


def _matmul_in_parts(x, table):
    """`x` [n, V] times an int8 `table` [V, K], of which only a part is floats at a time."""
    vocabulary_size, width = table.shape
    product = ops.zeros((ops.shape(x)[0], width), x.dtype)

    def add(start, rows, product):
        part = ops.slice(table, (start, 0), (rows, width))
        return product + ops.matmul(
            ops.slice(x, (0, start), (ops.shape(x)[0], rows)), ops.cast(part, x.dtype)
        )

    whole, rest = divmod(vocabulary_size, PART)
    if whole:
        _, product = backend.while_loop(
            lambda start, _: start < whole * PART,
            lambda start, product: (start + PART, add(start, PART, product)),
            (ops.zeros((), "int32"), product),
        )
    return add(whole * PART, rest, product) if rest else product
