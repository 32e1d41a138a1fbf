"""Name, shape and axes of every weight of the backbone in each checkpoint format.

One table, computed from the hyperparameters alone, so that a file is checked against its config
before anything is allocated. Readers and writers use the same table in opposite directions.
"""

import math
from typing import NamedTuple

import numpy as np

HUGGING_FACE, GEMMA, KERAS_HUB, KERAS = "hugging_face", "gemma", "keras_hub", "keras"
"""Formats: Hugging Face's safetensors of VaultGemma and of Gemma 1, keras-hub's `GemmaBackbone`,
this package's Keras preset."""

SAFETENSORS = (HUGGING_FACE, GEMMA)
"""Formats whose weights are in Hugging Face's safetensors files."""


class Location(NamedTuple):
    """A weight's tensor in the files of one format.

    `tensor.transpose(axes).reshape(shape of the variable)` is the value of the variable.

    Attributes:
        name: string. Name of the tensor.
        shape: tuple of ints. Shape of the tensor.
        axes: tuple of ints. Axes of the tensor in the order of the variable, in which the head
            axis and the axis of a head's channels are merged afterwards.
    """

    name: str
    shape: tuple
    axes: tuple

    def to_variable(self, tensor, shape):
        """Return a tensor of the file as a variable of `shape`; a view where that is possible."""
        return tensor.transpose(self.axes).reshape(shape)

    def from_variable(self, value):
        """Return a variable's value as the file's tensor; a view where that is possible."""
        split = value.reshape([self.shape[axis] for axis in self.axes])
        return split.transpose(np.argsort(self.axes))


class Weight(NamedTuple):
    """A weight of the backbone.

    Attributes:
        path: string. Path of the backbone's variable.
        shape: tuple of ints. Shape of the variable.
        locations: dict of formats to `Location`.
    """

    path: str
    shape: tuple
    locations: dict

    @property
    def size(self):
        """Number of values."""
        return math.prod(self.shape)


def weight_map(hyperparameters):
    """Return the weights of a backbone and their tensors in every format.

    Variables and Hugging Face's files store projections as [out, in], Keras's files as [in, out].
    keras-hub's Gemma stores the projections into heads as [N, D, H] (keys and values as [K, D, H])
    and the output projection as [N, H, D]; it applies GELU to `gating_ffw`, not to `gating_ffw_2`.

    Args:
        hyperparameters: dict. Constructor arguments of the backbone, as `config.read_config`
            returns them.

    Returns:
        List of `Weight`, in the order of the layers.
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
    """Return a weight that has the same shape in every format."""
    return _weight(names, shape, *[Location("", shape, tuple(range(len(shape))))] * 2)


def _projection(names, shape, keras_hub=None):
    keras = Location("", shape[::-1], (1, 0))
    return _weight(names, shape, keras_hub or keras, keras)


def _into_heads(names, width, heads, head_dim):
    return _projection(
        names, (heads * head_dim, width), Location("", (heads, width, head_dim), (0, 2, 1))
    )


def _weight(names, shape, keras_hub, keras):
    hugging_face = Location(f"{names.hugging_face}.weight", shape, tuple(range(len(shape))))
    # Gemma has the same norm in the same place, and names it after what comes before it.
    gemma = hugging_face.name.replace("pre_feedforward", "post_attention")
    locations = {
        HUGGING_FACE: hugging_face,
        GEMMA: hugging_face._replace(name=gemma),
        KERAS_HUB: keras_hub._replace(name=f"{names.keras_hub}/vars/0"),
        KERAS: keras._replace(name=f"{names.keras}/vars/0"),
    }
    return Weight(names.path, shape, locations)
