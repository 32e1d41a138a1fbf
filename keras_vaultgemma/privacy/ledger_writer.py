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
from keras_vaultgemma.privacy import accounting
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
from keras_vaultgemma.privacy.statements import is_plain_training, plain_training, unknown_history

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


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

        For a model that was loaded it is that of the data of the latest run. `ledger.spent()`
        returns the guarantees of all data sets.

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
        return self.ledger.spent_on(self.dataset or runs[-1][0].dataset, delta)

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
        run: `Run`. It is given a new unique name.
        history: `Ledger` of the model at the beginning of the run. Entries that the file lacks are
            written first. Defaults to None.

    Attributes:
        run: `Run` with its name.
        done: int. Number of steps released so far.

    Raises:
        ValueError: If the file is not a ledger, if another run is writing to it, or if a value of
            `run` is out of range.
        OSError: If the file cannot be written. No step may be released then.
    """

    def __init__(self, path, run: Run, history: Ledger | None = None):
        accounting.check_steps(run.steps(run.planned_steps))
        accounting.check_delta(run.delta)
        check_number("clip_norm", run.clip_norm, above=0)
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
        history, saved = self._history, read_ledger(path)
        self._history = combine_ledgers(saved, history)
        counts = {run.name: count for run, count in saved.runs}
        missing = Ledger(
            tuple(entry for entry in history.statements if entry not in saved.statements),
            tuple((run, count) for run, count in history.runs if count > counts.get(run.name, -1)),
        )
        # A torn line is ended first, so that the next entry begins a line of its own.
        is_torn = path.stat().st_size and not path.read_bytes().endswith(b"\n")
        self._write(
            (b"\n" if is_torn else b"") + missing.lines(counts) + entry_line(run_entry(self.run))
        )
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
    """Lock a file until it is closed.

    Two runs that write to it at once would each spend what is left of a budget.
    """
    if fcntl is None:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ValueError(
            f"{path} must have one writer at a time. Received: a second run while another run is "
            "writing to it"
        ) from error
    except OSError:
        pass  # The file system has no locks.
