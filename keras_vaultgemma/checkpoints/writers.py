"""The files of a Hugging Face checkpoint that transformers loads as VaultGemma, but for its weights."""

import json

from keras_vaultgemma.checkpoints import weight_map
from keras_vaultgemma.checkpoints.config import HUGGING_FACE_FIELDS, MODEL_TYPE
from keras_vaultgemma.checkpoints.hdf5_format import write_hdf5
from keras_vaultgemma.checkpoints.lazy_tensor import dtype_name
from keras_vaultgemma.checkpoints.presets import CONFIG
from keras_vaultgemma.checkpoints.reader import WEIGHTS_FILE

UNUSED_WINDOW = 4096
"""transformers makes a sliding mask even where no layer slides, and fails where the window is null."""

SPECIAL_IDS = {"bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0}
"""Gemma's, for a model without vocabulary."""


def write_hugging_face_config(folder, hyperparameters, dtype, preprocessor, vocabulary):
    """Write config.json, generation_config.json and, with a vocabulary, tokenizer.model and tokenizer_config.json.

    Args:
        folder: that exists.
        hyperparameters: as `checkpoint.open_values` returns them.
        dtype: NumPy dtype of the weights.
        preprocessor: `VaultGemmaCausalLMPreprocessor`, or None.
        vocabulary: path of the SentencePiece model, or None.

    Raises:
        ValueError: for a hyperparameter that transformers' `VaultGemmaConfig` cannot hold.
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
            f"`query_pre_attn_scalar` must be an integer for transformers. Received: {scalar}"
        )
    width, heads = config["hidden_size"], config["num_attention_heads"]
    if width % heads:
        raise ValueError(
            f"`hidden_dim` must be a multiple of num_query_heads={heads} for transformers. Received: {width}"
        )
    return {
        **config,
        "architectures": ["VaultGemmaForCausalLM"],
        "model_type": MODEL_TYPE,
        "query_pre_attn_scalar": int(scalar),
        "use_cache": True,
    }


# MERGED: """The files of a Keras preset of this package, without a model to save: what `save_to_preset` would write."""
BACKBONE_NAME, TASK_NAME = "vault_gemma_backbone", "vault_gemma_causal_lm"
LAYERS_WITHOUT_WEIGHTS = {
    "layers/input_layer/vars": "padding_mask",
    "layers/input_layer_1/vars": "token_ids",
    "layers/rescaling/vars": "embedding_scale",
    "layers/rotary_angles/vars": "rotary_angles",
    "vars": BACKBONE_NAME,
}
"""Groups in the weights file, and the layers' names that Keras notes there."""


def write_keras_config(folder, hyperparameters, dtype, preprocessor):
    """Write config.json, task.json and the files of the preprocessor.

    Args:
        folder: that exists.
        hyperparameters: as `checkpoint.open_values` returns them.
        dtype: NumPy dtype of the weights, which becomes the preset's dtype.
        preprocessor: `VaultGemmaCausalLMPreprocessor`, or None.
    """
    # Written out, for `serialize_keras_object` would import TensorFlow.
    policy = {
        "module": "keras",
        "class_name": "DTypePolicy",
        "config": {"name": dtype_name(dtype)},
        "registered_name": None,
    }
    config = {"name": BACKBONE_NAME, "trainable": True, "dtype": policy, **hyperparameters}
    backbone = _serialized("backbone", "VaultGemmaBackbone", config)
    reader = None
    if preprocessor is not None:
        preprocessor.save_to_preset(folder)
        reader = json.loads((folder / "preprocessor.json").read_text(encoding="utf-8"))
    task = _serialized(
        "causal_lm",
        "VaultGemmaCausalLM",
        {"backbone": backbone, "preprocessor": reader, "name": TASK_NAME},
    )
    for name, content in ((CONFIG, backbone), ("task.json", task)):
        (folder / name).write_text(json.dumps(content, indent=4), encoding="utf-8")


def write_keras_weights(folder, hyperparameters, values, dtype, report):
    """Write model.weights.h5, tensor by tensor; the arguments are those of `write_config` and `write_h5`."""
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
    """What Keras's serializer writes for an object of a registered class of `models`."""
    return {
        "module": f"keras_vaultgemma.models.{module}",
        "class_name": name,
        "config": config,
        "registered_name": f"keras_vaultgemma>{name}",
    }
