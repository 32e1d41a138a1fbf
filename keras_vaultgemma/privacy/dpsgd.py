"""The settings of private training, `compile(privacy=DPSGD(...))`, and the guarantee they give."""

import os

from keras_vaultgemma._validation import (
    check_choice,
    check_exactly_one,
    check_integer,
    check_number,
)
from keras_vaultgemma.privacy import accounting
from keras_vaultgemma.privacy.seeds import fixed_secret, new_secret

UNITS = ("row", "sequence")

CLIP_NORMS = (1e-8, 1e8)
"""Smallest and largest clipping norm, whose squares float32 represents, split over a billion
coordinates."""


class DPSGD:
    """Differentially private stochastic gradient descent, for `model.compile(privacy=...)`.

    **Guarantee.** Let D and D' be two datasets of N rows, one of which is the other with one row
    replaced by a row whose gradient is zero (zero-out neighbours; N itself is public). For the
    trainable variables after each step of `fit`, all steps together, and every set A of such
    sequences,

        P(M(D) in A) <= e^ε P(M(D') in A) + δ.

    **Mechanism.** Each step samples every row independently with probability q = batch_size / N,
    and from more than Bmax rows a uniformly random subset of Bmax (truncated Poisson sampling,
    `privacy/sampling.py`; Chua et al., 2024). It clips the gradient of each sampled row, over all
    trainable variables together, to Euclidean norm C, sums the clipped gradients, adds Gaussian
    noise of standard deviation σC to every coordinate, and divides by the expected number of rows
    (`privacy/mechanism.py`; Abadi et al., 2016). The optimizer sees nothing else of the data. An
    empty batch is a step like any other. ε is accounted with privacy loss distributions
    (`privacy/accounting.py`), as in VaultGemma's own pre-training, for the steps that were done,
    also in runs that were killed (`privacy/ledger.py`).

    **Unit.** What is protected is one row of the data given to `fit`: a string, a pair, a chat. A
    person who contributed several rows is protected less: the guarantees of their rows compose.
    Rows that several documents are packed into are rejected, unless `unit="sequence"` states that
    the packed sequence is what shall be protected.

    **Not covered** is whatever else is learned from the rows and published:

    - the choice of hyperparameters, of the best of several runs, or of a checkpoint by looking at
      results on the rows. Each run on the rows counts, and the ledger composes the runs it knows
      of. It recognises strings by their contents and token ids by their values: the same rows as
      both, or as ids truncated at two lengths, are two datasets to it;
    - the metrics that `fit` reports. They are named "unprotected_..." for that reason, and a
      checkpoint stores them, too;
    - a `fit` without `privacy` on the same model, before or after. The ledger counts its steps;
    - validation on rows that are not public, and anything that the vocabulary or the preprocessing
      took from the rows;
    - the duration of a step, which depends on the number of rows it sampled;
    - the masks of dropout on PyTorch, whose generator takes only 31 bits of the secret;
    - an attacker who can predict the statistical, not cryptographic, generator of the noise
      (`privacy/noise.py`).

    No row is protected from a person who knows the secret of a run's random numbers: 128 bits from
    the operating system for each `fit`, which are never written anywhere (`privacy/seeds.py`).

    Args:
        epsilon: float in (0, 100]. The budget ε that all steps planned by `fit` stay within,
            together with earlier runs on the same data that the model's ledger knows of. Exactly
            one of `epsilon` and `noise_multiplier` is required.
        delta: float in (0, 1). Defaults to min(N^-1.1, 1e-5). A warning says if N δ is above 0.5.
        clip_norm: float from 1e-8 to 1e8. The norm C that gradients are clipped to. Outside this
            range squares of float32 numbers underflow or overflow. Defaults to 1.
        noise_multiplier: float, 0.01 or more. The noise multiplier σ.
        unit: string, "row" or "sequence". Defaults to "row".
        microbatch_size: int or None. Rows that are computed together. More than 1 requires that the
            model computes each of them separately, as it does with LoRA on projections and the
            default loss. Defaults to as many as pay off.
        extend_budget: bool. If True, another `fit` on the same data may exceed the budget; `spent`
            and the ledger report by how much. Defaults to False.
        public_validation: bool. States that validation data given to `fit` is public, so that its
            metrics may be known to anyone. Defaults to False.
        ledger: string or path of the file in which every step is recorded before it is done.
            Defaults to a file next to the checkpoint of a `TrainingCheckpoint` given to `fit`;
            without one the ledger stays in memory. One run at a time may write it, and a checkpoint
            resumes only with the ledger that was written with it.
        seed_for_tests: int or None. Makes the run repeatable and NOT private, as a warning, the
            ledger and `spent` report.

    Raises:
        ValueError: If an argument is out of its range; from `compile` and `fit`, if private
            training does not support the model, the data or an argument.

    Example:

    ```python
    import keras
    from keras_vaultgemma import VaultGemmaCausalLM, privacy

    records = [f"Patient {i} has had a sore throat for {i % 9} days." for i in range(64)]
    model = VaultGemmaCausalLM.from_preset("vaultgemma_tiny")
    model.preprocessor.sequence_length = 16
    model.backbone.enable_lora(rank=4)
    model.compile(keras.optimizers.Adam(1e-3), privacy=privacy.DPSGD(epsilon=8.0, delta=1e-3))
    model.fit(records, batch_size=16, verbose=0)  # the expected batch size
    print(model.privacy.spent())
    ```

    References:
        - [Abadi et al., 2016](https://arxiv.org/abs/1607.00133)
        - [Chua et al., 2024](https://arxiv.org/abs/2411.04205)
        - [VaultGemma, 2025](https://arxiv.org/abs/2510.15001)
    """

    def __init__(
        self,
        epsilon: float | None = None,
        delta: float | None = None,
        clip_norm: float = 1.0,
        *,
        noise_multiplier: float | None = None,
        unit: str = "row",
        microbatch_size: int | None = None,
        extend_budget: bool = False,
        public_validation: bool = False,
        ledger: str | os.PathLike | None = None,
        seed_for_tests: int | None = None,
    ) -> None:
        check_exactly_one(epsilon=epsilon, noise_multiplier=noise_multiplier)
        largest = accounting.LARGEST_EPSILON
        check_number("epsilon", epsilon, above=0, maximum=largest, allow_none=True)
        smallest = accounting.SMALLEST_NOISE
        check_number("noise_multiplier", noise_multiplier, minimum=smallest, allow_none=True)
        check_number("clip_norm", clip_norm, minimum=CLIP_NORMS[0], maximum=CLIP_NORMS[1])
        if delta is not None:
            accounting.check_delta(delta)
        check_choice("unit", unit, UNITS)
        check_integer("microbatch_size", microbatch_size, allow_none=True)
        self.epsilon, self.noise_multiplier = epsilon, noise_multiplier
        self.delta, self.clip_norm = delta, clip_norm
        self.unit, self.microbatch_size = unit, microbatch_size
        self.extend_budget, self.public_validation = extend_budget, public_validation
        self.ledger, self.seed_for_tests = ledger, seed_for_tests

    @property
    def mechanism(self):
        """Description of the mechanism in the ledger, in words."""
        is_private = self.seed_for_tests is None
        return (
            accounting.MECHANISM if is_private else f"{accounting.SEEDED}: {accounting.MECHANISM}"
        )

    def secret(self):
        """Return a new secret for one `fit`; with `seed_for_tests` warn and return a known one."""
        return new_secret() if self.seed_for_tests is None else fixed_secret(self.seed_for_tests)
