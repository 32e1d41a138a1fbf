"""A run while it is being written down: each step is in the ledger before it releases anything."""

import os
import uuid
from pathlib import Path

from keras_vaultgemma import presets
from keras_vaultgemma.privacy import accounting, ledger

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
            raise ValueError(f"`clip_norm` must be above 0 and finite. Received: clip_norm={run.clip_norm}")
        self.run, self.done, self._reserved = run._replace(name=uuid.uuid4().hex), 0, 0
        self._history, self._file = history or ledger.Ledger(), None
        if path is not None:
            self._open(Path(path))

    def _open(self, path):
        path.parent.mkdir(parents=True, exist_ok=True)
        presets.check_link(path)
        self._file = path.open("ab")
        try:
            self._begin(path)
        except BaseException:
            self._file.close()
            raise

    def _begin(self, path):
        _lock(self._file, path)
        history = self._history
        there = ledger.read(path)
        self._history = ledger.combine(there, history)
        counted = {run.name: count for run, count in there.runs}
        missing = ledger.Ledger(
            tuple(statement for statement in history.statements if statement not in there.statements),
            tuple((run, count) for run, count in history.runs if count > counted.get(run.name, -1)),
        )
        # What a torn line left is closed, so that it spoils no other.
        torn = path.stat().st_size and not path.read_bytes().endswith(b"\n")
        self._write((b"\n" if torn else b"") + missing.lines(counted) + ledger.line(ledger.run_line(self.run)))
        _synchronise_folder(path.parent)

    @property
    def ledger(self):
        """`ledger.Ledger` of all entries, with the steps that this run has released so far."""
        return ledger.combine(self._history, ledger.Ledger((), ((self.run, self.done),)))

    def release(self):
        """Count one more step. It may release something when this has returned, and not before."""
        if self.done == self._reserved:
            reserved = min(self.done + self.run.block, max(self.run.planned_steps, self.done + 1))
            self._write(ledger.line({"kind": "steps", "run": self.run.name, "steps": reserved}))
            self._reserved = reserved
        self.done += 1

    def close(self):
        """End the run: it counts the steps that were released, no more."""
        if self._file is not None:
            self._write(ledger.line({"kind": "end", "run": self.run.name, "steps": self.done}))
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


def _synchronise_folder(folder):
    """The name of a new file is on the disk too, where folders can be opened."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
