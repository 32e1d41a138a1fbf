"""Cross-entropy of next tokens that never materialises all logits.

With a vocabulary of 256,000 tokens, the logits of one row of 1,024 tokens take 1.05 GB in float32,
and their softmax and gradients as much again. This module computes the loss in chunks of tokens and
holds the logits of one chunk at a time. It does so in three steps:

1. The logits of a token are `soft_cap(row @ table^T)`, where `row` `[D]` is the final hidden state
   and `table` `[V, D]` is the embedding, to which the head is tied.
2. For each chunk, the forward pass computes the logits, the losses and already the gradients: that
   of a weighted sum of losses with respect to a token's logits is `weight * (softmax - one_hot)`,
   and a matmul each yields the gradients of the chunk's rows and of the table. The chunk's logits
   are then discarded.
3. These gradients are final but for one factor, the upstream gradient of the weighted sum, so that
   the backward pass only multiplies by it.

No matmul with the table is therefore recomputed. And because the loop over the chunks is not itself
differentiated, its length can depend on the data: tokens of weight 0, such as padding and prompts,
are sorted to the end, and the loop stops before them.
"""

import functools
import operator

from keras import ops

from keras_vaultgemma import backend
from keras_vaultgemma.layers.soft_cap import soft_cap
from keras_vaultgemma.training.logit_term import LogitTerm

CHUNK_LOGITS = 2**25
"""Largest number of logits in a chunk: 128 MiB in float32, of which three copies exist at a time.

Every chunk reads the whole table. With VaultGemma's vocabulary a chunk has 131 tokens. On two CPU
cores, training takes 50 % longer with half as many, and is 20 % (JAX) or 4 % (TensorFlow) faster
with twice as many.
"""


def head_terms(embedding, rows, table=None):
    """Return the terms of the logits that the tied head computes.

    Args:
        embedding: `ReversibleEmbedding`, whose table is also the head's.
        rows: tensor `[N, D]`. Final hidden states of N tokens.
        table: tensor `[V, D]`. Values of the embedding. Defaults to its own.

    Returns:
        List of one `LogitTerm`, or two if the embedding has an adapter.
    """
    is_int8 = embedding.quantization_mode == "int8"
    if table is None:
        # Dequantized once, not in every chunk.
        is_int4 = embedding.quantization_mode == "int4"
        table = embedding.int4_matrix.dense(rows.dtype) if is_int4 else embedding.table
    base = LogitTerm(
        rows,
        table,
        embedding.embeddings_scale if is_int8 else None,
        embedding.inputs_quantizer if is_int8 else None,
        embedding.table.trainable,
    )
    if not embedding.lora_enabled:
        return [base]
    a, b = embedding.lora_factors
    adapted = embedding.lora_scale * ops.matmul(ops.cast(rows, "float32"), ops.transpose(b))
    return [base, LogitTerm(adapted, a, is_trained=True)]


