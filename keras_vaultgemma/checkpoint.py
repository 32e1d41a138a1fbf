"""The weight maps between checkpoints that other libraries wrote and the backbone.

A map says, for each variable of the backbone, which tensor of the checkpoint it is and how its axes lie there. Reading
and writing are the same map in two directions.
"""

import warnings
from pathlib import Path
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import ops

from keras_vaultgemma import checkpoint_config
from keras_vaultgemma.checkpoint_config import read_config as read_config
from keras_vaultgemma.h5_file import open_h5
from keras_vaultgemma.safetensors_file import open_tensors

H5 = "model.weights.h5"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


class Place(NamedTuple):
    """Where a variable stands in a checkpoint.

    Args:
        variable: of the backbone.
        shape: of the tensor in the file.
        axes: the file's axes in the order that the variable has them in, before it merges neighbours (heads and their
            channels). So `tensor.transpose(axes).reshape(variable.shape)` is the variable's value.
    """

    variable: Any
    shape: tuple
    axes: tuple

    def to_variable(self, tensor):
        """A tensor of the file as the variable has it; a view where that can be."""
        return tensor.transpose(self.axes).reshape(self.variable.shape)


def weight_map(backbone):
    """{tensor name in a Hugging Face checkpoint: Place}, in the order of the layers.

    Hugging Face keeps projections [out, in], Keras [in, out].
    """

    def vector(variable):
        return Place(variable, tuple(variable.shape), (0,))

    def matrix(layer):
        return Place(layer.kernel, tuple(reversed(layer.kernel.shape)), (1, 0))

    embeddings = backbone.token_embedding.embeddings
    places = {EMBEDDING: Place(embeddings, tuple(embeddings.shape), (0, 1))}
    for i, block in enumerate(backbone.transformer_layers):
        layer = f"model.layers.{i}"
        places[f"{layer}.input_layernorm.weight"] = vector(block.attention_norm.scale)
        places[f"{layer}.self_attn.q_proj.weight"] = matrix(block.attention.query)
        places[f"{layer}.self_attn.k_proj.weight"] = matrix(block.attention.key)
        places[f"{layer}.self_attn.v_proj.weight"] = matrix(block.attention.value)
        places[f"{layer}.self_attn.o_proj.weight"] = matrix(block.attention.attention_output)
        places[f"{layer}.pre_feedforward_layernorm.weight"] = vector(block.mlp_norm.scale)
        places[f"{layer}.mlp.gate_proj.weight"] = matrix(block.gate)
        places[f"{layer}.mlp.up_proj.weight"] = matrix(block.up)
        places[f"{layer}.mlp.down_proj.weight"] = matrix(block.down)
    places["model.norm.weight"] = vector(backbone.final_norm.scale)
    return places


def keras_hub_weight_map(backbone):
    """{dataset in the weights file of keras-hub's `GemmaBackbone`: Place}, in the order of the layers.

    Its projections into heads are [N, D, H] (keys and values [K, D, H]), the one out of them [N, H, D], the others
    [in, out] as here. It applies GELU to `gating_ffw` and not to `gating_ffw_2`.
    """
    D, H = backbone.hidden_dim, backbone.head_dim

    def plain(variable):
        return Place(variable, tuple(variable.shape), tuple(range(len(variable.shape))))

    def into_heads(layer, heads):
        return Place(layer.kernel, (heads, D, H), (1, 0, 2))

    places = {"layers/reversible_embedding/vars/0": plain(backbone.token_embedding.embeddings)}
    for i, block in enumerate(backbone.transformer_layers):
        layer = "layers/gemma_decoder_block" + (f"_{i}" if i else "")
        attention = block.attention
        places[f"{layer}/pre_attention_norm/vars/0"] = plain(block.attention_norm.scale)
        places[f"{layer}/attention/query_dense/vars/0"] = into_heads(attention.query, backbone.num_query_heads)
        places[f"{layer}/attention/key_dense/vars/0"] = into_heads(attention.key, backbone.num_key_value_heads)
        places[f"{layer}/attention/value_dense/vars/0"] = into_heads(attention.value, backbone.num_key_value_heads)
        places[f"{layer}/attention/output_dense/vars/0"] = Place(
            attention.attention_output.kernel, (backbone.num_query_heads, H, D), (0, 1, 2)
        )
        places[f"{layer}/pre_ffw_norm/vars/0"] = plain(block.mlp_norm.scale)
        places[f"{layer}/gating_ffw/vars/0"] = plain(block.gate.kernel)
        places[f"{layer}/gating_ffw_2/vars/0"] = plain(block.up.kernel)
        places[f"{layer}/ffw_linear/vars/0"] = plain(block.down.kernel)
    places["layers/rms_normalization/vars/0"] = plain(backbone.final_norm.scale)
    return places


