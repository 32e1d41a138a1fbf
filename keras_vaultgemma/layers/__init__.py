"""The mathematics of the model: layers and pure functions."""

from keras_vaultgemma import (
    backend as backend,
)  # selects the Keras backend before Keras is imported
