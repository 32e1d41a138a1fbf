"""The rule that chooses those options of a private run that the user leaves out.

It depends on public values alone: the number of rows N, the budget (ε, δ) and the shape of the
model. It never reads a row, so that the choice costs no privacy.

**Batch size and epochs.** T steps on all rows have noise of standard deviation C √T / (μ N) per
coordinate, where μ is the Gaussian privacy of (ε, δ) (Dong et al.). Steps that sample a fraction q
of the rows cost q times as much, and their noise is larger by a factor that stays near 1 until the
noise multiplier falls to about 1.2. The rule takes the smallest batch whose noise is at most
`EXCESS` times that of all rows, or so small that it does not matter (`NEGLIGIBLE`), for `STEPS`
steps. These are the large batches and many epochs that Li et al., De et al., Ponomareva et al. and
McKenna et al. recommend, without those that only cost time.

**Adapter.** Low-rank factors of all projections, because they fit more than factors of query and
value at the same noise (Yu et al.). The rank matters little between 4 and 8: a larger one fits more
and has noise of a larger norm.

**Clipping norm.** Far below the norm of a row's gradient, so that all rows contribute vectors of
one length. Adam divides by the scale, so that the length itself does not matter (Bu et al.).

**Learning rate.** Constant and inversely proportional to the width of the model, as updates of
Adam require (Yang et al.). The final weights are an exponential moving average over the last
steps, in which noise cancels out. It is computed from weights that the guarantee covers already,
and therefore costs no privacy (De et al.).

**Trials** of 30 November 2026 (`tools/benchmark/private_options.py`): `vaultgemma_tiny` on texts of
PIQA, rows of 64 tokens, ε = 8, δ = 1e-5, with the noise of N = 1,200 rows. Held-out bits per byte,
3.19 before; repetitions differ by up to 0.02. Other sizes of models, and the threshold of the
warning of few rows, are extrapolation.

| | |
|---|---|
| 75 steps, rate 1e-2, rank 4, all projections, norm 0.1, average | 2.452 |
| rate 5e-3 (2e-2) | 2.535 (2.659) |
| rank 8 (16) | 2.469 (2.560) |
| query and value alone, rank 8 | 2.694 |
| no average | 2.469 |
| clipping norm 1 | 2.476 |
| 38 steps, rate 2e-2 (150 steps, rate 6e-3) | 2.525 (2.430) |
| noise of N = 300 rows, rate 1e-2 (4e-3) | 2.747 (2.882) |
| noise of N = 4,800 rows | 2.292 |

References:
    - [Bu et al., 2022](https://arxiv.org/abs/2206.07136): automatic clipping
    - [De et al., 2022](https://arxiv.org/abs/2204.13650): large batches, averaged weights
    - [Dong et al., 2019](https://arxiv.org/abs/1905.02383): Gaussian differential privacy
    - [Li et al., 2021](https://arxiv.org/abs/2110.05679): language models as private learners
    - [McKenna et al., 2025](https://arxiv.org/abs/2501.18914): scaling laws
    - [Ponomareva et al., 2023](https://arxiv.org/abs/2303.00654): how to DP-fy ML
    - [Yang et al., 2022](https://arxiv.org/abs/2203.03466): learning rates and width
    - [Yu et al., 2022](https://arxiv.org/abs/2110.06500): private fine-tuning with adapters
"""

import math
import re
import warnings
from collections.abc import Sequence
from typing import NamedTuple

from keras_vaultgemma._validation import check_integer
from keras_vaultgemma.privacy import planning

STEPS = 64
"""Number of steps, unless so many fit no whole number of epochs."""

FEWEST_EPOCHS = 2
"""Epochs of a dataset that is so large that its noise is negligible."""

EXCESS = 1.2
"""Largest noise of a step, in units of that of a step on all rows."""

SMALLEST_BATCH = 16

