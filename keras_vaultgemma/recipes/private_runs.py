"""Recipe of `keras-vaultgemma ledger`: the private runs on this machine and what they amount to."""

from keras_vaultgemma._validation import check_number
from keras_vaultgemma.privacy import accounting, fingerprint, machine_ledger

HEADER = ("run", "begun (UTC)", "data", "N", "ε", "δ", "steps", "σ", "ledger of the model")


def private_runs(delta: float | None = None) -> str:
    """Return a table of the private runs on this machine, their data, and ε of each and in all.

    Args:
        delta: float in (0, 1). δ of every ε. Defaults to the δ of each run, and for several runs to
            the smallest of them.

    Returns:
        str of several lines.

    Raises:
        ValueError: If `delta` is out of range or a file of a run is damaged.
        ImportError: If batches are truncated and SciPy is not installed.

    Example:

    ```python
    from keras_vaultgemma.recipes.private_runs import private_runs

    print(private_runs())
    ```
    """
    check_number("delta", delta, above=0, below=1, allow_none=True)
    runs = machine_ledger.read_runs()
    if not runs:
        return f"No private runs in {machine_ledger.root()}"
    known = machine_ledger.as_ledger(runs)
    names = {dataset: _letter(i) for i, dataset in enumerate(known.datasets)}
    plural = "s" if len(runs) > 1 else ""
    lines = [
        f"{len(runs):,} private run{plural} on this machine, in {machine_ledger.root()}",
        "",
        *_table([HEADER, *(_cells(one, names, delta) for one in runs)]),
        "",
    ]
    for dataset, spent in known.spent(delta).items():
        lines.append(
            f"Data {names[dataset]}: ε = {spent.epsilon:g} at δ = {spent.delta:.3g} for "
            f"{spent.unit}{_in_common(dataset, runs, names)}"
        )
    chosen = delta or min(run.delta for run, _ in known.runs)
    lines.append(
        f"For a person whose record was in all runs: ε = {_epsilon(runs, chosen):g} at "
        f"δ = {chosen:.3g}"
    )
    return "\n".join(lines)


def _letter(index):
    """Return A, B, …, Z, AA, AB, …."""
    return (_letter(index // 26 - 1) if index >= 26 else "") + chr(ord("A") + index % 26)


def _cells(one, names, delta):
    run = one.run
    chosen = delta or run.delta
    return (
        run.name[:8],
        one.begun[:16].replace("T", " "),
        names[run.dataset],
        f"{run.rows:,}",
        f"{_epsilon([one], chosen):g}",
        f"{chosen:.3g}",
        f"{one.steps:,}",
        f"{run.noise_multiplier:.4g}",
        one.ledger or "in memory",
    )


def _table(rows):
    """Return the lines of a table whose columns are aligned."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def _epsilon(runs, delta):
    steps = machine_ledger.steps_of(machine_ledger.as_ledger(runs))
    return accounting.round_up(accounting.epsilon(steps, delta))


def _in_common(dataset, runs, names):
    """Describe how many records a data set has in common with each other one."""
    latest = {one.run.dataset: one for one in runs}
    rows = latest.pop(dataset).rows
    found = machine_ledger.in_common(rows, dataset, list(latest.values()))
    parts = [f"{count:,} in common with {names[other.run.dataset]}" for other, count in found]
    parts += [
        f"counted as the same as {names[other]}, because the key of the fingerprints was replaced"
        for other in latest
        if fingerprint.may_be_equal(other, dataset)
    ]
    return f"; {', '.join(parts)}" if parts else ""
