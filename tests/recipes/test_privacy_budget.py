"""The text and the plot of `keras-vaultgemma epsilon`."""

import re
import sys

import pytest

from keras_vaultgemma.privacy import accounting, planning
from keras_vaultgemma.privacy.accounting import Steps
from keras_vaultgemma.privacy.group_privacy import group_epsilon
from keras_vaultgemma.recipes.privacy_budget import POINTS, curves, privacy_budget

pytestmark = pytest.mark.any_backend


def test_epsilon_of_a_noise_multiplier():
    text = privacy_budget(1000, 50, 4, noise_multiplier=1.2)
    delta = 1e-5
    steps = planning.plan(1000, 50, 4, delta, noise_multiplier=1.2)
    epsilon = accounting.round_up(accounting.epsilon([steps], delta))
    answer, _, meaning, _, details = text.splitlines()
    assert (
        answer
        == f"ε = {epsilon:g} at δ = 1e-05 (the default), with noise multiplier σ = 1.2, after 80 steps"
    )
    right = 100 * (1 + accounting.delta([steps], 0.0)) / 2
    shown = float(re.search(r"right in at most ([\d.]+) of 100 cases", meaning).group(1))
    assert right <= shown <= right + 0.1 and "1,000" in meaning
    assert f"probability 0.05 (50 rows expected, {steps.max_batch_size} at most)" in details


def test_noise_multiplier_of_an_epsilon():
    text = privacy_budget(300, 100, 4, epsilon=3.0, delta=1e-4)
    epsilon, sigma = map(
        float, re.search(r"ε = ([\d.]+) at δ = 0.0001, .* σ = ([\d.]+),", text).groups()
    )
    assert 2.97 < epsilon <= 3.0
    steps = planning.plan(300, 100, 4, 1e-4, epsilon=3.0)
    assert sigma == pytest.approx(steps.noise_multiplier, rel=1e-3)


def test_users():
    """As for rows, with group privacy of rows beside it."""
    by_row, text = (
        privacy_budget(300, 100, 4, noise_multiplier=3.0, delta=1e-4, max_rows_per_group=k)
        for k in (None, 3)
    )
    assert text.splitlines()[0] == by_row.splitlines()[0] and len(by_row.splitlines()) == 5
    assert "(100 users expected" in text and "The unit is one user" in text
    steps = planning.plan(300, 100, 4, 1e-4, noise_multiplier=3.0)
    expected = accounting.round_up(group_epsilon([steps], 1e-4, 3))
    assert text.splitlines()[-1] == (
        "If single rows were drawn and clipped instead, with the same probability, noise and steps, "
        f"group privacy would give a user with 3 rows an ε of {expected:g} at δ = 0.0001"
    )


def test_curves_go_through_the_plan():
    steps = Steps(80, 1000, 0.05, 80, 1.2)
    (counts, after), (noises, with_noise) = curves(steps, 1e-4)
    assert (counts[0], counts[-1]) == (1, 80) and POINTS - 2 <= len(counts) <= POINTS
    assert after[-1] == accounting.epsilon([steps], 1e-4)
    assert after == sorted(after) and with_noise == sorted(with_noise, reverse=True)
    assert with_noise[3] == accounting.epsilon([steps._replace(noise_multiplier=noises[3])], 1e-4)
    assert noises[0] < 1.2 < noises[-1]
    assert curves(steps._replace(count=3), 1e-4)[0][0] == [1, 2, 3]


def test_a_plot(tmp_path):
    from matplotlib import image

    path = tmp_path / "plan.png"
    text = privacy_budget(100, 50, 2, noise_multiplier=5.0, png=str(path))
    assert text.endswith(f"{path}: ε against steps, σ against ε")
    pixels = image.imread(path)
    assert pixels.shape[:2] == (540, 1350)
    # Both halves of the figure have dark pixels.
    assert all((half < 0.5).any() for half in (pixels[:, :675, :3], pixels[:, 675:, :3]))
    assert [file.name for file in tmp_path.iterdir()] == ["plan.png"]


def test_a_plot_without_matplotlib_fails_before_the_accounting(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setattr(planning, "plan", lambda *args: pytest.fail("computed first"))
    with pytest.raises(
        ImportError, match=r"needs? matplotlib: pip install 'keras-vaultgemma\[plot\]'"
    ):
        privacy_budget(1000, 50, 1, noise_multiplier=1.2, png=str(tmp_path / "x.png"))


def test_a_plot_that_cannot_be_written_leaves_the_old_file(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    (tmp_path / "plan.png").write_bytes(b"old")

    def fail(self, path, **kwargs):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(Figure, "savefig", fail)
    with pytest.raises(OSError, match="disk full"):
        privacy_budget(100, 50, 1, noise_multiplier=5.0, png=str(tmp_path / "plan.png"))
    assert (tmp_path / "plan.png").read_bytes() == b"old"
