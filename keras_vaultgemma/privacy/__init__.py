"""Differentially private training: its guarantee, its mechanism and its ledger."""

from keras_vaultgemma.privacy.accounting import PrivacySpent
from keras_vaultgemma.privacy.dpsgd import DPSGD
from keras_vaultgemma.privacy.seeds import NotPrivateWarning

__all__ = ["DPSGD", "NotPrivateWarning", "PrivacySpent"]
