"""`model.privacy`: what a model's weights have been told about private data."""

from keras_vaultgemma.privacy.ledger import Ledger, combine, plain_training


class PrivacyRecord:
    """The ledger of a model, and the ε that it amounts to at any time.

    Attributes:
        dataset: fingerprint of the data of the last private `fit`, or None.
        budgets: {fingerprint: ε that `fit` keeps to on these data}.
        run: `open_run.OpenRun` while a private `fit` goes on, else None.
    """

    def __init__(self, ledger=None):
        self._ledger, self._plain = ledger or Ledger(), Ledger()
        self.dataset, self.budgets, self.run = None, {}, None

    @property
    def ledger(self):
        """`ledger.Ledger`: every run that the weights come from, and statements that others make about them."""
        if self.run is not None:
            return self.run.ledger
        return self.history if self._ledger != Ledger() else self._ledger

    @property
    def history(self):
        """What a run begins with: the ledger, and training without privacy even where no guarantee was there yet."""
        return combine(self._ledger, self._plain)

    def add(self, ledger):
        """Take over the entries of weights that have been put into the model."""
        self._ledger = combine(self._ledger, ledger)

    def add_plain_steps(self, count):
        """So many steps were trained without privacy."""
        if count > 0:
            self._plain = combine(self._plain, Ledger((plain_training(count),)))

    def begin(self, run):
        """A private `fit` begins: its `open_run.OpenRun`."""
        self.run, self.dataset = run, run.run.dataset

    def end(self):
        """It has ended, however it did; what was released stays on record."""
        self.run.close()
        self._ledger, self.run = self.run.ledger, None

    def spent(self, delta=None):
        """`accounting.PrivacySpent` of all steps done so far on the data of the last private `fit`.

        Of a model that was loaded it is that of the data of the latest run; `ledger.spent()` has all data sets.

        Args:
            delta: in (0, 1); that of the runs if None.

        Raises:
            ValueError: for a model that no run of the ledger has trained.
        """
        runs = self.ledger.runs
        if not runs:
            raise ValueError(
                "`spent` needs a private run: `compile(privacy=DPSGD(...))` and `fit`. Received: none so far"
            )
        return self.ledger.spent_on(self.dataset or runs[-1][0].dataset, delta)
