"""Fine-tuning from a data file to an adapter or a preset: what `keras-vaultgemma finetune` does."""

import sys
from pathlib import Path
from typing import NamedTuple

import keras

from keras_vaultgemma._plots import new_figure
from keras_vaultgemma.data.text_files import read_records
from keras_vaultgemma.evaluation.likelihood import Likelihood, measure
from keras_vaultgemma.models.causal_lm import VaultGemmaCausalLM
from keras_vaultgemma.privacy import DPSGD
from keras_vaultgemma.recipes.finetune_output import CHECKPOINT, Pace, begin_run, finish_run
from keras_vaultgemma.training.checkpoint import TrainingCheckpoint

LORA_RATE, FULL_RATE = 1e-3, 1e-4
"""Adam's learning rates, where none is given."""

BATCH_SIZE, PRIVATE_BATCH_SIZE = 8, 128
"""Rows of a batch, where none are given. The noise is the same for few rows and for many."""

LARGEST_SEED = 2**31 - 1
"""The largest that all three backends take."""


class Outcome(NamedTuple):
    """What a run came to.

    Attributes:
        before, after: `held_out.Likelihood` of the held-out data.
        history: `{name: value of each epoch}`: `loss`, `val_loss`, accuracies and `tokens_per_second`.
        losses: `Pace.losses`.
    """

    before: Likelihood
    after: Likelihood
    history: dict
    losses: list


def train(model, training, validation, compile_options, fit_options, samples=None):
    """Compile, fit, and measure the model on held-out data before and after; after each epoch too, unless privately.

    Args:
        model: `VaultGemmaCausalLM` with a preprocessor, and an adapter unless all of it is to be trained.
        training, validation: ids and labels as `TextRecords.tokenize` gives them.
        compile_options: for `model.compile`.
        fit_options: for `model.fit`, without data; its `callbacks` are a list.
        samples: the rows of `training` as `fit` takes them raw, or None. Private training knows them again by these.

    Returns:
        `Outcome`.
    """
    count = len(training["y"])
    tokens_per_row = int((training["x"]["padding_mask"] > 0).sum()) / count
    pace = Pace(tokens_per_row * min(fit_options.get("batch_size") or 32, count))
    before = measure(model, **validation)
    model.compile(**compile_options)
    given = dict(training) if samples is None else {"x": samples}
    if compile_options.get("privacy") is None:
        given["validation_data"] = (validation["x"], validation["y"], validation["sample_weight"])
    history = model.fit(
        **given, **{**fit_options, "callbacks": [pace, *fit_options.get("callbacks", ())]}
    )
    after = measure(model, **validation)
    return Outcome(before, after, history.history, pace.losses)


