"""A run while it is being written down: each step is in the ledger before it releases anything."""

import os
import uuid
from pathlib import Path

from keras_vaultgemma._files import check_link, sync_folder
from keras_vaultgemma.privacy import accounting
from keras_vaultgemma.privacy.ledger import (
    Ledger,
    combine_ledgers,
    entry_line,
    plain_training,
    read_ledger,
    run_entry,
)

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


class OpenRun:
    """A run that is being written down; a context manager, which ends it.

    Args:
        path: file, made where there is none; or None to keep the run in memory, for weights that are nowhere else.
        run: `ledger.Run`; it is given a name.
        history: `ledger.Ledger` of the model that the run begins with, or None; what the file lacks of it is added
            first.

    Raises:
        ValueError: where the file is not a ledger or another run is writing it, or the run's numbers are outside their
            ranges.
        OSError: where it cannot be written; no step may then be released.
    """

    def __init__(self, path, run, history=None):
        accounting.check(run.steps(run.planned_steps))
        accounting.check_delta(run.delta)
        if not 0 < run.clip_norm < float("inf"):
            raise ValueError(
                f"`clip_norm` must be above 0 and finite. Received: clip_norm={run.clip_norm}"
            )
        self.run, self.done, self._reserved = run._replace(name=uuid.uuid4().hex), 0, 0
        self._history, self._file = history or Ledger(), None
        if path is not None:
            self._open(Path(path))

    def _open(self, path):
        path.parent.mkdir(parents=True, exist_ok=True)
        check_link(path)
        self._file = path.open("ab")
        try:
            self._begin(path)
        except BaseException:
            self._file.close()
            raise

    def _begin(self, path):
        _lock(self._file, path)
        history = self._history
        there = read_ledger(path)
        self._history = combine_ledgers(there, history)
        counted = {run.name: count for run, count in there.runs}
        missing = Ledger(
            tuple(
                statement for statement in history.statements if statement not in there.statements
            ),
            tuple((run, count) for run, count in history.runs if count > counted.get(run.name, -1)),
        )
        # What a torn line left is closed, so that it spoils no other.
        torn = path.stat().st_size and not path.read_bytes().endswith(b"\n")
        self._write(
            (b"\n" if torn else b"") + missing.lines(counted) + entry_line(run_entry(self.run))
        )
        sync_folder(path.parent)

    @property
    def ledger(self):
        """`ledger.Ledger` of all entries, with the steps that this run has released so far."""
        return combine_ledgers(self._history, Ledger((), ((self.run, self.done),)))

    def release(self):
        """Count one more step. It may release something when this has returned, and not before."""
        if self.done == self._reserved:
            reserved = min(self.done + self.run.block, max(self.run.planned_steps, self.done + 1))
            self._write(entry_line({"kind": "steps", "run": self.run.name, "steps": reserved}))
            self._reserved = reserved
        self.done += 1

    def close(self):
        """End the run: it counts the steps that were released, no more."""
        if self._file is not None:
            self._write(entry_line({"kind": "end", "run": self.run.name, "steps": self.done}))
            self._file.close()
            self._file = None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def _write(self, content):
        if self._file is None:
            return
        self._file.write(content)
        self._file.flush()
        os.fsync(self._file.fileno())


def _lock(file, path):
    """Until it is closed nobody else writes the file: two runs at once would each spend what is left of a budget."""
    if fcntl is None:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ValueError(
            f"{path} must have one writer at a time. Received: a second run while another is going on"
        ) from error
    except OSError:
        pass  # a file system without locks


# MERGED: """`model.privacy`: what a model's weights have been told about private data."""
class PrivacyRecord:
    """The ledger of a model, and the ε that it amounts to at any time.

    Attributes:
        dataset: fingerprint of the data of the last private `fit`, or None.
        budgets: {fingerprint: ε that `fit` keeps to on these data}.
        run: `open_run.OpenRun` while a private `fit` goes on, else None.
    """

    def __init__(self, ledger=None):
        self._ledger, self._plain = ledger or Ledger(), Ledger()
        self.dataset, self.budgets, self.run = None, {}, None

    @property
    def ledger(self):
        """`ledger.Ledger`: every run that the weights come from, and statements that others make about them."""
        if self.run is not None:
            return self.run.ledger
        return self.history if self._ledger != Ledger() else self._ledger

    @property
    def history(self):
        """What a run begins with: the ledger, and training without privacy even where no guarantee was there yet."""
        return combine_ledgers(self._ledger, self._plain)

    def add(self, ledger):
        """Take over the entries of weights that have been put into the model."""
        self._ledger = combine_ledgers(self._ledger, ledger)

    def add_plain_steps(self, count):
        """So many steps were trained without privacy."""
        if count > 0:
            self._plain = combine_ledgers(self._plain, Ledger((plain_training(count),)))

    def begin(self, run):
        """A private `fit` begins: its `open_run.OpenRun`."""
        self.run, self.dataset = run, run.run.dataset

    def end(self):
        """It has ended, however it did; what was released stays on record."""
        self.run.close()
        self._ledger, self.run = self.run.ledger, None

    def spent(self, delta=None):
        """`accounting.PrivacySpent` of all steps done so far on the data of the last private `fit`.

        Of a model that was loaded it is that of the data of the latest run; `ledger.spent()` has all data sets.

        Args:
            delta: in (0, 1); that of the runs if None.

        Raises:
            ValueError: for a model that no run of the ledger has trained.
        """
        runs = self.ledger.runs
        if not runs:
            raise ValueError(
                "`spent` needs a private run: `compile(privacy=DPSGD(...))` and `fit`. Received: none so far"
            )
        return self.ledger.spent_on(self.dataset or runs[-1][0].dataset, delta)
