"""Measure conversion and loading at VaultGemma 1B's size: time and memory.

    python tools/benchmark/conversion.py FOLDER

Compares with copying and reading the files, and with keras-hub. FOLDER gets a random bfloat16
checkpoint in each format (8 GB), unless it has them; `full_size.py` writes the first.

Each step runs in a process of its own, one after the other. All steps of a table run in turns,
three times; the table has median times and the largest memory. Memory is what is resident beyond
the interpreter and the imported libraries, without mapped pages of files (RssAnon of Linux),
sampled every 5 ms. Each process first allocates and frees `WARM` bytes, because the host of a
virtual machine takes back memory that was free for seconds, and returning 2 GB takes up to two
seconds more.
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
import numpy as np

RUNS = 3
WARM = 3 * 2**30
BACKENDS = ("jax", "torch", "tensorflow")


def resident():
    """Return the anonymous resident bytes of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    raise SystemExit("RssAnon needs Linux")


class Memory(threading.Thread):
    """A thread that records the peak of resident memory."""

    def __init__(self):
        super().__init__(daemon=True)
        self.before = self.peak = resident()
        self.done = threading.Event()

    def run(self):
        while not self.done.wait(0.005):
            self.peak = max(self.peak, resident())


def copy(source, target):
    """Copy and hash the files, the least that any conversion does."""
    subprocess.run(["cp", "-r", source, target], check=True)
    for path in sorted(Path(target).iterdir()):
        with path.open("rb") as file:
            hashlib.file_digest(file, "sha256")


def read(source, target):
    """Read the weights file into memory."""
    path = next(path for path in Path(source).iterdir() if path.suffix in (".safetensors", ".h5"))
    path.read_bytes()


def to_keras(source, target):
    from keras_vaultgemma import convert

    convert(source, target, to="keras", progress=False)


def to_hf(source, target):
    from keras_vaultgemma import convert

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
        from keras_vaultgemma import convert  # noqa: F401
    np.ones(WARM, "u1")
    memory = Memory()
    memory.start()
    start = time.perf_counter()
    STEPS[step](source, target)
    seconds = time.perf_counter() - start
    memory.done.set()
    memory.join()
    print(
        json.dumps(
            {"seconds": seconds, "gigabytes": (max(memory.peak, resident()) - memory.before) / 1e9}
        )
    )


def run(step, source, target, backend):
    """Run a step in a process of its own and return its `seconds` and `gigabytes`."""
    shutil.rmtree(target, ignore_errors=True)
    command = [sys.executable, __file__, str(source), "--step", step, "--target", str(target)]
    environment = {**os.environ, "KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def run_in_turns(steps, scratch):
    """Return (median seconds, most gigabytes) of each (step, source, backend)."""
    results = [[] for _ in steps]
    for _ in range(RUNS):
        for (step, source, backend), of_step in zip(steps, results, strict=True):
            of_step.append(run(step, source, scratch, backend))
            print(
                f"{step} of {source.name}, {backend}: {of_step[-1]['seconds']:.2f} s",
                file=sys.stderr,
                flush=True,
            )
            shutil.rmtree(scratch, ignore_errors=True)
    return [
        (statistics.median(r["seconds"] for r in of_step), max(r["gigabytes"] for r in of_step))
        for of_step in results
    ]


def compare_conversions(source, preset, hub, scratch):
    labels = (
        "cp and sha256",
        "Hugging Face to Keras",
        "Keras to Hugging Face",
        "keras-hub (Kaggle) to Keras",
    )
    steps = (("copy", source), ("to_keras", source), ("to_hf", preset), ("to_keras", hub))
    results = run_in_turns([(*step, "jax") for step in steps], scratch)
    base, _ = results[0]
    print(f"{'conversion, bfloat16, 2.08 GB':34}{'time, s':>9}{'x copy':>8}{'memory, GB':>12}")
    for label, (seconds, memory) in zip(labels, results, strict=True):
        print(f"{label:34}{seconds:9.2f}{seconds / base:8.2f}{memory:12.2f}")


def compare_loading(source, preset, hub, scratch):
    steps = (("read", source), ("keras_hub_load", hub), ("load", source), ("load", preset))
    labels = ("reading the file", "keras-hub", "from_preset, Hugging Face", "from_preset, Keras")
    results = run_in_turns([(*step, backend) for backend in BACKENDS for step in steps], scratch)
    columns = f"{'time, s':>9}{'x read':>8}{'memory, GB':>12}{'x keras-hub':>13}"
    print(f"{'loading, bfloat16, 2.08 GB':34}{columns}")
    for i, backend in enumerate(BACKENDS):
        of_backend = results[len(steps) * i : len(steps) * (i + 1)]
        (base, _), (peer, _) = of_backend[:2]
        for label, (seconds, memory) in zip(labels, of_backend, strict=True):
            row = f"{f'{label}, {backend}':34}{seconds:9.2f}{seconds / base:8.2f}{memory:12.2f}"
            print(f"{row}{seconds / peer:13.2f}")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="where the checkpoints are, or are written to")
    parser.add_argument(
        "--table", choices=TABLES, action="append", help="one of the tables; both by default"
    )
    parser.add_argument("--step", choices=STEPS, help=argparse.SUPPRESS)
    parser.add_argument("--target", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.step:
        return measure(options.step, options.folder, options.target)

    folder = options.folder
    folder.mkdir(parents=True, exist_ok=True)
    source, preset, hub, scratch = (
        folder / name for name in ("hugging_face", "keras", "keras_hub", "scratch")
    )
    if not source.exists():
        full_size.run("write", source, "")
    if not preset.exists():
        run("to_keras", source, preset, "jax")
    if not hub.exists():
        run("keras_hub_save", source, hub, "jax")
    for table in options.table or TABLES:
        TABLES[table](source, preset, hub, scratch)
    return None


TABLES = {"conversion": compare_conversions, "loading": compare_loading}

if __name__ == "__main__":
    main()
