"""The picture of a run."""

import math

import pytest

from keras_vaultgemma.evaluation.likelihood import Likelihood
from keras_vaultgemma.recipes import finetune_output
from keras_vaultgemma.recipes.finetune import Outcome
from keras_vaultgemma.recipes.finetune_output import plot_curves

pytestmark = pytest.mark.any_backend


def drawn(monkeypatch, losses, val_losses, name="val_loss"):
    figures = []
    monkeypatch.setattr(
        finetune_output, "save_figure", lambda figure, path: figures.append((figure, path))
    )
    before, after = Likelihood(30.0, 10, 20), Likelihood(20.0, 10, 20)
    plot_curves("a.png", Outcome(before, after, {name: val_losses}, losses))
    ((figure, path),) = figures
    assert path == "a.png"
    return figure.axes[0]


def test_both_curves(monkeypatch):
    axes = drawn(monkeypatch, [4.0, 3.0, 2.5, 2.0], [2.6, 2.0])
    training, held_out = axes.lines
    assert training.get_xydata().tolist() == [[0.5, 4.0], [1.0, 3.0], [1.5, 2.5], [2.0, 2.0]]
    assert held_out.get_xydata().tolist() == [[0.0, 3.0], [1.0, 2.6], [2.0, 2.0]]
    assert axes.get_title() == "held out: 2.164 bits per byte, then 1.443"
    assert axes.get_ylim() == (0, 4.4)


def test_a_loss_that_is_not_a_number(monkeypatch):
    assert drawn(monkeypatch, [4.0, math.nan], [math.nan]).get_ylim() == (0, 4.4)


def test_private_training_measures_nothing_on_the_way(monkeypatch):
    axes = drawn(monkeypatch, [4.0, 3.0], [3.5, 3.0], name="unprotected_loss")
    assert axes.lines[1].get_xydata().tolist() == [[0.0, 3.0], [2.0, 2.0]]
    assert axes.lines[0].get_label().endswith("not protected")
