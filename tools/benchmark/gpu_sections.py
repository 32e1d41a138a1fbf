"""The sections of `gpu.py`: each runs in a process of its own and prints one line of JSON.

KERAS_BACKEND=jax python tools/benchmark/gpu_sections.py decode [--tiny]
"""

import argparse
import importlib
import importlib.metadata
import json
import os
import statistics
import sys
import time
from pathlib import Path

GPU_BUILDS = {
    "jax": '`pip install "jax[cuda13]"`, or cuda12 for older drivers',
    "torch": "a build for CUDA, by the command that https://pytorch.org/get-started prints",
    "tensorflow": '`pip install "tensorflow[and-cuda]"`',
}
PROMPT = 16
FEW, MANY = 1, 32
WORK = dict(rank=8, batch=32, length=256, steps=8, sampling=1 / 100, dtype="bfloat16")
TINY_WORK = dict(WORK, batch=4, length=16, steps=3, sampling=1 / 20)


def probe(tiny):
    """Return the versions of libraries and the device of the backend.

    Returns:
        Dict of "device" (string, or None on a CPU), "versions", and "missing", a sentence that says
        what to install, or None.
    """
    backend = os.environ["KERAS_BACKEND"]
    found = {"device": None, "versions": {}, "missing": None}
    for module in (backend, "keras", "keras_hub", "keras_vaultgemma.models.causal_lm"):
        try:
            importlib.import_module(module)
        except ImportError as error:
            found["missing"] = f"{backend} cannot be used: {error}."
            return found
    for package in (backend, "keras", "keras-hub"):
        try:
            found["versions"][package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:  # a build under another name
            found["versions"][package] = "?"
    import device

    found["device"] = device.name()
    if found["device"] is None:
        found["missing"] = (
            f"{backend} {found['versions'][backend]} sees no GPU: it needs {GPU_BUILDS[backend]}."
        )
    return found


def correctness(tiny):
    import gpu_correctness

    return gpu_correctness.measure(tiny)


def decode(tiny):
    """Measure greedy decoding in bfloat16, of one prompt and of many together.

    Tokens/s are those of a whole call.
    """
    import generate
    import random_model

    size = random_model.SIZES["tiny" if tiny else "1b"]
    return _decode(generate.build(size, "bfloat16")[0], tiny)


def decode_transformers(tiny):
    import generate
    import random_model

    size = random_model.SIZES["tiny" if tiny else "1b"]
    return _decode(generate.build_transformers(size, "bfloat16"), tiny)


def _decode(call, tiny):
    import device
    import generate

    new, result = 8 if tiny else 64, {}
    device.reset_peak()
    for rows in (FEW, MANY):
        prompts = [PROMPT] * rows
        first_call = generate.once(call, prompts, new)
        first_token = generate.warm(call, prompts, 1)
        result[str(rows)] = {
            "first_call_s": first_call,
            "first_token_s": first_token,
            "tokens_per_s": rows * new / generate.warm(call, prompts, new),
            "peak_gb": device.peak() / 1e9,
        }
    return result


def step(peer, tiny):
    """Measure a training step of LoRA (rank 8 on query and value) over a bfloat16 base."""
    import private_fit
    import random_model

    work = TINY_WORK if tiny else WORK
    return private_fit.measure(peer, dict(work, size=random_model.SIZES["tiny" if tiny else "1b"]))


def bandwidth(tiny):
    """Measure the bytes that the device reads or writes per second: it limits decoding."""
    import keras

    x = keras.ops.ones((2**22 if tiny else 2**30,), "bfloat16")

    def read_and_write():
        # The number of an element waits for all of them.
        return float((x + 1)[-1])

    read_and_write()
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        read_and_write()
        seconds.append(time.perf_counter() - start)
    return {"gb_per_s": 2 * 2 * x.shape[0] / statistics.median(seconds) / 1e9}


SECTIONS = {
    "probe": probe,
    "correctness": correctness,
    "bandwidth": bandwidth,
    "decode": decode,
    "decode_transformers": decode_transformers,
    **{
        peer: lambda tiny, peer=peer: step(peer, tiny)
        for peer in ("plain", "private", "peft", "opacus")
    },
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("section", choices=[*SECTIONS, "reference"])
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.section == "reference":
        import gpu_correctness

        return gpu_correctness.write_reference(options.out, options.tiny)
    return print(json.dumps(SECTIONS[options.section](options.tiny)), flush=True)


if __name__ == "__main__":
    sys.exit(main())
