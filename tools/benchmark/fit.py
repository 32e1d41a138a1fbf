"""Measure LoRA fine-tuning at VaultGemma 1B's size and with keras-hub: memory and time per step.

    python tools/benchmark/fit.py [--backends jax torch] [--shapes 1x512 2x1024 8x1024]
        [--png FILE] [--json FILE]

Rank 8 on query and value, float32, Adam, random weights, random rows without padding. Each
measurement runs in a process of its own, one after the other, and needs up to 24 GB. Memory is
the most that is resident during `fit` above what the built model takes. Time is the median of the
steps after the first, which compiles; a step of 8x1024 takes minutes, so its time is that of the
first. Exits with 1 if a measurement failed.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import device
import numpy as np
import random_model

BACKENDS = ("jax", "torch", "tensorflow")
PLAN = {
    "1x512": ("keras_hub", "fit", "fit_checkpointing"),
    "2x1024": ("keras_hub", "fit", "fit_checkpointing"),
    "8x1024": ("fit_checkpointing",),
}
NAMES = {
    "keras_hub": "keras-hub",
    "fit": "keras_vaultgemma",
    "fit_checkpointing": "keras_vaultgemma, gradient_checkpointing=True",
}
FIGURES = {"gb_above_model": "memory above the model, GB", "step_s": "a step, s"}
RANK = 8
STEPS = {"1x512": 4, "2x1024": 3, "8x1024": 1}


def keras_hub(size):
    # keras-hub slices arrays by it, and this package would hide it on JAX and PyTorch.
    import keras
    import tensorflow  # noqa: F401
    from keras_hub.models import GemmaCausalLM

    backbone = random_model.keras_hub_gemma(size, "float32")
    backbone.enable_lora(RANK)
    model = GemmaCausalLM(backbone, preprocessor=None)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(1e-4), loss, weighted_metrics=[])
    return model


def fit(size, checkpointing=False):
    import keras

    model = random_model.vaultgemma(size, "float32")
    model.backbone.enable_lora(RANK)
    model.compile(
        keras.optimizers.Adam(1e-4), weighted_metrics=None, gradient_checkpointing=checkpointing
    )
    return model


def fit_checkpointing(size):
    return fit(size, checkpointing=True)


MODELS = {f.__name__: f for f in (keras_hub, fit, fit_checkpointing)}


def measure(model, steps, batch, length, vocabulary_size):
    """Measure memory, seconds, CPU seconds of all cores, and the loss of a few steps."""
    import keras

    seconds, cpu_seconds = [], []

    class Clock(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None):
            self.start, self.cpu_start = time.perf_counter(), time.process_time()

        def on_train_batch_end(self, batch, logs=None):
            seconds.append(time.perf_counter() - self.start)
            cpu_seconds.append(time.process_time() - self.cpu_start)

    ids = (
        np.random.default_rng(0)
        .integers(5, vocabulary_size, (steps * batch, length + 1))
        .astype("int32")
    )
    x = {"token_ids": ids[:, :-1], "padding_mask": np.ones((len(ids), length), "int32")}
    before = device.reset_peak()
    history = model.fit(x, ids[:, 1:], batch_size=batch, verbose=0, callbacks=[Clock()])
    peak = device.peak()
    return {
        "gb_above_model": (peak - before) / 1e9,
        "peak_gb": peak / 1e9,
        "step_s": statistics.median(seconds[1:] or seconds),
        "cpu_s": statistics.median(cpu_seconds[1:] or cpu_seconds),
        "first_step_s": seconds[0],
        **{name: values[0] for name, values in history.history.items()},
    }


def run(step, backend, shape, size, steps):
    """Run one measurement in a process of its own. Return its figures, or {} if it fails."""
    command = [sys.executable, __file__, "--step", step, "--shapes", shape, "--size", size]
    command += ["--steps", str(steps)] if steps else []
    environment = {
        **os.environ,
        "KERAS_BACKEND": backend,
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "PYTHONWARNINGS": "ignore",
    }
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    return {} if done.returncode else json.loads(done.stdout.splitlines()[-1])


def report(results):
    """Print the table."""
    columns = (
        "rows x tokens",
        "what",
        "memory above the model, GB",
        "x keras-hub",
        "step, s",
        "x keras-hub",
    )
    print(f"\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for (step, backend, shape), r in results.items():
        hub = results.get(("keras_hub", backend, shape))
        memory, seconds = (
            f"{r[key] / hub[key]:.2f}" if hub else "" for key in ("gb_above_model", "step_s")
        )
        figures = f"{r['gb_above_model']:.2f} | {memory} | {r['step_s']:.1f} | {seconds}"
        print(f"| {shape} | {NAMES[step]}, {backend} | {figures} |")


def draw(results, path):
    """Write a PNG with bars of memory and time for each shape and backend."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 1.5 + len(results) / 4), layout="constrained")
    colors = dict(zip(NAMES, ("#a9a9a9", "#2a6fbb", "#7fb2e5"), strict=True))
    labels = [f"{shape}, {backend}" for _, backend, shape in results]
    for axes, (key, title) in zip(figure.subplots(1, 2, sharey=True), FIGURES.items(), strict=True):
        for i, ((step, *_), r) in enumerate(results.items()):
            bar = axes.barh(i, r[key], color=colors[step], label=NAMES[step])
            axes.bar_label(bar, fmt="%.1f", padding=3, fontsize=8)
        axes.set_xlabel(title)
        axes.set_yticks(range(len(labels)), labels, fontsize=8)
        axes.margins(x=0.15)
        axes.spines[["top", "right"]].set_visible(False)
    axes.invert_yaxis()
    handles = dict(zip(*axes.get_legend_handles_labels()[::-1], strict=True))
    figure.legend(
        handles.values(),
        handles.keys(),
        loc="outside upper center",
        ncols=3,
        fontsize=8,
        frameon=False,
    )
    unfinished = path.with_name(path.name + ".unfinished")
    figure.savefig(unfinished, format="png", dpi=150)
    unfinished.rename(path)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=BACKENDS)
    parser.add_argument(
        "--shapes", nargs="+", choices=PLAN, default=list(PLAN), help="rows x tokens of a step"
    )
    parser.add_argument("--steps", type=int, help=f"of each measurement (default: {STEPS})")
    parser.add_argument("--png", type=Path, help="draw the results into this file")
    parser.add_argument("--json", type=Path, help="write results into this file, one a line")
    parser.add_argument("--size", choices=random_model.SIZES, default="1b", help=argparse.SUPPRESS)
    parser.add_argument("--step", choices=MODELS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.step:
        size = random_model.SIZES[options.size]
        batch, length = map(int, options.shapes[0].split("x"))
        model = MODELS[options.step](size)
        steps = options.steps or STEPS[options.shapes[0]]
        return print(json.dumps(measure(model, steps, batch, length, size["vocabulary_size"])))

    results, failed = {}, []
    for key in [
        (step, b, shape)
        for shape in options.shapes
        for b in options.backends
        for step in PLAN[shape]
    ]:
        result = run(*key, options.size, options.steps)
        print(
            f"{' '.join(key)}: {', '.join(f'{n} {v:.4g}' for n, v in result.items()) or 'failed'}",
            flush=True,
        )
        if not result:
            failed.append(" ".join(key))
            continue
        results[key] = result
        if options.json:
            rows = (
                dict(zip(("step", "backend", "shape"), key, strict=True)) | r
                for key, r in results.items()
            )
            options.json.write_text("".join(json.dumps(row) + "\n" for row in rows))
    report(results)
    if options.png:
        draw(results, options.png)
    return f"Failed: {', '.join(failed)}" if failed else None


if __name__ == "__main__":
    sys.exit(main())
