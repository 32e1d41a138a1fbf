"""The benchmarks of VaultGemma's model card."""

from typing import NamedTuple


class CardTask(NamedTuple):
    """A benchmark of the model card.

    Attributes:
        name: string. Name of the task in lm-evaluation-harness.
        shots: int. Number of examples in the context.
        figure: float. Google's figure for VaultGemma 1B, a fraction. The card does not say which
            metric it is: compare it with `acc` and with `acc_norm`.

    Example:

    ```python
    from keras_vaultgemma.evaluation import CardTask

    print(CardTask("piqa", shots=0, figure=0.68))
    ```
    """

    name: str
    shots: int
    figure: float


def card_tasks() -> tuple[CardTask, ...]:
    """Return the five benchmarks of VaultGemma's model card, with shots and Google's figures.

    Returns:
        Tuple of `CardTask`.

    Example:

    ```python
    from keras_vaultgemma import evaluation

    for task in evaluation.card_tasks():
        print(f"{task.name}, {task.shots} shots: {task.figure:.2%}")
    ```

    References:
        - [Model card](https://huggingface.co/google/vaultgemma-1b)
    """
    return (
        CardTask("hellaswag", 10, 0.3909),
        CardTask("boolq", 0, 0.6204),
        CardTask("piqa", 0, 0.6800),
        CardTask("triviaqa", 5, 0.1124),
        CardTask("arc_challenge", 25, 0.2645),
    )
