"""Long computations in parts, with a progress bar, which resume after the process was killed."""

import hashlib
import json
import os
import sys
import zipfile
from pathlib import Path

import keras
import numpy as np
from tqdm import tqdm

from keras_vaultgemma._files import sync_folder


class Parts:
    """Results of the parts of a computation, stored in a folder as soon as each is finished.

    A file is named after a digest of everything its numbers depend on, so that a changed model,
    record or option never gets the numbers of another.

    Args:
        folder: path or None. Created if it does not exist. With None nothing is stored.
    """

    def __init__(self, folder):
        self.folder = None if folder is None else Path(folder)
        self._models = []  # and their digests
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)

    def compute(self, function, batches, model, options, label, verbose):
        """Return `function(batch)` for each batch, read from the folder where it is stored.

        Args:
            function: callable of a batch. Returns a dict of NumPy arrays.
            batches: list of tuples of int NumPy arrays.
            model: `VaultGemmaCausalLM` that `function` calls.
            options: dict for JSON. Other arguments that the results depend on.
            label: string. Name of the computation.
            verbose: bool. True for a progress bar, if standard error is a terminal.

        Returns:
            List of dicts of NumPy arrays.
        """
        context = (
            None if self.folder is None else self._digest(model) + json.dumps([label, options])
        )
        is_terminal = sys.stderr is not None and sys.stderr.isatty()
        bar = tqdm(batches, label, unit="batch", leave=False, disable=not (verbose and is_terminal))
        return [self._part(function, batch, context) for batch in bar]

    def _part(self, function, batch, context):
        if context is None:
            return function(*batch)
        digest = hashlib.sha256(context.encode())
        for array in batch:
            digest.update(f"{array.dtype.str}{array.shape}".encode())
            digest.update(np.ascontiguousarray(array))
        path = self.folder / f"{digest.hexdigest()[:32]}.npz"
        try:
            with np.load(path, allow_pickle=False) as stored:
                return dict(stored)
        except (OSError, ValueError, EOFError, zipfile.BadZipFile):  # none, or a damaged one
            results = function(*batch)
        new = path.with_name(f"{path.name}.{os.getpid()}")
        with new.open("wb") as file:
            np.savez(file, **results)
            file.flush()
            os.fsync(file.fileno())
        new.replace(path)
        sync_folder(self.folder)
        return results

    def _digest(self, model):
        """Return a digest of what a model computes, once for each model."""
        for known, digest in self._models:
            if known is model:
                return digest
        digest = hashlib.sha256()
        for variable in model.weights:
            value = keras.ops.convert_to_numpy(variable.value)
            digest.update(f"{variable.path}{value.dtype}{value.shape}".encode())
            digest.update(np.ascontiguousarray(value).view("uint8"))
        # A few losses tell which adapter is in use, which is no weight.
        size = model.backbone.vocabulary_size
        digest.update(np.round(model.score(np.arange(8)[None] % size), 2).tobytes())
        self._models.append((model, digest.hexdigest()))
        return self._models[-1][1]
