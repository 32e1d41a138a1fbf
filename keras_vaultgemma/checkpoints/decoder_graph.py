"""One step of a decoder with its key-value cache, as an ONNX graph that transformers.js runs.

The graph has the operations of `OnnxGraph` and takes the keys and values of earlier tokens. Prefill
is a step of several tokens with an empty cache.

Shapes: B batch, T new tokens, S tokens with those in the cache, N query heads, K key-value heads,
G = N / K, H head width, V vocabulary.

References:
    - [MatMulNBits](https://onnxruntime.ai/docs/reference/operators/ContribOperators.html)
"""

import math

from keras_vaultgemma.checkpoints.block_quantization import BITS, BLOCK, MIDDLE
from keras_vaultgemma.checkpoints.onnx_graph import MASKED, TABLE, OnnxGraph, scale_name

IDS, MASK, POSITIONS, KEEP = "input_ids", "attention_mask", "position_ids", "num_logits_to_keep"
LOGITS = "logits"
MICROSOFT = "com.microsoft"
"""Domain of ONNX Runtime's own operators."""

IN_INT8 = 4
"""Accuracy level by which `MatMulNBits` may round its other factor to int8 in blocks."""

END = 2**63 - 1
"""End of a slice that has all elements."""


def cache_names(layer):
    """Return `((past key, present key), (past value, present value))` of a layer."""
    return tuple(
        (f"past_key_values.{layer}.{part}", f"present.{layer}.{part}") for part in ("key", "value")
    )


def packed_names(weight):
    """Return the names of a quantized matrix's integers and scales."""
    return f"{weight}_packed", f"{weight}_scales"


