"""Conversion and loading at VaultGemma 1B's size: time and memory beside copying, reading and keras-hub.

    python tools/benchmark/conversion.py FOLDER

FOLDER holds (or is filled with, 8 GB) a random bfloat16 checkpoint in each format; `full_size.py` writes the first.
Every step runs in a process of its own, one after the other. Memory is what is resident beyond the interpreter and
imported libraries, mapped pages of files not counted (RssAnon of Linux), sampled every 5 ms. A step runs three times;
the table has the median time and the largest memory.
"""

import argparse
import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

import full_size

RUNS = 3
BACKENDS = ("jax", "torch", "tensorflow")


def resident():
    """Anonymous resident bytes of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    raise SystemExit("RssAnon needs Linux")


class Memory(threading.Thread):
    """Watches how far resident memory rises above where it stood."""

    def __init__(self):
        super().__init__(daemon=True)
        self.before = self.peak = resident()
        self.done = threading.Event()

    def run(self):
        while not self.done.wait(0.005):
            self.peak = max(self.peak, resident())


def copy(source, target):
    """`cp` and a hash of the same bytes: what any conversion has to do at least."""
    subprocess.run(["cp", "-r", source, target], check=True)
    for path in sorted(Path(target).iterdir()):
        with path.open("rb") as file:
            hashlib.file_digest(file, "sha256")


def read(source, target):
    """The weights file into memory."""
    path = next(path for path in Path(source).iterdir() if path.suffix in (".safetensors", ".h5"))
    path.read_bytes()


def to_keras(source, target):
    from keras_vaultgemma.conversion import convert

    convert(source, target, to="keras", progress=False)


def to_hf(source, target):
    from keras_vaultgemma.conversion import convert

    convert(source, target, to="hf", progress=False)


def load(source, target):
    from keras_vaultgemma import VaultGemmaCausalLM

    VaultGemmaCausalLM.from_preset(source, preprocessor=None, dtype="bfloat16")


def keras_hub_backbone():
    import keras_hub

    return keras_hub.models.GemmaBackbone(
        vocabulary_size=256_000,
        num_layers=26,
        num_query_heads=4,
        num_key_value_heads=4,
        hidden_dim=1152,
        intermediate_dim=13_824,
        head_dim=256,
        dtype="bfloat16",
    )


def keras_hub_save(source, target):
    Path(target).mkdir()
    keras_hub_backbone().save_to_preset(str(target))


def keras_hub_load(source, target):
    keras_hub_backbone().load_weights(str(Path(source) / "model.weights.h5"))


STEPS = {f.__name__: f for f in (copy, read, to_keras, to_hf, load, keras_hub_save, keras_hub_load)}


def measure(step, source, target):
    """Run one step in this process and print a JSON line."""
    import keras  # noqa: F401

    if step.startswith("keras_hub"):
        import keras_hub  # noqa: F401
    else:
        import keras_vaultgemma.conversion  # noqa: F401
    memory = Memory()
    memory.start()
    start = time.perf_counter()
    STEPS[step](source, target)
    seconds = time.perf_counter() - start
    memory.done.set()
    memory.join()
    print(json.dumps({"seconds": seconds, "gigabytes": (max(memory.peak, resident()) - memory.before) / 1e9}))


def run(step, source, target, backend="jax", keep=False):
    """(median seconds, most gigabytes) of a step; TARGET is removed before each run, and after the last unless kept."""
    results = []
    for _ in range(1 if keep else RUNS):
        shutil.rmtree(target, ignore_errors=True)
        command = [sys.executable, __file__, str(source), "--step", step, "--target", str(target)]
        environment = {**os.environ, "KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3"}
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
        results.append(json.loads(done.stdout.splitlines()[-1]))
    if not keep:
        shutil.rmtree(target, ignore_errors=True)
    return statistics.median(r["seconds"] for r in results), max(r["gigabytes"] for r in results)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the checkpoints are, or are written to")
    parser.add_argument("--step", choices=STEPS, help=argparse.SUPPRESS)
    parser.add_argument("--target", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.step:
        return measure(options.step, options.folder, options.target)

    folder = options.folder
    folder.mkdir(parents=True, exist_ok=True)
    source, preset, hub, scratch = (folder / name for name in ("hugging_face", "keras", "keras_hub", "scratch"))
    if not source.exists():
        full_size.run("write", source, "")
    if not preset.exists():
        run("to_keras", source, preset, keep=True)
    if not hub.exists():
        run("keras_hub_save", source, hub, keep=True)

    base, _ = run("copy", source, scratch)
    print(f"{'conversion, bfloat16, 2.08 GB':34}{'time, s':>9}{'x copy':>8}{'memory, GB':>12}")
    print(f"{'cp and sha256':34}{base:9.2f}{1:8.2f}")
    for label, step, place in (
        ("Hugging Face to Keras", "to_keras", source),
        ("Keras to Hugging Face", "to_hf", preset),
        ("keras-hub (Kaggle) to Keras", "to_keras", hub),
    ):
        seconds, memory = run(step, place, scratch)
        print(f"{label:34}{seconds:9.2f}{seconds / base:8.2f}{memory:12.2f}", flush=True)

    base, _ = run("read", source, scratch)
    print(f"\n{'loading, bfloat16, 2.08 GB':34}{'time, s':>9}{'x read':>8}{'memory, GB':>12}{'x keras-hub':>13}")
    print(f"{'reading the file':34}{base:9.2f}{1:8.2f}")
    for backend in BACKENDS:
        peer, memory = run("keras_hub_load", hub, scratch, backend)
        print(f"{f'keras-hub, {backend}':34}{peer:9.2f}{peer / base:8.2f}{memory:12.2f}", flush=True)
        for label, place in (("Hugging Face", source), ("Keras", preset)):
            seconds, memory = run("load", place, scratch, backend)
            row = f"{f'from_preset, {label}, {backend}':34}{seconds:9.2f}{seconds / base:8.2f}{memory:12.2f}"
            print(f"{row}{seconds / peer:13.2f}", flush=True)
    return None


if __name__ == "__main__":
    main()
