"""The rule that chooses the options of a private run."""

import json
import math
import warnings

import pytest
from common import LINES, one_layer_preset

from keras_vaultgemma import finetune
from keras_vaultgemma.privacy import accounting, planning
from keras_vaultgemma.privacy.accounting import Steps
from keras_vaultgemma.recipes.privacy_budget import privacy_budget
from keras_vaultgemma.recipes.private_options import (
    CHOSEN,
    FEWEST_EPOCHS,
    SMALLEST_BATCH,
    STEPS,
    TARGETS,
    ModelShape,
    gaussian_privacy,
    model_shape,
    private_options,
)

SHAPE = ModelShape(192, {f"block_{i}/{name}": (192, 256) for i in range(4) for name in TARGETS})


def options(rows, epsilon=8.0, **given):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return private_options(rows, SHAPE, epsilon, 1e-5, **given)


@pytest.mark.any_backend
def test_ranges():
    for rows in (1, 2, 20, 100, 1201, 10**5, 10**8):
        for epsilon in (0.1, 1.0, 8.0, 100.0):
            chosen = options(rows, epsilon)
            assert min(rows, SMALLEST_BATCH) <= chosen.batch_size <= rows
            per_epoch = planning.steps_per_epoch(rows, chosen.batch_size)
            assert FEWEST_EPOCHS <= chosen.epochs <= STEPS
            assert STEPS <= chosen.epochs * per_epoch <= max(STEPS, per_epoch) * FEWEST_EPOCHS
            assert chosen.learning_rate > 0 and 0 <= chosen.averaging < 1
            assert chosen.lora_rank == 4 and chosen.lora_targets == TARGETS


@pytest.mark.any_backend
def test_monotone():
    """More rows mean larger batches and less noise, a larger budget less noise, more width a smaller rate."""
    by_rows = [options(rows) for rows in (50, 200, 800, 3200, 12800)]
    assert [o.batch_size for o in by_rows] == sorted(o.batch_size for o in by_rows)
    for many in (by_rows, [options(1000, epsilon) for epsilon in (1, 2, 4, 8, 16)]):
        noises = [o.noise_norm for o in many]
        assert noises == sorted(noises, reverse=True)
    wide = private_options(10**4, SHAPE._replace(width=1152), 8.0, 1e-5)
    assert wide.learning_rate == pytest.approx(options(10**4).learning_rate / 6)


@pytest.mark.any_backend
@pytest.mark.parametrize(
    "given",
    [
        {"batch_size": 100},
        {"epochs": 3},
        {"learning_rate": 0.5},
        {"clip_norm": 2.0},
        {"lora_rank": 16},
        {"lora_targets": ("query",)},
        {"lora_rank": 0},
    ],
    ids=str,
)
def test_what_is_given_wins(given):
    chosen = options(1000, **given)
    assert {name: getattr(chosen, name) for name in given} == given
    everything = {name: getattr(chosen, name) for name in CHOSEN}
    assert options(1000, **everything) == chosen


@pytest.mark.any_backend
def test_the_noise_is_near_that_of_all_rows():
    """The noise that the accountant needs for the batch is close to that which the rule expects."""
    for epsilon in (1.0, 8.0):
        chosen = options(1200, epsilon)
        count = chosen.epochs * planning.steps_per_epoch(1200, chosen.batch_size)
        noise = [
            planning.calibrate(Steps(count, 1200, size / 1200), epsilon, 1e-5).noise_multiplier
            / size
            for size in (chosen.batch_size, 1200)
        ]
        assert noise[0] < 1.4 * noise[1]
        expected = noise[0] * math.sqrt(SHAPE.parameters(4, TARGETS))
        assert chosen.noise_norm == pytest.approx(expected, rel=0.15)


@pytest.mark.any_backend
def test_gaussian_privacy():
    for epsilon, delta in ((0.1, 1e-6), (8.0, 1e-5), (100.0, 1e-3)):
        mu = gaussian_privacy(epsilon, delta)
        found = accounting.delta([Steps(1, 10, 1.0, None, 1 / mu)], epsilon)
        assert found == pytest.approx(delta, rel=0.02)


@pytest.mark.any_backend
def test_few_rows_warn():
    with pytest.warns(UserWarning, match="20 rows are too few for this budget"):
        private_options(20, SHAPE, 8.0, 1e-5)


@pytest.mark.any_backend
def test_the_shape_of_a_preset():
    shape = model_shape("vaultgemma_tiny")
    assert (shape.width, shape.parameters(8, ["query", "value"])) == (256, 32768)
    assert shape.parameters(1, [r"decoder_block_0/(gate|up)"]) == 2 * (256 + 1152)
    assert shape.parameters(0, []) > 5.6e6


@pytest.mark.any_backend
def test_epsilon_prints_the_options():
    text = privacy_budget(1201, epsilon=8.0)
    chosen = private_options(1201, model_shape("vaultgemma_tiny"), 8.0, 1e-5)
    assert f"  {chosen.describe()}\n" in text and f"({chosen.batch_size:,} rows expected" in text
    assert f"--batch-size {chosen.batch_size} --epochs {chosen.epochs} --learning-rate" in text
    steps = chosen.epochs * planning.steps_per_epoch(1201, chosen.batch_size)
    assert "σ = 1." in text and f"after {steps} steps" in text
    assert "--epochs 2 " in privacy_budget(1201, epochs=2, noise_multiplier=2.0)


@pytest.mark.first_backend
@pytest.mark.filterwarnings("ignore:.*rows were longer", "ignore:.*too few")
def test_a_run_with_chosen_options(tmp_path, monkeypatch):
    """It trains with what the rule chooses for its rows and reports it; the same command does nothing more."""
    monkeypatch.setenv("KERAS_VAULTGEMMA_HOME", str(tmp_path / "home"))
    data = tmp_path / "data.txt"
    data.write_text("\n\n".join(f"{line} The end of tale {i}." for i in range(8) for line in LINES))
    run = dict(preset=one_layer_preset(), private=True, epsilon=8.0, delta=1e-3, sequence_length=8)
    run |= dict(epochs=2)
    text = finetune(data, tmp_path / "run", **run)
    rows = int(text.split(" rows to train on")[0].split()[-1])
    chosen = private_options(rows, model_shape(one_layer_preset()), 8.0, 1e-3, epochs=2)
    assert f"Trained with {chosen.describe()}" in text
    stored = json.loads((tmp_path / "run" / "run.json").read_text())
    assert {name: stored["options"][name] for name in CHOSEN} == {
        **{name: getattr(chosen, name) for name in CHOSEN},
        "lora_targets": list(TARGETS),
    }
    config = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert config["r"] == 4 and len(config["target_modules"]) == len(TARGETS)
    again = finetune(data, tmp_path / "run", **run)
    after = [line for line in text.splitlines() if line.startswith("Held out, after")]
    assert after[0] in again
