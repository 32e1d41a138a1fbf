"""Fine-tuning from a data file to an adapter or a preset: what `keras-vaultgemma finetune` does."""

import dataclasses
import os
import sys
import warnings
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import keras

from keras_vaultgemma._plots import new_figure
from keras_vaultgemma.data.fit_inputs import TruncationCounter
from keras_vaultgemma.data.text_files import read_records
from keras_vaultgemma.evaluation.likelihood import Likelihood, measure
from keras_vaultgemma.models.causal_lm import VaultGemmaCausalLM
from keras_vaultgemma.recipes import compare
from keras_vaultgemma.recipes.canaries import with_canaries
from keras_vaultgemma.recipes.finetune_config import (
    BATCH_SIZE,
    FULL_RATE,
    LORA_RATE,
    FinetuneConfig,
)
from keras_vaultgemma.recipes.finetune_output import (
    CANARIES,
    CHECKPOINT,
    REPORT,
    TWIN,
    Pace,
    begin_run,
    finish_run,
)
from keras_vaultgemma.recipes.privacy_budget import describe_group_privacy
from keras_vaultgemma.training.checkpoint import TrainingCheckpoint


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


def finetune(data: Any, output: str | os.PathLike = "finetuned", **options) -> str:
    """Fine-tune a preset on a data file, or resume the run of a call that was killed.

    Args:
        data: string or path of a `.txt`, `.jsonl`, `.json`, `.csv` or `.tsv` file, or a table or
            texts in memory, as for `VaultGemmaCausalLM.fit`. A blank line ends a text in `.txt`;
            without blank lines each line is a text. The others have columns: "text", "messages"
            (chats), or "prompt" and "response" or "completion".
        output: string or path of the run's folder, created if it does not exist. It gets `adapter/`
            (for `lora.load_adapter` and PEFT) or `preset/` (for `from_preset`), `curves.png`,
            `run.json` with options and figures, and `checkpoint/`, from which the run resumes and
            which may be deleted once no more epochs are wanted. With `report` also
            `report.unprotected.html`, its figures as JSON, and `plain_twin/`. Defaults to
            "finetuned".
        **options: See `recipes.finetune_config.FinetuneConfig`: `preset`, `validation`,
            `text_column`, `prompt_column`, `response_column`, `group_column`,
            `max_rows_per_group`, `packed`, `lora_rank`, `lora_targets`, `epochs`, `batch_size`,
            `learning_rate`, `sequence_length`, `truncate`, `dtype`, `gradient_checkpointing`,
            `merge`, `save_freq`, `seed`, `png`, `private`, `epsilon`, `delta`, `noise_multiplier`,
            `clip_norm`, `extend_budget`, `report` and `canaries`.

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
    if config.report:
        compare.check_extras()
    records = read_records(data, **config.columns, group_column=config.group_column)
    blank = records.blank
    if config.validation is None:
        records, held_out = records.split()
    else:
        held_out = read_records(config.validation, **config.columns)
    data, validation = _describe_data(data), _describe_data(config.validation)
    config = dataclasses.replace(config, validation=validation)
    genuine = records
    if config.canaries:
        records = with_canaries(records, output / CANARIES, config)
    users = None if records.groups is None else len({*records.groups})
    config, private = config.complete(users or len(records.texts))
    model, outcome, written = _run(config, private, data, records, held_out, output)
    owners = "" if users is None else f" of {users:,} users"
    counts = f"{len(records.texts):,} rows{owners} to train on, {len(held_out.texts):,} held out"
    blank_rows = f", {blank:,} blank ones left out" if blank else ""
    lines = [
        f"{config.preset} on {data}: {counts}{blank_rows}",
        *([f"Trained with {private.describe()}"] if private else []),
        f"Held out, before: {outcome.before}",
        f"Held out, after:  {outcome.after}",
        *(_describe_privacy(model.privacy, config.guarantee()) if config.private else []),
        *written,
    ]
    if config.report:
        del model
        twin = config.plain_twin(records)
        _, outcome, _ = _run(twin, private, data, records, held_out, output / TWIN)
        lines += [
            f"The plain twin, held out, after: {outcome.after}",
            compare.compare(
                output,
                genuine,
                held_out,
                plain=output / TWIN,
                canaries=output / CANARIES if config.canaries else None,
                html=output / REPORT,
            ),
        ]
    return "\n".join(lines)


def _run(config, private, data, records, held_out, output):
    """Train once and write the results, or resume.

    Args:
        config: `FinetuneConfig` that is complete.
        private: `PrivateOptions`, or None.
        data: description of the data, for `run.json`.
        records: `TextRecords` to train on.
        held_out: `TextRecords`.
        output: `pathlib.Path` of the run's folder.

    Returns:
        Tuple of the `VaultGemmaCausalLM`, the `Outcome`, and a list of strings that describe what
        was written.
    """
    options = {"data": data, "output": output, **dataclasses.asdict(config)}
    begin_run(output, options)
    checkpoint = TrainingCheckpoint(output / CHECKPOINT, config.save_freq)
    model = _model(config)
    with TruncationCounter() as truncations:
        training = records.tokenize(model.preprocessor, config.is_packed, truncations)
        validation = held_out.tokenize(model.preprocessor, True, truncations)
    if config.private:
        _advise_length(model.preprocessor.sequence_length, training["x"]["padding_mask"])
    outcome = train(
        model,
        training,
        validation,
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
            groups=records.groups if config.private else None,
        ),
        samples=records.samples if config.private and not config.is_packed else None,
    )
    written = finish_run(output, options, model, outcome)
    if checkpoint.failure:
        folder = written[0].partition(":")[0]
        raise FloatingPointError(f"{checkpoint.failure}. These are in {folder}")
    return model, outcome, written


def _advise_length(length, padding_mask):
    """Say on stderr if private rows, which are all padded to `sequence_length`, are mostly padding.

    The length is the user's choice: one that depended on the records would not be protected.
    """
    longest = int((padding_mask > 0).sum(axis=1).max())
    enough = max(16, 2 ** (longest - 1).bit_length())
    if 2 * enough <= length:
        print(
            f"Each row takes the time of sequence_length={length} tokens, and none has more than "
            f"{longest}: sequence_length={enough} makes steps shorter.",
            file=sys.stderr,
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
    count, rows_each, groups = len(training["y"]), 1.0, fit_options.get("groups")
    tokens_per_row = int((training["x"]["padding_mask"] > 0).sum()) / count
    if groups is not None:
        sizes, largest = Counter(groups).values(), compile_options["privacy"].max_rows_per_group
        count, rows_each = len(sizes), sum(min(size, largest) for size in sizes) / len(sizes)
    pace = Pace(tokens_per_row * rows_each * min(fit_options.get("batch_size") or 32, count))
    before = measure(model, **validation)
    model.compile(**compile_options)
    data = dict(training) if samples is None else {"x": samples}
    if compile_options.get("privacy") is None:
        data["validation_data"] = (validation["x"], validation["y"], validation["sample_weight"])
    callbacks = [pace, *fit_options.get("callbacks", ())]
    with warnings.catch_warnings():
        if samples is not None:
            # They are tokenized again, and were counted when they were `training`.
            warnings.filterwarnings("ignore", message=".* rows ", category=UserWarning)
        history = model.fit(**data, **{**fit_options, "callbacks": callbacks})
    return Outcome(before, measure(model, **validation), history.history, pace.losses)


def make_optimizer(config, private):
    """Return Adam for a complete `FinetuneConfig` and its `PrivateOptions`, or None."""
    rate = config.learning_rate or (LORA_RATE if config.lora_rank else FULL_RATE)
    average = dict(use_ema=True, ema_momentum=private.averaging) if private else {}
    return keras.optimizers.Adam(rate, **average)


def _describe_data(data):
    """Return a path, or None, unchanged, and the kind of data in memory."""
    is_path = data is None or isinstance(data, (str, os.PathLike))
    return data if is_path else f"a {type(data).__name__} in memory"


def _model(config):
    keras.utils.set_random_seed(config.seed)
    dtype = {"dtype": config.dtype} if config.dtype else {}
    model = VaultGemmaCausalLM.from_preset(config.preset, **dtype)
    if config.sequence_length is not None:
        model.preprocessor.sequence_length = config.sequence_length
    if config.truncate is not None:
        model.preprocessor.truncate = config.truncate
    if config.lora_rank:
        model.backbone.enable_lora(config.lora_rank, config.lora_targets)
    return model


def _describe_privacy(record, guarantee):
    spent = record.spent()
    kind = "Private" if spent.is_private else "NOT private"
    lines = [
        f"{kind}: ε = {spent.epsilon:g} at δ = {spent.delta:.3g} for {spent.unit}, after "
        f"{spent.steps:,} steps ({spent.mechanism}, {spent.neighbouring} neighbours); metrics are "
        "not covered"
    ]
    if spent.all_runs > 1:
        lines.append(
            f"For a person whose record was in all {spent.all_runs:,} private runs that this "
            f"machine knows: ε = {spent.epsilon_of_all_runs:g}"
        )
    if guarantee.unit == "user":
        runs = record.ledger.on(record.dataset)
        lines.append(describe_group_privacy(runs, spent.delta, guarantee.max_rows_per_group))
    return lines
