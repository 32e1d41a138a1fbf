"""What the sizes and constants of a VaultGemma may be."""

import numbers

LAYER_TYPES = ("full_attention", "sliding_attention")


def check_hyperparameters(hyperparameters):
    """Check constructor arguments of `VaultGemmaBackbone`.

    Args:
        hyperparameters: dict of all of them by name.

    Raises:
        ValueError: names the first that is out of its range or contradicts another, and its value.
    """

    def require(name, legal, fine):
        if not fine:
            raise ValueError(
                f"`{name}` must be {legal}. Received: {name}={hyperparameters[name]!r}"
            )

    def is_positive(value):
        return isinstance(value, numbers.Real) and value > 0

    h = hyperparameters
    for name in (
        "vocabulary_size",
        "num_layers",
        "num_query_heads",
        "num_key_value_heads",
        "hidden_dim",
    ):
        require(name, "a positive integer", is_count(h[name]))
    for name in ("intermediate_dim", "head_dim", "max_sequence_length"):
        require(name, "a positive integer", is_count(h[name]))
    for name in ("query_pre_attn_scalar", "rope_theta", "layer_norm_epsilon", "initializer_range"):
        require(name, "a number above 0", is_positive(h[name]))
    for name in ("attention_logit_soft_cap", "final_logit_soft_cap"):
        require(name, "None or a number above 0", h[name] is None or is_positive(h[name]))
    heads = h["num_key_value_heads"]
    require(
        "num_query_heads",
        f"a multiple of num_key_value_heads={heads}",
        h["num_query_heads"] % heads == 0,
    )
    require("head_dim", "even, for rotary positions turn pairs of channels", h["head_dim"] % 2 == 0)
    count = h["num_layers"]
    fine = isinstance(h["layer_types"], (list, tuple)) and len(h["layer_types"]) == count
    fine = fine and all(layer_type in LAYER_TYPES for layer_type in h["layer_types"])
    require("layer_types", f"{count} (num_layers) of {' or '.join(map(repr, LAYER_TYPES))}", fine)
    slides = "sliding_attention" in h["layer_types"]
    fine = is_count(h["sliding_window_size"]) or (h["sliding_window_size"] is None and not slides)
    require("sliding_window_size", "a positive integer" + ("" if slides else " or None"), fine)


def is_count(value):
    """Whether a value is a positive integer."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool) and value > 0
