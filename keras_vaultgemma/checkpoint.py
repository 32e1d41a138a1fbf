"""The weight map between Hugging Face checkpoints and the backbone.

One table says, for each variable of the backbone, the tensor of a Hugging Face checkpoint that it is, and whether it is
transposed; reading and writing are the same table in two directions. Tensors are memory-mapped and assigned one by one.
"""

import json
import warnings
from pathlib import Path

import ml_dtypes
import numpy as np
from keras import ops

from keras_vaultgemma import presets

MODEL_TYPE = "vaultgemma"
ACTIVATION = "gelu_pytorch_tanh"
DTYPES = {"F32": np.dtype("float32"), "F16": np.dtype("float16"), "BF16": np.dtype(ml_dtypes.bfloat16)}

FIELDS = {
    "vocab_size": ("vocabulary_size", 256000),
    "num_hidden_layers": ("num_layers", 26),
    "num_attention_heads": ("num_query_heads", 8),
    "num_key_value_heads": ("num_key_value_heads", 4),
    "hidden_size": ("hidden_dim", 2304),
    "intermediate_size": ("intermediate_dim", 9216),
    "head_dim": ("head_dim", 256),
    "query_pre_attn_scalar": ("query_pre_attn_scalar", 256),
    "attn_logit_softcapping": ("attention_logit_soft_cap", 50.0),
    "final_logit_softcapping": ("final_logit_soft_cap", 30.0),
    "layer_types": ("layer_types", None),
    "sliding_window": ("sliding_window_size", 4096),
    "rms_norm_eps": ("layer_norm_epsilon", 1e-6),
    "max_position_embeddings": ("max_sequence_length", 8192),
    "initializer_range": ("initializer_range", 0.02),
}
"""Field of a Hugging Face config: the backbone's argument, and transformers' default where the file leaves it out."""


def read_config(folder):
    """The backbone's constructor arguments from the config.json of a Hugging Face folder.

    Fields that are missing take the defaults of transformers' `VaultGemmaConfig`, which are not those of VaultGemma 1B.

    Raises:
        ValueError: for another `model_type`, an activation, bias, rotary scaling or untied head this model does not
            have. Names the field.
    """
    path = Path(folder) / presets.CONFIG
    config = presets.read_json(path)

    def refuse(field, legal):
        raise ValueError(f"{path}: `{field}` must be {legal}. Received: {config.get(field)!r}")

    if config.get("model_type") != MODEL_TYPE:
        refuse("model_type", repr(MODEL_TYPE))
    if config.get("hidden_activation", ACTIVATION) != ACTIVATION:
        refuse("hidden_activation", repr(ACTIVATION))
    if config.get("attention_bias", False):
        refuse("attention_bias", "false")
    if not config.get("tie_word_embeddings", True):
        refuse("tie_word_embeddings", "true")
    if config.get("attention_dropout"):
        warnings.warn(f"{path}: `attention_dropout` is ignored; training here has no dropout", stacklevel=2)
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if rope.get("rope_type", "default") != "default":
        refuse("rope_parameters", "of the rope_type 'default'")

    arguments = {ours: config.get(theirs, default) for theirs, (ours, default) in FIELDS.items()}
    arguments["rope_theta"] = rope.get("rope_theta", config.get("rope_theta", 10_000.0))
    if arguments["layer_types"] is None:  # transformers alternates, sliding first
        arguments["layer_types"] = [
            "full_attention" if i % 2 else "sliding_attention" for i in range(arguments["num_layers"])
        ]
    return arguments


def weight_map(backbone):
    """{tensor name in a Hugging Face checkpoint: (variable of the backbone, transposed)}, in the order of the layers.

    Hugging Face keeps projections [out, in], Keras [in, out].
    """
    table = {"model.embed_tokens.weight": (backbone.token_embedding.embeddings, False)}
    for i, block in enumerate(backbone.transformer_layers):
        layer = f"model.layers.{i}"
        table[f"{layer}.input_layernorm.weight"] = (block.attention_norm.scale, False)
        table[f"{layer}.self_attn.q_proj.weight"] = (block.attention.query.kernel, True)
        table[f"{layer}.self_attn.k_proj.weight"] = (block.attention.key.kernel, True)
        table[f"{layer}.self_attn.v_proj.weight"] = (block.attention.value.kernel, True)
        table[f"{layer}.self_attn.o_proj.weight"] = (block.attention.attention_output.kernel, True)
        table[f"{layer}.pre_feedforward_layernorm.weight"] = (block.mlp_norm.scale, False)
        table[f"{layer}.mlp.gate_proj.weight"] = (block.gate.kernel, True)
        table[f"{layer}.mlp.up_proj.weight"] = (block.up.kernel, True)
        table[f"{layer}.mlp.down_proj.weight"] = (block.down.kernel, True)
    table["model.norm.weight"] = (backbone.final_norm.scale, False)
    return table


