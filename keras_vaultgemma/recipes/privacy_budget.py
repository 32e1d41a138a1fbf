"""What a private run would promise, in words and in a picture, before anything is trained."""

import numpy as np

from keras_vaultgemma._plots import new_figure, save_figure
from keras_vaultgemma.privacy import accounting, planning

POINTS = 10
"""Of a curve."""


def privacy_budget(
    rows, batch_size, epochs, noise_multiplier=None, epsilon=None, delta=None, png=None
):
    """The answer, and what it means.

    Args:
        rows, batch_size, epochs, noise_multiplier, epsilon: as in `plan.plan`.
        delta: in (0, 1); N^-1.1 if None.
        png: file for a picture of ε against steps and of σ against ε, or None.

    Returns:
        Text of several lines.

    Raises:
        ValueError: for an argument outside its range.
        ImportError: where dp-accounting, or matplotlib for a picture, is not installed.
    """
    figure = None if png is None else new_figure((9, 3.6))
    chosen = planning.default_delta(rows) if delta is None else delta
    steps = planning.plan(rows, batch_size, epochs, chosen, epsilon, noise_multiplier)
    spent = accounting.epsilon([steps], chosen)
    right = accounting.round_up(50 + 50 * accounting.delta([steps], 0.0), 3)
    if png is not None:
        plot(figure, steps, chosen, spent)
        save_figure(figure, png)
    lines = [
        f"ε = {accounting.round_up(spent):g} at δ = {chosen:.3g}{' (N^-1.1)' if delta is None else ''}, "
        f"with noise multiplier σ = {steps.noise_multiplier:.4g}, after {steps.count:,} steps",
        "",
        f"Someone who sees the trained model, knows all other rows and guesses whether one row was among the {rows:,}, "
        f"both being as likely, is right in at most {right:g} of 100 cases; a coin is right in 50.",
        "",
        f"Each step draws every row with probability {steps.sampling_probability:.4g} ({batch_size:,} rows expected, "
        f"{steps.max_batch_size:,} at most). The unit is one row, neighbours are zero-out, the accounting is PLD.",
    ]
    return "\n".join(lines if png is None else [*lines, "", f"{png}: ε against steps, σ against ε"])


def curves(steps, delta):
    """Points of two curves through a plan.

    Args:
        steps: `accounting.Steps`.
        delta: in (0, 1).

    Returns:
        `(counts, epsilons), (noise_multipliers, epsilons)`, each a list of numbers; ε after so many of the steps, and ε
        of all steps with so much noise.
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


def plot(figure, steps, delta, spent):
    """Draw the two curves and the plan's own point into a matplotlib `Figure`; `spent` is its ε."""
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
