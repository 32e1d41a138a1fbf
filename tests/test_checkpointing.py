"""Runs that are interrupted, and where they end. `Interrupt` stands for the kill, which one test does in earnest."""

import os
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
from common import random_backbone, to_numpy

from keras_vaultgemma import TrainingCheckpoint, VaultGemmaCausalLM, checkpointing, state_file

TOLERANCE = 1e-6 if keras.config.backend() == "torch" else 0
ROWS = np.random.default_rng(0).integers(3, 32, (10, 7))
IDS = {"token_ids": ROWS[:, :-1], "padding_mask": np.ones((10, 6), "int32")}
LABELS = ROWS[:, 1:]
STEPS = 3
"""Batches of an epoch: 4, 4 and 2 rows."""


class Batches(keras.utils.PyDataset):
    def __len__(self):
        return 5

    def __getitem__(self, index):
        rows = slice(2 * index, 2 * index + 2)
        return {name: array[rows] for name, array in IDS.items()}, LABELS[rows]


class Interrupt(keras.callbacks.Callback):
    """Ends a run, as a kill would, at the end of the given batches, counted from the start of the run."""

    def __init__(self, step):
        super().__init__()
        self.left = step

    def on_train_batch_end(self, batch, logs=None):
        self.left -= 1
        if not self.left:
            raise InterruptedError


class Lines(keras.callbacks.Callback):
    """Writes down the loss after every batch."""

    def __init__(self):
        super().__init__()
        self.losses = []

    def on_train_batch_end(self, batch, logs=None):
        self.losses.append(logs["loss"])


def small(seed=0, **changes):
    keras.utils.set_random_seed(seed)
    sizes = dict(num_layers=1, vocabulary_size=32, hidden_dim=16, intermediate_dim=24, head_dim=8, num_query_heads=2)
    return VaultGemmaCausalLM(random_backbone(**{**sizes, "num_key_value_heads": 2, **changes}))


def fit(model, folder, x=IDS, y=LABELS, save_freq=1, callbacks=(), **kwargs):
    """Train as the tests do, with a checkpoint; the callback."""
    checkpoint = TrainingCheckpoint(folder, save_freq)
    options = {"batch_size": 4, "epochs": 3, "verbose": 0, **kwargs}
    model.fit(x, y, callbacks=[*callbacks, checkpoint], **options)
    return checkpoint


def weights(model):
    return [to_numpy(v).copy() for v in model.trainable_variables]


def assert_equal(found, expected, tolerance=TOLERANCE):
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance)


def interrupted(make, folder, steps, **kwargs):
    """The model of a run that is interrupted after so many steps, each time, and gone on with by another seed."""
    for i, step in enumerate(steps):
        with pytest.raises(InterruptedError):
            fit(make(seed=i), folder, **{**kwargs, "callbacks": [*kwargs.get("callbacks", list)(), Interrupt(step)]})
    model = make(seed=99)
    fit(model, folder, **{**kwargs, "callbacks": kwargs.get("callbacks", list)()})
    return model