def load(backbone, folder):
    """Read the weights of a Hugging Face folder into a backbone, cast to its dtype.

    Everything is checked before the first variable changes.

    Args:
        backbone: `VaultGemmaBackbone` of the folder's configuration.
        folder: with model.safetensors, or several files and their model.safetensors.index.json.

    Raises:
        ValueError: names the tensor that is missing, unknown or of another shape (with both shapes), an
            `lm_head.weight` that is not the embedding, or the file that is cut short or malformed.
    """
    tensors = open_tensors(folder)
    table = weight_map(backbone)
    head = tensors.pop("lm_head.weight", None)
    embedding = tensors.get("model.embed_tokens.weight")
    if head is not None and not (embedding is not None and np.array_equal(_bits(head), _bits(embedding))):
        raise ValueError(
            f"{folder}: lm_head.weight differs from model.embed_tokens.weight, and VaultGemma's head is tied to its "
            f"embedding. Shapes: {head.shape} and {None if embedding is None else embedding.shape}"
        )
    for name in sorted(table.keys() | tensors.keys()):
        expected = _file_shape(*table[name]) if name in table else None
        found = tensors[name].shape if name in tensors else None
        if expected != found:
            problem = "missing from" if found is None else "unknown in" if expected is None else "misshapen in"
            raise ValueError(f"{name} is {problem} {folder}. Expected shape: {expected}. Found: {found}")
    for name, (variable, transposed) in table.items():
        array = tensors.pop(name)
        # The cast makes the one copy in memory; an array in place of a view also keeps the file from being held open.
        variable.assign(_to_dtype(array.T if transposed else array, variable.dtype))


def open_tensors(folder):
    """{name: memory-mapped NumPy array} of a folder's safetensors files; no tensor is read yet.

    Raises:
        ValueError: names the file that is missing, cut short or malformed.
    """
    folder = Path(folder)
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return open_safetensors(folder / "model.safetensors")
    weight_map = presets.read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index} must have a `weight_map` from tensor names to files. Received: {weight_map!r}")
    tensors = {}
    for name in sorted(set(map(str, weight_map.values()))):
        if Path(name).name != name:
            raise ValueError(f"{index} names a file outside its folder: {name!r}")
        tensors.update(open_safetensors(folder / name))
    if set(tensors) != set(weight_map):
        difference = sorted(set(tensors) ^ set(weight_map))
        raise ValueError(f"{index} and its files disagree about {', '.join(difference[:5])}")
    return tensors


def open_safetensors(path):
    """{name: memory-mapped NumPy array} of one safetensors file (https://github.com/huggingface/safetensors).

    The library reads bfloat16 into PyTorch or JAX only; a header and a memory map serve every backend.

    Raises:
        ValueError: names the file where it is missing, cut short or malformed.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} does not exist")
    size = path.stat().st_size
    with path.open("rb") as f:
        length = int.from_bytes(f.read(8), "little")
        if size < 8 or length > size - 8:
            raise ValueError(f"{path} is cut short: {size} bytes, and its header alone is {length}")
        try:
            header = json.loads(f.read(length))
        except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"{path} has no valid safetensors header: {error}") from error
    header.pop("__metadata__", None)
    data = np.memmap(path, mode="r", offset=8 + length) if size > 8 + length else np.empty(0, "uint8")
    tensors = {}
    for name, entry in header.items():
        try:
            dtype, shape, (begin, end) = DTYPES[entry["dtype"]], tuple(entry["shape"]), entry["data_offsets"]
            fits = 0 <= begin <= end and end - begin == dtype.itemsize * int(np.prod(shape, dtype=object))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: the entry of {name} is malformed: {entry!r}") from error
        if not fits:
            raise ValueError(f"{path}: the entry of {name} contradicts itself: {entry!r}")
        if end > len(data):
            raise ValueError(f"{path} is cut short: {name} ends at byte {end} of {len(data)}")
        tensors[name] = data[begin:end].view(dtype).reshape(shape)
    return tensors


def warn_if_not_finite(backbone):
    """Warn where weights hold NaN or infinity, naming the first variable that does."""
    for variable in backbone.variables:
        if "float" in variable.dtype and not bool(ops.all(ops.isfinite(variable.value))):
            warnings.warn(f"{variable.path} holds NaN or infinite values: the checkpoint is damaged", stacklevel=3)
            return


def _file_shape(variable, transposed):
    return tuple(reversed(variable.shape)) if transposed else tuple(variable.shape)


def _bits(array):
    """The bit pattern, so that equal means equal for NaN too."""
    return array.view(f"uint{8 * array.dtype.itemsize}")


def _to_dtype(array, dtype):
    return np.ascontiguousarray(array).astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype, copy=False)
