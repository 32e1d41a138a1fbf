"""The ledger: what was released about which data, in a file beside the checkpoint and inside saved presets.

A line is a JSON object and is only ever added: "statement", a guarantee that others make (VaultGemma's own of its
pre-training comes first) or that training without privacy went between; "run", a run that begins; "steps", how many of
its steps may have been released from now on; "end", how many were.

**A run that is killed at any point is never under-counted.** A "steps" line is on the disk (`fsync`) before the first
of its steps releases anything, so that the lines that are whole count every released step. A line that cannot be read
is one whose write did not end, and counts all the same, as the most steps that a line may add. Steps are written down
in blocks of 1 % of the planned ones: a run that is killed is over-counted by two blocks at most, one that ends is
counted exactly.

A resumed run is a new one, of its own secret: what it repeats of the steps before it is counted again, for it was
released again. Its file has one writer at a time, which holds a lock (`flock`, where the system has it).

Runs on the same data compose. Runs on other data stand beside each other, each with the ε of a row of its own data: a
row that is in both is protected by the composition of the two, which nobody can see from fingerprints.
"""

import json
import uuid
from pathlib import Path
from typing import NamedTuple

from keras_vaultgemma._files import check_link, parse_json, read_json
from keras_vaultgemma.checkpoints import presets
from keras_vaultgemma.privacy import accounting, fingerprint
from keras_vaultgemma.privacy.accounting import Steps

FILE = presets.LEDGER
BLOCKS = 100
"""Into how many parts the planned steps are reserved."""


WITHOUT_PRIVACY = "without privacy"


class Run(NamedTuple):
    """What a run is, as it is known when it begins.

    Attributes:
        rows, sampling_probability, max_batch_size, noise_multiplier: as in `accounting.Steps`.
        clip_norm: C, the largest norm of a row's gradient.
        delta: δ at which its ε is meant to be read.
        planned_steps: how many it will do.
        unit: what one row is, in words.
        dataset: as `fingerprint.fingerprint` returns it.
        package_version: of this package.
        mechanism, neighbouring: in words; the mechanism of a run with `DPSGD(seed_for_tests=...)` begins with
            `accounting.SEEDED`.
        name: unique.
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

    def steps(self, count):
        """`accounting.Steps` of this run."""
        return Steps(
            count, self.rows, self.sampling_probability, self.max_batch_size, self.noise_multiplier
        )

    @property
    def block(self):
        """How many steps a line reserves."""
        return max(1, self.planned_steps // BLOCKS)


class Ledger(NamedTuple):
    """What a file says.

    Attributes:
        statements: tuple of dicts, as metadata.json has under "privacy" or as `plain_training` returns them.
        runs: tuple of pairs of a `Run` and the number of its steps that may have been released.
    """

    statements: tuple = ()
    runs: tuple = ()

    def on(self, dataset):
        """List of `Steps` of the runs on some data, and of those that may be on the same data."""
        return [
            run.steps(count)
            for run, count in self.runs
            if fingerprint.may_be_equal(run.dataset, dataset)
        ]

    def spent(self, delta=None):
        """{fingerprint: `PrivacySpent`} of each data set.

        Args:
            delta: in (0, 1); the smallest that the runs on the data were meant for if None.
        """
        return {
            dataset: self.spent_on(dataset, delta)
            for dataset in dict.fromkeys(run.dataset for run, _ in self.runs)
        }

    def spent_on(self, dataset, delta=None):
        """`PrivacySpent` of the runs on some data, and of those that may be on the same; `delta` as for `spent`."""
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
        )

    def describe(self):
        """A sentence for each run, in order."""
        return [
            f"{count:,} steps of {run.mechanism}, noise multiplier {run.noise_multiplier:.4g}, clipping norm "
            f"{run.clip_norm:g}, on {run.rows:,} rows, each with probability {run.sampling_probability:.4g} a step; "
            f"unit: {run.unit}; neighbours: {run.neighbouring}; data {run.dataset}"
            for run, count in self.runs
        ]

    def without_privacy(self):
        """A sentence on training that no guarantee covers, or "" where none is known."""
        steps = sum(entry["steps"] for entry in self.statements if _is_plain_training(entry))
        return f"{steps:,} steps, whose rows no guarantee here covers" if steps else ""

    def write(self, folder):
        """Write the file of a saved model, or none where there is nothing to say."""
        if self.statements or self.runs:
            (Path(folder) / FILE).write_bytes(self.lines())

    def lines(self, begun=()):
        """The same as the bytes of a file, each run ended: for a saved preset, whose weights have no later steps.

        Args:
            begun: names of runs that the file has already, and of which only the steps are to be added.
        """
        lines = [{"kind": "statement", **statement} for statement in self.statements]
        for run, count in self.runs:
            lines += [] if run.name in begun else [run_entry(run)]
            lines += [{"kind": "end", "run": run.name, "steps": count}]
        return b"".join(entry_line(content) for content in lines)


def plain_training(steps):
    """The statement that a call of `fit` did so many steps without privacy."""
    # Two calls of as many steps are two statements.
    return {"training": WITHOUT_PRIVACY, "steps": steps, "name": uuid.uuid4().hex}


def _is_plain_training(statement):
    # A metadata.json may state anything.
    return (
        isinstance(statement, dict)
        and statement.get("training") == WITHOUT_PRIVACY
        and isinstance(statement.get("steps"), int)
    )


def combine_ledgers(*ledgers):
    """One `Ledger` of all entries of several; of a run that is in more than one, the most steps."""
    statements, runs = [], {}
    for ledger in ledgers:
        statements += [statement for statement in ledger.statements if statement not in statements]
        for run, count in ledger.runs:
            runs[run.name] = (run, max(count, runs.get(run.name, (run, 0))[1]))
    return Ledger(tuple(statements), tuple(runs.values()))


def preset_ledger(folder, preset="", parameter_count=None):
    """The `Ledger` of a preset: its file, or else the privacy statement of its metadata.json.

    Args:
        folder: where the preset was found.
        preset, parameter_count: by which Google's release is known, which has neither; its statement is bundled.
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


