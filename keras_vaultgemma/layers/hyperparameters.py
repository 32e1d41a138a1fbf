"""Ranges of the backbone's hyperparameters."""

from keras_vaultgemma._validation import check_integer, check_number, is_integer

LAYER_TYPES = ("full_attention", "sliding_attention")

SHAPES = (
    "vocabulary_size",
    "num_layers",
    "num_query_heads",
    "num_key_value_heads",
    "hidden_dim",
    "intermediate_dim",
    "head_dim",
)
"""Arguments of the backbone that the shapes of its weights depend on."""


def check_hyperparameters(hyperparameters):
    """Check the constructor arguments of `VaultGemmaBackbone`.

    Args:
        hyperparameters: dict from the name of each argument to its value.

    Raises:
        ValueError: If a value is out of its range or contradicts another. Names the first such
            value.
    """
    h = hyperparameters

    def require(name, legal, is_legal):
        if not is_legal:
            raise ValueError(f"`{name}` must be {legal}. Received: {name}={h[name]!r}")

    for name in (*SHAPES, "max_sequence_length"):
        check_integer(name, h[name])
    for name in ("query_pre_attn_scalar", "rope_theta", "layer_norm_epsilon", "initializer_range"):
        check_number(name, h[name], above=0)
    for name in ("attention_logit_soft_cap", "final_logit_soft_cap"):
        check_number(name, h[name], above=0, allow_none=True)
    heads = h["num_key_value_heads"]
    divides = h["num_query_heads"] % heads == 0
    require("num_query_heads", f"a multiple of num_key_value_heads={heads}", divides)
    is_even = h["head_dim"] % 2 == 0
    require("head_dim", "even, because rotary positions rotate pairs of channels", is_even)
    count, types = h["num_layers"], h["layer_types"]
    is_list = isinstance(types, (list, tuple)) and len(types) == count
    require(
        "layer_types",
        f"{count} (num_layers) of {' or '.join(map(repr, LAYER_TYPES))}",
        is_list and all(layer_type in LAYER_TYPES for layer_type in types),
    )
    window, slides = h["sliding_window_size"], "sliding_attention" in types
    is_legal = is_integer(window) or (window is None and not slides)
    require("sliding_window_size", "a positive integer" + ("" if slides else " or None"), is_legal)
