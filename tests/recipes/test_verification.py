"""A difference between source and target is found, in the tensors and in the logits."""

import importlib.util
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
from common import float32_preset

from keras_vaultgemma.checkpoints import lazy_tensor
from keras_vaultgemma.checkpoints.lazy_tensor import DTYPES
from keras_vaultgemma.recipes import verification
from keras_vaultgemma.recipes.convert import convert
from keras_vaultgemma.recipes.verification import verify_conversion

pytestmark = pytest.mark.any_backend

BF16 = DTYPES["bfloat16"]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A preset of float32 in bfloat16, for Keras and for transformers; no test may change them."""
    root = tmp_path_factory.mktemp("pair")
    convert(float32_preset(), root / "keras", dtype="bfloat16")
    convert(float32_preset(), root / "hf", to="hf", dtype="bfloat16")
    return root / "keras", root / "hf"


def test_equal_folders_pass(tiny, pair, monkeypatch):
    monkeypatch.setattr(lazy_tensor, "BLOCK_BYTES", 10_000)
    reported = []
    verify_conversion(*pair, BF16, reported.append)
    assert sum(reported) == 2 * tiny.backbone.count_params()
    verify_conversion(*reversed(pair), BF16)


def test_weights_are_rounded_before_they_are_compared(pair):
    source = Path(float32_preset())
    for target in pair:
        verify_conversion(source, target, BF16)
    with pytest.raises(ValueError, match="embeddings must have the same bits in source and target"):
        verify_conversion(source, pair[1], DTYPES["float32"])


@pytest.fixture
def changed(pair, tmp_path):
    """A copy of the Keras preset with one bit of one value flipped, and how to flip more."""
    folder = shutil.copytree(pair[0], tmp_path / "changed")

    def flip(bit):
        with h5py.File(folder / "model.weights.h5", "r+") as file:
            dataset = file["layers/vault_gemma_decoder_block_2/up/vars/0"]
            bits = dataset[()].view("u2")
            bits[3, 5] ^= 1 << bit
            dataset[...] = bits.view("V2")

    return folder, flip


def test_one_bit_is_found(pair, changed):
    folder, flip = changed
    flip(0)
    with pytest.raises(ValueError, match="decoder_block_2/up/weight must have the same bits"):
        verify_conversion(pair[1], folder, BF16)


def test_logits_that_differ_are_found(pair, changed):
    folder, flip = changed
    verification.verify_logits(pair[1], folder, BF16)
    flip(13)  # of the exponent
    with pytest.raises(
        ValueError,
        match=r"The logits of source and target must differ by at most 0.001. Received: ",
    ):
        verification.verify_logits(pair[1], folder, BF16)


def test_without_transformers_tensors_are_compared(pair, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(verification, "verify_logits", lambda *_: pytest.fail("asked for logits"))
    verify_conversion(*pair, BF16)


def test_no_logits_between_two_keras_presets(pair, monkeypatch):
    monkeypatch.setattr(verification, "verify_logits", lambda *_: pytest.fail("asked for logits"))
    verify_conversion(pair[0], pair[0], BF16)


def test_nan_is_no_agreement(pair, monkeypatch):
    logits = iter([np.zeros(3), np.array([0, np.nan, 0])])
    monkeypatch.setattr(verification, "_logits", lambda *_: next(logits))
    with pytest.raises(ValueError, match="Received: nan"):
        verification.verify_logits(*pair, BF16)
