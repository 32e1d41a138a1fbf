"""Measure generation at VaultGemma 1B's size and compare with keras-hub and transformers.

    python tools/benchmark/generate.py [--backends jax torch] [--dtypes float32]
        [--only generate batch] [--rows 8] [--png FILE] [--json FILE]

Weights are random. Each measurement runs in a process of its own, one after the other, and needs
up to 10 GB. Times are medians of three warm calls, except that of the first call, which compiles.

A decode step reads every weight once, so the read bandwidth over the bytes of all weights limits
it. The bandwidth is the best of 7 sums of 1 GiB by NumPy in two threads, measured right before
and after decoding in the same process, because it changes from minute to minute on shared
machines.

keras-hub's first token is at its default length of 1,024, which it computes for any prompt; its
tokens/s are those of a whole call. With `--json` a run can be made in parts: the report includes
what the file already has. Exits with 1 if a measurement failed.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import device
import full_size
import generate_report
import numpy as np
import random_model

ROOT = Path(__file__).parents[2]
RUNS, PROMPT, NEW, CONTEXT = 3, 16, 32, 1024
BACKENDS = ("jax", "torch", "tensorflow")
PLAN = {
    ("jax", "float32"): "generate keras_hub warm_cache batch prompt_lookup memory",
    ("jax", "bfloat16"): "generate keras_hub warm_cache batch memory",
    ("jax", "int8"): "generate warm_cache memory",
    ("torch", "float32"): "generate keras_hub transformers batch prompt_lookup memory",
    ("torch", "bfloat16"): "generate transformers batch memory",
    ("torch", "int8"): "generate memory",
    ("tensorflow", "float32"): "generate keras_hub batch prompt_lookup memory",
}
BYTES = {"float32": 4, "bfloat16": 2, "int8": 1}


def build(size, dtype):
    """Return a function of prompt lengths and new tokens that generates, and its model."""
    model = random_model.vaultgemma(size, dtype)

    def call(lengths, new):
        model.generate(
            [random_ids(size, n) for n in lengths], max_new_tokens=new, stop_token_ids=None
        )

    return call, model


def random_ids(size, length):
    return np.random.default_rng(length).integers(5, size["vocabulary_size"], length).tolist()


def on_cpu():
    import keras

    return "cpu" in str(keras.ops.zeros(()).device).lower()


def once(call, *args):
    start = time.perf_counter()
    call(*args)
    return time.perf_counter() - start


def warm(call, *args):
    """Return the median seconds of a call, after one that compiles."""
    call(*args)
    return statistics.median(once(call, *args) for _ in range(RUNS))


def bandwidth():
    """Measure the read bandwidth of the CPU in bytes per second."""
    data = np.ones(2**28, "float32")
    with ThreadPoolExecutor(2) as pool:
        return data.nbytes / min(
            once(lambda: list(pool.map(np.sum, np.split(data, 2)))) for _ in range(7)
        )


def within_limit(measure, size, dtype):
    """Return the tokens/s of `measure()`, and the limit that memory sets at the same time."""
    if not on_cpu():
        return {"tokens_per_s": measure()}
    before, tokens_per_s, after = bandwidth(), measure(), bandwidth()
    limit = max(before, after) / (random_model.parameters(size) * BYTES[dtype])
    return {"tokens_per_s": tokens_per_s, "limit_tokens_per_s": limit}


def first_call_and_decoding(call, size, dtype):
    """Measure `call([prompt length], new tokens)`. Tokens/s are those of NEW more tokens."""
    first_call, first_token = once(call, [PROMPT], NEW), warm(call, [PROMPT], 1)
    decoding = within_limit(
        lambda: NEW / (warm(call, [PROMPT], 1 + NEW) - first_token), size, dtype
    )
    return {"first_call_s": first_call, "first_token_s": first_token, **decoding}


def generate(size, dtype, options):
    return first_call_and_decoding(build(size, dtype)[0], size, dtype)


def keras_hub(size, dtype, options):
    from keras_hub.models import GemmaCausalLM

    model = GemmaCausalLM(random_model.keras_hub_gemma(size, dtype), preprocessor=None)
    model.compile(sampler="greedy")

    def call(prompt, new):
        token_ids = np.array([random_ids(size, prompt) + [0] * new], "int32")
        padding_mask = np.array([[1] * prompt + [0] * new], "int32")
        model.generate({"token_ids": token_ids, "padding_mask": padding_mask}, stop_token_ids=None)

    first_call = once(call, PROMPT, NEW)
    decoding = within_limit(lambda: NEW / warm(call, PROMPT, NEW), size, dtype)
    return {"first_call_s": first_call, "first_token_s": warm(call, CONTEXT - 1, 1), **decoding}


def build_transformers(size, dtype):
    """Return a function of equal prompt lengths and new tokens that generates."""
    import torch
    from transformers import AutoModelForCausalLM, VaultGemmaConfig

    config = VaultGemmaConfig(
        **full_size.CONFIG
        | dict(vocab_size=size["vocabulary_size"], hidden_size=size["hidden_dim"])
        | dict(intermediate_size=size["intermediate_dim"], num_hidden_layers=size["num_layers"])
        | dict(layer_types=["full_attention"] * size["num_layers"])
    )
    at = device.torch_device()
    with at:
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).eval()

    def call(lengths, new):
        ids = torch.tensor([random_ids(size, n) for n in lengths], device=at)
        options = dict(min_new_tokens=new, max_new_tokens=new, do_sample=False, pad_token_id=0)
        model.generate(ids, attention_mask=torch.ones_like(ids), **options).cpu()

    return call


def transformers(size, dtype, options):
    return first_call_and_decoding(build_transformers(size, dtype), size, dtype)


def warm_cache(size, dtype, options):
    """Measure a first call. `run` uses the second of two processes that share a cache."""
    return {"first_call_s": once(build(size, dtype)[0], [PROMPT], NEW)}


def batch(size, dtype, options):
    """Measure prompts of 5 to 200 tokens together, and one of their mean length alone."""
    (call, _), lengths, new = (
        build(size, dtype),
        np.linspace(5, 200, options.rows).astype(int).tolist(),
        64,
    )
    alone = new / warm(call, [round(statistics.mean(lengths))], new)
    together = len(lengths) * new / warm(call, lengths, new)
    return {"prompts": len(lengths), "tokens_per_s": together, "x_1_prompt": together / alone}


def prompt_lookup(size, dtype, options):
    """Compare tokens/s with and without prompt lookup on text that repeats its prompt.

    Random weights generate no such text, so the draft is replaced by the right guesses.
    """
    from keras_vaultgemma.generation import prompt_lookup

    _, model = build(size, dtype)
    ids = random_ids(size, PROMPT)

    def call(**options):
        return model.generate(ids, max_new_tokens=2 * NEW, stop_token_ids=None, **options)

    text = call()
    prompt_lookup.draft = lambda found, length: text[len(found) : len(found) + length]
    same = call(prompt_lookup=True) == text
    return {"x_without": warm(call) / warm(lambda: call(prompt_lookup=True)), "same_text": same}


def memory(size, dtype, options):
    """Measure the bytes of the weights, and the memory of a call that fills the context.

    The second such call counts, because the first one compiles, which takes memory too.
    """
    call, model = build(size, dtype)
    variable_bytes = sum(math.prod(v.shape) * BYTES.get(v.dtype, 4) for v in model.variables)
    result = {"variables_over_float32": variable_bytes / (4 * random_model.parameters(size))}
    if sys.platform == "linux" and on_cpu():
        for name in ("gb_above_weights_first_call", "gb_above_weights"):
            before = random_model.reset_peak()
            call([1000], 8)
            result[name] = (random_model.resident("VmHWM") - before) / 1e9
        cache = 2 * size["num_layers"] * CONTEXT * size["num_key_value_heads"] * size["head_dim"]
        result["gb_of_cache"] = (
            cache * BYTES["bfloat16" if dtype == "bfloat16" else "float32"] / 1e9
        )
    return result


def int8_loss(size, dtype, options):
    """Measure held-out bits per byte of the bundled model before and after quantizing."""
    sys.path.append(str(ROOT / "tools"))
    import train_tiny_preset

    from keras_vaultgemma import VaultGemmaCausalLM

    _, held_out = train_tiny_preset.split(options.corpus.read_text(encoding="utf-8"))
    model = VaultGemmaCausalLM.from_preset("vaultgemma_tiny")
    before = train_tiny_preset.bits_per_byte(model, held_out)
    model.quantize("int8")
    return {"float32": before, "int8": train_tiny_preset.bits_per_byte(model, held_out)}


STEPS = (generate, keras_hub, transformers, warm_cache, batch, prompt_lookup, memory, int8_loss)
STEPS = {f.__name__: f for f in STEPS}


def run(step, backend, dtype, options):
    """Run one step in a process of its own. Return its figures, or {} if it fails."""
    command = [sys.executable, __file__, "--step", step, "--dtype", dtype, "--size", options.size]
    command += ["--rows", str(options.rows)]
    command += ["--corpus", options.corpus] if options.corpus else []
    environment = {
        **os.environ,
        "KERAS_BACKEND": backend,
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "PYTHONWARNINGS": "ignore",
    }
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    with tempfile.TemporaryDirectory() as folder:
        if step == "warm_cache":
            environment |= {
                "JAX_COMPILATION_CACHE_DIR": folder,
                "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            }
            environment |= {"JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1"}
            subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, check=False)
        done = subprocess.run(
            command, env=environment, stdout=subprocess.PIPE, text=True, check=False
        )
    return {} if done.returncode else json.loads(done.stdout.splitlines()[-1])


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=BACKENDS)
    parser.add_argument("--dtypes", nargs="+", choices=BYTES, default=list(BYTES))
    parser.add_argument(
        "--only", nargs="+", choices=STEPS, default=list(STEPS), help="measurements; default: all"
    )
    parser.add_argument("--rows", type=int, default=8, help="prompts of `batch`; default: 8")
    parser.add_argument(
        "--corpus", type=Path, help="text the bundled model was trained on; int8_loss needs it"
    )
    parser.add_argument("--png", type=Path, help="draw tokens/s into this file")
    parser.add_argument("--json", type=Path, help="file of results, one per line")
    parser.add_argument("--size", choices=random_model.SIZES, default="1b", help=argparse.SUPPRESS)
    parser.add_argument("--step", choices=STEPS, help=argparse.SUPPRESS)
    parser.add_argument("--dtype", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.step:
        result = STEPS[options.step](random_model.SIZES[options.size], options.dtype, options)
        return print(json.dumps(result))

    plan = []
    for (backend, dtype), steps in PLAN.items():
        if backend in options.backends and dtype in options.dtypes:
            plan += [(step, backend, dtype) for step in steps.split()]
    plan = [
        key for key in [*plan, ("int8_loss", options.backends[0], "")] if key[0] in options.only
    ]
    results, failed = generate_report.read(options.json), []
    for key in plan:
        if key[0] == "int8_loss" and not options.corpus:
            print("int8_loss: left out, since it needs --corpus")
            continue
        label, result = " ".join(key).strip(), run(*key, options)
        figures = [f"{name} {value:.5g}" for name, value in result.items()]
        print(f"{label}: {', '.join(figures) or 'failed'}", flush=True)
        if not result:
            failed.append(label)
            continue
        results[key] = result
        if options.json:
            generate_report.write(results, options.json)
    generate_report.print_tables(results)
    if options.png:
        generate_report.draw(results, options.png)
    return f"Failed: {', '.join(failed)}" if failed else None


if __name__ == "__main__":
    sys.exit(main())