NEGLIGIBLE = 0.1
"""Norm of the noise, in units of the longest possible mean gradient, that needs no larger batch."""

USELESS = 15.0
"""Norm of the noise, in the same units, above which a warning is given."""

RATE_TIMES_WIDTH = 2.0
"""Learning rate of Adam times the width of the model."""

FULL_RATE = 1e-4
"""Learning rate of Adam for all weights, which the trials do not cover."""

RANK, CLIP_NORM = 4, 0.1
TARGETS = ("query", "key", "value", "attention_output", "gate", "up", "down")

AVERAGED = 1 / 8
"""Fraction of the steps over which the moving average of the weights extends."""

CHOSEN = ("batch_size", "epochs", "learning_rate", "clip_norm", "lora_rank", "lora_targets")
"""Names of the options that the rule chooses where they are None."""

ASSUMED_EPSILON = 8.0
"""Budget that the batch is chosen for if the noise multiplier is given instead of ε."""


class ModelShape(NamedTuple):
    """The sizes of a model that the rule depends on.

    Attributes:
        width: int. Width of the residual stream.
        weights: dict. Maps the path of each layer with a matrix to the shape of the matrix.
    """

    width: int
    weights: dict[str, tuple[int, ...]]

    def parameters(self, rank: int, targets: Sequence[str]) -> int:
        """Return the number of trained parameters; all of them if `rank` is 0.

        Args:
            rank: int, 0 or more.
            targets: list of strings, as for `lora.add`.
        """
        if not rank:
            return sum(math.prod(shape) for shape in self.weights.values())
        return rank * sum(
            sum(shape)
            for path, shape in self.weights.items()
            if any(path.split("/")[-1] == t or re.fullmatch(t, path) for t in targets)
        )


class PrivateOptions(NamedTuple):
    """The options of a private run.

    Attributes:
        batch_size: int. Expected number of rows of a step.
        epochs: int. Number of epochs.
        learning_rate: float. Constant learning rate of Adam.
        clip_norm: float. C.
        lora_rank: int. Rank of the adapter, or 0 to train all weights.
        lora_targets: tuple of strings. Layers with an adapter.
        averaging: float. Momentum of the moving average of the weights.
        noise_norm: float. Norm of a step's noise, in units of the longest possible mean gradient.
    """

    batch_size: int
    epochs: int
    learning_rate: float
    clip_norm: float
    lora_rank: int
    lora_targets: tuple[str, ...]
    averaging: float
    noise_norm: float

    def describe(self) -> str:
        """Return the options in words, as command-line arguments."""
        targets = f" --lora-targets {' '.join(self.lora_targets)}" if self.lora_rank else ""
        return (
            f"--batch-size {self.batch_size} --epochs {self.epochs} "
            f"--learning-rate {self.learning_rate:.3g} --clip-norm {self.clip_norm:g} "
            f"--lora-rank {self.lora_rank}{targets}"
        )


def model_shape(preset: str) -> ModelShape:
    """Return the `ModelShape` of a preset, of which only config.json is read.

    Args:
        preset: string. Preset as for `VaultGemmaCausalLM.from_preset`.

    Raises:
        ValueError: If there is no such preset, or it is no VaultGemma.
    """
    # Here, because these import Keras, which plans with given options do without.
    from keras_vaultgemma.checkpoints import presets, weight_map
    from keras_vaultgemma.checkpoints.config import read_config

    config = read_config(presets.find(preset, "config"))
    weights = {
        weight.path.rpartition("/")[0]: tuple(weight.shape)
        for weight in weight_map.weight_map(config)
        if len(weight.shape) == 2
    }
    return ModelShape(config["hidden_dim"], weights)


