"""The options of `finetune`, and what those that are left out default to."""

import dataclasses
import os
from collections.abc import Sequence
from typing import Any, Literal

from keras_vaultgemma._validation import check_choice, check_integer, check_number
from keras_vaultgemma.data.truncation import TRUNCATE
from keras_vaultgemma.privacy import DPSGD
from keras_vaultgemma.recipes.private_options import (
    CHOSEN,
    CLIP_NORM,
    model_shape,
    private_options,
)

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
        validation: string or path of a file of held-out records with the same columns, or a table
            in memory. Defaults to every tenth record of the data, at most 100 of them.
        text_column: string. Column of texts to train on, or of chats.
        prompt_column: string. Column of prompts, strings or lists of messages.
        response_column: string. Column of responses, which are trained on.
        group_column: string. Column of the users whose rows they are, strings or integers. Only
            for private training, which then protects users: `privacy.DPSGD(unit="user")`. All
            rows of a user are held out together. Defaults to None.
        max_rows_per_group: int, as for `privacy.DPSGD`.
        packed: bool. If True, texts share full rows; if False, each has its own row and is
            truncated at `sequence_length`. Defaults to True, and to False in private training,
            where a row is what is protected.
        lora_rank: int. Rank of an adapter; 0 trains all weights. Defaults to 8.
        lora_targets: list of strings. Layers with an adapter, as for `lora.add`. Defaults to query
            and value.
        epochs: int. Number of epochs. A finished run continues if it is called with more. Defaults
            to 1.
        batch_size: int. Rows of a batch, or users. Defaults to 8.
        learning_rate: float. Of Adam. Defaults to 1e-3 for an adapter and 1e-4 for all weights.
        sequence_length: int. Tokens of a row. Defaults to the preset's.
        truncate: string. Where to cut pairs that are longer than a row: "prompt_start",
            "prompt_end" or "row_end", as for `VaultGemmaCausalLMPreprocessor`. Defaults to the
            preset's.
        dtype: string. Dtype policy. Defaults to Keras's, float32, or to a mixed or quantized policy
            that the preset was saved with.
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
        extend_budget: bool, as for `privacy.DPSGD`.
        secure: bool, as for `privacy.DPSGD`.

    Raises:
        ValueError: If an option is out of its range or contradicts another.
    """

    preset: str = "vaultgemma_tiny"
    validation: Any = None
    text_column: str | None = None
    prompt_column: str | None = None
    response_column: str | None = None
    group_column: str | None = None
    max_rows_per_group: int | None = None
    packed: bool | None = None
    lora_rank: int | None = None
    lora_targets: Sequence[str] | None = None
    epochs: int | None = None
    batch_size: int | None = None
    learning_rate: float | None = None
    sequence_length: int | None = None
    truncate: str | None = None
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
    extend_budget: bool = False
    secure: bool = False

    def __post_init__(self):
        check_integer("lora_rank", self.lora_rank, minimum=0, allow_none=True)
        check_number("learning_rate", self.learning_rate, above=0, allow_none=True)
        check_integer("epochs", self.epochs, allow_none=True)
        check_integer("batch_size", self.batch_size, allow_none=True)
        check_integer("sequence_length", self.sequence_length, allow_none=True)
        check_choice("truncate", self.truncate, TRUNCATE, allow_none=True)
        check_integer("seed", self.seed, minimum=0, maximum=LARGEST_SEED)
        if self.merge and self.lora_rank == 0:
            raise ValueError("`merge` needs an adapter. Received: lora_rank=0")
        private = ("epsilon", "delta", "noise_multiplier", "extend_budget", "secure")
        for name in (*private, "group_column"):
            value = getattr(self, name)
            if value not in (None, False) and not self.private:
                raise ValueError(
                    f"`{name}` goes with private=True (--private). Received: {name}={value}"
                )
        if self.max_rows_per_group is not None and self.group_column is None:
            raise ValueError(
                "`max_rows_per_group` goes with `group_column`. "
                f"Received: max_rows_per_group={self.max_rows_per_group}"
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
        return DPSGD(
            self.epsilon,
            self.delta,
            clip_norm,
            noise_multiplier=self.noise_multiplier,
            unit="row" if self.group_column is None else "user",
            max_rows_per_group=self.max_rows_per_group,
            extend_budget=self.extend_budget,
            secure=self.secure,
        )

    def complete(self, rows):
        """Choose the options that are None and that training needs.

        Args:
            rows: int. Number of training records, or of users.

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
