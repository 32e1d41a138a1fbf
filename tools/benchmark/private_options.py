"""Trials behind the rule of `recipes/private_options.py`, on how-to texts that are no one's secret.

    KERAS_BACKEND=jax python tools/benchmark/private_options.py piqa_valid.jsonl

The file is PIQA's validation set (Bisk et al., 2020), whose texts are unlike the fairy tales that
`vaultgemma_tiny` was trained on. A trial computes the gradients of 16 rows a step, with noise of
the size that a run on all rows with the rule's batches has. Which rows they are matters less than
that noise. This is a simulation and NOT private. Takes 10 to 20 minutes on one core.
"""

import argparse
import json
import math
import warnings
from pathlib import Path

import keras
import numpy as np

from keras_vaultgemma import VaultGemmaCausalLM, privacy
from keras_vaultgemma.data.text_files import TextRecords
from keras_vaultgemma.evaluation import measure
from keras_vaultgemma.privacy import accounting, planning
from keras_vaultgemma.recipes.private_options import TARGETS, gaussian_privacy

EPSILON, DELTA, ROW_LENGTH, SIMULATED, EXCESS = 8.0, 1e-5, 64, 16, 1.2
BASE = dict(rows=1200, steps=75, rate=1e-2, rank=4, targets=TARGETS, clip=0.1, momentum=0.9)
TRIALS = [
    {},
    {"rate": 5e-3},
    {"rate": 2e-2},
    {"rank": 8},
    {"rank": 16},
    {"targets": ("query", "value"), "rank": 8},
    {"momentum": 0.0},
    {"clip": 1.0},
    {"steps": 38, "rate": 2e-2},
    {"steps": 150, "rate": 6e-3},
    {"rows": 300},
    {"rows": 300, "rate": 4e-3},
    {"rows": 4800},
]
"""What differs from `BASE`."""


def trial(training, held_out, rows, steps, rate, rank, targets, clip, momentum):
    """Return the norm of the noise and held-out bits per byte."""
    keras.utils.set_random_seed(0)
    model = VaultGemmaCausalLM.from_preset("vaultgemma_tiny", dtype="mixed_bfloat16")
    model.backbone.enable_lora(rank, list(targets))
    unseen = held_out.tokenize(model.preprocessor, packed=True)
    model.preprocessor.sequence_length = ROW_LENGTH
    rows_of_run = training.tokenize(model.preprocessor, packed=False)
    noise = EXCESS * math.sqrt(steps) / gaussian_privacy(EPSILON, DELTA) / rows
    simulated = max(SIMULATED, round(len(training.texts) / steps))
    optimizer = keras.optimizers.Adam(rate, use_ema=bool(momentum), ema_momentum=momentum or None)
    # With a seed, because the machine's ledger is for runs that are private.
    guarantee = privacy.DPSGD(
        None, DELTA, clip, noise_multiplier=noise * simulated, seed_for_tests=0
    )
    model.compile(optimizer=optimizer, privacy=guarantee)
    epochs = max(1, round(steps / planning.steps_per_epoch(len(training.texts), simulated)))
    model.fit(**rows_of_run, batch_size=simulated, epochs=epochs, verbose=0)
    parameters = sum(math.prod(v.shape) for v in model.trainable_variables)
    return noise * math.sqrt(parameters), measure(model, **unseen).bits_per_byte


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("piqa", type=Path)
    options = parser.parse_args()
    items = [json.loads(line) for line in options.piqa.read_text(encoding="utf-8").splitlines()]
    texts = [f"Goal: {i['goal']}\nFirst: {i['sol1']}\nSecond: {i['sol2']}" for i in items]
    texts = [texts[i] for i in np.random.default_rng(0).permutation(len(texts))]
    training, held_out = TextRecords(texts[100:1300], None), TextRecords(texts[:40], None)
    # The simulated noise has no meaningful ε, and computing it would take minutes.
    accounting.epsilon = lambda *args, **kwargs: 1.0
    planning.choose_max_batch_size = lambda steps, *args: (
        2 * round(steps.rows * steps.sampling_probability)
    )
    warnings.simplefilter("ignore")
    print("| differs | norm of the noise | held-out bits per byte |\n|---|---|---|")
    for changes in TRIALS:
        norm, bits = trial(training, held_out, **{**BASE, **changes})
        described = ", ".join(f"{name} {value}" for name, value in changes.items()) or "nothing"
        print(f"| {described} | {norm:.2f} | {bits:.3f} |", flush=True)


if __name__ == "__main__":
    main()
