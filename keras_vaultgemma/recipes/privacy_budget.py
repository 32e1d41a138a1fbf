"""Recipe of `keras-vaultgemma epsilon`: the guarantee of a planned run, as text and as a plot."""

from collections.abc import Sequence

import numpy as np

from keras_vaultgemma._plots import new_figure, save_figure
from keras_vaultgemma._validation import check_exactly_one, check_integer
from keras_vaultgemma.privacy import accounting, planning
from keras_vaultgemma.privacy.accounting import Steps
from keras_vaultgemma.privacy.group_privacy import group_epsilon
from keras_vaultgemma.recipes.private_options import model_shape, private_options

POINTS = 10
"""Largest number of points of a curve."""


def privacy_budget(
    rows: int,
    batch_size: int | None = None,
    epochs: int | None = None,
    noise_multiplier: float | None = None,
    epsilon: float | None = None,
    delta: float | None = None,
    png: str | None = None,
    max_rows_per_group: int | None = None,
    preset: str = "vaultgemma_tiny",
) -> str:
    """Return the guarantee of a private run, or the noise that meets a budget, in plain words.

    Args:
        rows: int. N, the number of training records.
        batch_size: int. Expected batch size. If it or `epochs` is None, `private_options` chooses
            it, and the text says which options it would choose for `finetune --private`.
        epochs: int. Number of times that a record takes part on average.
        noise_multiplier: float. Standard deviation of the noise divided by the clipping norm.
            Exactly one of `noise_multiplier` and `epsilon` must be given.
        epsilon: float in (0, 100]. Budget of the run.
        delta: float in (0, 1). Defaults to min(N^-1.1, 1e-5).
        png: str. File for a plot of ε against steps and of σ against ε. Defaults to None, which
            plots nothing.
        max_rows_per_group: int. Rows that a user contributes to a step at most. If given, records
            are users, as with `DPSGD(unit="user")`, and what a user with as many rows would have
            with single rows as records is stated as well. Defaults to None: records are rows.
        preset: str. Preset whose shape the choice depends on. Defaults to "vaultgemma_tiny".

    Returns:
        str of several lines.

    Raises:
        ValueError: If an argument is out of range.
        ImportError: If SciPy is not installed, or if `png` is given and matplotlib is not
            installed.

    Example:

    ```python
    from keras_vaultgemma.recipes.privacy_budget import privacy_budget

    print(privacy_budget(rows=1000, batch_size=50, epochs=1, noise_multiplier=1.0))
    ```
    """
    # First, so that a missing matplotlib is reported before the accounting.
    figure = None if png is None else new_figure((9, 3.6))
    check_integer("max_rows_per_group", max_rows_per_group, allow_none=True)
    kind = "row" if max_rows_per_group is None else "user"
    chosen = planning.default_delta(rows) if delta is None else delta
    check_exactly_one(epsilon=epsilon, noise_multiplier=noise_multiplier)
    options = None
    if batch_size is None or epochs is None:
        shape = model_shape(preset)
        options = private_options(
            rows, shape, epsilon, chosen, batch_size=batch_size, epochs=epochs
        )
        batch_size, epochs = options.batch_size, options.epochs
    steps = planning.plan(rows, batch_size, epochs, chosen, epsilon, noise_multiplier)
    planning.warn_of_large_delta(rows, chosen)
    spent = accounting.epsilon([steps], chosen)
    advantage = accounting.delta([steps], 0.0)
    right = accounting.round_up(50 + 50 * advantage, 3)
    if png is not None:
        plot(figure, steps, chosen, spent)
        save_figure(figure, png)
    lines = [
        f"ε = {accounting.round_up(spent):g} at δ = {chosen:.3g}"
        f"{' (the default)' if delta is None else ''}, "
        f"with noise multiplier σ = {steps.noise_multiplier:.4g}, after {steps.count:,} steps",
        "",
        f"An attacker who sees the trained model, knows all other records and guesses if one "
        f"record was among the {rows:,}, both being equally likely, is right in at most "
        f"{right:g} of 100 cases; a coin is right in 50.",
        "",
        f"Each step draws every record with probability {steps.sampling_probability:.4g} "
        f"({batch_size:,} {kind}s expected, {steps.max_batch_size:,} at most). The unit is one "
        f"{kind}, neighbouring data sets are zero-out, and the accounting uses privacy loss "
        "distributions.",
    ]
    if max_rows_per_group is not None:
        lines += ["", describe_group_privacy([steps], chosen, max_rows_per_group)]
    if options is not None:
        lines += [
            "",
            f"Options that `finetune --private` chooses for {rows:,} {kind}s and {preset}:",
            f"  {options.describe()}",
            f"They read each {kind} {epochs} times on average. The noise of a step is "
            f"{options.noise_norm:.2g} times as long as the longest possible mean gradient.",
        ]
    return "\n".join(lines if png is None else [*lines, "", f"{png}: ε against steps, σ against ε"])


def describe_group_privacy(runs: Sequence[Steps], delta: float, size: int) -> str:
    """Describe what the same steps would guarantee to a user if they protected single rows.

    Args:
        runs: list of `Steps` that protect users.
        delta: float in (0, 1).
        size: int. Number of the user's rows.
    """
    value = group_epsilon(runs, delta, size)
    largest = accounting.LARGEST_EPSILON
    told = f"above {largest:g}" if value > largest else f"{accounting.round_up(value):g}"
    return (
        "If single rows were drawn and clipped instead, with the same probability, noise and "
        f"steps, group privacy would give a user with {size:,} rows an ε of {told} at "
        f"δ = {delta:.3g}"
    )


def curves(steps: Steps, delta: float):
    """Return two curves through a plan: ε against the number of steps, and ε against the noise.

    Args:
        steps: `accounting.Steps`.
        delta: float in (0, 1).

    Returns:
        Tuple `((counts, epsilons), (noise_multipliers, epsilons))` of lists of numbers: ε after
        each number of the steps, and ε of all steps with each noise multiplier.
    """
    counts = np.unique(np.geomspace(1, steps.count, POINTS).round().astype(int)).tolist()
    noises = (steps.noise_multiplier * np.geomspace(0.8, 4, POINTS)).tolist()
    return (
        (counts, [accounting.epsilon([steps._replace(count=count)], delta) for count in counts]),
        (
            noises,
            [
                accounting.epsilon([steps._replace(noise_multiplier=noise)], delta)
                for noise in noises
            ],
        ),
    )


def plot(figure, steps: Steps, delta: float, spent: float) -> None:
    """Plot both curves and mark the plan itself.

    Args:
        figure: matplotlib `Figure`, to which two axes are added.
        steps: `accounting.Steps`.
        delta: float in (0, 1).
        spent: float. ε of `steps`.
    """
    (counts, after), (noises, with_noise) = curves(steps, delta)
    left, right = figure.subplots(1, 2)
    left.plot(counts, after)
    left.plot(steps.count, spent, "o", color="black")
    left.set(xlabel="steps", ylabel="ε", title=f"σ = {steps.noise_multiplier:.4g}, δ = {delta:.3g}")
    right.plot(with_noise, noises)
    right.plot(spent, steps.noise_multiplier, "o", color="black")
    right.set(
        xlabel="ε", ylabel="σ, noise multiplier", title=f"{steps.count:,} steps, δ = {delta:.3g}"
    )
    for axes in (left, right):
        axes.grid(alpha=0.3)
