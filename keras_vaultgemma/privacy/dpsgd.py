"""What a user asks for: `compile(privacy=DPSGD(...))`, and what it promises."""

import math
import numbers

from keras_vaultgemma.privacy import accounting
from keras_vaultgemma.privacy.seeds import fixed_secret, new_secret

UNITS = ("row", "sequence")


class DPSGD:
    """Differentially private training: `model.compile(optimizer, privacy=DPSGD(epsilon=3.0, delta=1e-5))`.

    ```python
    model.compile(optimizer=keras.optimizers.Adam(1e-3), privacy=privacy.DPSGD(epsilon=3.0, delta=1e-5, clip_norm=1.0))
    model.fit(records, epochs=3, batch_size=256)  # the expected batch size; what is protected is one row
    model.privacy.spent()
    ```

    **The guarantee.** Let D and D' be two data sets of N rows of which one comes from the other by replacing one row by
    a row whose gradient is zero (zero-out neighbours; N itself is public). For the trainable variables after each step
    of `fit`, all steps together, and every set A of such sequences,

        P(M(D) in A) <= e^ε P(M(D') in A) + δ.

    **The mechanism.** Each step draws every row independently with probability q = batch_size / N, and of more than
    Bmax rows a uniformly random subset of Bmax (truncated Poisson sampling, row_sampling.py; Chua et al., 2024,
    arXiv:2411.04205). It clips the gradient of each drawn row, over all trainable variables together, to Euclidean norm
    C, adds up, adds Gaussian noise of standard deviation σC in every coordinate, and divides by the expected number of
    rows (mechanism.py; Abadi et al., 2016, arXiv:1607.00133). The optimizer sees nothing else of the data. An empty
    batch is a step like any other. ε is accounted with privacy loss distributions (accounting.py), as in VaultGemma's
    own pre-training (arXiv:2510.15001), for the steps that were DONE, also in runs that were killed (ledger.py).

    **The unit** is one row of the data as `fit` gets it: a string, a pair, a chat. Somebody who wrote several rows is
    protected by less: their rows' guarantees compose. Rows that several documents are packed into are refused, unless
    `unit="sequence"` says that the packed sequence is what shall be protected.

    **Not covered** is whatever else was learnt from the rows and is told to somebody:
    - the choice of hyperparameters, of the best of several runs, or of a checkpoint by looking at results on the rows;
      each run on the rows counts, and the ledger adds up those that it knows of. It knows strings by what they say and
      ids by their numbers: the same rows as both, or as ids cut at two lengths, are two data sets to it;
    - the metrics that `fit` shows. They are named "unprotected_..." for that reason, and a checkpoint keeps them, too;
    - a `fit` without `privacy` on the same model, before or after; the ledger says how many steps there were;
    - validation on rows that are not public, and anything that the vocabulary or the preprocessing took from the rows;
    - the time a step takes, which depends on the number of rows it drew;
    - the masks of dropout on PyTorch, whose generator takes 31 bits of the secret alone;
    - floating-point numbers: noise is a float32 number of a statistical generator (noise_seeds.py).
    And nobody's row is safe where the secret of the run's random numbers is known: it is 128 bits from the operating
    system for each `fit`, and written nowhere (secret_key.py).

    Args:
        epsilon: the budget ε, in (0, 100], that all steps planned by `fit` keep to, together with earlier runs on the
            same data that the model's ledger knows of; or
        noise_multiplier: σ, above 0. Exactly one of the two.
        delta: δ, in (0, 1); N^-1.1 if None.
        clip_norm: C, above 0.
        unit: "row" or "sequence".
        microbatch_size: rows that are computed at a time; None for as many as pay off. More than 1 only where the model
            can compute each by itself, as with LoRA on projections and the default loss.
        extend_budget: let another `fit` on the same data go beyond the budget; `spent` and the ledger say how far.
        public_validation: says that validation data given to `fit` is public, and its metrics may be known to all.
        ledger: file that every step is written down in before it is done. Defaults to one beside the checkpoint of a
            `TrainingCheckpoint` given to `fit`, and to memory alone without one. One run at a time may write it, and a
            checkpoint goes on only with the ledger that was written with it.
        seed_for_tests: makes the run repeatable and NOT private; a warning, the ledger and `spent` say so.

    Raises:
        ValueError: for an argument outside its range; by `compile` and `fit` for what they cannot do privately.
    """

    def __init__(
        self,
        epsilon=None,
        delta=None,
        clip_norm=1.0,
        *,
        noise_multiplier=None,
        unit="row",
        microbatch_size=None,
        extend_budget=False,
        public_validation=False,
        ledger=None,
        seed_for_tests=None,
    ):
        if (epsilon is None) == (noise_multiplier is None):
            raise ValueError(
                "Exactly one of `epsilon` and `noise_multiplier` must be given. "
                f"Received: epsilon={epsilon}, noise_multiplier={noise_multiplier}"
            )
        if epsilon is not None and not 0 < epsilon <= accounting.LARGEST_EPSILON:
            raise ValueError(
                f"`epsilon` must be above 0 and at most {accounting.LARGEST_EPSILON:g}. Received: epsilon={epsilon}"
            )
        if delta is not None:
            accounting.check_delta(delta)
        for name, value in dict(clip_norm=clip_norm, noise_multiplier=noise_multiplier).items():
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"`{name}` must be above 0 and finite. Received: {name}={value}")
        if unit not in UNITS:
            raise ValueError(
                f"`unit` must be one of {', '.join(map(repr, UNITS))}. Received: unit={unit!r}"
            )
        is_count = isinstance(microbatch_size, numbers.Integral) and not isinstance(
            microbatch_size, bool
        )
        if microbatch_size is not None and not (is_count and microbatch_size > 0):
            raise ValueError(
                f"`microbatch_size` must be a positive integer or None. Received: microbatch_size={microbatch_size!r}"
            )
        self.epsilon, self.noise_multiplier, self.delta, self.clip_norm = (
            epsilon,
            noise_multiplier,
            delta,
            clip_norm,
        )
        self.unit, self.microbatch_size = unit, microbatch_size
        self.extend_budget, self.public_validation = extend_budget, public_validation
        self.ledger, self.seed_for_tests = ledger, seed_for_tests

    @property
    def mechanism(self):
        """What the ledger says that a run does, in words."""
        is_private = self.seed_for_tests is None
        return (
            accounting.MECHANISM if is_private else f"{accounting.SEEDED}: {accounting.MECHANISM}"
        )

    def secret(self):
        """A new secret for one call of `fit`; with `seed_for_tests` a known one, and a warning."""
        return new_secret() if self.seed_for_tests is None else fixed_secret(self.seed_for_tests)
