"""An adapter in host memory."""

from typing import NamedTuple


class Adapter(NamedTuple):
    """An adapter in host memory.

    Attributes:
        rank: int. Rank r of the layers that `ranks` does not name.
        alpha: float. A layer computes `x W + alpha / rank * (x A) B`.
        dropout: float. Fraction of the adapter's input that is dropped during training.
        factors: dict. `{path of the layer: (A, B)}`, float32 NumPy arrays of shapes `[in, r]` and
            `[r, out]`, or None instead of the arrays.
        ranks: dict. `{path: int}` of layers with another rank.
        alphas: dict. `{path: float}` of layers with another alpha.
    """

    rank: int
    alpha: float
    dropout: float
    factors: dict
    ranks: dict = {}  # noqa: RUF012
    alphas: dict = {}  # noqa: RUF012

    def rank_of(self, path):
        """Return the rank of the layer at `path`."""
        return self.ranks.get(path, self.rank)

    def alpha_of(self, path):
        """Return alpha of the layer at `path`."""
        return self.alphas.get(path, self.alpha)

    def without_values(self):
        """Return the adapter with None instead of its factors."""
        return self._replace(factors=dict.fromkeys(self.factors))
