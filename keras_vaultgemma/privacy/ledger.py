"""The privacy ledger: a record, in a file, of what was released about which data.

The file lies next to a checkpoint and inside saved presets. Every line is a JSON object, and lines
are only appended:

- "statement": a guarantee that others state, such as VaultGemma's own of its pre-training, which
  comes first; or training without privacy in between.
- "run": a private run begins.
- "steps": the number of steps of a run that may have been released from then on.
- "end": the exact number of steps of a run that has ended.

**A run that is killed at any point is never under-counted.** A "steps" line is on the disk
(`fsync`) before the first of its steps releases anything, so the complete lines count every
released step. An unreadable line is one whose write was interrupted. It is counted as well, as the
most steps that a line can add. Steps are reserved in blocks of 1 % of the planned steps: a killed
run is over-counted by two blocks at most, and a run that ends is counted exactly.

A resumed run is a new run with its own secret. The steps that it repeats are counted again, because
they are released again. A file has one writer at a time, which holds a lock (`flock`, if the system
has it).

Runs on the same data compose. Runs on different data are accounted for separately, each with the ε
of a record of its own data. A record that is in both data sets is protected by the composition of
the two, which fingerprints cannot reveal; `machine_ledger` finds such records on this machine.
"""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from keras_vaultgemma._files import check_link, parse_json, read_json
from keras_vaultgemma._validation import check_integer, check_number
from keras_vaultgemma.checkpoints import presets
from keras_vaultgemma.privacy import accounting, fingerprint, statements
from keras_vaultgemma.privacy.accounting import PrivacySpent, Steps

FILE = presets.LEDGER
BLOCKS = 100
"""Number of blocks that the planned steps are reserved in."""


