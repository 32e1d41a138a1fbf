"""Measure the cost of private training: time and memory of private and plain steps.

    python tools/benchmark/private_fit.py [--backends jax torch tensorflow]
        [--works lora lora128 lora256x64 lora128x64 full small_full small tiny] [--json FILE]

- lora: VaultGemma 1B's size, float32, rank 8 on query and value, Adam, 8 rows of 256 tokens per
  step (on average in private training); lora128: 8 rows of 128; lora256x64 and lora128x64: 64 rows.
- full: the same size, all weights, SGD, 2 rows of 64 tokens.
- small: 6 layers of width 192, rank 8, Adam, 8 rows of 128 tokens.
- small_full: 4 such layers, all weights, SGD, 64 rows of 128 tokens.
- tiny: the bundled model's size, rank 8, Adam, 32 rows of 64 tokens. On JAX also keras-hub's Gemma
  of that shape with jax-privacy's Keras API.

On PyTorch the works with LoRA also run on transformers and PEFT, plain and with Opacus
(`opacus_stack.py`).

Random weights, random rows. Each measurement runs in a process of its own; the first step, which
compiles, does not count. Private steps draw different numbers of rows, so a step's time is the time
per row times the expected batch size. Memory is the most that is resident during `fit` above what
the built model takes.
Exits with 1 if a measurement failed.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import device
import numpy as np
import opacus_stack
import random_model

BACKENDS = ("jax", "torch", "tensorflow")
HEADS = dict(num_query_heads=4, num_key_value_heads=4)
NARROW = dict(vocabulary_size=4096, hidden_dim=192, intermediate_dim=512, **HEADS)
ONE_B = dict(size=random_model.SIZES["1b"], rank=8, steps=2, sampling=1 / 100)
WORKS = {
    "lora": dict(ONE_B, batch=8, length=256),
    "lora128": dict(ONE_B, batch=8, length=128),
    "lora256x64": dict(ONE_B, batch=64, length=256),
    "lora128x64": dict(ONE_B, batch=64, length=128),
    "full": dict(ONE_B, rank=0, batch=2, length=64, steps=3),
    "small": dict(
        size=dict(NARROW, num_layers=6, head_dim=32),
        **dict(rank=8, batch=8, length=128, steps=30, sampling=1 / 100),
    ),
    "small_full": dict(
        size=dict(NARROW, num_layers=4, head_dim=64),
        **dict(rank=0, batch=64, length=128, steps=5, sampling=1 / 20),
    ),
    "tiny": dict(
        size=dict(NARROW, num_layers=4, head_dim=64),
        **dict(rank=8, batch=32, length=64, steps=12, sampling=1 / 20),
    ),
}
DEFAULT_WORKS = ("lora", "full", "tiny")
SEED = 54
"""Seed of the drawn rows, for repeatable measurements. The second step of `lora` draws 8."""
PEERS = ("plain", "private", "jax_privacy", "peft", "opacus")


def plain(work):
    return _fit(work, None)


def private(work):
    from keras_vaultgemma.privacy import DPSGD

    return _fit(work, DPSGD(noise_multiplier=1.0, delta=1e-5, seed_for_tests=SEED))


def _fit(work, guarantee):
    model = random_model.vaultgemma(work["size"], work.get("dtype", "float32"))
    if work["rank"]:
        model.backbone.enable_lora(work["rank"])
    model.compile(_optimizer(work), weighted_metrics=None, privacy=guarantee)
    return model


def jax_privacy(work):
    import keras
    from jax_privacy import keras_api
    from keras_hub.models import GemmaCausalLM

    backbone = random_model.keras_hub_gemma(work["size"], "float32")
    backbone.enable_lora(work["rank"])
    model = GemmaCausalLM(backbone, preprocessor=None)
    model.compile(
        _optimizer(work),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        weighted_metrics=[],
    )
    settings = keras_api.DPKerasConfig(
        epsilon=1000.0,  # no bound on these few steps
        delta=1e-5,
        clipping_norm=1.0,
        batch_size=work["batch"],
        gradient_accumulation_steps=1,
        train_steps=work["steps"],
        train_size=work["steps"] * work["batch"],
        noise_multiplier=1.0,
        rescale_to_unit_norm=False,
    )
    return keras_api.make_private(model, settings)


def _optimizer(work):
    import keras

    return keras.optimizers.Adam(1e-4) if work["rank"] else keras.optimizers.SGD(1e-4)


def measure(peer, work):
    """Measure seconds per step, memory and rows of a few steps."""
    if peer in ("peft", "opacus"):
        return opacus_stack.measure(peer, work)
    import keras

    model = globals()[peer](work)
    seconds = []

    class Clock(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None):
            self.start = time.perf_counter()

        def on_train_batch_end(self, batch, logs=None):
            float(next(iter(logs.values())))  # waits until the step is done
            seconds.append(time.perf_counter() - self.start)
            self.model.stop_training = len(seconds) == work["steps"]

    count = (
        round(work["batch"] / work["sampling"])
        if peer == "private"
        else work["steps"] * work["batch"]
    )
    ids = np.random.default_rng(0).integers(
        5, work["size"]["vocabulary_size"], (count, work["length"] + 1)
    )
    ids = ids.astype("int32")
    x = {"token_ids": ids[:, :-1], "padding_mask": np.ones((count, work["length"]), "int32")}
    before = device.reset_peak()
    model.fit(x, ids[:, 1:], batch_size=work["batch"], verbose=0, callbacks=[Clock()])
    peak = device.peak()
    rows = [work["batch"]] * len(seconds)
    if peer == "private":
        rows = drawn_rows(model.privacy.ledger.runs[-1][0], len(seconds))
    return {
        "step_s": sum(seconds[1:]) / sum(rows[1:]) * work["batch"],
        "gb_above_model": (peak - before) / 1e9,
        "peak_gb": peak / 1e9,
        "first_step_s": seconds[0],
        "timed_rows": sum(rows[1:]),
    }


def drawn_rows(run, steps):
    """Return the number of rows of each of the first steps."""
    from keras_vaultgemma.privacy.sampling import sample_rows
    from keras_vaultgemma.privacy.seeds import fixed_secret

    secret, sampling = fixed_secret(SEED), (run.rows, run.sampling_probability, run.max_batch_size)
    return [len(sample_rows(secret, step, *sampling)) for step in range(steps)]


def peers(work, backend):
    """Return what is measured for a work on a backend."""
    found = ["plain", "private"]
    if work == "tiny" and backend == "jax":
        found.append("jax_privacy")
    if WORKS[work]["rank"] and backend == "torch":
        found += ["peft", "opacus"]
    return found


def run(peer, backend, work):
    """Run one measurement in a process of its own. Return its figures, or {} if it fails."""
    command = [sys.executable, __file__, "--peer", peer, "--works", work]
    with tempfile.TemporaryDirectory() as home:
        environment = {
            **os.environ,
            **dict(KERAS_BACKEND=backend, TF_CPP_MIN_LOG_LEVEL="3", PYTHONWARNINGS="ignore"),
            "KERAS_VAULTGEMMA_HOME": home,
        }
        done = subprocess.run(
            command, env=environment, stdout=subprocess.PIPE, text=True, check=False
        )
    return {} if done.returncode else json.loads(done.stdout.splitlines()[-1])


def report(results):
    """Print the table."""
    columns = ("work", "what", "a step, s", "x plain", "memory above the model, GB", "x plain")
    print(f"\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for (peer, backend, work), r in results.items():
        base = results.get(("plain", backend, work))
        time_ratio, memory_ratio = (
            f"{r[key] / base[key]:.2f}" if base else "" for key in ("step_s", "gb_above_model")
        )
        name = peer.replace("_", "-")
        figures = f"{r['step_s']:.3g} | {time_ratio} | {r['gb_above_model']:.2f} | {memory_ratio}"
        print(f"| {work} | {name}, {backend} | {figures} |")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=BACKENDS)
    parser.add_argument("--works", nargs="+", choices=WORKS, default=DEFAULT_WORKS)
    parser.add_argument("--json", type=Path, help="write results into this file, one a line")
    parser.add_argument("--peer", choices=PEERS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peer:
        return print(json.dumps(measure(options.peer, WORKS[options.works[0]])))

    results, failed = {}, []
    for work in options.works:
        for backend in options.backends:
            for peer in peers(work, backend):
                result = run(peer, backend, work)
                print(f"{work} {peer} {backend}: {result or 'failed'}", flush=True)
                if not result:
                    failed.append(f"{work} {peer} {backend}")
                    continue
                results[peer, backend, work] = result
                if options.json:
                    rows = (
                        dict(zip(("peer", "backend", "work"), k, strict=True)) | r
                        for k, r in results.items()
                    )
                    options.json.write_text("".join(json.dumps(row) + "\n" for row in rows))
    report(results)
    return f"Failed: {', '.join(failed)}" if failed else None


if __name__ == "__main__":
    sys.exit(main())
