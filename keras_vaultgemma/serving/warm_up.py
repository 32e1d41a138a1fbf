"""Compilation of the functions that most requests need, before the first request."""

import numpy as np
import tqdm

from keras_vaultgemma.generation.batch_rows import Row


def warm_up(batch):
    """Decode a few tokens with each number of rows, as greedy and as sampled text.

    Args:
        batch: `ContinuousBatch` without rows.
    """
    counts = [1]
    while counts[-1] < batch.max_rows:
        counts.append(min(2 * counts[-1], batch.max_rows))
    for count in tqdm.tqdm(counts, desc="Compiling", unit="batch size", disable=None):
        for temperature in (0.0, 1.0):
            uniforms = np.full(2, 0.5, "float32")
            batch.add([Row([2, 3, 4], 2, (), temperature, uniforms=uniforms) for _ in range(count)])
            while batch.rows:
                batch.step(2)
