"""Writers of the files of a checkpoint folder, without a model in memory.

For Hugging Face, everything but the weights (`safetensors_format` writes those); for Keras, what
`save_to_preset` would write.
"""

import json

from keras_vaultgemma.checkpoints import weight_map
from keras_vaultgemma.checkpoints.config import HUGGING_FACE_FIELDS, MODEL_TYPE
from keras_vaultgemma.checkpoints.hdf5_format import write_hdf5
from keras_vaultgemma.checkpoints.lazy_tensor import dtype_name
from keras_vaultgemma.checkpoints.presets import CONFIG
from keras_vaultgemma.checkpoints.reader import WEIGHTS_FILE

UNUSED_WINDOW = 4096
"""Positions. transformers fails on a null window even if no layer slides."""

SPECIAL_IDS = {"bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0}
"""Gemma's ids, for a model without vocabulary."""

BACKBONE_NAME, TASK_NAME = "vault_gemma_backbone", "vault_gemma_causal_lm"
LAYERS_WITHOUT_WEIGHTS = {
    "layers/input_layer/vars": "padding_mask",
    "layers/input_layer_1/vars": "token_ids",
    "layers/rescaling/vars": "embedding_scale",
    "layers/rotary_angles/vars": "rotary_angles",
    "vars": BACKBONE_NAME,
}
"""Groups that Keras writes for layers without weights, and the layer name of each."""


def write_hugging_face_config(folder, hyperparameters, dtype, preprocessor, vocabulary):
    """Write the config and tokenizer files that transformers loads as VaultGemma.

    config.json and generation_config.json; with a vocabulary also tokenizer.model and
    tokenizer_config.json.

    Args:
        folder: `pathlib.Path` of an existing folder.
        hyperparameters: dict. Constructor arguments of the backbone, as `reader.open_values`
            returns them.
        dtype: NumPy dtype of the weights.
        preprocessor: `VaultGemmaCausalLMPreprocessor`, or None.
        vocabulary: `pathlib.Path` of the SentencePiece model, or None.

    Raises:
        ValueError: If transformers' `VaultGemmaConfig` cannot represent a hyperparameter.
    """
    ids = SPECIAL_IDS
    if preprocessor is not None:
        tokenizer = preprocessor.tokenizer
        ids = dict(
            zip(
                SPECIAL_IDS,
                (tokenizer.start_token_id, tokenizer.end_token_id, tokenizer.pad_token_id),
                strict=True,
            )
        )
    files = {
        CONFIG: {**_config(hyperparameters), "dtype": dtype_name(dtype), **ids},
        "generation_config.json": {"_from_model_config": True, **ids},
    }
    if vocabulary is not None:
        (folder / "tokenizer.model").write_bytes(vocabulary.read_bytes())
        files["tokenizer_config.json"] = {
            "tokenizer_class": "GemmaTokenizer",
            "add_bos_token": True,
            "add_eos_token": False,
            "bos_token": "<bos>",
            "eos_token": "<eos>",
            "pad_token": "<pad>",
            "unk_token": "<unk>",
            "clean_up_tokenization_spaces": False,
            "model_max_length": hyperparameters["max_sequence_length"],
        }
    for name, content in files.items():
        (folder / name).write_text(
            json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8"
        )


def _config(hyperparameters):
    config = {
        field: hyperparameters[argument] if argument else default
        for field, (argument, default, _) in HUGGING_FACE_FIELDS.items()
    }
    config["rope_parameters"] = {
        "rope_type": "default",
        "rope_theta": float(hyperparameters["rope_theta"]),
    }
    if config["sliding_window"] is None:
        config["sliding_window"] = UNUSED_WINDOW
    for field in ("attn_logit_softcapping", "final_logit_softcapping"):
        if config[field] is not None:
            config[field] = float(config[field])
    scalar = config["query_pre_attn_scalar"]
    if scalar != int(scalar):
        raise ValueError(
            "`query_pre_attn_scalar` must be an integer for transformers. "
            f"Received: query_pre_attn_scalar={scalar}"
        )
    width, heads = config["hidden_size"], config["num_attention_heads"]
    if width % heads:
        raise ValueError(
            f"`hidden_dim` must be a multiple of num_query_heads={heads} for transformers. "
            f"Received: hidden_dim={width}"
        )
    return {
        **config,
        "architectures": ["VaultGemmaForCausalLM"],
        "model_type": MODEL_TYPE,
        "query_pre_attn_scalar": int(scalar),
        "use_cache": True,
    }


def write_keras_config(folder, hyperparameters, dtype, preprocessor):
    """Write config.json, task.json and the files of the preprocessor.

    Args:
        folder: `pathlib.Path` of an existing folder.
        hyperparameters: dict. Constructor arguments of the backbone, as `reader.open_values`
            returns them.
        dtype: NumPy dtype of the weights, which becomes the preset's dtype.
        preprocessor: `VaultGemmaCausalLMPreprocessor`, or None.
    """
    # A literal, because `serialize_keras_object` would import TensorFlow.
    policy = {
        "module": "keras",
        "class_name": "DTypePolicy",
        "config": {"name": dtype_name(dtype)},
        "registered_name": None,
    }
    config = {"name": BACKBONE_NAME, "trainable": True, "dtype": policy, **hyperparameters}
    backbone = _serialized("backbone", "VaultGemmaBackbone", config)
    preprocessor_config = None
    if preprocessor is not None:
        preprocessor.save_to_preset(folder)
        preprocessor_config = json.loads((folder / "preprocessor.json").read_text(encoding="utf-8"))
    task = _serialized(
        "causal_lm",
        "VaultGemmaCausalLM",
        {"backbone": backbone, "preprocessor": preprocessor_config, "name": TASK_NAME},
    )
    for name, content in ((CONFIG, backbone), ("task.json", task)):
        (folder / name).write_text(json.dumps(content, indent=4), encoding="utf-8")


def write_keras_weights(folder, hyperparameters, values, dtype, report):
    """Write model.weights.h5, one tensor at a time.

    Args:
        folder: `pathlib.Path` of an existing folder.
        hyperparameters: dict. Constructor arguments of the backbone, as `reader.open_values`
            returns them.
        values: dict of the variables' paths to `LazyTensor`.
        dtype: NumPy dtype to write.
        report: callable. Called with the number of bytes of each block after it is written.
    """
    weights = weight_map.weight_map(hyperparameters)
    tensors = [(weight.locations[weight_map.KERAS], values[weight.path]) for weight in weights]
    write_hdf5(folder / WEIGHTS_FILE, tensors, dtype, _layer_names(weights), report)


def _layer_names(weights):
    names = dict(LAYERS_WITHOUT_WEIGHTS)
    for weight in weights:
        layers = weight.path.split("/")[:-1]
        groups = weight.locations[weight_map.KERAS].name.removesuffix("/vars/0").split("/")
        for depth, layer in enumerate(layers, 1):
            names["/".join([*groups[: depth + 1], "vars"])] = layer
    return names


def _serialized(module, name, config):
    """Return the serialised form of an object of one of the registered classes of `models`."""
    return {
        "module": f"keras_vaultgemma.models.{module}",
        "class_name": name,
        "config": config,
        "registered_name": f"keras_vaultgemma>{name}",
    }
