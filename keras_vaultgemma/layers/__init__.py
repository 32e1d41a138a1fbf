"""The layers of VaultGemma, and the functions that they are made of."""

# Selects the Keras backend before Keras is imported.
from keras_vaultgemma import backend as backend
