"""One of the matrix products whose sum is the logits, with its gradients."""

from typing import NamedTuple

from keras import ops

from keras_vaultgemma import backend
from keras_vaultgemma.layers.int8 import int8_matmul

INT8_BLOCK_ROWS = 2**14
"""Rows of an int8 table that are cast to floating point at a time."""


class LogitTerm(NamedTuple):
    """A matrix product `rows @ table^T`. The logits before the soft cap are a sum of such terms.

    Attributes:
        rows: tensor `[N, K]`. Hidden states of N tokens, or an adapter's projection of them.
        table: tensor `[V, K]`.
        scale: tensor `[V]`. Factors that the rows of an int8 table were multiplied by before they
            were rounded. None if the table is in floating point.
        quantizer: Keras quantizer of `rows` if the table is int8, or None not to quantize them.
        is_trained: bool. If True, the table gets a gradient. The rows always do.
    """

    rows: object
    table: object
    scale: object = None
    quantizer: object = None
    is_trained: bool = False

    def logits(self):
        """Return the product, float32 `[N, V]`."""
        if self.scale is not None:
            return int8_matmul(self.rows, self.table, self.scale, self.quantizer, transposed=True)
        return ops.cast(backend.matmul(self.rows, self.table, transposed=True), "float32")

    def gradients(self, upstream):
        """Return the gradients of the rows and of the table.

        Args:
            upstream: float32 tensor `[N, V]`. Gradient of the product.

        Returns:
            Tuple of a tensor `[N, K]` and a float32 tensor `[V, K]`, or None if the table is not
            trained.
        """
        if self.scale is not None:
            # Straight-through estimator: the rounding of the rows is differentiated as identity.
            upstream = upstream / ops.cast(self.scale, "float32")
            return _matmul_int8_table(upstream, self.table), None
        upstream = ops.cast(upstream, self.rows.dtype)
        row_gradient = ops.matmul(upstream, self.table)
        if not self.is_trained:
            return row_gradient, None
        table_gradient = ops.matmul(ops.transpose(upstream), self.rows)
        return row_gradient, ops.cast(table_gradient, "float32")


def _matmul_int8_table(x, table):
    """Return `x` `[n, V]` times an int8 table `[V, K]`, casting one block of its rows at a time."""
    vocabulary_size, width = table.shape
    product = ops.zeros((ops.shape(x)[0], width), x.dtype)

    def add_block(start, rows, product):
        block = ops.slice(table, (start, 0), (rows, width))
        columns = ops.slice(x, (0, start), (ops.shape(x)[0], rows))
        return product + ops.matmul(columns, ops.cast(block, x.dtype))

    blocks, rest = divmod(vocabulary_size, INT8_BLOCK_ROWS)
    end = blocks * INT8_BLOCK_ROWS
    if blocks:
        _, product = backend.while_loop(
            lambda start, _: start < end,
            lambda start, product: (
                start + INT8_BLOCK_ROWS,
                add_block(start, INT8_BLOCK_ROWS, product),
            ),
            (ops.zeros((), "int32"), product),
        )
    return add_block(end, rest, product) if rest else product
