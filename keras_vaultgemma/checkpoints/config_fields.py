"""The fields of config.json in each format, and the legal values of each field."""

import sys

from keras_vaultgemma._validation import is_integer

MODEL_TYPE, GEMMA_TYPE = "vaultgemma", "gemma"
ACTIVATION = "gelu_pytorch_tanh"
KERAS_HUB = "keras_hub>GemmaBackbone"
KERAS = "keras_vaultgemma>VaultGemmaBackbone"


def is_count(value):
    return is_integer(value, maximum=2**31 - 1)


def is_number(value):
    return type(value) in (int, float) and 0 < value <= sys.float_info.max


COUNT = ("an integer from 1 to 2147483647", is_count)
LAYERS = ("an integer from 1 to 1000", lambda value: is_integer(value, maximum=1000))
"""Bounds the memory that `layer_types` and the weight map take for a hostile config."""

NUMBER = ("a finite number above 0", is_number)
CAP = ("null or a finite number above 0", lambda value: value is None or is_number(value))
RATE = (
    "null or a number from 0 to 1",
    lambda value: value is None or (type(value) in (int, float) and 0 <= value <= 1),
)
FLAG = ("true or false", lambda value: type(value) is bool)
TRUE = ("true", lambda value: value is True)
FALSE = ("false", lambda value: value is False)
ANY = ("", lambda value: True)
"""Legal values of a field: the words of the error message, and a predicate."""

HUGGING_FACE_FIELDS = {
    "vocab_size": ("vocabulary_size", 256000, COUNT),
    "num_hidden_layers": ("num_layers", 26, LAYERS),
    "num_attention_heads": ("num_query_heads", 8, COUNT),
    "num_key_value_heads": ("num_key_value_heads", 4, COUNT),
    "hidden_size": ("hidden_dim", 2304, COUNT),
    "intermediate_size": ("intermediate_dim", 9216, COUNT),
    "head_dim": ("head_dim", 256, COUNT),
    "query_pre_attn_scalar": ("query_pre_attn_scalar", 256, NUMBER),
    "attn_logit_softcapping": ("attention_logit_soft_cap", 50.0, CAP),
    "final_logit_softcapping": ("final_logit_soft_cap", 30.0, CAP),
    "layer_types": ("layer_types", None, ANY),
    "sliding_window": ("sliding_window_size", 4096, ANY),
    "rms_norm_eps": ("layer_norm_epsilon", 1e-6, NUMBER),
    "max_position_embeddings": ("max_sequence_length", 8192, COUNT),
    "initializer_range": ("initializer_range", 0.02, NUMBER),
    "hidden_activation": (None, ACTIVATION, (repr(ACTIVATION), lambda value: value == ACTIVATION)),
    "attention_bias": (None, False, FALSE),
    "tie_word_embeddings": (None, True, TRUE),
    "attention_dropout": (None, 0.0, RATE),
}
"""Fields of Hugging Face's config.json.

Each maps to the backbone's argument (None if it has none), the default that transformers uses for
an absent field, and the legal values."""

TANH_GELU = (
    f"{ACTIVATION!r}, or null or 'gelu', by which the first releases mean it",
    lambda value: value in (ACTIVATION, "gelu", None),
)
GEMMA_FIELDS = {
    "vocab_size": ("vocabulary_size", 256000, COUNT),
    "num_hidden_layers": ("num_layers", 28, LAYERS),
    "num_attention_heads": ("num_query_heads", 16, COUNT),
    "num_key_value_heads": ("num_key_value_heads", 16, COUNT),
    "hidden_size": ("hidden_dim", 3072, COUNT),
    "intermediate_size": ("intermediate_dim", 24576, COUNT),
    "head_dim": ("head_dim", 256, COUNT),
    "rms_norm_eps": ("layer_norm_epsilon", 1e-6, NUMBER),
    "max_position_embeddings": ("max_sequence_length", 8192, COUNT),
    "initializer_range": ("initializer_range", 0.02, NUMBER),
    "hidden_act": (None, ACTIVATION, TANH_GELU),
    "hidden_activation": (None, None, TANH_GELU),
    "attention_bias": (None, False, FALSE),
    "use_bidirectional_attention": (None, None, ("null or false", lambda value: not value)),
    "tie_word_embeddings": (None, True, TRUE),
    "attention_dropout": (None, 0.0, RATE),
}
"""Fields of the config.json of Gemma 1, in the same form. It has one scalar, no caps and no sliding
layers, so that the backbone's defaults for these are its values."""

KERAS_HUB_FIELDS = {
    "vocabulary_size": ("vocabulary_size", None, COUNT),
    "num_layers": ("num_layers", None, LAYERS),
    "num_query_heads": ("num_query_heads", None, COUNT),
    "num_key_value_heads": ("num_key_value_heads", None, COUNT),
    "hidden_dim": ("hidden_dim", None, COUNT),
    "intermediate_dim": (
        "intermediate_dim",
        None,
        ("an even integer above 0", lambda v: is_count(v) and v % 2 == 0),
    ),
    "head_dim": ("head_dim", None, COUNT),
    "attention_logit_soft_cap": ("attention_logit_soft_cap", None, CAP),
    "final_logit_soft_cap": ("final_logit_soft_cap", None, CAP),
    "use_sliding_window_attention": (None, False, FLAG),
    "sliding_window_size": ("sliding_window_size", 4096, COUNT),
    "use_post_ffw_norm": (None, False, FALSE),
    "use_post_attention_norm": (None, False, FALSE),
    "dropout": (None, 0, ("0", lambda value: value == 0)),
    # keras-hub's blocks ignore these two fields and compute with the values below. Another value
    # means that the weights belong to a model that keras-hub does not run.
    "query_head_dim_normalize": (None, True, TRUE),
    "layer_norm_epsilon": ("layer_norm_epsilon", 1e-6, ("1e-6", lambda value: value == 1e-6)),
}
"""Fields of keras-hub's `GemmaBackbone`, in the same form."""

KERAS_FIELDS = {
    "vocabulary_size": ("vocabulary_size", None, COUNT),
    "num_layers": ("num_layers", None, LAYERS),
    "num_query_heads": ("num_query_heads", None, COUNT),
    "num_key_value_heads": ("num_key_value_heads", None, COUNT),
    "hidden_dim": ("hidden_dim", None, COUNT),
    "intermediate_dim": ("intermediate_dim", None, COUNT),
    "head_dim": ("head_dim", None, COUNT),
    "query_pre_attn_scalar": ("query_pre_attn_scalar", None, CAP),
    "attention_logit_soft_cap": ("attention_logit_soft_cap", None, CAP),
    "final_logit_soft_cap": ("final_logit_soft_cap", None, CAP),
    "layer_types": ("layer_types", None, ANY),
    "sliding_window_size": ("sliding_window_size", None, ANY),
    "rope_theta": ("rope_theta", 10_000.0, NUMBER),
    "layer_norm_epsilon": ("layer_norm_epsilon", 1e-6, NUMBER),
    "max_sequence_length": ("max_sequence_length", 1024, COUNT),
    "initializer_range": ("initializer_range", 0.02, NUMBER),
}
"""Fields of this package's presets, in the same form, with the defaults of the backbone."""
