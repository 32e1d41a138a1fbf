"""Tokens a second, and the loss of each step."""

import time

import pytest

from keras_vaultgemma.recipes.finetune_output import Pace
from keras_vaultgemma.training.state import callback_states, restore_callbacks

pytestmark = pytest.mark.any_backend


@pytest.fixture
def clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    return now


def step(pace, clock, seconds, loss):
    clock[0] += seconds
    logs = {"loss": loss}
    pace.on_train_batch_end(0, logs)
    return logs


def test_the_rate_leaves_out_the_step_that_compiles(clock):
    pace = Pace(100)
    pace.on_epoch_begin(0)
    assert step(pace, clock, 50, 3.0) == {"loss": 3.0, "tokens_per_second": 2}
    assert step(pace, clock, 2, 2.0)["tokens_per_second"] == 50
    assert step(pace, clock, 8, 1.5)["tokens_per_second"] == 20
    logs = {}
    pace.on_epoch_end(0, logs)
    assert logs == {"tokens_per_second": 20}
    pace.on_epoch_begin(1)
    assert step(pace, clock, 4, 1.0)["tokens_per_second"] == 25
    assert pace.losses == [3.0, 2.0, 1.5, 1.0]


def test_an_epoch_of_one_step_has_a_rate(clock):
    pace, logs = Pace(100), {}
    pace.on_epoch_begin(0)
    step(pace, clock, 50, 3.0)
    pace.on_epoch_end(0, logs)
    assert logs == {"tokens_per_second": 2}


def test_losses_of_other_names(clock):
    pace = Pace(1)
    pace.on_epoch_begin(0)
    for logs in ({"count": 7, "unprotected_loss": 2.0}, {"count": 7}):
        clock[0] += 1
        pace.on_train_batch_end(0, logs)
    assert pace.losses == [2.0]


def test_a_checkpoint_keeps_the_losses():
    pace, again = Pace(1), Pace(1)
    pace.losses = [3.0, 2.0]
    states = callback_states([pace])
    assert states == {"Pace 0": {"losses": [3.0, 2.0]}}
    restore_callbacks(None, [again], states, {})
    assert again.losses == [3.0, 2.0]
