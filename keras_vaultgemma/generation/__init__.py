"""Generation: token ids to more token ids, and to text."""

# Selects the Keras backend before Keras is imported.
from keras_vaultgemma import backend as backend
