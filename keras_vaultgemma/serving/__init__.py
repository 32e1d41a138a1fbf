"""Serving: one model that answers many clients at once, by OpenAI's HTTP interface."""

# Selects the Keras backend before Keras is imported.
from keras_vaultgemma import backend as backend
