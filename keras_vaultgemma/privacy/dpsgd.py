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

UNITS = ("row", "sequence", "user")

DEFAULT_MAX_ROWS = 4
"""Default of `max_rows_per_group`. Each sampled user takes the time of as many rows."""

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
    person who contributed several rows is protected less (`privacy/group_privacy.py` says how much
    less). Rows that several documents are packed into are rejected, unless `unit="sequence"` states
    that the packed sequence is what shall be protected.

    **Users.** With `unit="user"` what is protected is all rows of one person, however many:
    `fit(..., groups=labels)` says whose row each one is. In all of the above, a user takes the
    place of a row: N is the number of users, each is sampled with probability q = batch_size / N,
    and D' has a user whose gradient is zero in every step. From a sampled user with more than
    k = `max_rows_per_group` rows, k are drawn at random, afresh in each step. The gradient of the
    mean of their losses is clipped to C, so that a step's sum changes by at most C with the user,
    whatever k is (`privacy/groups.py`, `privacy/train_step.py`). The ledger's unit, "one user of at
    most k rows of at most L tokens", is about one step: users with more rows are protected as well.
    The labels are trusted: a person with two labels is two users, and what a row under another
    user's label says about a person is that user's. A run that protects rows and one that protects
    users on the same data compose for persons with one row only, and `fit` warns of it.

    **Several devices** (`DataParallel` and `ModelParallel` of keras.distribution, on JAX) change
    none of this. Each device clips and sums its share of the sampled rows; the sums are added, and
    the noise is drawn once and added to the sum of all. The allowance for rounding covers the
    additions between devices (`privacy/mechanism.py`). Each of several processes is given all rows,
    and the first one plans, draws the secret and writes the ledgers (`privacy/processes.py`).

    **Not covered** is whatever else is learned from the rows and published:

    - the choice of hyperparameters, of the best of several runs, or of a checkpoint by looking at
      results on the rows. Each run on the rows counts: `spent` composes the runs of this model and
      those of other models that this machine knows of (`privacy/machine_ledger.py`). Strings are
      recognised by their contents and token ids by their values: the same rows as both, or as ids
      truncated at two lengths, are two datasets. Rows in common with a run on another dataset are a
      warning, and `spent().epsilon_of_all_runs` is ε for a person whose record was in all runs;
    - the metrics that `fit` reports. They are named "unprotected_..." for that reason, and a
      checkpoint stores them, too;
    - a `fit` without `privacy` on the same model, before or after. The ledger counts its steps;
    - validation on rows that are not public, and anything that the vocabulary or the preprocessing
      took from the rows;
    - the duration of a step, which depends on the number of rows or users it sampled;
    - the masks of dropout on PyTorch, whose generator takes only 31 bits of the secret;
    - without `secure=True`, an attacker who can predict the statistical, not cryptographic,
      generator of the noise (`privacy/noise.py`).

    No row is protected from a person who knows the secret of a run's random numbers: 128 bits from
    the operating system for each `fit`, which are never written anywhere (`privacy/seeds.py`). The
    processes that train together send it over their network, which must be trusted.

    Args:
        epsilon: float in (0, 100]. The budget ε that all steps planned by `fit` stay within,
            together with earlier runs on the same data that the model's ledger or this machine
            knows of. Exactly one of `epsilon` and `noise_multiplier` is required.
        delta: float in (0, 1). Defaults to min(N^-1.1, 1e-5). A warning says if N δ is above 0.5.
        clip_norm: float from 1e-8 to 1e8. The norm C that gradients are clipped to. Outside this
            range squares of float32 numbers underflow or overflow. Defaults to 1.
        noise_multiplier: float, 0.01 or more. The noise multiplier σ. The budget is then the ε of
            the first run of this model on the data.
        unit: string, "row", "sequence" or "user". "user" needs `groups` in `fit`. Defaults to
            "row".
        max_rows_per_group: int. k, the number of rows that a user contributes to a step at most,
            only with `unit="user"`. A step takes the time and memory of k rows for each user, also
            for those who have fewer, because a shape that follows the data would depend on them.
            More rows average out more of a user's own gradient noise; more users in a batch, for
            the same time, average out more of the privacy noise. Defaults to 4.
        microbatch_size: int or None. Rows, or users, that a device computes together. More than 1
            requires that the model computes each of them separately, as it does with the default
            loss unless the embedding has an adapter. Defaults to as many as pay off.
        extend_budget: bool. If True, another `fit` on the same data may exceed the budget; `spent`
            and the ledger report by how much. Defaults to False.
        public_validation: bool. States that validation data given to `fit` is public, so that its
            metrics may be known to anyone. Defaults to False.
        ledger: string or path of the file in which every step is recorded before it is done.
            Defaults to a file next to the checkpoint of a `TrainingCheckpoint` given to `fit`;
            without one the ledger stays in memory. One run at a time may write it, and a checkpoint
            resumes only with the ledger that was written with it.
        secure: bool. If True, the noise is made from the bits of ChaCha20, a cryptographic
            generator, and not of a statistical one. At the size of LoRA factors the time is not
            noticed; for all weights of a large model on a CPU it is. Defaults to False.
        seed_for_tests: int or None. Makes the run repeatable and NOT private, as a warning, the
            ledger and `spent` report. This machine does not remember such a run.

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
        max_rows_per_group: int | None = None,
        microbatch_size: int | None = None,
        extend_budget: bool = False,
        public_validation: bool = False,
        ledger: str | os.PathLike | None = None,
        secure: bool = False,
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
        check_integer("max_rows_per_group", max_rows_per_group, allow_none=True)
        if unit == "user":
            max_rows_per_group = max_rows_per_group or DEFAULT_MAX_ROWS
        elif max_rows_per_group is not None:
            raise ValueError(
                '`max_rows_per_group` goes with `unit="user"`. '
                f"Received: max_rows_per_group={max_rows_per_group}, unit={unit!r}"
            )
        check_integer("microbatch_size", microbatch_size, allow_none=True)
        self.epsilon, self.noise_multiplier = epsilon, noise_multiplier
        self.delta, self.clip_norm = delta, clip_norm
        self.unit, self.microbatch_size = unit, microbatch_size
        self.max_rows_per_group = max_rows_per_group
        self.extend_budget, self.public_validation = extend_budget, public_validation
        self.ledger, self.secure, self.seed_for_tests = ledger, secure, seed_for_tests

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
