"""Plots, which need matplotlib."""

import importlib.util
from pathlib import Path

from keras_vaultgemma._files import new_folder


def can_plot():
    """Return True if matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def new_figure(size):
    """Return an empty matplotlib `Figure`.

    Args:
        size: tuple of two floats. Width and height in inches.

    Raises:
        ImportError: If matplotlib is not installed. The message names the extra to install.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            f"A plot needs matplotlib: pip install 'keras-vaultgemma[plot]' ({error})"
        ) from error
    return Figure(figsize=size, layout="constrained")


def save_figure(figure, path):
    """Write a figure as a PNG file at `path`, atomically."""
    path = Path(path).resolve()
    with new_folder(path.parent) as folder:
        figure.savefig(folder / path.name, format="png", dpi=150)