def load(backbone, folder):
    """Read the weights of a Hugging Face or keras-hub folder into a backbone, cast to its dtype.

    Everything is checked before the first variable changes; then one tensor after the other is read.

    Args:
        backbone: `VaultGemmaBackbone` of the folder's configuration.
        folder: with config.json and model.safetensors, several files and their model.safetensors.index.json, or
            keras-hub's model.weights.h5.

    Raises:
        ValueError: names the tensor that is missing, unknown or of another shape (with both shapes), an
            `lm_head.weight` that is not the embedding, the file that is cut short or malformed, or a variable that is
            quantized.
    """
    folder = Path(folder)
    if checkpoint_config.is_keras_hub(folder):
        places, tensors = keras_hub_weight_map(backbone), open_h5(folder / H5)
    else:
        places, tensors = weight_map(backbone), open_tensors(folder)
        _check_head(folder, tensors.pop(HEAD, None), tensors.get(EMBEDDING))
    for name in sorted(places.keys() | tensors.keys()):
        expected = places[name].shape if name in places else None
        found = tensors[name].shape if name in tensors else None
        if expected != found:
            problem = "is missing from" if found is None else "is unknown in" if expected is None else "is misshapen in"
            raise ValueError(f"{name} {problem} {folder}. Expected shape: {expected}. Found: {found}")
    for place in places.values():
        if not keras.backend.is_float_dtype(place.variable.dtype):
            raise ValueError(
                f"A checkpoint loads into floating-point variables; quantize the model afterwards. Received: "
                f"{place.variable.path} of dtype {place.variable.dtype}"
            )
    for name, place in places.items():
        place.variable.assign(_own(place.to_variable(tensors.pop(name)), place.variable.dtype))


def warn_if_not_finite(backbone):
    """Warn where weights hold NaN or infinity, naming the first variable that does."""
    for variable in backbone.variables:
        if "float" in variable.dtype and not _is_finite(variable.value):
            warnings.warn(
                f"{variable.path} holds NaN or infinite values: the checkpoint is damaged, or too large for "
                f"{variable.dtype}",
                stacklevel=3,
            )
            return


def _is_finite(value):
    # NaN or infinity cannot leave a sum finite, and a sum takes no memory; but it can overflow where all is well.
    return bool(ops.isfinite(ops.sum(value))) or bool(ops.all(ops.isfinite(value)))


def _check_head(folder, head, embedding):
    """Refuse a head of its own: a tied one, stored twice, is the embedding bit by bit (NaN included)."""
    if head is None or embedding is None:
        return
    if head.dtype != embedding.dtype or not np.array_equal(_bits(head), _bits(embedding)):
        raise ValueError(
            f"{folder}: {HEAD} must be equal to {EMBEDDING}, for VaultGemma's head is tied to its embedding. Received: "
            f"{head.dtype} {head.shape} and {embedding.dtype} {embedding.shape}, which differ"
        )


def _bits(array):
    return array.view(f"u{array.dtype.itemsize}")


def _own(array, dtype):
    """A contiguous copy of another dtype in memory of its own.

    JAX may use an array's memory as it is; a view of the file would change, or crash, with the file.
    """
    with np.errstate(over="ignore"):  # `warn_if_not_finite` says which variable became infinite
        # To contiguous memory before the cast: half the time of a strided cast, and no copy where nothing is turned.
        return np.ascontiguousarray(array).astype(dtype)
