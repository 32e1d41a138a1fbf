"""Runs while they are written down: killed, cut short, without room."""

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from ledger_cases import a_run, counts, cut_after

import keras_vaultgemma
from keras_vaultgemma.privacy import ledger_writer
from keras_vaultgemma.privacy.ledger import FILE, parse_ledger, read_ledger
from keras_vaultgemma.privacy.ledger_writer import OpenRun

pytestmark = pytest.mark.any_backend


def test_a_step_is_on_the_disk_before_it_is_released(tmp_path, monkeypatch):
    """`release` returns after fsync, and the steps of a block share one line."""
    path, synchronised = tmp_path / FILE, []
    monkeypatch.setattr(
        ledger_writer.os, "fsync", lambda descriptor: synchronised.append(path.read_bytes())
    )
    run = OpenRun(path, a_run(planned_steps=1000))
    for step in range(1, 26):
        run.release()
        assert parse_ledger(synchronised[-1], path).runs[0][1] >= step
    # The run's line, its folder, and blocks of 10 steps.
    assert len(synchronised) == 2 + 3


@pytest.mark.parametrize("planned", [5, 700])
def test_a_file_that_is_cut_at_any_byte_counts_every_step(tmp_path, planned):
    """A step was released when the file was at least so long; two runs, so that a cut may fall into the second's lines."""
    path, released = tmp_path / FILE, []
    for steps in (4, 3):
        with OpenRun(path, a_run(planned_steps=planned)) as run:
            cut_after(path, run, steps, released)
    content, block = path.read_bytes(), run.run.block
    for length in range(len(content) + 1):
        counted = sum(count for _, count in parse_ledger(content[:length], path).runs)
        true = sum(size <= length for size in released)
        assert true <= counted <= true + 2 * block, length
    assert counts(path) == [4, 3]


@pytest.mark.parametrize("rest", [b"", b'{"kind": "st', b"\0\0\0\0", "σ".encode()[:1]])
def test_a_run_after_a_killed_one_spoils_nothing(tmp_path, rest):
    """Neither what was torn nor what follows is lost; the new run's line begins a line."""
    path = tmp_path / FILE
    run = OpenRun(path, a_run())
    cut_after(path, run, 7, [])
    run._file.close()
    with path.open("ab") as file:
        file.write(rest)
    with OpenRun(path, a_run()) as second:
        cut_after(path, second, 2, [])
    assert counts(path) == [7 + bool(rest), 2]


KILLED = """
import os, sys, types
package = types.ModuleType("keras_vaultgemma")
package.__path__ = [sys.argv[2]]  # without Keras, which takes seconds to import
sys.modules["keras_vaultgemma"] = package
from keras_vaultgemma.privacy.ledger import Run
from keras_vaultgemma.privacy.ledger_writer import OpenRun
run = OpenRun(sys.argv[1], Run(1000, 0.05, 80, 1.0, 1.0, 1e-5, 2000, "row", "aaaaaaaa:01", "0"))
while True:
    run.release()
    os.write(1, b".")
"""


def test_kill_minus_nine(tmp_path):
    """Eight runs into one file, each killed at a random moment: the file counts what each has released, and no run counts
    more than two blocks that it has not."""
    path, released, rng = tmp_path / FILE, [], random.Random(5)
    for _ in range(8):
        command = [
            sys.executable,
            "-c",
            KILLED,
            str(path),
            str(Path(keras_vaultgemma.__file__).parent),
        ]
        process = subprocess.Popen(command, stdout=subprocess.PIPE)
        first = os.read(process.stdout.fileno(), 1)
        time.sleep(rng.uniform(0, 0.03))
        process.kill()
        rest = process.stdout.read()
        process.wait()
        released.append(len(first + rest))
    found = counts(path)
    assert len(found) == 8 and min(released) > 0
    for true, counted in zip(released, found, strict=True):
        assert true <= counted <= true + 2 * 20


def test_nothing_is_released_where_nothing_can_be_written(tmp_path, monkeypatch):
    run = OpenRun(tmp_path / FILE, a_run())

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ledger_writer.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        run.release()
    assert run.done == 0


def test_a_file_that_is_older_than_the_model_catches_up(tmp_path):
    """Such as one from a backup: the model's own history has more steps of the same run, and those count."""
    path = tmp_path / FILE
    with OpenRun(path, a_run()) as run:
        cut_after(path, run, 10, [])
        older = path.read_bytes()
        cut_after(path, run, 20, [])
    history = read_ledger(path)
    path.write_bytes(older)
    assert counts(path) == [10]
    OpenRun(path, a_run(), history).close()
    assert counts(path) == [30, 0]


def test_one_run_at_a_time(tmp_path):
    """Of this process or of another one; a lock ends with the run, or with the process that is killed."""
    path = tmp_path / FILE
    message = (
        f"{path} must have one writer at a time. Received: a second run while another is going on"
    )
    with OpenRun(path, a_run()) as run:
        run.release()
        before = path.read_bytes()
        with pytest.raises(ValueError) as error:
            OpenRun(path, a_run())
        assert str(error.value) == message and path.read_bytes() == before
        run.release()
    command = [sys.executable, "-c", KILLED, str(path), str(Path(keras_vaultgemma.__file__).parent)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        os.read(process.stdout.fileno(), 1)
        with pytest.raises(ValueError) as error:
            OpenRun(path, a_run())
        assert str(error.value) == message
        process.kill()
    OpenRun(path, a_run()).close()
    assert len(counts(path)) == 3


def test_a_damaged_file_is_not_kept_locked(tmp_path):
    path = tmp_path / FILE
    path.write_text('{"kind": "gift"}\n')
    for _ in range(2):
        with pytest.raises(ValueError, match="unknown kind 'gift'"):
            OpenRun(path, a_run())
    path.unlink()


def test_numbers_of_numpy(tmp_path):
    run = a_run(rows=np.int64(1000), planned_steps=np.int32(50), noise_multiplier=np.float64(1.1))
    OpenRun(tmp_path / FILE, run).close()
    ((found, _),) = read_ledger(tmp_path / FILE).runs
    assert found[:-1] == run[:-1] and type(found.rows) is int


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            dict(noise_multiplier=0.0),
            "`noise_multiplier` must be above 0 and finite. Received: noise_multiplier=0.0",
        ),
        (dict(delta=1.0), "`delta` must be above 0 and below 1. Received: delta=1.0"),
        (dict(clip_norm=0.0), "`clip_norm` must be above 0 and finite. Received: clip_norm=0.0"),
        (dict(planned_steps=-1), "`count` must be an integer of 0 or more. Received: count=-1"),
    ],
)
def test_impossible_runs_leave_no_file(tmp_path, changes, message):
    with pytest.raises(ValueError) as error:
        OpenRun(tmp_path / FILE, a_run(**changes))
    assert str(error.value) == message
    assert not (tmp_path / FILE).exists()
