"""The forward pass as an ONNX graph of any batch and length, written operation by operation.

It has the operations of `VaultGemmaBackbone.walk` without a cache, and of the tied head. It is not
traced from the model, so that every backend writes the same file, in blocks, at any size.

Shapes: B batch, T length, D width, N query heads, K key-value heads, G = N / K, H head width, V
vocabulary.

References:
    - [Operators](https://onnx.ai/onnx/operators/)
"""

import math

import keras
import numpy as np

from keras_vaultgemma.layers.kv_cache import EMPTY

TABLE = "token_embedding/embeddings"
TOKEN_IDS, PADDING_MASK = INPUTS = "token_ids", "padding_mask"
LOGITS, HIDDEN_STATES = "logits", "hidden_states"

MASKED = np.float32(-1e30)
"""Score of a key that is not attended to. Finite, because a row of -inf alone would become NaN."""

INT8_RANGE, INT8_OFFSET = 127, 128
GELU_FACTOR, GELU_CUBE = math.sqrt(2 / math.pi), 0.044715


def scale_name(name):
    """Return the name of the scale of an int8 matrix."""
    return f"{name}_scale"


class OnnxGraph:
    """Nodes and constants of the forward pass.

    Args:
        onnx: the `onnx` package.
        hyperparameters: dict. Constructor arguments of the backbone.
        dtypes: dict of the weights' names to NumPy dtypes. Matrices are [in, out], and float or
            int8; the weights of norms are float32 and have the 1 added.
        has_head: bool. True to return logits, False to return hidden states.
        rounds_activations: bool. False to leave what int8 matrices are multiplied by unrounded.
            Defaults to True.
        has_integer_matmuls: bool. False to write int8 matrices as dequantized ones, which OpenVINO
            stores in int8, and which ONNX Runtime would multiply by activations that it rounds
            itself. Defaults to True.

    Attributes:
        nodes: list of `onnx.NodeProto`.
        constants: list of `onnx.TensorProto`.
        output: string. Name of the output.
    """

    def __init__(
        self,
        onnx,
        hyperparameters,
        dtypes,
        has_head,
        rounds_activations=True,
        has_integer_matmuls=True,
    ):
        self._onnx = onnx
        self._rounds_activations = rounds_activations
        self._has_integer_matmuls = has_integer_matmuls
        self._h = hyperparameters
        self._dtypes = dtypes
        self._scope = ""
        self._constants = {}
        self.nodes, self.constants = [], []
        self.output = LOGITS if has_head else HIDDEN_STATES
        self._walk(has_head)

    def _walk(self, has_head):
        h = self._h
        positions, masks = self._masks()
        angles = self._angles(positions)
        x = self._embed()
        for i, layer_type in enumerate(h["layer_types"]):
            x = self._block(f"decoder_block_{i}", x, angles, masks[layer_type])
        self._scope = "head"
        x = self._norm("final_norm/scale", x)
        if has_head:
            x = self._cap(self._head(x), h["final_logit_soft_cap"])
        self._add("Identity", x, output=self.output)

    def _masks(self):
        """Return positions [B, T], and the mask [B, T, T] of each type of layer."""
        self._scope = "mask"
        segments = PADDING_MASK
        same = self._add("Equal", self._unsqueeze(segments, 2), self._unsqueeze(segments, 1))
        length = self._add("Gather", self._add("Shape", segments), self._constant(1, "int64"))
        index = self._add("Range", self._constant(0, "int64"), length, self._constant(1, "int64"))
        is_earlier = self._add(
            "GreaterOrEqual", self._unsqueeze(index, 1), self._unsqueeze(index, 0)
        )
        count = self._add(
            "ReduceSum",
            self._cast(self._add("And", same, is_earlier), "int32"),
            self._constant([2], "int64"),
            keepdims=0,
        )
        positions = self._add(
            "Where",
            self._add("Greater", segments, self._constant(0, "int32")),
            self._add("Sub", count, self._constant(1, "int32")),
            self._constant(EMPTY, "int32"),
        )
        keys = self._unsqueeze(positions, 1)
        distance = self._add("Sub", self._unsqueeze(positions, 2), keys)
        full = self._add("And", same, self._at_least(distance, 0))
        full = self._add("And", full, self._at_least(keys, EMPTY + 1))
        masks = {"full_attention": full}
        if "sliding_attention" in self._h["layer_types"]:
            window = self._constant(self._h["sliding_window_size"], "int32")
            masks["sliding_attention"] = self._add("And", full, self._add("Less", distance, window))
        axes = 1 if self._groups == 1 else [1, 2]
        return positions, {kind: self._unsqueeze(mask, axes) for kind, mask in masks.items()}

    def _angles(self, positions):
        """Return the factors [B, T, 1, H] of the rotation, as `RotaryAngles` computes them."""
        self._scope = "rotary"
        size = self._h["head_dim"]
        frequencies = float(self._h["rope_theta"]) ** (-np.arange(0, size, 2) / size)
        positions = self._unsqueeze(self._cast(positions, "float32"), [2, 3])
        angles = self._add("Mul", positions, self._constant(frequencies, "float32"))
        cos, sin = self._add("Cos", angles), self._add("Sin", angles)
        return self._concat(cos, cos), self._concat(self._add("Neg", sin), sin)

    def _embed(self):
        self._scope = "embedding"
        rows = self._cast(self._add("Gather", TABLE, TOKEN_IDS), "float32", TABLE)
        if self._is_int8(TABLE):
            scale = self._add("Gather", scale_name(TABLE), TOKEN_IDS)
            rows = self._add("Div", rows, self._unsqueeze(scale, 2))
        return self._add("Mul", rows, self._float(math.sqrt(self._h["hidden_dim"])))

    def _block(self, name, x, angles, mask):
        self._scope = f"{name}/attention"
        normed = self._norm(f"{name}/attention_norm/scale", x)
        attended = self._attend(f"{name}/attention", normed, angles, mask)
        x = self._add("Add", x, attended)
        self._scope = f"{name}/mlp"
        normed = self._norm(f"{name}/mlp_norm/scale", x)
        gate, up = (self._matmul(normed, f"{name}/{part}/weight") for part in ("gate", "up"))
        product = self._add("Mul", self._gelu(gate), up)
        return self._add("Add", x, self._matmul(product, f"{name}/down/weight"))

    @property
    def _groups(self):
        return self._h["num_query_heads"] // self._h["num_key_value_heads"]

    def _attend(self, name, x, angles, mask):
        h = self._h
        heads, size = h["num_key_value_heads"], h["head_dim"]
        # Query heads that share a key-value head are an axis of their own, if there are several.
        groups = [] if self._groups == 1 else [self._groups]

        def project(part, shape):
            return self._reshape(self._matmul(x, f"{name}/{part}/weight"), [0, 0, *shape])

        query = self._rotate(project("query", [h["num_query_heads"], size]), *angles)
        key = self._rotate(project("key", [heads, size]), *angles)
        value = project("value", [heads, size])
        if groups:
            query = self._reshape(query, [0, 0, heads, *groups, size])
        query = self._transpose(query, [0, 2, 3, 1, 4] if groups else [0, 2, 1, 3])
        key, value = self._transpose(key, [0, 2, 3, 1]), self._transpose(value, [0, 2, 1, 3])
        if groups:
            key, value = self._unsqueeze(key, 2), self._unsqueeze(value, 2)
        scores = self._add("MatMul", query, key)
        scores = self._add("Mul", scores, self._float(h["query_pre_attn_scalar"] ** -0.5))
        scores = self._cap(scores, h["attention_logit_soft_cap"])
        scores = self._add("Where", mask, scores, self._float(MASKED))
        output = self._add("MatMul", self._add("Softmax", scores, axis=-1), value)
        output = self._transpose(output, [0, 3, 1, 2, 4] if groups else [0, 2, 1, 3])
        output = self._reshape(output, [0, 0, h["num_query_heads"] * size])
        return self._matmul(output, f"{name}/attention_output/weight")

    def _rotate(self, x, cos, sin):
        halves = [f"{self._scope}/half_{len(self.nodes)}_{i}" for i in range(2)]
        self.nodes.append(self._onnx.helper.make_node("Split", [x], halves, axis=-1, num_outputs=2))
        rolled = self._add("Mul", self._concat(*reversed(halves)), sin)
        return self._add("Add", self._add("Mul", x, cos), rolled)

    def _norm(self, weight, x):
        square = self._add("Mul", x, x)
        mean = self._add("ReduceMean", square, self._constant([-1], "int64"), keepdims=1)
        mean = self._add("Add", mean, self._float(self._h["layer_norm_epsilon"]))
        x = self._add("Div", x, self._add("Sqrt", mean))
        return self._add("Mul", x, weight)

    def _gelu(self, x):
        cube = self._add("Mul", self._add("Mul", x, x), x)
        inner = self._add("Add", x, self._add("Mul", cube, self._float(GELU_CUBE)))
        tanh = self._add("Tanh", self._add("Mul", inner, self._float(GELU_FACTOR)))
        half = self._add("Mul", x, self._float(0.5))
        return self._add("Mul", half, self._add("Add", tanh, self._float(1.0)))

    def _cap(self, x, cap):
        if cap is None:
            return x
        return self._add(
            "Mul", self._add("Tanh", self._add("Div", x, self._float(cap))), self._float(cap)
        )

    def _head(self, x):
        """Return logits [B, T, V] of hidden states [B, T, D]."""
        if self._is_int8(TABLE):
            return self._int8_matmul(x, TABLE, transposed=True)
        # `Gemm` reads the table as it is; `MatMul` would need a transposed copy of it.
        rows = self._reshape(x, [-1, self._h["hidden_dim"]])
        logits = self._add("Gemm", rows, self._cast(TABLE, "float32", TABLE), transB=1)
        size = self._constant([self._h["vocabulary_size"]], "int64")
        shape = self._add("Concat", self._add("Shape", TOKEN_IDS), size, axis=0)
        return self._add("Reshape", logits, shape)

    def _matmul(self, x, weight):
        if self._is_int8(weight):
            return self._int8_matmul(x, weight)
        return self._add("MatMul", x, self._cast(weight, "float32", weight))

    def _int8_matmul(self, x, weight, transposed=False):
        """Return the product with an int8 matrix of `x`, each row of which is rounded to int8."""
        scale = scale_name(weight)
        if self._rounds_activations:
            largest = self._add(
                "ReduceMax", self._add("Abs", x), self._constant([-1], "int64"), keepdims=1
            )
            largest = self._add("Add", largest, self._float(keras.config.epsilon()))
            x_scale = self._add("Div", self._float(INT8_RANGE), largest)
            x = self._add("Round", self._add("Mul", x, x_scale))
            x = self._add("Clip", x, self._float(-INT8_RANGE), self._float(INT8_RANGE))
        if self._has_integer_matmuls:
            matrix = self._transpose(weight, [1, 0]) if transposed else weight
            if not self._rounds_activations:
                product = self._add("MatMul", x, self._cast(matrix, "float32"))
                return self._add("Div", product, scale)
            # Unsigned, because ONNX Runtime takes 4 times (in browsers) to 20 times as long for two
            # signed factors. x64 CPUs without VNNI then saturate the sum of two large products.
            x = self._add("Add", x, self._float(INT8_OFFSET))
            offset = self._constant(INT8_OFFSET, "uint8")
            product = self._add("MatMulInteger", self._cast(x, "uint8"), matrix, offset)
            scale = self._add("Mul", x_scale, scale)
            return self._add("Div", self._cast(product, "float32"), scale)
        step = self._add("Reciprocal", scale)
        matrix = self._add("DequantizeLinear", weight, step, axis=0 if transposed else 1)
        matrix = self._transpose(matrix, [1, 0]) if transposed else matrix
        product = self._add("MatMul", x, matrix)
        return self._add("Div", product, x_scale) if self._rounds_activations else product

    def _is_int8(self, weight):
        return self._dtypes[weight] == "int8"

    def _add(self, operator, *inputs, output=None, **attributes):
        """Add a node, and return the name of its output."""
        output = output or f"{self._scope}/{operator}_{len(self.nodes)}"
        node = self._onnx.helper.make_node(operator, inputs, [output], name=output, **attributes)
        self.nodes.append(node)
        return output

    def _cast(self, x, dtype, weight=None):
        """Cast; `x` itself if it has the dtype of a `weight` that is cast already."""
        if weight is not None and self._dtypes[weight] == dtype:
            return x
        to = self._onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
        return self._add("Cast", x, to=to)

    def _constant(self, value, dtype):
        """Return the name of a constant, one for all uses of its value."""
        value = np.asarray(value, dtype)
        key = value.tobytes(), value.shape, dtype
        if key not in self._constants:
            name = f"constants/{len(self._constants)}"
            self._constants[key] = name
            self.constants.append(self._onnx.numpy_helper.from_array(value, name))
        return self._constants[key]

    def _float(self, value):
        return self._constant(value, "float32")

    def _at_least(self, x, value):
        return self._add("GreaterOrEqual", x, self._constant(value, "int32"))

    def _unsqueeze(self, x, axes):
        return self._add("Unsqueeze", x, self._constant(np.ravel(axes), "int64"))

    def _reshape(self, x, shape):
        return self._add("Reshape", x, self._constant(shape, "int64"))

    def _transpose(self, x, axes):
        return self._add("Transpose", x, perm=axes)

    def _concat(self, *parts):
        return self._add("Concat", *parts, axis=-1)
