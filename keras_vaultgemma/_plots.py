"""Pictures, which need matplotlib."""

import importlib.util
from pathlib import Path

from keras_vaultgemma._files import new_folder


def can_plot():
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def new_figure(size):
    """An empty matplotlib `Figure` of `size` (width, height) in inches.

    Raises:
        ImportError: where matplotlib is not installed; it names the extra.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            f"A picture needs matplotlib: pip install keras-vaultgemma[plot] ({error})"
        ) from error
    return Figure(figsize=size, layout="constrained")


def save_figure(figure, path):
    """Write a PNG: whole, or not at all."""
    path = Path(path).resolve()
    with new_folder(path.parent) as folder:
        figure.savefig(folder / path.name, format="png", dpi=150)
