"""Evaluation: how well a model predicts held-out text."""

# First, because it selects the Keras backend before Keras is imported.
from keras_vaultgemma import backend as backend
from keras_vaultgemma.evaluation.likelihood import Likelihood, measure

__all__ = ["Likelihood", "measure"]
