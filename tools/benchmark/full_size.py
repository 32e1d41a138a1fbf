"""Compare a checkpoint of VaultGemma 1B's size with transformers on each backend.

    python tools/benchmark/full_size.py FOLDER

Reports logits, load time and memory. The weights are random, because the real ones are gated.
FOLDER (2.1 GB) is written once and reused. Each model runs in a process of its own, one after the
other, and needs 5 to 9 GB. Exits with 1 if logits differ by more than 1e-3.
"""

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

BACKENDS = ("jax", "torch", "tensorflow")
TOLERANCE = 1e-3
PARAMETERS = 1_038_741_120
CONFIG = dict(
    vocab_size=256_000,
    hidden_size=1152,
    intermediate_size=6912,
    num_hidden_layers=26,
    num_attention_heads=4,
    num_key_value_heads=4,
    head_dim=256,
    query_pre_attn_scalar=256,
    attn_logit_softcapping=None,
    final_logit_softcapping=None,
    layer_types=["full_attention"] * 26,
    sliding_window=512,
    max_position_embeddings=1024,
    rms_norm_eps=1e-6,
    # Larger than the released model's, so that attention is far from uniform.
    initializer_range=0.05,
)
PROMPT = np.concatenate([[2], np.random.default_rng(0).integers(217, 256_000, 23)])[None]


def peak_gigabytes():
    """Return the peak of this process's resident memory, mapped pages of files included."""
    return (
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        * (1 if sys.platform == "darwin" else 1024)
        / 1e9
    )


def write(folder):
    """Write the checkpoint next to `folder` and rename it. An interrupted run leaves none."""
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.VaultGemmaConfig(**CONFIG)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    for name, parameter in model.named_parameters():
        if "norm" in name:  # zeros at first, which would hide norms that are swapped
            torch.nn.init.normal_(parameter, std=0.1)
    if model.num_parameters() != PARAMETERS:
        raise SystemExit(
            f"The model must have {PARAMETERS:,} parameters. It has {model.num_parameters():,}"
        )
    unfinished = folder.with_name(folder.name + ".unfinished")
    model.save_pretrained(unfinished)
    unfinished.rename(folder)


def transformers_logits(folder):
    import torch
    import transformers

    start = time.perf_counter()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    yield time.perf_counter() - start
    with torch.inference_mode():
        yield model(torch.from_numpy(PROMPT)).logits.numpy()


def keras_logits(folder):
    import keras

    from keras_vaultgemma import VaultGemmaCausalLM

    start = time.perf_counter()
    model = VaultGemmaCausalLM.from_preset(folder, preprocessor=None, dtype="float32")
    yield time.perf_counter() - start
    yield keras.ops.convert_to_numpy(
        model({"token_ids": PROMPT, "padding_mask": np.ones_like(PROMPT)})
    )


def measure(steps, out):
    """Write load seconds, logits and memory to the file `out`."""
    load_seconds, load_peak = next(steps), peak_gigabytes()
    np.savez(
        out,
        load_seconds=load_seconds,
        load_peak=load_peak,
        logits=next(steps),
        peak=peak_gigabytes(),
    )


def run(step, folder, out, backend="torch"):
    """Run one step in a process of its own, because its memory is measured."""
    environment = {**os.environ, "KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3"}
    subprocess.run(
        [sys.executable, __file__, folder, "--step", step, "--out", out],
        env=environment,
        check=True,
    )


def compare(folder):
    """Print a row per backend, then the table. Return True if all logits agree."""
    rows = []
    with tempfile.TemporaryDirectory() as directory:
        for name in ("transformers", *BACKENDS):
            out = Path(directory) / f"{name}.npz"
            if name == "transformers":
                run("transformers", folder, out)
                expected = np.load(out)["logits"]
                print(
                    f"logits: {expected.shape}, standard deviation {expected.std():.2f}", flush=True
                )
            else:
                run("keras", folder, out, name)
            result = np.load(out)
            difference = float(np.abs(result["logits"] - expected).max())
            rows.append(
                (name, result["load_seconds"], result["load_peak"], result["peak"], difference)
            )
            print(
                "{}: loaded in {:.1f} s, at most {:.2f} GB; {:.2f} GB in all; {:.1e} off".format(
                    *rows[-1]
                ),
                flush=True,
            )
    print(f"\n{'float32':14}{'load, s':>9}{'load, GB':>10}{'peak, GB':>10}{'difference':>12}")
    for name, seconds, load_peak, peak, difference in rows:
        print(f"{name:14}{seconds:9.1f}{load_peak:10.2f}{peak:10.2f}{difference:12.1e}")
    # Not `max(...) <= TOLERANCE`, which a NaN could pass.
    return all(difference <= TOLERANCE for *_, difference in rows)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="where the checkpoint is, or is written to")
    parser.add_argument(
        "--step", choices=("write", "transformers", "keras"), help=argparse.SUPPRESS
    )
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.step == "write":
        write(args.folder)
    elif args.step:
        measure(
            (transformers_logits if args.step == "transformers" else keras_logits)(args.folder),
            args.out,
        )
    else:
        if not args.folder.exists():
            run("write", args.folder, "")
        if not compare(args.folder):
            raise SystemExit(f"A difference is above {TOLERANCE}")


if __name__ == "__main__":
    main()
