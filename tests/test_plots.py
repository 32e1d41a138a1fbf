"""Plots, with matplotlib and without."""

import importlib.util
import sys

import pytest

from keras_vaultgemma._plots import can_plot, new_figure, save_figure

pytestmark = pytest.mark.any_backend


def test_a_png_is_written(tmp_path):
    from matplotlib import image

    path = tmp_path / "new" / "a.png"
    figure = new_figure((4, 2))
    figure.subplots().plot([1, 2])
    save_figure(figure, path)
    assert image.imread(path).shape[:2] == (300, 600)
    assert [file.name for file in path.parent.iterdir()] == ["a.png"]


def test_without_matplotlib(monkeypatch):
    assert can_plot()
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(
        ImportError, match=r"A plot needs matplotlib: pip install 'keras-vaultgemma\[plot\]'"
    ):
        new_figure((1, 1))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert not can_plot()
