"""The files of a Hugging Face checkpoint that transformers loads as VaultGemma, but for its weights."""

import json

from keras_vaultgemma import checkpoint_config
from keras_vaultgemma.presets import CONFIG
from keras_vaultgemma.stored_tensor import dtype_name

UNUSED_WINDOW = 4096
"""transformers makes a sliding mask even where no layer slides, and fails where the window is null."""

SPECIAL_IDS = {"bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0}
"""Gemma's, for a model without vocabulary."""


def write_config(folder, hyperparameters, dtype, preprocessor, vocabulary):
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
            zip(SPECIAL_IDS, (tokenizer.start_token_id, tokenizer.end_token_id, tokenizer.pad_token_id), strict=True)
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
        (folder / name).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _config(hyperparameters):
    config = {
        field: hyperparameters[argument] if argument else default
        for field, (argument, default, _) in checkpoint_config.HUGGING_FACE_FIELDS.items()
    }
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": float(hyperparameters["rope_theta"])}
    if config["sliding_window"] is None:
        config["sliding_window"] = UNUSED_WINDOW
    for field in ("attn_logit_softcapping", "final_logit_softcapping"):
        if config[field] is not None:
            config[field] = float(config[field])
    scalar = config["query_pre_attn_scalar"]
    if scalar != int(scalar):
        raise ValueError(f"`query_pre_attn_scalar` must be an integer for transformers. Received: {scalar}")
    width, heads = config["hidden_size"], config["num_attention_heads"]
    if width % heads:
        raise ValueError(
            f"`hidden_dim` must be a multiple of num_query_heads={heads} for transformers. Received: {width}"
        )
    return {
        **config,
        "architectures": ["VaultGemmaForCausalLM"],
        "model_type": checkpoint_config.MODEL_TYPE,
        "query_pre_attn_scalar": int(scalar),
        "use_cache": True,
    }
