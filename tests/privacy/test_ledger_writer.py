"""Runs while they are written: killed, truncated, on a full disk."""

import os
import random
import subprocess
import sys
import time

import numpy as np
import pytest
from ledger_cases import a_run, counts, release_steps

from keras_vaultgemma.privacy.ledger import FILE, parse_ledger, read_ledger
from keras_vaultgemma.privacy.ledger_writer import OpenRun

pytestmark = pytest.mark.any_backend


def test_a_step_is_on_the_disk_before_it_is_released(tmp_path, monkeypatch):
    """`release` returns after fsync, and the steps of a block share one line."""
    path, synchronised = tmp_path / FILE, []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synchronised.append(path.read_bytes()))
    run = OpenRun(path, a_run(planned_steps=1000))
    for step in range(1, 26):
        run.release()
        assert parse_ledger(synchronised[-1], path).runs[0][1] >= step
    # The line of the run, its folder, and three blocks of 10 steps.
    assert len(synchronised) == 2 + 3


@pytest.mark.parametrize("planned", [5, 700])
def test_a_file_that_is_truncated_at_any_byte_counts_every_step(tmp_path, planned):
    """Truncated to a length, the file counts every step that was released when the file had that length."""
    path, released = tmp_path / FILE, []
    for steps in (4, 3):
        with OpenRun(path, a_run(planned_steps=planned)) as run:
            release_steps(path, run, steps, released)
    content, block = path.read_bytes(), run.run.block
    for length in range(len(content) + 1):
        counted = sum(count for _, count in parse_ledger(content[:length], path).runs)
        true = sum(size <= length for size in released)
        assert true <= counted <= true + 2 * block, length
    assert counts(path) == [4, 3]


@pytest.mark.parametrize("rest", [b"", b'{"kind": "st', b"\0\0\0\0", "σ".encode()[:1]])
def test_a_run_after_a_killed_one_loses_nothing(tmp_path, rest):
    """Neither the torn line nor the entries after it are lost, because the new run begins a line of its own."""
    path = tmp_path / FILE
    run = OpenRun(path, a_run())
    release_steps(path, run, 7, [])
    run._file.close()
    with path.open("ab") as file:
        file.write(rest)
    with OpenRun(path, a_run()) as second:
        release_steps(path, second, 2, [])
    assert counts(path) == [7 + bool(rest), 2]


ENDLESS_RUN = """
import os, sys
sys.modules["keras"] = None  # A ledger needs no Keras, which takes seconds to import.
from keras_vaultgemma.privacy.ledger import Run
from keras_vaultgemma.privacy.ledger_writer import OpenRun
run = OpenRun(sys.argv[1], Run(1000, 0.05, 80, 1.0, 1.0, 1e-5, 2000, "row", "aaaaaaaa:01", "0"))
while True:
    run.release()
    os.write(1, b".")
"""


def start_endless_run(path):
    """Start a process that releases steps and prints a character for each, and wait for the first step."""
    command = [sys.executable, "-c", ENDLESS_RUN, str(path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    assert os.read(process.stdout.fileno(), 1) == b"."
    return process


def test_kill_minus_nine(tmp_path):
    """The file counts every step that a killed run has released, and at most two blocks more.

    Eight runs write to one file one after the other, each killed at a random moment.
    """
    path, released, rng = tmp_path / FILE, [], random.Random(5)
    for _ in range(8):
        process = start_endless_run(path)
        time.sleep(rng.uniform(0, 0.03))
        process.kill()
        released.append(1 + len(process.stdout.read()))
        process.wait()
    found = counts(path)
    assert len(found) == 8
    for true, counted in zip(released, found, strict=True):
        assert true <= counted <= true + 2 * 20


def test_no_step_is_released_if_it_cannot_be_written(tmp_path, monkeypatch):
    run = OpenRun(tmp_path / FILE, a_run())

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        run.release()
    assert run.done == 0


def test_an_older_file_gets_the_steps_of_the_models_history(tmp_path):
    """A file from a backup may have fewer steps of a run than the model's own history."""
    path = tmp_path / FILE
    with OpenRun(path, a_run()) as run:
        release_steps(path, run, 10, [])
        older = path.read_bytes()
        release_steps(path, run, 20, [])
    history = read_ledger(path)
    path.write_bytes(older)
    assert counts(path) == [10]
    OpenRun(path, a_run(), history).close()
    assert counts(path) == [30, 0]


def test_one_run_at_a_time(tmp_path):
    """Of this process or of another one. The lock ends with the run, or with the process if it is killed."""
    path = tmp_path / FILE
    message = f"{path} must have one writer at a time. Received: a second run while another run is writing to it"
    with OpenRun(path, a_run()) as run:
        run.release()
        before = path.read_bytes()
        with pytest.raises(ValueError) as error:
            OpenRun(path, a_run())
        assert str(error.value) == message and path.read_bytes() == before
        run.release()
    with start_endless_run(path) as process:
        with pytest.raises(ValueError) as error:
            OpenRun(path, a_run())
        assert str(error.value) == message
        process.kill()
    OpenRun(path, a_run()).close()
    assert len(counts(path)) == 3


def test_an_invalid_file_is_unlocked_again(tmp_path):
    path = tmp_path / FILE
    path.write_text('{"kind": "gift"}\n')
    for _ in range(2):
        with pytest.raises(ValueError, match="unknown kind 'gift'"):
            OpenRun(path, a_run())
    path.unlink()


def test_numpy_numbers_are_written(tmp_path):
    run = a_run(rows=np.int64(1000), planned_steps=np.int32(50), noise_multiplier=np.float64(1.1))
    OpenRun(tmp_path / FILE, run).close()
    ((found, _),) = read_ledger(tmp_path / FILE).runs
    assert found._replace(name="") == run and type(found.rows) is int


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            dict(noise_multiplier=0.0),
            "`noise_multiplier` must be a finite number above 0. Received: noise_multiplier=0.0",
        ),
        (dict(delta=1.0), "`delta` must be a number above 0 and below 1. Received: delta=1.0"),
        (
            dict(clip_norm=0.0),
            "`clip_norm` must be a finite number above 0. Received: clip_norm=0.0",
        ),
        (dict(planned_steps=-1), "`count` must be an integer of at least 0. Received: count=-1"),
    ],
)
def test_impossible_runs_leave_no_file(tmp_path, changes, message):
    with pytest.raises(ValueError) as error:
        OpenRun(tmp_path / FILE, a_run(**changes))
    assert str(error.value) == message
    assert not (tmp_path / FILE).exists()
