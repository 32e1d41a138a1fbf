"""Fine-tuning from a data file to an adapter or a preset: what `keras-vaultgemma finetune` does."""

import dataclasses
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import keras

from keras_vaultgemma._plots import new_figure
from keras_vaultgemma._validation import check_integer, check_number
from keras_vaultgemma.data.text_files import read_records
from keras_vaultgemma.evaluation.likelihood import Likelihood, measure
from keras_vaultgemma.models.causal_lm import VaultGemmaCausalLM
from keras_vaultgemma.privacy import DPSGD
from keras_vaultgemma.recipes.finetune_output import CHECKPOINT, Pace, begin_run, finish_run
from keras_vaultgemma.recipes.private_options import (
    CHOSEN,
    CLIP_NORM,
    model_shape,
    private_options,
)
from keras_vaultgemma.training.checkpoint import TrainingCheckpoint

LORA_RATE, FULL_RATE = 1e-3, 1e-4
"""Default learning rates of Adam without privacy, for an adapter and for all weights."""

BATCH_SIZE, EPOCHS, LORA_RANK = 8, 1, 8
"""Defaults of training without privacy. `private_options` chooses those of private training."""

LARGEST_SEED = 2**31 - 1
"""The largest seed that all three backends take."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """The options of `finetune`, validated when they are put together.

    Args:
        preset: string. Preset to start from, as for `VaultGemmaCausalLM.from_preset`.
        validation: string or path of a file of held-out records with the same columns. Defaults to
            every tenth record of the data, at most 100 of them.
        text_column: string. Column of texts to train on.
        prompt_column: string. Column of prompts.
        response_column: string. Column of responses, which are trained on.
        packed: bool. If True, texts share full rows; if False, each has its own row and is
            truncated at `sequence_length`. Defaults to True, and to False in private training,
            where a row is what is protected.
        lora_rank: int. Rank of an adapter; 0 trains all weights. Defaults to 8.
        lora_targets: list of strings. Layers with an adapter, as for `lora.add`. Defaults to query
            and value.
        epochs: int. Number of epochs. A finished run continues if it is called with more. Defaults
            to 1.
        batch_size: int. Rows of a batch. Defaults to 8.
        learning_rate: float. Of Adam. Defaults to 1e-3 for an adapter and 1e-4 for all weights.
        sequence_length: int. Tokens of a row. Defaults to the preset's.
        dtype: string. Dtype of the weights. Defaults to Keras's, float32.
        gradient_checkpointing: bool, as for `VaultGemmaCausalLM.compile`.
        merge: bool. If True, save a preset with the adapter merged into its weights.
        save_freq: int or "epoch". Number of batches between two checkpoints.
        seed: int. Seed of the adapter's initial values and of the order of the data.
        png: string or path of a plot of the curves. Defaults to `curves.png` in the output folder
            if matplotlib is installed.
        private: bool. If True, train with differential privacy; `privacy.DPSGD` states the
            guarantee. Held-out records are measured all the same, and these figures are not covered
            by it. `recipes.private_options` then chooses batch size, epochs, learning rate,
            clipping norm, rank and targets where they are None, and the weights are averaged over
            the last steps.
        epsilon: float, as for `privacy.DPSGD`.
        delta: float, as for `privacy.DPSGD`.
        noise_multiplier: float, as for `privacy.DPSGD`.
        clip_norm: float, as for `privacy.DPSGD`.

    Raises:
        ValueError: If an option is out of its range or contradicts another.
    """

    preset: str = "vaultgemma_tiny"
    validation: str | os.PathLike | None = None
    text_column: str | None = None
    prompt_column: str | None = None
    response_column: str | None = None
    packed: bool | None = None
    lora_rank: int | None = None
    lora_targets: Sequence[str] | None = None
    epochs: int | None = None
    batch_size: int | None = None
    learning_rate: float | None = None
    sequence_length: int | None = None
    dtype: str | None = None
    gradient_checkpointing: bool = False
    merge: bool = False
    save_freq: int | Literal["epoch"] = 100
    seed: int = 0
    png: str | os.PathLike | None = None
    private: bool = False
    epsilon: float | None = None
    delta: float | None = None
    noise_multiplier: float | None = None
    clip_norm: float | None = None

    def __post_init__(self):
        check_integer("lora_rank", self.lora_rank, minimum=0, allow_none=True)
        check_number("learning_rate", self.learning_rate, above=0, allow_none=True)
        check_integer("epochs", self.epochs, allow_none=True)
        check_integer("batch_size", self.batch_size, allow_none=True)
        check_integer("sequence_length", self.sequence_length, allow_none=True)
        check_integer("seed", self.seed, minimum=0, maximum=LARGEST_SEED)
        if self.merge and self.lora_rank == 0:
            raise ValueError("`merge` needs an adapter. Received: lora_rank=0")
        for name in ("epsilon", "delta", "noise_multiplier"):
            value = getattr(self, name)
            if value is not None and not self.private:
                raise ValueError(
                    f"`{name}` goes with private=True (--private). Received: {name}={value}"
                )
        self.guarantee()

    @property
    def columns(self):
        """Dict of the columns to read, for `read_records`."""
        names = ("text_column", "prompt_column", "response_column")
        return {name: getattr(self, name) for name in names}

    @property
    def is_packed(self):
        """True if texts share full rows."""
        return not self.private if self.packed is None else self.packed

    def guarantee(self):
        """Return the `DPSGD` of a private run, or None."""
        if not self.private:
            return None
        clip_norm = CLIP_NORM if self.clip_norm is None else self.clip_norm
        return DPSGD(self.epsilon, self.delta, clip_norm, noise_multiplier=self.noise_multiplier)

    def complete(self, rows):
        """Choose the options that are None and that training needs.

        Args:
            rows: int. Number of training records.

        Returns:
            Tuple of the `FinetuneConfig` and the `PrivateOptions`, which are None without privacy.
        """
        if not self.private:
            defaults = dict(lora_rank=LORA_RANK, epochs=EPOCHS, clip_norm=1.0)
            missing = {name: x for name, x in defaults.items() if getattr(self, name) is None}
            return dataclasses.replace(self, **missing), None
        given = {name: getattr(self, name) for name in ("epsilon", "delta", *CHOSEN)}
        options = private_options(rows, model_shape(self.preset), **given)
        chosen = {name: getattr(options, name) for name in CHOSEN}
        return dataclasses.replace(self, **chosen), options


class Outcome(NamedTuple):
    """The result of a run.

    Attributes:
        before: `Likelihood` of the held-out data before training.
        after: `Likelihood` of the held-out data after training.
        history: dict `{name: value of each epoch}`: `loss`, `val_loss`, accuracies and
            `tokens_per_second`.
        losses: list with one entry per step, see `Pace`.
    """

    before: Likelihood
    after: Likelihood
    history: dict
    losses: list


def finetune(data: str | os.PathLike, output: str | os.PathLike = "finetuned", **options) -> str:
    """Fine-tune a preset on a data file, or resume the run of a call that was killed.

    Args:
        data: string or path of a `.txt`, `.jsonl` or `.csv` file. A blank line ends a text in
            `.txt`; the others have columns: "text", or "prompt" and "response".
        output: string or path of the run's folder, created if it does not exist. It gets `adapter/`
            (for `lora.load_adapter` and PEFT) or `preset/` (for `from_preset`), `curves.png`,
            `run.json` with options and figures, and `checkpoint/`, from which the run resumes and
            which may be deleted once no more epochs are wanted. Defaults to "finetuned".
        **options: See `recipes.finetune.FinetuneConfig`: `preset`, `validation`, `text_column`,
            `prompt_column`, `response_column`, `packed`, `lora_rank`, `lora_targets`, `epochs`,
            `batch_size`, `learning_rate`, `sequence_length`, `dtype`, `gradient_checkpointing`,
            `merge`, `save_freq`, `seed`, `png`, `private`, `epsilon`, `delta`, `noise_multiplier`
            and `clip_norm`.

    Returns:
        String of several lines: the data, held-out perplexity and bits per byte before and after,
        what private training has spent, and what was written.

    Raises:
        TypeError: If there is no such option.
        ValueError: If an option is out of its range, the data is malformed, or `output` holds a run
            with other options.
        ImportError: If `png` is given and matplotlib is not installed.
        FloatingPointError: If a loss was not finite. The message names the batch; what was trained
            before it is in `output`.

    Example:

    ```python
    from keras_vaultgemma import finetune

    with open("tales.txt", "w") as file:
        file.write("\\n\\n".join(f"Once there were {i} hares." for i in range(8)))
    print(finetune("tales.txt", "my_run", epochs=1, lora_rank=2, sequence_length=16))
    ```
    """
    config, output = FinetuneConfig(**options), Path(output)
    if config.png is not None:
        new_figure((1, 1))  # raises before anything is trained
    checkpoint = TrainingCheckpoint(output / CHECKPOINT, config.save_freq)
    records = read_records(data, **config.columns)
    blank = records.blank
    if config.validation is None:
        records, held_out = records.split()
    else:
        held_out = read_records(config.validation, **config.columns)
    config, private = config.complete(len(records.texts))
    options = {"data": data, "output": output, **dataclasses.asdict(config)}
    begin_run(output, options)

    model = _model(config)
    outcome = train(
        model,
        records.tokenize(model.preprocessor, config.is_packed),
        held_out.tokenize(model.preprocessor, packed=True),
        compile_options=dict(
            optimizer=make_optimizer(config, private),
            gradient_checkpointing=config.gradient_checkpointing,
            privacy=config.guarantee(),
        ),
        fit_options=dict(
            batch_size=config.batch_size or BATCH_SIZE,
            epochs=config.epochs,
            callbacks=[checkpoint],
            # A progress bar is for terminals.
            verbose=1 if sys.stdout.isatty() else 2,
        ),
        samples=records.samples if config.private and not config.is_packed else None,
    )
    written = finish_run(output, options, model, outcome)
    if checkpoint.failure:
        folder = written[0].partition(":")[0]
        raise FloatingPointError(f"{checkpoint.failure}. These are in {folder}")
    counts = f"{len(records.texts):,} rows to train on, {len(held_out.texts):,} held out"
    blank_rows = f", {blank:,} blank ones left out" if blank else ""
    return "\n".join(
        [
            f"{config.preset} on {data}: {counts}{blank_rows}",
            *([f"Trained with {private.describe()}"] if private else []),
            f"Held out, before: {outcome.before}",
            f"Held out, after:  {outcome.after}",
            *([_describe_spent(model.privacy.spent())] if config.private else []),
            *written,
        ]
    )


def train(model, training, validation, compile_options, fit_options, samples=None):
    """Compile and fit a model, and measure it on held-out data before and after.

    Held-out data is also measured after each epoch, unless training is private.

    Args:
        model: `VaultGemmaCausalLM` with a preprocessor, and an adapter unless all of it is trained.
        training: token ids and labels, as `TextRecords.tokenize` returns them.
        validation: the same of the held-out records.
        compile_options: dict of arguments of `model.compile`.
        fit_options: dict of arguments of `model.fit` without data; its `callbacks` are a list.
        samples: the training records as `fit` takes them before tokenization, or None. Private
            training recognises a dataset by them.

    Returns:
        `Outcome`.
    """
    count = len(training["y"])
    tokens_per_row = int((training["x"]["padding_mask"] > 0).sum()) / count
    pace = Pace(tokens_per_row * min(fit_options.get("batch_size") or 32, count))
    before = measure(model, **validation)
    model.compile(**compile_options)
    data = dict(training) if samples is None else {"x": samples}
    if compile_options.get("privacy") is None:
        data["validation_data"] = (validation["x"], validation["y"], validation["sample_weight"])
    callbacks = [pace, *fit_options.get("callbacks", ())]
    history = model.fit(**data, **{**fit_options, "callbacks": callbacks})
    return Outcome(before, measure(model, **validation), history.history, pace.losses)


def make_optimizer(config, private):
    """Return Adam for a complete `FinetuneConfig` and its `PrivateOptions`, or None."""
    rate = config.learning_rate or (LORA_RATE if config.lora_rank else FULL_RATE)
    average = dict(use_ema=True, ema_momentum=private.averaging) if private else {}
    return keras.optimizers.Adam(rate, **average)


def _model(config):
    keras.utils.set_random_seed(config.seed)
    dtype = {"dtype": config.dtype} if config.dtype else {}
    model = VaultGemmaCausalLM.from_preset(config.preset, **dtype)
    if config.sequence_length is not None:
        model.preprocessor.sequence_length = config.sequence_length
    if config.lora_rank:
        model.backbone.enable_lora(config.lora_rank, config.lora_targets)
    return model


def _describe_spent(spent):
    kind = "Private" if spent.is_private else "NOT private"
    return (
        f"{kind}: ε = {spent.epsilon:g} at δ = {spent.delta:.3g} for {spent.unit}, after "
        f"{spent.steps:,} steps ({spent.mechanism}, {spent.neighbouring} neighbours); metrics are "
        "not covered"
    )
