"""The output folder of a fine-tuning run: its files, its plot, and which runs may resume there."""

import json
import math
import time
from pathlib import Path

import keras

from keras_vaultgemma._files import new_folder
from keras_vaultgemma._plots import can_plot, new_figure, save_figure
from keras_vaultgemma.lora import adapters
from keras_vaultgemma.training.checkpoint import FILE

ADAPTER, PRESET, CHECKPOINT = "adapter", "preset", "checkpoint"
RUN, CURVES = "run.json", "curves.png"

RESUMABLE_OPTIONS = (
    "data",
    "validation",
    "output",
    "epochs",
    "save_freq",
    "png",
    "merge",
    "gradient_checkpointing",
    "extend_budget",
    "secure",
)
"""Options that may change when a run resumes. The checkpoint recognises its training data by their
contents."""


UNPROTECTED = (
    "Losses and accuracies below, and curves.png, were computed on private records without noise. "
    "No guarantee covers them: do not publish them with the model"
)
"""What a private run says at the top of its run.json."""


def begin_run(folder, options):
    """Write the options of a run that begins in a folder; check them if the run resumes there.

    Args:
        folder: `pathlib.Path`, created if it does not exist.
        options: dict of the run's options.

    Raises:
        ValueError: If the folder holds a run with another option.
        OSError: If nothing can be written there.
    """
    path = folder / RUN
    if (folder / CHECKPOINT / FILE).exists():
        try:
            begun = json.loads(path.read_text(encoding="utf-8"))["options"]
            other = [
                name
                for name, value in _plain(options).items()
                if name not in RESUMABLE_OPTIONS and begun.get(name) != value
            ]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{path} is missing or damaged ({error}). Give this run another `output`"
            ) from error
        for name in other:
            raise ValueError(
                f"{folder} has a run with {name}={begun.get(name)!r}. "
                f"Received: {name}={options[name]!r}. Give this run another `output`"
            )
        return
    with new_folder(folder) as new:
        _write(new, options)


def finish_run(folder, options, model, outcome):
    """Write the results of a run: all files, or none.

    Args:
        folder: `pathlib.Path`.
        options: dict of the run's options.
        model: `VaultGemmaCausalLM`. Its active adapter is written; the whole model if it has none
            or `options["merge"]` is True.
        outcome: `finetune.Outcome`.

    Returns:
        List of strings that describe what was written.

    Raises:
        OSError: If nothing can be written there.
    """
    has_adapter = adapters.active(model) is not None and not options["merge"]
    png = options["png"] or (folder / CURVES if can_plot() else None)
    with new_folder(folder) as new:
        if has_adapter:
            adapters.save_adapter(model, new / ADAPTER)
        else:
            model.save_to_preset(new / PRESET)
        likelihoods = {
            name: dict(perplexity=x.perplexity, bits_per_byte=x.bits_per_byte, **x._asdict())
            for name, x in (("before", outcome.before), ("after", outcome.after))
        }
        _write(new, options, **likelihoods, history=outcome.history)
        if png is not None:
            plot_curves(options["png"] or new / CURVES, outcome)
    kind, loads = (
        (ADAPTER, "lora.load_adapter(model, folder)") if has_adapter else (PRESET, "from_preset")
    )
    plot = f"{png}: the curves"
    if png is None:
        plot = "No curves: pip install 'keras-vaultgemma[plot]' for a plot of them"
    return [f"{folder / kind}: for {loads}", plot]


def _write(folder, options, **figures):
    content = {"unprotected": UNPROTECTED} if options.get("private") else {}
    content |= _plain({"options": options, **figures})
    text = json.dumps(content, indent=2, allow_nan=False) + "\n"
    (folder / RUN).write_text(text, encoding="utf-8")


def _plain(x):
    """Convert to what JSON can hold. Numbers that are not finite become None."""
    if isinstance(x, dict):
        return {key: _plain(value) for key, value in x.items()}
    if isinstance(x, (list, tuple)):
        return [_plain(value) for value in x]
    if isinstance(x, float) and not math.isfinite(x):
        return None
    return str(x) if isinstance(x, Path) else x


def plot_curves(path, outcome):
    """Plot the training loss by step and the held-out loss before the run and after each epoch.

    Args:
        path: path of the PNG file, which is complete or not written at all.
        outcome: `finetune.Outcome`.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    figure = new_figure((7, 4))
    axes = figure.subplots()
    losses, epochs = outcome.losses, len(next(iter(outcome.history.values()), [None]))
    axes.plot(
        [epochs * (i + 1) / len(losses) for i in range(len(losses))],
        losses,
        color="#7fb2e5",
        label="training, mean of the epoch so far"
        + ("" if "val_loss" in outcome.history else "; not protected"),
    )
    before, after = (
        likelihood.nats / likelihood.tokens for likelihood in (outcome.before, outcome.after)
    )
    # Private training measures held-out data only before and after.
    held_out = [before, *outcome.history.get("val_loss", [after])]
    at_epochs = range(len(held_out)) if "val_loss" in outcome.history else (0, epochs)
    axes.plot(at_epochs, held_out, "o-", color="#2a6fbb", label="held out")
    largest = max((loss for loss in (*losses, *held_out) if math.isfinite(loss)), default=1.0)
    axes.set(
        xlabel="epochs",
        ylabel="loss, nats per token",
        ylim=(0, 1.1 * largest),
        title=f"held out: {outcome.before.bits_per_byte:.3f} bits per byte, then "
        f"{outcome.after.bits_per_byte:.3f}",
    )
    axes.legend(frameon=False)
    axes.grid(alpha=0.3)
    save_figure(figure, path)


class Pace(keras.callbacks.Callback):
    """Callback that adds `tokens_per_second` to the logs of `fit` and stores the loss of each step.

    The rate is that of the epoch so far, without the first step of a process, which compiles.

    Args:
        tokens_per_step: float. Average number of tokens in a step, without padding.

    Attributes:
        losses: list with one entry per step, the mean loss of the epoch so far.
        kept: names of the attributes that a `TrainingCheckpoint` saves.
    """

    kept = ("losses",)

    def __init__(self, tokens_per_step):
        super().__init__()
        self._tokens_per_step = tokens_per_step
        self.losses = []
        self._is_compiled = False

    def on_epoch_begin(self, epoch, logs=None):
        self._start, self._done = time.perf_counter(), 0

    def on_train_batch_end(self, batch, logs=None):
        now = time.perf_counter()
        # Private training reports its loss under another name.
        self.losses += [float(value) for name, value in logs.items() if name.endswith("loss")][:1]
        self._done += 1
        self._rate = self._done * self._tokens_per_step / (now - self._start)
        if not self._is_compiled:
            self._is_compiled, self._start, self._done = True, now, 0
        logs["tokens_per_second"] = self._rate

    def on_epoch_end(self, epoch, logs=None):
        logs["tokens_per_second"] = self._rate
