"""Pictures, which need matplotlib."""

import importlib.util
from pathlib import Path

from keras_vaultgemma import saving


def can_draw():
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def figure(size):
    """An empty matplotlib `Figure` of `size` (width, height) in inches.

    Raises:
        ImportError: where matplotlib is not installed; it names the extra.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(f"A picture needs matplotlib: pip install keras-vaultgemma[plot] ({error})") from error
    return Figure(figsize=size, layout="constrained")


def save(figure, path):
    """Write a PNG: whole, or not at all."""
    path = Path(path).resolve()
    with saving.written_beside(path.parent) as folder:
        figure.savefig(folder / path.name, format="png", dpi=150)
