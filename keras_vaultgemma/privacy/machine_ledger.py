"""The ledger of this machine: the private runs of this user, whatever model they trained.

A model's own ledger knows the runs that its weights come from. It knows nothing of another model
that was trained on the same records, and the guarantees of both compose for a record in both. Every
private run is therefore also written to a folder of its own below `cache_home()`, next to the key
of the fingerprints:

- privacy_ledger.jsonl, a ledger with this run alone, written step by step like the model's own;
- rows.npy, a sketch of its records (`fingerprint.RowSketch`), which finds records in common;
- about.json, when it began and where the model's own ledger is.

Nothing of it is ever copied next to a model. Deleting the folder of a run makes the machine forget
it, which is right if nothing learned from the run was seen by anybody else, or ever will be. Runs
with `DPSGD(seed_for_tests=...)` are not recorded.

A run that is being written by another process counts with all of its planned steps.
"""

import datetime
import json
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

import numpy as np

from keras_vaultgemma._files import read_json
from keras_vaultgemma.checkpoints import presets
from keras_vaultgemma.privacy import accounting, fingerprint
from keras_vaultgemma.privacy.accounting import Steps
from keras_vaultgemma.privacy.ledger import FILE, Ledger, Run, read_ledger
from keras_vaultgemma.privacy.locks import is_locked

FOLDER, ROWS, ABOUT = "private_runs", "rows.npy", "about.json"

MOST_NAMED = 3
"""Largest number of earlier runs that a warning names."""


class MachineRun(NamedTuple):
    """A private run that was done on this machine.

    Attributes:
        run: `Run`.
        steps: int. Number of steps that it may have released.
        begun: str. Date and time in UTC, as ISO 8601.
        ledger: str. Path of the model's own ledger; "" if it was kept in memory.
        folder: `pathlib.Path`. Folder of the run's files.
    """

    run: Run
    steps: int
    begun: str
    ledger: str
    folder: Path

    @property
    def rows(self) -> np.ndarray:
        """Sketch of the records: a sorted uint64 array of shape `[n]`, empty if there is none."""
        path = self.folder / ROWS
        return np.load(path, allow_pickle=False) if path.is_file() else np.zeros(0, "uint64")

    def __str__(self):
        place = f", written to {self.ledger}" if self.ledger else ""
        return f"run {self.run.name[:8]} of {self.begun[:10]}{place}"


def root() -> Path:
    """Return the folder that has a folder for each run."""
    return presets.cache_home() / FOLDER


def read_runs() -> list[MachineRun]:
    """Return the private runs on this machine, the earliest first.

    Raises:
        ValueError: If a file of a run is damaged.
    """
    return sorted(
        (run for path in root().glob(f"*/{FILE}") for run in _read_run(path)),
        key=lambda one: (one.begun, one.run.name),
    )


def _read_run(path):
    is_running = is_locked(path)
    about = read_json(path.with_name(ABOUT))
    return [
        MachineRun(
            run,
            max(count, run.planned_steps) if is_running else count,
            str(about.get("begun", "")),
            str(about.get("ledger", "")),
            path.parent,
        )
        for run, count in read_ledger(path).runs
    ]


def as_ledger(runs: Collection[MachineRun]) -> Ledger:
    """Return a `Ledger` of some runs."""
    return Ledger((), tuple((one.run, one.steps) for one in runs))


def steps_of(ledger: Ledger) -> list[Steps]:
    """Return the steps of all runs of a ledger, equal ones together, whatever their data.

    They compose to the guarantee for a person whose record was in all of the runs.
    """
    counts: dict[Steps, int] = {}
    for run, count in ledger.runs:
        steps = run.steps(0)
        counts[steps] = counts.get(steps, 0) + count
    return [steps._replace(count=count) for steps, count in counts.items()]


def new_folder(run: Run, rows: np.ndarray, ledger: str | Path | None) -> Path:
    """Create the folder of a run that begins, and return the path for its ledger.

    Args:
        run: `Run` with its name.
        rows: sketch of its records, as `RowSketch.values` returns it.
        ledger: str or `pathlib.Path` of the model's own ledger, or None.
    """
    folder = root() / run.name
    folder.mkdir(parents=True, mode=0o700)
    np.save(folder / ROWS, rows, allow_pickle=False)
    begun = datetime.datetime.now(datetime.UTC).isoformat()
    about = {"begun": begun, "ledger": "" if ledger is None else str(Path(ledger).resolve())}
    (folder / ABOUT).write_text(json.dumps(about), encoding="utf-8")
    return folder / FILE


def in_common(
    rows: np.ndarray, dataset: str, runs: Collection[MachineRun]
) -> list[tuple[MachineRun, int]]:
    """Return the runs that had some of these records, with the number of them.

    Args:
        rows: sketch of records.
        dataset: str. Fingerprint of the same records.
        runs: list of `MachineRun`.
    """
    found = [
        (one, fingerprint.rows_in_common(rows, one.rows))
        for one in runs
        if fingerprint.have_same_key(one.run.dataset, dataset)
    ]
    return [(one, count) for one, count in found if count]


def describe_common(found: list[tuple[MachineRun, int]], steps: list[Steps], delta: float) -> str:
    """Return the sentence that warns of records that earlier runs had as well.

    Args:
        found: list of pairs of a run and the number of records in common, not empty.
        steps: `Steps` of these runs and of the one that begins.
        delta: float in (0, 1).
    """
    named = [f"{count:,} records in {one}" for one, count in found[-MOST_NAMED:]]
    more = len(found) - len(named)
    epsilon = accounting.round_up(accounting.epsilon(steps, delta))
    return (
        f"Earlier private runs on this machine had records of these data: {'; '.join(named)}"
        f"{f'; and {more} more' if more else ''}. For a person whose record is in all of them and "
        f"in this run, ε = {epsilon:g} at δ = {delta:g} once this run is done. "
        "`keras-vaultgemma ledger` lists the runs"
    )