def read_ledger(path):
    """The `Ledger` in a file.

    Raises:
        ValueError: for a line that is whole and makes no sense, such as steps of a run that never began.
    """
    path = Path(path)
    check_link(path)
    return parse_ledger(path.read_bytes(), path)


def parse_ledger(content, path):
    """The `Ledger` in the bytes of a file, of which any number may be missing at the end.

    Args:
        content: bytes.
        path: what an error names.
    """
    statements, runs, counts, latest = [], {}, {}, None
    for number, line in enumerate(content.split(b"\n"), 1):
        if not line:
            continue
        try:
            entry = parse_json(line, f"{path}, line {number}")
        except ValueError:
            # Torn: the write never ended, and at most one block was to be added.
            if latest:
                counts[latest] += runs[latest].block
            continue
        try:
            kind = entry.pop("kind")
            if kind == "statement":
                statements.append(entry)
            elif kind == "run":
                run = _run(entry)
                if run.name in runs:
                    raise ValueError(f"a second run has the name {run.name!r}")
                latest = run.name
                runs[latest], counts[latest] = run, 0
            elif kind == "steps":
                counts[entry["run"]] = max(counts[entry["run"]], _count(entry["steps"]))
            elif kind == "end":
                _ = counts[entry["run"]]
                counts[entry["run"]], latest = _count(entry["steps"]), None
            else:
                raise ValueError(f"unknown kind {kind!r}")
        except (KeyError, TypeError, ValueError) as error:
            message = f"no {error}" if isinstance(error, KeyError) else error
            raise ValueError(
                f"{path}, line {number} is not an entry of a privacy ledger: {message}"
            ) from error
    return Ledger(tuple(statements), tuple((run, counts[name]) for name, run in runs.items()))


def entry_line(content):
    """An entry as the bytes of its line."""
    # NumPy's integers are taken for the numbers they are.
    return json.dumps(content, default=lambda number: number.item()).encode("ascii") + b"\n"


def run_entry(run):
    """The entry of a run that begins."""
    return {"kind": "run", **run._asdict()}


def _run(entry):
    run = Run(**entry)
    accounting.check_steps(run.steps(run.planned_steps))
    accounting.check_delta(run.delta)
    for name in ("unit", "dataset", "mechanism", "name"):
        if not isinstance(getattr(run, name), str):
            raise ValueError(f"{name} must be a string")
    return run


def _count(value):
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"steps must be 0 or more, not {value!r}")
    return value
