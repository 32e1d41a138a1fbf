"""Training: the loss, scoring, and runs that resume after an interruption."""

# First, because it selects the Keras backend before Keras is imported.
from keras_vaultgemma import backend as backend
