"""Evaluation: how well a model predicts held-out text, and what it reveals of its training data."""

# First, because it selects the Keras backend before Keras is imported.
from keras_vaultgemma import backend as backend
from keras_vaultgemma.evaluation.canaries import insert_canaries
from keras_vaultgemma.evaluation.intervals import Rate
from keras_vaultgemma.evaluation.likelihood import Likelihood, measure
from keras_vaultgemma.evaluation.membership import Membership, measure_membership
from keras_vaultgemma.evaluation.memorization import Memorization, measure_memorization
from keras_vaultgemma.evaluation.privacy_audit import Audit, audit

__all__ = [
    "Audit",
    "Likelihood",
    "Membership",
    "Memorization",
    "Rate",
    "audit",
    "insert_canaries",
    "measure",
    "measure_membership",
    "measure_memorization",
]
