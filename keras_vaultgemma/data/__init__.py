"""From the texts, pairs, chats and files of users to arrays of token ids."""

# Selects the Keras backend, before the modules of this package import Keras.
from keras_vaultgemma import backend as backend