def finetune(
    data,
    output="finetuned",
    *,
    preset="vaultgemma_tiny",
    validation=None,
    text_column=None,
    prompt_column=None,
    response_column=None,
    packed=None,
    lora_rank=8,
    epochs=1,
    batch_size=None,
    learning_rate=None,
    sequence_length=None,
    dtype=None,
    gradient_checkpointing=False,
    merge=False,
    save_freq=100,
    seed=0,
    png=None,
    private=False,
    epsilon=None,
    delta=None,
    noise_multiplier=None,
    clip_norm=1.0,
):
    """Fine-tune a preset on a data file, and go on where an earlier call with the same arguments was killed.

    Args:
        data: `.txt`, `.jsonl` or `.csv` file; `rows.read` says what of it is learnt.
        output: folder of the run, made where it does not exist. It gets `adapter/` (for `lora.load_adapter` and PEFT)
            or `preset/` (for `from_preset`), `curves.png`, `run.json` with the options and figures, and `checkpoint/`,
            with which the run goes on; delete that when you will not want more epochs.
        preset: to start from; see `VaultGemmaBackbone.from_preset`.
        validation: file of held-out rows with the same columns. Without it, every tenth row of `data` is held out, at
            most 100 of them.
        text_column, prompt_column, response_column: as for `rows.read`.
        packed: whether texts share rows, full ones; else each has its own and is cut at `sequence_length`. Defaults to
            True, in private training to False, where a row is what is protected.
        lora_rank: of an adapter on query and value; 0 trains all weights.
        epochs, batch_size: as for `fit`; batches have 8 rows if None, in private training 128 or all rows.
        learning_rate: of Adam. Defaults to 1e-3 for an adapter, 1e-4 without.
        sequence_length: tokens of a row. Defaults to the preset's.
        dtype: of the weights; Keras's default, float32, if None.
        gradient_checkpointing: as for `compile`.
        merge: save a preset with the adapter in its weights instead of the adapter.
        save_freq: after how many batches to save the checkpoint, or "epoch".
        seed: of what is random: first values of an adapter, and the order of the data.
        png: file for the picture. Defaults to `curves.png` in `output`, where matplotlib is installed.
        private: train with differential privacy; `privacy.DPSGD` states the guarantee. The ledger comes with what is
            written. Held-out rows are measured as ever, and these figures are not covered by the guarantee.
        epsilon, delta, noise_multiplier, clip_norm: as for `privacy.DPSGD`.

    Returns:
        Text of several lines: the data, held-out perplexity and bits per byte before and after, what private training
        has spent, and what was written.

    Raises:
        ValueError: for an argument out of its range, data as `rows.read` says, and an `output` of a run with other
            arguments.
        ImportError: for a `png` without matplotlib.
        FloatingPointError: where a loss was not finite. It names the batch; what was learnt before is in `output`.
    """
    options = dict(locals())
    output = Path(output)
    if png is not None:
        new_figure((1, 1))
    if isinstance(lora_rank, bool) or not isinstance(lora_rank, int) or lora_rank < 0:
        raise ValueError(
            f"`lora_rank` must be an integer from 0. Received: lora_rank={lora_rank!r}"
        )
    if learning_rate is not None and not 0 < learning_rate < float("inf"):
        raise ValueError(
            f"`learning_rate` must be a number above 0. Received: learning_rate={learning_rate!r}"
        )
    for name in (
        "epochs",
        *(name for name in ("batch_size", "sequence_length") if options[name] is not None),
    ):
        if (
            isinstance(options[name], bool)
            or not isinstance(options[name], int)
            or options[name] < 1
        ):
            raise ValueError(
                f"`{name}` must be a positive integer. Received: {name}={options[name]!r}"
            )
    if not 0 <= seed <= LARGEST_SEED:
        raise ValueError(f"`seed` must be from 0 to {LARGEST_SEED}. Received: seed={seed}")
    if merge and not lora_rank:
        raise ValueError("`merge` needs an adapter. Received: lora_rank=0")
    for name in ("epsilon", "delta", "noise_multiplier"):
        if options[name] is not None and not private:
            raise ValueError(
                f"`{name}` goes with private=True (--private). Received: {name}={options[name]}"
            )
    guarantee = (
        DPSGD(epsilon, delta, clip_norm, noise_multiplier=noise_multiplier) if private else None
    )
    packed = not private if packed is None else packed
    checkpoint = TrainingCheckpoint(output / CHECKPOINT, save_freq)
    columns = dict(
        text_column=text_column, prompt_column=prompt_column, response_column=response_column
    )
    learnt = read_records(data, **columns)
    blank = learnt.blank
    learnt, unseen = (
        learnt.split() if validation is None else (learnt, read_records(validation, **columns))
    )
    begin_run(output, options)

    keras.utils.set_random_seed(seed)
    model = VaultGemmaCausalLM.from_preset(preset, **({"dtype": dtype} if dtype else {}))
    if sequence_length is not None:
        model.preprocessor.sequence_length = sequence_length
    training, validation = (
        learnt.tokenize(model.preprocessor, packed),
        unseen.tokenize(model.preprocessor, packed=True),
    )
    batch_size = batch_size or (
        min(PRIVATE_BATCH_SIZE, len(learnt.texts)) if private else BATCH_SIZE
    )
    if lora_rank:
        model.backbone.enable_lora(lora_rank)
    rate = learning_rate or (LORA_RATE if lora_rank else FULL_RATE)
    outcome = train(
        model,
        training,
        validation,
        compile_options=dict(
            optimizer=keras.optimizers.Adam(rate),
            gradient_checkpointing=gradient_checkpointing,
            privacy=guarantee,
        ),
        fit_options=dict(
            batch_size=batch_size,
            epochs=epochs,
            callbacks=[checkpoint],
            # A bar moves on a terminal alone.
            verbose=1 if sys.stdout.isatty() else 2,
        ),
        samples=learnt.samples if private and not packed else None,
    )
    written = finish_run(output, options, model, outcome)
    if checkpoint.failure:
        raise FloatingPointError(
            f"{checkpoint.failure}. These are in {written[0].partition(':')[0]}"
        )
    first = f"{preset} on {data}: {len(learnt.texts):,} rows to train on, {len(unseen.texts):,} held out"
    return "\n".join(
        [
            first + (f", {blank:,} blank ones left out" if blank else ""),
            f"Held out, before: {outcome.before}",
            f"Held out, after:  {outcome.after}",
            *([_spent(model.privacy.spent())] if private else []),
            *written,
        ]
    )


def _spent(spent):
    kind = "Private" if spent.is_private else "NOT private"
    return (
        f"{kind}: ε = {spent.epsilon:g} at δ = {spent.delta:.3g} for {spent.unit}, after {spent.steps:,} steps "
        f"({spent.mechanism}, {spent.neighbouring} neighbours); metrics are not covered"
    )
