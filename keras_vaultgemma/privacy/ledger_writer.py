"""Recording of private runs: the privacy record of a model, and a run that is written to a ledger.

Every step is in the ledger before it releases anything.
"""

import contextlib
import os
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

from keras_vaultgemma._files import check_link, sync_folder
from keras_vaultgemma._validation import check_number
from keras_vaultgemma.privacy import accounting, machine_ledger
from keras_vaultgemma.privacy.accounting import PrivacySpent
from keras_vaultgemma.privacy.ledger import (
    Ledger,
    Run,
    combine_ledgers,
    entry_line,
    parse_ledger,
    read_ledger,
    run_entry,
)
from keras_vaultgemma.privacy.locks import lock
from keras_vaultgemma.privacy.statements import is_plain_training, plain_training, unknown_history


class PrivacyRecord:
    """The privacy ledger of a model, `model.privacy`, with the ε that it amounts to at any time.

    Args:
        ledger: `Ledger` of the model's weights. Defaults to an empty one.

    Attributes:
        dataset: str or None. Fingerprint of the data of the last private `fit`.
        run: `OpenRun` during a private `fit`, else None.
        is_in_weights: bool. True if files of weights get the ledger.

    Example:

    ```python
    import keras
    from keras_vaultgemma import VaultGemmaCausalLM, privacy

    model = VaultGemmaCausalLM.from_preset("vaultgemma_tiny")
    model.preprocessor.sequence_length = 8
    model.backbone.enable_lora(2)
    model.compile(keras.optimizers.SGD(0.1), privacy=privacy.DPSGD(noise_multiplier=1.0))
    model.fit(["The fox said so."] * 8, batch_size=4)

    print(model.privacy.spent())
    print("\\n".join(model.privacy.ledger.describe()))
    ```
    """

    def __init__(self, ledger: Ledger | None = None):
        self._ledger, self._plain = ledger or Ledger(), Ledger()
        self.dataset: str | None = None
        self._running: Callable[[], tuple[dict, ...]] | None = None
        self.run: OpenRun | None = None
        self.is_in_weights = True

    @property
    def ledger(self) -> Ledger:
        """`Ledger` of all runs that the weights come from and all statements about them.

        It says nothing about training without privacy that no guarantee preceded.
        """
        return self.everything if self._ledger != Ledger() or self.run else Ledger()

    @property
    def everything(self) -> Ledger:
        """`Ledger` with all that is known about the weights, which every copy of them carries."""
        if self.run is not None:
            return self.run.ledger
        running = Ledger(self._running()) if self._running else Ledger()
        return combine_ledgers(self._ledger, self._plain, running)

    def spent(self, delta: float | None = None) -> PrivacySpent:
        """Return the guarantee of all steps done so far on the data of the last private `fit`.

        It covers everything that was learned from these data: by this model, and by other models
        on this machine. For a model that was loaded the data are those of the latest run.
        `ledger.spent()` returns the guarantees of this model alone, for all its data sets.

        Args:
            delta: float in (0, 1). Defaults to the smallest δ of the runs on these data.

        Returns:
            `PrivacySpent`.

        Raises:
            ValueError: If the ledger has no run.
            ImportError: If batches are truncated and SciPy is not installed.
        """
        runs = self.ledger.runs
        if not runs:
            raise ValueError(
                "`spent` needs a private run: `compile(privacy=DPSGD(...))` and `fit`. "
                "Received: a model without private runs"
            )
        known = self.known()
        spent = known.spent_on(self.dataset or runs[-1][0].dataset, delta)
        epsilon = accounting.epsilon(machine_ledger.steps_of(known), spent.delta)
        return spent._replace(
            uncovered=self.ledger.without_privacy(),
            epsilon_of_all_runs=accounting.round_up(epsilon),
            all_runs=sum(count > 0 for _, count in known.runs),
        )

    def known(self) -> Ledger:
        """Return the `Ledger` of the model with all other runs that this machine knows."""
        others = [one for one in machine_ledger.read_runs() if not self._is_running_here(one.run)]
        return combine_ledgers(self.ledger, machine_ledger.as_ledger(others))

    def _is_running_here(self, run):
        return self.run is not None and self.run.run.name == run.name

    def add(self, ledger: Ledger) -> None:
        """Add the ledger of weights that were loaded into the model."""
        self._ledger = combine_ledgers(self._ledger, ledger)

    def add_copied(self, content: bytes, source: str) -> None:
        """Add the `everything` of weights that were copied into the model, as its lines.

        Args:
            content: bytes.
            source: str. Name of the source for error messages.
        """
        ledger = parse_ledger(content, source)
        if ledger.runs or not all(map(is_plain_training, ledger.statements)):
            self.add(ledger)
        else:
            self._plain = combine_ledgers(self._plain, ledger)

    def add_unknown(self, source: str) -> None:
        """Add weights whose ledger did not come with them.

        Args:
            source: str. How they came.
        """
        # During `fit` a callback brings back weights of the run itself, as `EarlyStopping` does.
        if self.run is None and self._running is None:
            self.add(Ledger((unknown_history(source),)))

    @contextlib.contextmanager
    def in_its_own_file(self) -> Iterator[None]:
        """Context in which the ledger is saved next to the weights, not with them."""
        self.is_in_weights = False
        try:
            yield
        finally:
            self.is_in_weights = True

    @contextlib.contextmanager
    def count_plain_steps(self, steps: Callable[[], int]) -> Iterator[None]:
        """Context of training without privacy.

        Args:
            steps: function that returns the number of steps so far.
        """
        name = uuid.uuid4().hex
        self._running = lambda: (plain_training(steps(), name),) if steps() > 0 else ()
        try:
            yield
        finally:
            # After an error in a step Keras has dropped the variables on JAX, and with them the
            # weights; asking for the steps would hide the error.
            with contextlib.suppress(TypeError):
                self._plain = combine_ledgers(self._plain, Ledger(self._running()))
            self._running = None

    def begin(self, run: "OpenRun") -> None:
        """Begin a private run; `ledger` counts its steps from here on."""
        self.run, self.dataset = run, run.run.dataset

    def end(self) -> None:
        """End the run. The steps that it released stay in the ledger."""
        self.run.close()
        self._ledger, self.run = self.run.ledger, None


