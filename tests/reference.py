"""VaultGemma in NumPy and float64, one row at a time, every step written out: what the fast model must equal."""

import numpy as np
from common import to_numpy


def rms_norm(x, scale, epsilon):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + epsilon) * (1 + scale)


def gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def rotate(x, position, theta):
    half = len(x) // 2
    turned = np.empty_like(x)
    for i in range(half):
        angle = position * theta ** (-i / half)
        turned[i] = x[i] * np.cos(angle) - x[i + half] * np.sin(angle)
        turned[i + half] = x[i + half] * np.cos(angle) + x[i] * np.sin(angle)
    return turned


def logits(backbone, row):
    """Logits float64 [T, V] of a list of ids."""

    def weight(variable):
        return to_numpy(variable).astype("float64")

    cap = backbone.attention_logit_soft_cap
    group = backbone.num_query_heads // backbone.num_key_value_heads
    embeddings = weight(backbone.token_embedding.embeddings)
    x = embeddings[row] * np.sqrt(backbone.hidden_dim)
    for block, layer_type in zip(backbone.transformer_layers, backbone.layer_types, strict=True):
        a = block.attention
        normed = rms_norm(x, weight(block.attention_norm.scale), backbone.layer_norm_epsilon)
        heads = [
            (normed @ weight(p.kernel)).reshape(len(row), -1, backbone.head_dim)
            for p in (a.query, a.key, a.value)
        ]
        query, key, value = heads
        for turned in (query, key):
            for t, n in np.ndindex(turned.shape[:2]):
                turned[t, n] = rotate(turned[t, n], t, backbone.rope_theta)
        mixed = np.zeros_like(query)
        for t, n in np.ndindex(query.shape[:2]):
            first = 0
            if layer_type == "sliding_attention":
                first = max(0, t - backbone.sliding_window_size + 1)
            k = n // group
            scores = key[first : t + 1, k] @ query[t, n] / np.sqrt(backbone.query_pre_attn_scalar)
            if cap is not None:
                scores = cap * np.tanh(scores / cap)
            weights = np.exp(scores - scores.max())
            mixed[t, n] = weights @ value[first : t + 1, k] / weights.sum()
        x = x + mixed.reshape(len(row), -1) @ weight(a.attention_output.kernel)
        normed = rms_norm(x, weight(block.mlp_norm.scale), backbone.layer_norm_epsilon)
        gated = gelu(normed @ weight(block.gate.kernel)) * (normed @ weight(block.up.kernel))
        x = x + gated @ weight(block.down.kernel)
    x = rms_norm(x, weight(backbone.final_norm.scale), backbone.layer_norm_epsilon)
    result = x @ embeddings.T
    cap = backbone.final_logit_soft_cap
    return result if cap is None else cap * np.tanh(result / cap)


def greedy(backbone, row, count):
    """`count` ids that follow a list of ids, from the whole row anew for each."""
    row = list(row)
    for _ in range(count):
        row.append(int(np.argmax(logits(backbone, row)[-1])))
    return row[-count:]
