"""Differential privacy: what a private run promises, how it keeps the promise, and where that is written."""

from keras_vaultgemma.privacy.accounting import PrivacySpent
from keras_vaultgemma.privacy.dpsgd import DPSGD
from keras_vaultgemma.privacy.seeds import NotPrivateWarning

__all__ = ["DPSGD", "NotPrivateWarning", "PrivacySpent"]
