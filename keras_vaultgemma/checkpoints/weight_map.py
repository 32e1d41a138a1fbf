"""Where each weight of the backbone stands in each format: one table, made from the hyperparameters alone.

The numbers in a config make it, so that a file can be checked against its config before anything is allocated. Reading
and writing are the same table in two directions.
"""

import math
from typing import NamedTuple

import numpy as np

HUGGING_FACE, KERAS_HUB, KERAS = "hugging_face", "keras_hub", "keras"
"""The formats: Hugging Face's safetensors, keras-hub's `GemmaBackbone` (as on Kaggle), this package's Keras preset."""


class Location(NamedTuple):
    """Where a weight stands in files of one format.

    Args:
        name: of the tensor.
        shape: of the tensor.
        axes: the file's axes in the order that the variable has them in, before it merges neighbours (heads and their
            channels). So `tensor.transpose(axes).reshape(shape of the variable)` is the variable's value.
    """

    name: str
    shape: tuple
    axes: tuple

    def to_variable(self, tensor, shape):
        """A tensor of the file as a variable of `shape` has it; a view where that can be."""
        return tensor.transpose(self.axes).reshape(shape)

    def from_variable(self, value):
        """A variable's value as the file has it; a view where that can be."""
        return value.reshape([self.shape[axis] for axis in self.axes]).transpose(
            np.argsort(self.axes)
        )


class Weight(NamedTuple):
    """A weight of the backbone.

    Args:
        path: of the backbone's variable.
        shape: of the variable.
        locations: `{format: Location}`.
    """

    path: str
    shape: tuple
    locations: dict

    @property
    def size(self):
        """Number of values."""
        return math.prod(self.shape)


def weight_map(hyperparameters):
    """List of `Weight`, in the order of the layers.

    Variables and Hugging Face's files have projections as [out, in], Keras's files as [in, out]. keras-hub's Gemma has
    those into heads as [N, D, H] (keys and values [K, D, H]) and the one out of them as [N, H, D]; it applies GELU to
    `gating_ffw` and not to `gating_ffw_2`.

    Args:
        hyperparameters: the backbone's constructor arguments, as `checkpoint.read_config` returns them.
    """
    h = hyperparameters
    V, D, F, H = h["vocabulary_size"], h["hidden_dim"], h["intermediate_dim"], h["head_dim"]
    N, K = h["num_query_heads"], h["num_key_value_heads"]
    embeddings = _Names(
        "token_embedding/embeddings", "model.embed_tokens", *["layers/reversible_embedding"] * 2
    )
    weights = [_same(embeddings, (V, D))]
    for i in range(h["num_layers"]):
        block = _Block(i)
        weights += [
            _same(
                block.names("attention_norm/scale", "input_layernorm", "pre_attention_norm"), (D,)
            ),
            _into_heads(
                block.names("attention/query/weight", "self_attn.q_proj", "attention/query_dense"),
                D,
                N,
                H,
            ),
            _into_heads(
                block.names("attention/key/weight", "self_attn.k_proj", "attention/key_dense"),
                D,
                K,
                H,
            ),
            _into_heads(
                block.names("attention/value/weight", "self_attn.v_proj", "attention/value_dense"),
                D,
                K,
                H,
            ),
            _projection(
                block.names(
                    "attention/attention_output/weight",
                    "self_attn.o_proj",
                    "attention/output_dense",
                ),
                (D, N * H),
                Location("", (N, H, D), (2, 0, 1)),
            ),
            _same(block.names("mlp_norm/scale", "pre_feedforward_layernorm", "pre_ffw_norm"), (D,)),
            _projection(block.names("gate/weight", "mlp.gate_proj", "gating_ffw"), (F, D)),
            _projection(block.names("up/weight", "mlp.up_proj", "gating_ffw_2"), (F, D)),
            _projection(block.names("down/weight", "mlp.down_proj", "ffw_linear"), (D, F)),
        ]
    final_norm = _Names(
        "final_norm/scale", "model.norm", "layers/rms_normalization", "layers/rms_norm"
    )
    return [*weights, _same(final_norm, (D,))]


class _Names(NamedTuple):
    path: str
    hugging_face: str
    keras_hub: str
    keras: str


class _Block:
    def __init__(self, i):
        suffix = f"_{i}" if i else ""
        self.path = f"decoder_block_{i}"
        self.hugging_face = f"model.layers.{i}"
        self.keras_hub = f"layers/gemma_decoder_block{suffix}"
        self.keras = f"layers/vault_gemma_decoder_block{suffix}"

    def names(self, path, hugging_face, keras_hub):
        layer = path.rpartition("/")[0]
        return _Names(
            f"{self.path}/{path}",
            f"{self.hugging_face}.{hugging_face}",
            f"{self.keras_hub}/{keras_hub}",
            f"{self.keras}/{layer}",
        )


def _same(names, shape):
    """A weight that every format has as it is."""
    return _weight(names, shape, *[Location("", shape, tuple(range(len(shape))))] * 2)


def _projection(names, shape, keras_hub=None):
    keras = Location("", shape[::-1], (1, 0))
    return _weight(names, shape, keras_hub or keras, keras)


def _into_heads(names, width, heads, head_dim):
    return _projection(
        names, (heads * head_dim, width), Location("", (heads, width, head_dim), (0, 2, 1))
    )


def _weight(names, shape, keras_hub, keras):
    locations = {
        HUGGING_FACE: Location(f"{names.hugging_face}.weight", shape, tuple(range(len(shape)))),
        KERAS_HUB: keras_hub._replace(name=f"{names.keras_hub}/vars/0"),
        KERAS: keras._replace(name=f"{names.keras}/vars/0"),
    }
    return Weight(names.path, shape, locations)
