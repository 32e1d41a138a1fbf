"""A folder for transformers, written without a model in memory.

Its architecture is VaultGemma, or Gemma 1 if that computes the same.
"""

import json
import shutil

from keras_vaultgemma._files import check_link, read_json
from keras_vaultgemma.checkpoints import tokenizer_json
from keras_vaultgemma.checkpoints.chat_template import CHAT_TEMPLATE, TURNS, turn_ids
from keras_vaultgemma.checkpoints.config_fields import (
    ACTIVATION,
    GEMMA_FIELDS,
    GEMMA_TYPE,
    HUGGING_FACE_FIELDS,
    MODEL_TYPE,
)
from keras_vaultgemma.checkpoints.gemma import check_is_gemma
from keras_vaultgemma.checkpoints.lazy_tensor import dtype_name
from keras_vaultgemma.checkpoints.presets import CONFIG

UNUSED_WINDOW = 4096
"""Positions. transformers fails on a null window even if no layer slides."""

SPECIAL_IDS = {"bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0}
"""Gemma's ids, for a model without vocabulary."""

DTYPE_FIELDS = {MODEL_TYPE: ("dtype",), GEMMA_TYPE: ("dtype", "torch_dtype")}
"""Names of the field of the dtype. Engines that know Gemma may be older than the first name."""

GENERATION_CONFIG, TOKENIZER_CONFIG = "generation_config.json", "tokenizer_config.json"
TEXT_FILES = (
    "tokenizer.model",
    tokenizer_json.FILE,
    TOKENIZER_CONFIG,
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
    GENERATION_CONFIG,
)
"""Files of a Hugging Face folder that say how text becomes ids and when generation ends."""


def write_hugging_face_config(
    folder, hyperparameters, dtype, preprocessor, vocabulary, architecture=MODEL_TYPE
):
    """Write the config and tokenizer files that transformers loads as VaultGemma or Gemma.

    config.json and generation_config.json; with a vocabulary also tokenizer.model and
    tokenizer_config.json. A vocabulary that has turns gets Gemma's chat template, and generation
    then ends at `<end_of_turn>` too.

    Args:
        folder: `pathlib.Path` of an existing folder.
        hyperparameters: dict. Constructor arguments of the backbone, as `reader.open_values`
            returns them.
        dtype: NumPy dtype of the weights.
        preprocessor: `VaultGemmaCausalLMPreprocessor`, or None.
        vocabulary: `pathlib.Path` of the SentencePiece model, or None.
        architecture: string, "vaultgemma" or "gemma". Defaults to "vaultgemma".

    Raises:
        ValueError: If the architecture cannot represent a hyperparameter.
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
    turns = [] if preprocessor is None else turn_ids(preprocessor.tokenizer)
    stops = [ids["eos_token_id"], *turns[-1:]]
    config = _gemma_config if architecture == GEMMA_TYPE else _config
    dtypes = dict.fromkeys(DTYPE_FIELDS[architecture], dtype_name(dtype))
    files = {
        CONFIG: {**config(hyperparameters), **dtypes, **ids},
        GENERATION_CONFIG: {**ids, "eos_token_id": stops if turns else stops[0]},
    }
    if vocabulary is not None:
        (folder / "tokenizer.model").write_bytes(vocabulary.read_bytes())
        files[TOKENIZER_CONFIG] = {
            **(_chat(turns) if turns else {}),
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
        _write_json(folder / name, content)


def copy_text_files(source, folder):
    """Copy what the folder of another Hugging Face checkpoint says about text and its end.

    Args:
        source: `pathlib.Path` of the folder of the checkpoint.
        folder: `pathlib.Path` of a folder with the files of `write_hugging_face_config`, which are
            replaced. The ids of special tokens in its config become those of the source.

    Raises:
        ValueError: If a file of the source is a link that leaves its folder.
    """
    for pattern in TEXT_FILES:
        for path in source.glob(pattern):
            check_link(path, source)
            target = folder / path.relative_to(source)
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, target)
    theirs = read_json(source / CONFIG)
    ids = {name: theirs[name] for name in SPECIAL_IDS if name in theirs}
    _write_json(folder / CONFIG, {**read_json(folder / CONFIG), **ids})


def write_fast_tokenizer(folder, pieces):
    """Write tokenizer.json, for engines without SentencePiece.

    Args:
        folder: `pathlib.Path` of a folder with the files of `write_hugging_face_config`.
        pieces: list of `Piece`, the vocabulary.
    """
    added = tokenizer_json.write_tokenizer_json(folder / tokenizer_json.FILE, pieces, special=TURNS)
    path = folder / TOKENIZER_CONFIG
    if path.is_file():  # transformers prefers its list of added tokens to that of tokenizer.json.
        _write_json(path, {**read_json(path), "added_tokens_decoder": added})


def _chat(turns):
    """Return the chat template, and the turn markers as special tokens.

    transformers leaves special tokens out of decoded text.
    """
    flags = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
    added = {
        i: {"content": text, "special": True, **flags} for i, text in zip(turns, TURNS, strict=True)
    }
    return {"chat_template": CHAT_TEMPLATE, "added_tokens_decoder": added}


def _write_json(path, content):
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _fields(table, hyperparameters):
    """Return the fields that the config of either architecture has."""
    config = {
        field: hyperparameters[argument] if argument else default
        for field, (argument, default, _) in table.items()
    }
    rope = {"rope_type": "default", "rope_theta": float(hyperparameters["rope_theta"])}
    return {**config, "rope_parameters": rope, "use_cache": True}


def _gemma_config(hyperparameters):
    check_is_gemma(hyperparameters)
    config = _fields(GEMMA_FIELDS, hyperparameters)
    return {
        **config,
        "architectures": ["GemmaForCausalLM"],
        "model_type": GEMMA_TYPE,
        # Engines older than transformers 5 read these.
        "hidden_activation": ACTIVATION,
        "rope_theta": config["rope_parameters"]["rope_theta"],
    }


def _config(hyperparameters):
    config = _fields(HUGGING_FACE_FIELDS, hyperparameters)
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
    }