class DecoderGraph(OnnxGraph):
    """Nodes and constants of one step.

    Args:
        onnx: the `onnx` package.
        hyperparameters: dict. Constructor arguments of the backbone.
        dtypes: dict of the weights' names to NumPy dtypes, as for `OnnxGraph`.
        packed: dict of the names of matrices in blocks of 4 bits to their shapes [out, in].

    Attributes:
        nodes: list of `onnx.NodeProto`.
        constants: list of `onnx.TensorProto`.
    """

    def __init__(self, onnx, hyperparameters, dtypes, packed):
        self._packed = packed
        super().__init__(onnx, hyperparameters, dtypes, has_head=True)

    def inputs_and_outputs(self):
        """Return two lists of `onnx.ValueInfoProto`.

        transformers.js knows the axis of the batch by its name.
        """
        types, make = self._onnx.TensorProto, self._onnx.helper.make_tensor_value_info
        h = self._h
        batch, new, total = "batch_size", "sequence_length", "total_sequence_length"
        inputs = [
            make(IDS, types.INT64, [batch, new]),
            make(MASK, types.INT64, [batch, total]),
            make(POSITIONS, types.INT64, [batch, new]),
            make(KEEP, types.INT64, []),
        ]
        outputs = [make(LOGITS, types.FLOAT, [batch, "logits_length", h["vocabulary_size"]])]
        for layer in range(h["num_layers"]):
            for past, present in cache_names(layer):
                for values, name, length in (
                    (inputs, past, "past_sequence_length"),
                    (outputs, present, total),
                ):
                    shape = [batch, h["num_key_value_heads"], length, h["head_dim"]]
                    values.append(make(name, types.FLOAT, shape))
        return inputs, outputs

    def _masks(self):
        """Return positions [B, T], and a bias [B, 1, G * T, S] for each type of layer.

        Positions are counted in the mask, so that padding may be on either side.
        """
        self._scope = "mask"
        counts = self._add("CumSum", MASK, self._integer(1))
        length = self._add("Shape", IDS, start=1, end=2)
        queries = self._slice(counts, self._add("Neg", length), axis=1)
        keys = self._unsqueeze(counts, 1)
        distance = self._add("Sub", self._unsqueeze(queries, 2), keys)
        mask = self._add("GreaterOrEqual", distance, self._integer(0))
        is_token = self._add("Greater", self._unsqueeze(MASK, 1), self._integer(0))
        masks = {"full_attention": self._add("And", mask, is_token)}
        if "sliding_attention" in self._h["layer_types"]:
            window = self._integer(self._h["sliding_window_size"])
            masks["sliding_attention"] = self._add(
                "And", masks["full_attention"], self._add("Less", distance, window)
            )
        return POSITIONS, {kind: self._bias(mask) for kind, mask in masks.items()}

    def _bias(self, mask):
        bias = self._add("Where", mask, self._float(0.0), self._float(MASKED))
        bias = self._unsqueeze(bias, 1)
        if self._groups > 1:
            bias = self._add("Tile", bias, self._constant([1, 1, self._groups, 1], "int64"))
        return bias

    def _embed(self):
        self._scope = "embedding"
        if TABLE in self._packed:
            rows = self._take_packed_rows()
        else:
            rows = self._cast(self._add("Gather", TABLE, IDS), "float32", TABLE)
        if self._is_int8(TABLE):
            scale = self._add("Gather", scale_name(TABLE), IDS)
            rows = self._add("Div", rows, self._unsqueeze(scale, 2))
        return self._add("Mul", rows, self._float(math.sqrt(self._h["hidden_dim"])))

    def _take_packed_rows(self):
        """Dequantize rows by plain operators.

        `GatherBlockQuantized` is missing on CPUs in the build of ONNX Runtime for browsers that
        transformers.js 4 uses.
        """
        integers, scales = (self._add("Gather", name, IDS) for name in packed_names(TABLE))
        integers = self._cast(integers, "float32")
        high = self._add("Floor", self._add("Mul", integers, self._float(1 / 16)))
        low = self._add("Sub", integers, self._add("Mul", high, self._float(16)))
        pairs = self._concat(self._unsqueeze(low, 4), self._unsqueeze(high, 4))
        integers = self._add("Sub", self._reshape(pairs, [0, 0, 0, BLOCK]), self._float(MIDDLE))
        rows = self._add("Mul", integers, self._unsqueeze(scales, 3))
        return self._reshape(rows, [0, 0, self._h["hidden_dim"]])

    def _attend(self, name, x, angles, mask):
        h = self._h
        heads, size = h["num_key_value_heads"], h["head_dim"]

        def project(part, heads):
            product = self._matmul(x, f"{name}/{part}/weight")
            return self._reshape(product, [0, 0, heads, size])

        query = self._rotate(project("query", h["num_query_heads"]), *angles)
        # Query heads that share a key-value head are consecutive, so they are rows of one matrix.
        query = self._transpose(query, [0, 2, 1, 3])
        query = self._reshape(query, [0, heads, -1, size]) if self._groups > 1 else query
        new = self._rotate(project("key", heads), *angles), project("value", heads)
        layer = name.split("/")[0].removeprefix("decoder_block_")
        key, value = (
            self._add("Concat", past, self._transpose(x, [0, 2, 1, 3]), output=present, axis=2)
            for x, (past, present) in zip(new, cache_names(layer), strict=True)
        )
        scores = self._add("MatMul", query, self._transpose(key, [0, 1, 3, 2]))
        scores = self._add("Mul", scores, self._float(h["query_pre_attn_scalar"] ** -0.5))
        scores = self._add("Add", self._cap(scores, h["attention_logit_soft_cap"]), mask)
        output = self._add("MatMul", self._add("Softmax", scores, axis=-1), value)
        if self._groups > 1:
            output = self._reshape(output, [0, h["num_query_heads"], -1, size])
        output = self._transpose(output, [0, 2, 1, 3])
        output = self._reshape(output, [0, 0, h["num_query_heads"] * size])
        return self._matmul(output, f"{name}/attention_output/weight")

    def _head(self, x):
        # The last tokens alone, because logits of a long prompt take a gigabyte. 0 stands for all.
        keep = self._reshape(self._add("Neg", KEEP), [1])
        x = self._slice(x, keep, axis=1)
        if TABLE in self._packed:
            return self._matmul(x, TABLE)
        if self._is_int8(TABLE):
            return super()._head(x)
        # `Gemm` reads the table as it is; `MatMul` would need a transposed copy of it.
        rows = self._reshape(x, [-1, self._h["hidden_dim"]])
        logits = self._add("Gemm", rows, self._cast(TABLE, "float32", TABLE), transB=1)
        rest = self._constant([-1, self._h["vocabulary_size"]], "int64")
        batch = self._add("Shape", IDS, start=0, end=1)
        return self._add("Reshape", logits, self._add("Concat", batch, rest, axis=0))

    def _matmul(self, x, weight):
        if weight not in self._packed:
            return super()._matmul(x, weight)
        rows, columns = self._packed[weight]
        return self._add(
            "MatMulNBits",
            x,
            *packed_names(weight),
            domain=MICROSOFT,
            K=columns,
            N=rows,
            bits=BITS,
            block_size=BLOCK,
            accuracy_level=IN_INT8,
        )

    def _is_int8(self, weight):
        return weight not in self._packed and super()._is_int8(weight)

    def _slice(self, x, start, axis):
        return self._add(
            "Slice", x, start, self._constant([END], "int64"), self._constant([axis], "int64")
        )

    def _integer(self, value):
        return self._constant(value, "int64")
