"""How good a model is."""

from keras_vaultgemma import (
    backend as backend,
)  # selects the Keras backend before Keras is imported
