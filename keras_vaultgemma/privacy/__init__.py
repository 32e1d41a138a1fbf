"""Differential privacy: how a private run trains, what it may do, and a record of what it did."""

from keras_vaultgemma.privacy.accounting import PrivacySpent
from keras_vaultgemma.privacy.dpsgd import DPSGD
from keras_vaultgemma.privacy.secret_key import NotPrivateWarning

__all__ = ["DPSGD", "NotPrivateWarning", "PrivacySpent"]