def private_options(
    rows: int,
    shape: ModelShape,
    epsilon: float | None = None,
    delta: float | None = None,
    *,
    batch_size: int | None = None,
    epochs: int | None = None,
    learning_rate: float | None = None,
    clip_norm: float | None = None,
    lora_rank: int | None = None,
    lora_targets: Sequence[str] | None = None,
) -> PrivateOptions:
    """Choose the options of a private run that are None; the others remain as they are.

    Warns if the noise would be so large that hardly anything can be learned.

    Args:
        rows: int. N, the number of rows (or of whatever else is protected).
        shape: `ModelShape`.
        epsilon: float. Budget. Defaults to `ASSUMED_EPSILON`, for a given noise multiplier.
        delta: float. Defaults to `planning.default_delta`.
        batch_size: int. Expected number of rows of a step.
        epochs: int. Number of epochs.
        learning_rate: float. Learning rate of Adam.
        clip_norm: float. Clipping norm.
        lora_rank: int. Rank of the adapter, 0 to train all weights.
        lora_targets: list of strings. Layers with an adapter.

    Returns:
        `PrivateOptions`.

    Example:

    ```python
    from keras_vaultgemma.recipes.private_options import model_shape, private_options

    options = private_options(1200, model_shape("vaultgemma_tiny"), epsilon=8.0)
    print(options.describe())
    ```
    """
    check_integer("rows", rows)
    delta = planning.default_delta(max(rows, 2)) if delta is None else delta
    mu = gaussian_privacy(ASSUMED_EPSILON if epsilon is None else epsilon, delta)
    rank = RANK if lora_rank is None else lora_rank
    targets = tuple(TARGETS if lora_targets is None else lora_targets)
    scale = math.sqrt(shape.parameters(rank, targets)) / rows

    def steps(per_epoch):
        return per_epoch * (epochs or max(FEWEST_EPOCHS, math.ceil(STEPS / per_epoch)))

    def noise(per_epoch, count):
        """Return the norm of the noise by the central limit theorem of Gaussian privacy."""
        return scale * per_epoch / math.sqrt(math.log1p((mu * per_epoch) ** 2 / count))

    def is_enough(per_epoch):
        count = steps(per_epoch)
        return noise(per_epoch, count) <= max(EXCESS * noise(1, count), NEGLIGIBLE)

    if batch_size is None:
        per_epoch = 1
        while rows // (per_epoch + 1) >= SMALLEST_BATCH and is_enough(per_epoch + 1):
            per_epoch += 1
        size = math.ceil(rows / per_epoch)
    else:
        size = batch_size
    per_epoch = planning.steps_per_epoch(rows, size)
    count = steps(per_epoch)
    norm = noise(per_epoch, count)
    if norm > USELESS:
        warnings.warn(
            f"{rows:,} rows are too few for this budget: the noise of a step is {norm:.0f} times "
            "as long as the longest possible mean gradient, so that the model will probably learn "
            "little from them. More rows, a larger ε or a lower `lora_rank` would help",
            stacklevel=2,
        )
    rate = RATE_TIMES_WIDTH / shape.width if rank else FULL_RATE
    return PrivateOptions(
        size,
        count // per_epoch,
        rate if learning_rate is None else learning_rate,
        CLIP_NORM if clip_norm is None else clip_norm,
        rank,
        targets,
        max(0.0, 1 - 1 / (AVERAGED * count)),
        norm,
    )


def gaussian_privacy(epsilon: float, delta: float) -> float:
    """Return μ of the Gaussian mechanism that is (ε, δ)-private: sensitivity over noise.

    Args:
        epsilon: float above 0.
        delta: float in (0, 1).
    """

    def tail(x):
        return math.erfc(x / math.sqrt(2)) / 2

    def excess(mu):
        a, b = epsilon / mu - mu / 2, epsilon / mu + mu / 2
        return tail(a) - math.exp(epsilon) * tail(b) - delta

    low, high = 1e-9, 1e3
    while high > low * (1 + 1e-9):
        middle = math.sqrt(low * high)
        low, high = (low, middle) if excess(middle) > 0 else (middle, high)
    return low
