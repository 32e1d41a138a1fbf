"""The folder of a run: what is in it, and whether another run may go on in it."""

import json
import math
from pathlib import Path

from keras_vaultgemma import checkpointing, lora, picture, saving
from keras_vaultgemma.finetuning import curves

ADAPTER, PRESET, CHECKPOINT, RUN, CURVES = "adapter", "preset", "checkpoint", "run.json", "curves.png"

FREE = (
    "data",
    "validation",
    "output",
    "epochs",
    "save_freq",
    "png",
    "merge",
    "gradient_checkpointing",
)
"""Options that may change when a run goes on. The checkpoint knows its training data by what is in them."""


def begin(folder, options):
    """Note the options of a run that is to begin in a folder, or to go on where this has a checkpoint.

    Args:
        folder: `pathlib.Path`; made where it does not exist.
        options: dict for JSON.

    Raises:
        ValueError: where the folder has a run with another option.
        OSError: where nothing can be written there.
    """
    path = folder / RUN
    if (folder / CHECKPOINT / checkpointing.FILE).exists():
        try:
            begun = json.loads(path.read_text(encoding="utf-8"))["options"]
            other = [name for name, value in _plain(options).items() if name not in FREE and begun.get(name) != value]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is missing or damaged ({error}). Give this run another `output`") from error
        for name in other:
            raise ValueError(
                f"{folder} has a run with {name}={begun.get(name)!r}. Received: {name}={options[name]!r}. "
                "Give this run another `output`"
            )
        return
    with saving.written_beside(folder) as new:
        _write(new, options)


def finish(folder, options, model, outcome):
    """Write what a run has come to: all files, or none.

    Args:
        folder: `pathlib.Path`.
        options: those of `recipe.finetune`.
        model: `VaultGemmaCausalLM`. Its adapter is written, unless it has none or `merge` is an option.
        outcome: `recipe.Outcome`.

    Returns:
        Lines that say what was written.

    Raises:
        OSError: where nothing can be written there.
    """
    has_adapter = lora.active(model) is not None and not options["merge"]
    png = options["png"] or (folder / CURVES if picture.can_draw() else None)
    with saving.written_beside(folder) as new:
        if has_adapter:
            lora.save_adapter(model, new / ADAPTER)
        else:
            model.save_to_preset(new / PRESET)
        likelihoods = {
            name: dict(perplexity=x.perplexity, bits_per_byte=x.bits_per_byte, **x._asdict())
            for name, x in (("before", outcome.before), ("after", outcome.after))
        }
        _write(new, options, **likelihoods, history=outcome.history)
        if png is not None:
            curves.draw(options["png"] or new / CURVES, outcome)
    kind, loads = (ADAPTER, "lora.load_adapter(model, folder)") if has_adapter else (PRESET, "from_preset")
    drawn = f"{png}: the curves" if png is not None else "No curves: pip install keras-vaultgemma[plot] draws them"
    return [f"{folder / kind}: for {loads}", drawn]


def _write(folder, options, **figures):
    text = json.dumps(_plain({"options": options, **figures}), indent=2, allow_nan=False) + "\n"
    (folder / RUN).write_text(text, encoding="utf-8")


def _plain(x):
    """What JSON makes of `x`, numbers that are not finite as null."""
    if isinstance(x, dict):
        return {key: _plain(value) for key, value in x.items()}
    if isinstance(x, (list, tuple)):
        return [_plain(value) for value in x]
    if isinstance(x, float) and not math.isfinite(x):
        return None
    return str(x) if isinstance(x, Path) else x