class OpenRun:
    """Context manager of a run that is being written to a ledger file; leaving it ends the run.

    Args:
        path: `pathlib.Path` or str. Ledger file, which is created if there is none. None keeps the
            run in memory, for weights that are not saved.
        run: `Run`. It is given `name`.
        history: `Ledger` of the model at the beginning of the run. Entries that the file lacks are
            written first. Defaults to None.
        rows: sketch of the records (`fingerprint.RowSketch`), with which the run is also written to
            the ledger of this machine. Defaults to None, which does not.
        name: str. Name of the run, if another process has begun it. Defaults to a new unique one.

    Attributes:
        run: `Run` with its name.
        done: int. Number of steps released so far.

    Raises:
        ValueError: If the file is not a ledger, if another run is writing to it, or if a value of
            `run` is out of range.
        OSError: If the file cannot be written. No step may be released then.
    """

    def __init__(self, path, run: Run, history: Ledger | None = None, rows=None, name=""):
        accounting.check_steps(run.steps(run.planned_steps))
        accounting.check_delta(run.delta)
        check_number("clip_norm", run.clip_norm, above=0)
        self.run, self.done, self._reserved = run._replace(name=name or uuid.uuid4().hex), 0, 0
        self._history, self._file, self._copy = history or Ledger(), None, None
        try:
            if path is not None:
                self._open(Path(path))
            if rows is not None:
                copy = machine_ledger.new_folder(self.run, rows, path)
                self._copy = copy.open("ab")
                lock(self._copy, is_waiting=True)  # a reader may be looking if it is locked
                _append(self._copy, entry_line(run_entry(self.run)))
                sync_folder(copy.parent)
                sync_folder(copy.parent.parent)
        except BaseException:
            self._close_files()
            raise

    def _open(self, path):
        path.parent.mkdir(parents=True, exist_ok=True)
        check_link(path)
        self._file = _open_locked(path)
        history, saved = self._history, read_ledger(path)
        self._history = combine_ledgers(saved, history)
        counts = {run.name: count for run, count in saved.runs}
        missing = Ledger(
            tuple(entry for entry in history.statements if entry not in saved.statements),
            tuple((run, count) for run, count in history.runs if count > counts.get(run.name, -1)),
        )
        # A torn line is ended first, so that the next entry begins a line of its own.
        is_torn = path.stat().st_size and not path.read_bytes().endswith(b"\n")
        start = (b"\n" if is_torn else b"") + missing.lines(counts)
        _append(self._file, start + entry_line(run_entry(self.run)))
        sync_folder(path.parent)

    @property
    def ledger(self) -> Ledger:
        """`Ledger` of all entries, with the steps that this run has released so far."""
        return combine_ledgers(self._history, Ledger((), ((self.run, self.done),)))

    def release(self) -> None:
        """Count one more step. The step may release its result only after this has returned."""
        if self.done == self._reserved:
            reserved = min(self.done + self.run.block, max(self.run.planned_steps, self.done + 1))
            self._write(entry_line({"kind": "steps", "run": self.run.name, "steps": reserved}))
            self._reserved = reserved
        self.done += 1

    def close(self) -> None:
        """End the run, which then counts exactly the steps that were released."""
        if self._file is not None or self._copy is not None:
            self._write(entry_line({"kind": "end", "run": self.run.name, "steps": self.done}))
            self._close_files()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def _write(self, content):
        for file in (self._file, self._copy):
            if file is not None:
                _append(file, content)

    def _close_files(self):
        for file in (self._file, self._copy):
            if file is not None:
                file.close()
        self._file = self._copy = None


def _open_locked(path):
    """Open a file to append to it, and lock it: two writers would each spend a budget's rest."""
    file = path.open("ab")
    if lock(file):
        return file
    file.close()
    raise ValueError(
        f"{path} must have one writer at a time. Received: a second run while another run is "
        "writing to it"
    )


def _append(file, content):
    """Write to the end of a file, and to the disk."""
    file.write(content)
    file.flush()
    os.fsync(file.fileno())
