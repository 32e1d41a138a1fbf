"""Whole checkpoints from one format to another."""

from keras_vaultgemma.conversion.converter import convert

__all__ = ["convert"]