class Run(NamedTuple):
    """The facts of a private run, known when it begins.

    Attributes:
        rows: int. N, the number of records in the data set: of rows, or of users.
        sampling_probability: float. q.
        max_batch_size: int or None. Bmax.
        noise_multiplier: float. σ.
        clip_norm: float. C, the largest norm of a record's gradient.
        delta: float. δ at which ε is to be reported.
        planned_steps: int. Number of steps that the run will do.
        unit: str. Description of what is protected.
        dataset: str. Fingerprint of the data, as `fingerprint.fingerprint` returns it.
        package_version: str. Version of this package.
        mechanism: str. Description of the mechanism; it begins with `accounting.SEEDED` for a run
            with `DPSGD(seed_for_tests=...)`.
        neighbouring: str. Relation of neighbouring data sets.
        name: str. Unique name.
        budget: float or None. ε that later runs with a given noise multiplier keep within.
    """

    rows: int
    sampling_probability: float
    max_batch_size: int | None
    noise_multiplier: float
    clip_norm: float
    delta: float
    planned_steps: int
    unit: str
    dataset: str
    package_version: str
    mechanism: str = accounting.MECHANISM
    neighbouring: str = accounting.NEIGHBOURING
    name: str = ""
    budget: float | None = None

    def steps(self, count: int) -> Steps:
        """Return `accounting.Steps` of `count` steps of this run."""
        return Steps(
            count, self.rows, self.sampling_probability, self.max_batch_size, self.noise_multiplier
        )

    @property
    def block(self) -> int:
        """Number of steps that a "steps" line reserves."""
        return max(1, self.planned_steps // BLOCKS)


class Ledger(NamedTuple):
    """The content of a ledger file.

    Attributes:
        statements: tuple of dicts, as metadata.json has under "privacy" or as `statements` returns
            them.
        runs: tuple of pairs `(Run, count)`, with the number of steps that may have been released.
    """

    statements: tuple[dict, ...] = ()
    runs: tuple[tuple[Run, int], ...] = ()

    @property
    def datasets(self) -> list[str]:
        """Fingerprints of the data of the runs, each once."""
        return list(dict.fromkeys(run.dataset for run, _ in self.runs))

    def on(self, dataset: str) -> list[Steps]:
        """Return the steps of all runs that are, or may be, on the data with this fingerprint."""
        return [
            run.steps(count)
            for run, count in self.runs
            if fingerprint.may_be_equal(run.dataset, dataset)
        ]

    def budget(self, dataset: str) -> float | None:
        """Return the ε that runs with a given noise multiplier on these data keep within."""
        budgets = [
            run.budget
            for run, _ in self.runs
            if run.budget is not None and fingerprint.may_be_equal(run.dataset, dataset)
        ]
        return budgets[-1] if budgets else None

    def spent(self, delta: float | None = None) -> dict[str, PrivacySpent]:
        """Return the guarantee of each data set.

        Args:
            delta: float in (0, 1). Defaults to the smallest δ of the runs on each data set.

        Returns:
            Dict from fingerprint to `PrivacySpent`.
        """
        return {dataset: self.spent_on(dataset, delta) for dataset in self.datasets}

    def spent_on(self, dataset: str, delta: float | None = None) -> PrivacySpent:
        """Return the guarantee of all runs that are, or may be, on one data set.

        Args:
            dataset: str. Fingerprint of the data of a run.
            delta: float in (0, 1). Defaults to the smallest δ of these runs.

        Raises:
            ValueError: If no run is on these data.
        """
        runs = [run for run, _ in self.runs if fingerprint.may_be_equal(run.dataset, dataset)]
        if not runs:
            raise ValueError(
                f"`dataset` must be the fingerprint of a run's data. Received: dataset={dataset!r}"
            )
        units, mechanisms = (
            "; ".join(dict.fromkeys(getattr(r, name) for r in runs))
            for name in ("unit", "mechanism")
        )
        return accounting.spent(
            self.on(dataset), delta or min(run.delta for run in runs), units, mechanisms
        )._replace(uncovered=self.without_privacy())

    def describe(self) -> list[str]:
        """Return one sentence about each run, in order."""
        return [
            f"{count:,} steps of {run.mechanism}, noise multiplier {run.noise_multiplier:.4g}, "
            f"clipping norm {run.clip_norm:g}, on {run.rows:,} "
            f"{'users' if statements.is_of_users(run.unit) else 'rows'}, each drawn with "
            f"probability {run.sampling_probability:.4g} per step; unit: {run.unit}; "
            f"neighbours: {run.neighbouring}; data {run.dataset}"
            for run, count in self.runs
        ]

    def without_privacy(self) -> str:
        """Describe what no guarantee covers: steps without privacy, and weights from elsewhere.

        Returns:
            str. "" if there was none.
        """
        return statements.describe_uncovered(self.statements)

    def write(self, folder: str | Path) -> None:
        """Write the file of a saved model, unless the ledger is empty."""
        if self.statements or self.runs:
            (Path(folder) / FILE).write_bytes(self.lines())

    def lines(self, begun: Iterable[str] = ()) -> bytes:
        """Return the content of a file in which every run has ended.

        A saved preset has such a file, because its weights include no later steps.

        Args:
            begun: names of runs that the file has already; only their steps are added. Defaults to
                none.
        """
        lines = [{"kind": "statement", **statement} for statement in self.statements]
        for run, count in self.runs:
            lines += [] if run.name in begun else [run_entry(run)]
            lines += [{"kind": "end", "run": run.name, "steps": count}]
        return b"".join(entry_line(content) for content in lines)


def combine_ledgers(*ledgers: Ledger) -> Ledger:
    """Return the union of ledgers; a run in several of them has the largest number of steps."""
    stated: list[dict] = []
    runs: dict[str, tuple[Run, int]] = {}
    for ledger in ledgers:
        stated += [statement for statement in ledger.statements if statement not in stated]
        for run, count in ledger.runs:
            runs[run.name] = (run, max(count, runs.get(run.name, (run, 0))[1]))
    return Ledger(tuple(stated), tuple(runs.values()))


def preset_ledger(
    folder: str | os.PathLike, preset: str = "", parameter_count: int | None = None
) -> Ledger:
    """Return the ledger of a preset: its file, or else the privacy statement of its metadata.json.

    Args:
        folder: str or `pathlib.Path`. Folder of the preset.
        preset: str. Name of the preset. Google's release of VaultGemma has neither file; it is
            recognised by this name and by `parameter_count`, and its statement is bundled with this
            package. Defaults to "".
        parameter_count: int. Number of parameters. Defaults to None.
    """
    folder = Path(folder)
    if (folder / FILE).is_file():
        return read_ledger(folder / FILE)
    metadata = folder / presets.METADATA
    stated = (
        read_json(metadata)
        if metadata.is_file()
        else presets.release_metadata(preset, parameter_count)
    )
    statement = stated.get("privacy")
    return Ledger((statement,)) if statement else Ledger()


def read_ledger(path: str | Path) -> Ledger:
    """Return the ledger in a file.

    Raises:
        ValueError: If a complete line is invalid, such as steps of an unknown run.
    """
    path = Path(path)
    check_link(path)
    return parse_ledger(path.read_bytes(), path)


def parse_ledger(content: bytes, path: str | Path) -> Ledger:
    """Return the ledger in the content of a file, which may be cut off at any byte.

    Args:
        content: bytes.
        path: str or `pathlib.Path`. Name of the file for error messages.

    Raises:
        ValueError: If a complete line is invalid.
    """
    stated, runs, counts, latest = [], {}, {}, None
    for number, line in enumerate(content.split(b"\n"), 1):
        if not line:
            continue
        try:
            entry = parse_json(line, f"{path}, line {number}")
        except ValueError:
            # The write was interrupted, and it would have added one block at most.
            if latest:
                counts[latest] += runs[latest].block
            continue
        try:
            kind = entry.pop("kind")
            if kind == "statement":
                stated.append(entry)
            elif kind == "run":
                run = _parse_run(entry)
                if run.name in runs:
                    raise ValueError(f"a second run has the name {run.name!r}")
                latest = run.name
                runs[latest], counts[latest] = run, 0
            elif kind == "steps":
                counts[entry["run"]] = max(counts[entry["run"]], _parse_count(entry))
            elif kind == "end":
                _ = counts[entry["run"]]
                counts[entry["run"]], latest = _parse_count(entry), None
            else:
                raise ValueError(f"unknown kind {kind!r}")
        except (KeyError, TypeError, ValueError) as error:
            message = f"unknown run or missing {error}" if isinstance(error, KeyError) else error
            raise ValueError(
                f"{path}, line {number} is not an entry of a privacy ledger: {message}"
            ) from error
    return Ledger(tuple(stated), tuple((run, counts[name]) for name, run in runs.items()))


def entry_line(content: dict) -> bytes:
    """Return the line of an entry."""
    # `default` converts NumPy's numbers.
    return json.dumps(content, default=lambda number: number.item()).encode("ascii") + b"\n"


def run_entry(run: Run) -> dict:
    """Return the entry of a run that begins."""
    return {"kind": "run", **run._asdict()}


def _parse_run(entry):
    run = Run(**entry)
    accounting.check_steps(run.steps(run.planned_steps))
    accounting.check_delta(run.delta)
    check_number("budget", run.budget, minimum=0, allow_none=True)
    for name in ("unit", "dataset", "mechanism", "name"):
        value = getattr(run, name)
        if not isinstance(value, str):
            raise ValueError(f"`{name}` must be a string. Received: {name}={value!r}")
    return run


def _parse_count(entry):
    check_integer("steps", entry["steps"], 0)
    return entry["steps"]
