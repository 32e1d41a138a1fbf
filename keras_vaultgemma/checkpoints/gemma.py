"""Gemma 1, which computes the same as a VaultGemma of the release's kind."""

FULL = "full_attention"
WHY = "because Gemma 1, as which the model is written, has nothing else"


def check_is_gemma(hyperparameters):
    """Raise ValueError that names the first hyperparameter that Gemma 1 does not have.

    Args:
        hyperparameters: dict. Constructor arguments of the backbone, as `config.read_config`
            returns them.
    """
    h = hyperparameters
    head_dim = h["head_dim"]
    legal = {
        "query_pre_attn_scalar": (head_dim, f"head_dim={head_dim}"),
        "attention_logit_soft_cap": (None, "None"),
        "final_logit_soft_cap": (None, "None"),
        "layer_types": ([FULL] * h["num_layers"], f"{FULL!r} for every layer"),
    }
    for name, (value, words) in legal.items():
        if h[name] != value:
            raise ValueError(f"`{name}` must be {words}, {WHY}. Received: {name}={h[name]}")
