"""Multiple choice: how often the model prefers the right continuation."""

import dataclasses
import math
import os
from collections.abc import Iterable, Mapping
from typing import Any

import keras
import numpy as np

from keras_vaultgemma._validation import is_integer
from keras_vaultgemma.evaluation.pairs import score_pairs
from keras_vaultgemma.evaluation.results import Result

FIELDS = ("context", "choices", "gold")


@dataclasses.dataclass(frozen=True)
class Accuracy(Result):
    """Fraction of items in which the model prefers the right choice.

    Attributes:
        value: float.
        standard_error: float. Sample standard deviation of an item, divided by the root of their
            number. NaN for one item.
        correct: int. Number of items with the right choice.
        items: int. Number of all items.

    Example:

    ```python
    from keras_vaultgemma.evaluation import Accuracy

    print(Accuracy.of([True, True, False, True]))  # 0.7500 ± 0.2500 (3 of 4)
    ```
    """

    value: float
    standard_error: float
    correct: int
    items: int

    @classmethod
    def of(cls, is_correct: Iterable[bool]) -> "Accuracy":
        """Return the accuracy of a list of bools, True for each right item.

        Args:
            is_correct: iterable of bools.
        """
        values = np.asarray(list(is_correct), "float64")
        mean, count = float(values.mean()), len(values)
        error = float(values.std(ddof=1) / math.sqrt(count)) if count > 1 else math.nan
        return cls(mean, error, int(values.sum()), count)

    def __str__(self) -> str:
        return f"{self.value:.4f} ± {self.standard_error:.4f} ({self.correct} of {self.items})"


@dataclasses.dataclass(frozen=True)
class MultipleChoice(Result):
    """Accuracies on multiple-choice items, as lm-evaluation-harness defines them.

    Attributes:
        acc: `Accuracy` of the choice of the largest log-probability.
        acc_norm: `Accuracy` of that of the largest log-probability per character.
        acc_bytes: `Accuracy` of that of the largest log-probability per UTF-8 byte.
        acc_mutual_info: `Accuracy` of that whose log-probability the context increases most, or
            None if it was not asked for.
        truncated: int. Number of pairs whose context was cut.
        log_probs: tuple of a tuple for each item. Log-probabilities of its choices, in nats.

    Example:

    ```python
    from keras_vaultgemma import VaultGemmaCausalLM, evaluation

    model = VaultGemmaCausalLM.from_preset("vaultgemma_tiny")
    item = {"context": "Once upon a", "choices": ["time", "table"], "gold": 0}
    print(evaluation.measure_multiple_choice(model, [item]).acc)  # 1.0000 ± nan (1 of 1)
    ```
    """

    acc: Accuracy
    acc_norm: Accuracy
    acc_bytes: Accuracy
    acc_mutual_info: Accuracy | None
    truncated: int
    log_probs: tuple[tuple[float, ...], ...]


def measure_multiple_choice(
    model: keras.Model,
    items: Iterable[Mapping[str, Any]],
    *,
    delimiter: str = " ",
    mutual_information: bool = False,
    truncation: str = "keep_bos",
    max_length: int | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    verbose: bool = True,
) -> MultipleChoice:
    """Measure how often the model prefers the right continuation of a context.

    Args:
        model: `VaultGemmaCausalLM` with a preprocessor.
        items: iterable of dicts: "context" is a string, "choices" a list of strings, and "gold" the
            index of the right one.
        delimiter: string between a context and a choice. It does not count in the length of the
            choice. Defaults to a space.
        mutual_information: bool. If True, also score the choices without a context. Defaults to
            False.
        truncation: string, as for `score_pairs`. Defaults to "keep_bos".
        max_length: int, as for `score_pairs`. Defaults to the model's.
        checkpoint: path of a folder or None, as for `score_pairs`.
        verbose: bool. If True, show a progress bar on a terminal. Defaults to True.

    Returns:
        `MultipleChoice`.

    Raises:
        ValueError: If there is no item, an item lacks a field, or `gold` is no index of a choice.

    Example:

    ```python
    from keras_vaultgemma import VaultGemmaCausalLM, evaluation

    model = VaultGemmaCausalLM.from_preset("vaultgemma_tiny")
    goal = "Question: How does one cross a river? Answer:"
    items = [{"context": goal, "choices": ["Over the bridge.", "With a spoon."], "gold": 0}]
    print(evaluation.measure_multiple_choice(model, items, verbose=False).acc_norm)
    ```
    """
    items = list(items)
    if not items:
        raise ValueError("`items` must have at least one item. Received: none")
    for i, item in enumerate(items):
        _check_item(i, item)
    pairs = [(x["context"], delimiter + choice) for x in items for choice in x["choices"]]
    if mutual_information:
        pairs += [("", continuation) for _, continuation in pairs]
    scores = score_pairs(
        model,
        pairs,
        truncation=truncation,
        max_length=max_length,
        checkpoint=checkpoint,
        verbose=verbose,
    )
    bounds = np.cumsum([len(item["choices"]) for item in items])
    conditional = np.split(scores.log_probs[: bounds[-1]], bounds[:-1])
    values = [conditional]
    for length in (len, lambda choice: len(choice.encode())):
        lengths = [np.array([length(choice) for choice in item["choices"]]) for item in items]
        with np.errstate(divide="ignore"):  # an empty choice is the last, as in the harness
            values.append([x / n for x, n in zip(conditional, lengths, strict=True)])
    if mutual_information:
        alone = np.split(scores.log_probs[bounds[-1] :], bounds[:-1])
        values.append([x - y for x, y in zip(conditional, alone, strict=True)])
    accuracies = [
        Accuracy.of(np.argmax(x) == item["gold"] for x, item in zip(found, items, strict=True))
        for found in values
    ]
    acc, acc_norm, acc_bytes = accuracies[:3]
    return MultipleChoice(
        acc,
        acc_norm,
        acc_bytes,
        acc_mutual_info=accuracies[3] if mutual_information else None,
        truncated=scores.truncated,
        log_probs=tuple(tuple(x.tolist()) for x in conditional),
    )


def _check_item(index, item):
    lacking = [name for name in FIELDS if name not in item]
    if lacking:
        raise ValueError(
            f"An item must have {', '.join(map(repr, FIELDS))}. "
            f"Received: item {index} without {', '.join(map(repr, lacking))}"
        )
    if not is_integer(item["gold"], 0, len(item["choices"]) - 1):
        raise ValueError(
            f"`gold` must be the index of one of the {len(item['choices'])} choices. "
            f"Received: gold={item['gold']!r} in item {index}"
        )
