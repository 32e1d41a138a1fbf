"""Writers of the files of a checkpoint folder, without a model in memory.

For Hugging Face, everything but the weights (`safetensors_format` writes those); for Keras, what
`save_to_preset` would write.
"""

import json
import shutil

from keras_vaultgemma._files import check_link, read_json
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

GENERATION_CONFIG = "generation_config.json"
TEXT_FILES = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
    GENERATION_CONFIG,
)
"""Files of a Hugging Face folder that say how text becomes ids and when generation ends."""

CHAT_TEMPLATE = """\
{{ bos_token }}{% for message in messages %}\
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}\
{{ raise_exception('Turns must alternate user/assistant/..., without a system role') }}\
{% endif %}\
{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}\
{{ '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}\
{% endfor %}\
{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"""
"""`apply_chat_template` in Jinja, after `<bos>`, as transformers and servers expect it."""

TURNS = ["<start_of_turn>", "<end_of_turn>"]

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
    tokenizer_config.json. A vocabulary that has turns gets Gemma's chat template, and generation
    then ends at `<end_of_turn>` too.

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
    turns = {} if preprocessor is None else _turns(preprocessor.tokenizer)
    stops = [ids["eos_token_id"], *list(turns)[-1:]]
    files = {
        CONFIG: {**_config(hyperparameters), "dtype": dtype_name(dtype), **ids},
        GENERATION_CONFIG: {**ids, "eos_token_id": stops if turns else stops[0]},
    }
    if vocabulary is not None:
        (folder / "tokenizer.model").write_bytes(vocabulary.read_bytes())
        chat = {"chat_template": CHAT_TEMPLATE, "added_tokens_decoder": turns}
        files["tokenizer_config.json"] = {
            **(chat if turns else {}),
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


def _turns(tokenizer):
    """Return a dict of the ids of the turn markers to special tokens; {} if one is missing.

    transformers leaves special tokens out of decoded text.
    """
    ids = [tokenizer.token_to_id(text) for text in TURNS]
    if [tokenizer.id_to_token(i) for i in ids] != TURNS:
        return {}
    flags = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
    return {
        i: {"content": text, "special": True, **flags} for i, text in zip(ids, TURNS, strict=True)
    }


def _write_json(path, content):
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


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
