"""The picture of a run."""

import math

from keras_vaultgemma import picture


def draw(path, outcome):
    """Write a PNG of the loss on training data by step, and on held-out data before the run and after each epoch.

    Args:
        path: of the file; it appears whole or not at all.
        outcome: `recipe.Outcome`.

    Raises:
        ImportError: where matplotlib is not installed.
    """
    figure = picture.figure((7, 4))
    axes = figure.subplots()
    losses, epochs = outcome.losses, len(next(iter(outcome.history.values()), [None]))
    axes.plot(
        [epochs * (i + 1) / len(losses) for i in range(len(losses))],
        losses,
        color="#7fb2e5",
        label="training, mean of the epoch so far" + ("" if "val_loss" in outcome.history else "; not protected"),
    )
    before, after = (likelihood.nats / likelihood.tokens for likelihood in (outcome.before, outcome.after))
    # Private training measures nothing on the way.
    held_out = [before, *outcome.history.get("val_loss", [after])]
    places = range(len(held_out)) if "val_loss" in outcome.history else (0, epochs)
    axes.plot(places, held_out, "o-", color="#2a6fbb", label="held out")
    largest = max((loss for loss in (*losses, *held_out) if math.isfinite(loss)), default=1.0)
    axes.set(
        xlabel="epochs",
        ylabel="loss, nats per token",
        ylim=(0, 1.1 * largest),
        title=f"held out: {outcome.before.bits_per_byte:.3f} bits per byte, then {outcome.after.bits_per_byte:.3f}",
    )
    axes.legend(frameon=False)
    axes.grid(alpha=0.3)
    picture.save(figure, path)
