"""Adapters of different shapes as adapters of one shape, which share their variables."""

import numpy as np

from keras_vaultgemma.lora.adapter import Adapter


def align(adapters):
    """Return adapters of the same layers, ranks and scales that compute what the given ones do.

    Factors are padded with zeros, and the scale becomes part of B. Switching between the results
    assigns variables and compiles nothing.

    Args:
        adapters: non-empty list of `Adapter` with values.

    Returns:
        Tuple of the list of `Adapter`, and one more that changes nothing.
    """
    shapes = {}
    for adapter in adapters:
        for path, (a, b) in adapter.factors.items():
            rank = max(a.shape[1], shapes.get(path, (0, 0, 0))[1])
            shapes[path] = a.shape[0], rank, b.shape[1]
    ranks = {path: rank for path, (_, rank, _) in shapes.items()}
    common = dict(rank=1, alpha=1.0, dropout=0.0, ranks=ranks, alphas=dict(ranks))

    def padded(adapter):
        factors = {}
        for path, (inputs, rank, outputs) in shapes.items():
            a, b = np.zeros((inputs, rank), "float32"), np.zeros((rank, outputs), "float32")
            if adapter is not None and path in adapter.factors:
                first, second = adapter.factors[path]
                a[:, : first.shape[1]] = first
                b[: len(second)] = second * (adapter.alpha_of(path) / adapter.rank_of(path))
            factors[path] = a, b
        return Adapter(factors=factors, **common)

    return [padded(adapter) for adapter in adapters], padded(None)
