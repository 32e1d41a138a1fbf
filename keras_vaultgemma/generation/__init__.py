"""From token ids to more token ids, and to text."""

from keras_vaultgemma import (
    backend as backend,
)  # selects the Keras backend before Keras is imported
