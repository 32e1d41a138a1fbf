"""The Keras classes that users hold."""

from keras_vaultgemma import (
    backend as backend,
)  # selects the Keras backend before Keras is imported
