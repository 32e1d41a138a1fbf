"""Differential privacy: what a private run may do, and a record of what it did."""

from keras_vaultgemma.privacy.accounting import PrivacySpent

__all__ = ["PrivacySpent"]