def cross_entropy(terms, targets, weights, cap=None, with_gradient=True, chunk_size=None):
    """Compute the cross-entropy of each token and their weighted sum, in chunks of tokens.

    The logits are `soft_cap(sum of the terms' products, cap)`. Tokens of weight 0 do not
    contribute, and are not computed if there is more than one chunk of tokens.

    Args:
        terms: list of `LogitTerm`.
        targets: int tensor `[N]`. Token ids in `[0, V)`; any value where the weight is 0.
        weights: tensor `[N]`. Weights of the tokens.
        cap: float. Soft cap on the logits, or None. Defaults to None.
        with_gradient: bool. If False, do not compute gradients. Defaults to True.
        chunk_size: int. Number of tokens in a chunk. Defaults to `CHUNK_LOGITS / V`.

    Returns:
        Tuple `(total, losses, is_correct)` of float32 tensors:

        - total: scalar, the sum of `weights * losses`. Only this output has a gradient.
        - losses: `[N]`, `-log softmax(logits)[target]` in nats, 0 where the weight is 0.
        - is_correct: `[N]`, 1 where the weight is not 0 and the target is the argmax of the logits,
          which is the first of several equal ones, as in Keras's accuracy; otherwise 0.
    """
    count = ops.shape(targets)[0]
    chunk_size = chunk_size or max(1, CHUNK_LOGITS // terms[0].table.shape[0])
    targets, weights = ops.cast(targets, "int32"), ops.cast(weights, "float32")
    if not with_gradient:
        (losses, is_correct, _), _ = _cross_entropy_per_device(
            terms, targets, weights, cap, with_gradient, chunk_size
        )
        return ops.sum(weights * losses), losses, is_correct

    @ops.custom_gradient
    def concatenated_outputs(targets, weights, *tensors):
        tensors = iter(tensors)
        inputs = [
            LogitTerm(*[x if x is None else next(tensors) for x in term[:3]], *term[3:])
            for term in terms
        ]
        (losses, is_correct, row_gradients), table_gradients = _cross_entropy_per_device(
            inputs, targets, weights, cap, with_gradient, chunk_size
        )
        gradients = []
        for row_gradient, table_gradient, term in zip(
            row_gradients, table_gradients, inputs, strict=True
        ):
            scale_gradient = [] if term.scale is None else [None]
            gradients += [row_gradient, table_gradient, *scale_gradient]

        def gradient(*args, upstream=None):
            total_gradient = (args[0] if upstream is None else upstream)[0]
            return (
                None,
                None,
                *(None if g is None else ops.cast(total_gradient, g.dtype) * g for g in gradients),
            )

        # A single output, because `ops.custom_gradient` supports no more on PyTorch.
        return ops.concatenate([ops.sum(weights * losses)[None], losses, is_correct]), gradient

    tensors = [backend.value_of(x) for term in terms for x in term[:3] if x is not None]
    outputs = concatenated_outputs(targets, weights, *tensors)
    return outputs[0], outputs[1 : 1 + count], outputs[1 + count :]


def _cross_entropy_per_device(terms, targets, weights, cap, with_gradient, chunk_size):
    """Compute `_chunked_cross_entropy`, on each device of a distribution for its own tokens."""

    def on_device(divided, replicated):
        rows, targets, weights = divided
        device_terms = [
            term._replace(rows=x, table=table, scale=scale)
            for term, x, (table, scale) in zip(terms, rows, replicated, strict=True)
        ]
        return _chunked_cross_entropy(
            device_terms, targets, weights, cap, with_gradient, chunk_size
        )

    rows = [term.rows for term in terms]
    tables = [(term.table, term.scale) for term in terms]
    return backend.per_device(on_device, (rows, targets, weights), tables)


def _chunked_cross_entropy(terms, targets, weights, cap, with_gradient, chunk_size):
    """Return `((losses, is_correct, gradients of rows), gradients of tables)` of N tokens."""
    count = ops.shape(targets)[0]
    # Cast each table once, not in every chunk.
    tables = [
        term.table if term.scale is not None else ops.cast(term.table, term.rows.dtype)
        for term in terms
    ]
    # Inputs of weight 0 may be out of range or not finite, and 0 times such a loss would be NaN.
    targets, is_counted = ops.where(weights != 0, targets, 0), weights[:, None] != 0
    inputs = [
        term._replace(rows=ops.where(is_counted, term.rows, 0), table=table)
        for term, table in zip(terms, tables, strict=True)
    ]
    if isinstance(count, int) and count <= chunk_size:
        # Without a loop, which would also hold zeros to add the gradients of the tables to.
        results = _chunk_cross_entropy(inputs, targets, weights, cap, with_gradient)
    else:
        results = _loop_over_chunks(inputs, targets, weights, cap, with_gradient, chunk_size)
    losses, is_correct, row_gradients, trained = results
    trained = iter(trained)
    table_gradients = [
        ops.cast(next(trained), term.table.dtype) if with_gradient and term.is_trained else None
        for term in terms
    ]
    return (losses, is_correct, row_gradients), table_gradients


def _loop_over_chunks(terms, targets, weights, cap, with_gradient, chunk_size):
    """Return the results of `_chunk_cross_entropy` of N tokens, `chunk_size` at a time."""
    count = ops.shape(targets)[0]  # a tensor where TensorFlow does not know the batch size
    chunks = -(-count // chunk_size)
    if not isinstance(count, int):
        chunks = ops.maximum(chunks, 1)  # an empty batch
    # Chunks of nearly equal size, because the padding of the last one is computed as well.
    chunk_size = -(-count // chunks)
    padded = chunks * chunk_size
    position = ops.arange(count, dtype="int32")
    # A stable sort that puts the tokens of weight 0 last.
    order = ops.cast(ops.argsort(ops.where(weights != 0, position, position + count)), "int32")
    inverse = ops.argsort(order)
    order = ops.concatenate([order, ops.zeros((padded - count,), "int32")])
    used = ops.sum(ops.cast(weights != 0, "int32"))
    rows = [ops.take(term.rows, order, axis=0) for term in terms]
    targets = ops.take(targets, order, axis=0)
    weights = ops.where(
        ops.arange(padded, dtype="int32") < used, ops.take(weights, order, axis=0), 0.0
    )

    def add_chunk(start, losses, is_correct, row_gradients, table_gradients):
        def chunk(x):
            return ops.slice(x, (start, *[0] * (len(x.shape) - 1)), (chunk_size, *x.shape[1:]))

        def write(buffer, update):
            return backend.write_slice(buffer[None], update[None], start)[0]

        chunk_terms = [term._replace(rows=chunk(x)) for term, x in zip(terms, rows, strict=True)]
        results = _chunk_cross_entropy(
            chunk_terms, chunk(targets), chunk(weights), cap, with_gradient
        )
        return (
            start + chunk_size,
            write(losses, results[0]),
            write(is_correct, results[1]),
            [write(buffer, x) for buffer, x in zip(row_gradients, results[2], strict=True)],
            [total + x for total, x in zip(table_gradients, results[3], strict=True)],
        )

    trained = [term for term in terms if with_gradient and term.is_trained]
    state = (
        ops.zeros((), "int32"),
        ops.zeros((padded,)),
        ops.zeros((padded,)),
        [ops.zeros_like(x) for x in rows] if with_gradient else [],
        [backend.zeros(term.table.shape) for term in trained],
    )
    _, losses, is_correct, row_gradients, table_gradients = backend.while_loop(
        lambda start, *_: start < used, add_chunk, state
    )
    return (
        ops.take(losses, inverse, axis=0),
        ops.take(is_correct, inverse, axis=0),
        [ops.take(x, inverse, axis=0) for x in row_gradients],
        table_gradients,
    )


def _chunk_cross_entropy(terms, targets, weights, cap, with_gradient):
    """Return `(losses, is_correct, gradients of rows, gradients of trained tables)` of one chunk.

    Losses and `is_correct` have the shape `[n]`; the gradients are those of the weighted sum, and
    both lists are empty without gradients.
    """
    # Not `sum`, which would add the first term to 0.
    logits = functools.reduce(operator.add, (term.logits() for term in terms))
    losses, is_correct, logit_gradient = backend.in_row_blocks(
        _softmax_cross_entropy, logits, targets, weights, cap=cap, with_gradient=with_gradient
    )
    if not with_gradient:
        return losses, is_correct, [], []
    gradients = [term.gradients(logit_gradient) for term in terms]
    row_gradients = [
        ops.cast(row_gradient, term.rows.dtype)
        for term, (row_gradient, _) in zip(terms, gradients, strict=True)
    ]
    table_gradients = [gradient for _, gradient in gradients if gradient is not None]
    return losses, is_correct, row_gradients, table_gradients


def _softmax_cross_entropy(logits, targets, weights, cap, with_gradient):
    """Return losses and `is_correct` `[n]`, and the gradient of the weighted sum, `[n, V]` or None.

    The gradient is that with respect to `logits`, which are not capped yet.
    """
    capped = soft_cap(logits, cap)
    log_softmax = backend.log_softmax(capped)
    is_counted = ops.cast(weights != 0, "float32")
    losses = -is_counted * ops.take_along_axis(log_softmax, targets[:, None], axis=1)[:, 0]
    is_correct = is_counted * ops.cast(backend.is_argmax(capped, targets), "float32")
    if not with_gradient:
        return losses, is_correct, None
    gradient = backend.add_at(ops.exp(log_softmax) * weights[:, None], targets, -weights)
    if cap is not None:
        gradient = gradient * (1.0 - ops.square(capped / cap))
    return losses, is_correct, gradient
