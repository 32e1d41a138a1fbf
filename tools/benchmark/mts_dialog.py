"""Fine-tune the tiny preset on dialogues of doctors (MTS-Dialog): bits per byte, and samples.

    python tools/benchmark/mts_dialog.py FOLDER [--backends jax torch tensorflow]
        [--runs lora lora_all full private_8 private_3] [--json FILE]

FOLDER has train.csv and validation.csv (Ben Abacha et al., EACL 2023; CC BY 4.0), whose column
`dialogue` is trained on. The preset was trained on fairy tales. Each run is a process of its own.
Exits with 1 if one failed.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

BACKENDS = ("jax", "torch", "tensorflow")
COLUMN, PROMPT = "dialogue", "Doctor: What brings you here today?"
BATCH_SIZE, NEW_TOKENS = 8, 48


def lora():
    return dict(lora_rank=8, learning_rate=1e-3, epochs=3)


def lora_all():
    """The layers and the rank that the rule chooses for private training, without privacy."""
    from keras_vaultgemma.recipes.private_options import TARGETS

    return dict(lora_rank=4, lora_targets=TARGETS, learning_rate=1e-3, epochs=3)


def full():
    return dict(lora_rank=0, learning_rate=5e-4, epochs=3)


def private(epsilon):
    """Options of the rule of `finetune --private`, and rows of 128 tokens."""
    return dict(epsilon=epsilon, row_length=128)


def private_8():
    return private(8.0)


def private_3():
    return private(3.0)


RUNS = {f.__name__: f for f in (lora, lora_all, full, private_8, private_3)}
"""Each returns options of `fine_tune`."""


def fine_tune(
    folder,
    lora_rank=None,
    lora_targets=None,
    learning_rate=None,
    epochs=None,
    row_length=None,
    epsilon=None,
):
    """Run once and return bits per byte `before` and `after`, `seconds` and a `sample`.

    Args:
        epsilon: float or None. Budget of private training, with the options of the rule.
        row_length: int or None. Tokens of a row that has one dialogue, the unit that private
            training protects. If None, dialogues are packed into full rows.
    """
    import keras

    from keras_vaultgemma import VaultGemmaCausalLM
    from keras_vaultgemma.data.text_files import read_records
    from keras_vaultgemma.recipes.finetune import make_optimizer, train
    from keras_vaultgemma.recipes.finetune_config import FinetuneConfig

    start = time.perf_counter()
    keras.utils.set_random_seed(0)
    files = [
        read_records(folder / name, text_column=COLUMN) for name in ("train.csv", "validation.csv")
    ]
    config = FinetuneConfig(
        lora_rank=lora_rank,
        lora_targets=lora_targets,
        learning_rate=learning_rate,
        epochs=epochs,
        private=epsilon is not None,
        epsilon=epsilon,
    )
    config, private = config.complete(len(files[0].texts))
    model = VaultGemmaCausalLM.from_preset("vaultgemma_tiny")
    if config.lora_rank:
        model.backbone.enable_lora(config.lora_rank, config.lora_targets)
    held_out = files[1].tokenize(model.preprocessor, True)
    model.preprocessor.sequence_length = row_length or model.preprocessor.sequence_length
    training = files[0].tokenize(model.preprocessor, row_length is None)
    outcome = train(
        model,
        training,
        held_out,
        {"optimizer": make_optimizer(config, private), "privacy": config.guarantee()},
        {"batch_size": config.batch_size or BATCH_SIZE, "epochs": config.epochs, "verbose": 0},
    )
    spent = model.privacy.spent().epsilon if model.privacy.ledger.runs else None
    seconds = time.perf_counter() - start
    model.compile(sampler="top_p")
    return {
        "before": outcome.before.bits_per_byte,
        "after": outcome.after.bits_per_byte,
        "epsilon": spent,
        "seconds": seconds,
        "tokens_per_second": outcome.history["tokens_per_second"][-1],
        "sample": model.generate(PROMPT, max_new_tokens=NEW_TOKENS, seed=0),
    }


def run(name, backend, folder):
    """Run one training in a process of its own. Return its figures, or {} if it fails."""
    command = [sys.executable, __file__, str(folder), "--run", name]
    environment = {
        **os.environ,
        "KERAS_BACKEND": backend,
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "PYTHONWARNINGS": "ignore",
    }
    # A home of its own: the dialogues are public, and each run measures a budget of its own.
    with tempfile.TemporaryDirectory() as home:
        environment["KERAS_VAULTGEMMA_HOME"] = home
        done = subprocess.run(
            command, env=environment, stdout=subprocess.PIPE, text=True, check=False
        )
    return {} if done.returncode else json.loads(done.stdout.splitlines()[-1])


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=BACKENDS)
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=list(RUNS))
    parser.add_argument("--json", type=Path, help="write results into this file, one a line")
    parser.add_argument("--run", choices=RUNS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        return print(json.dumps(fine_tune(options.folder, **RUNS[options.run]())))

    results, failed = [], []
    for name, backend in ((name, backend) for name in options.runs for backend in options.backends):
        result = run(name, backend, options.folder)
        print(f"{name} {backend}: {result or 'failed'}", flush=True)
        if not result:
            failed.append(f"{name} {backend}")
            continue
        results.append({"run": name, "backend": backend, **result})
        if options.json:
            options.json.write_text("".join(json.dumps(row) + "\n" for row in results))
    columns = (
        "trained",
        "backend",
        "ε spent",
        "bits per byte before",
        "after",
        "tokens/s",
        "whole run, s",
    )
    print(f"\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for r in results:
        print(
            f"| {r['run']} | {r['backend']} | {r['epsilon'] or ''} "
            f"| {r['before']:.3f} | {r['after']:.3f} | {r['tokens_per_second']:,.0f} "
            f"| {r['seconds']:.0f} |"
        )
    return f"Failed: {', '.join(failed)}" if failed else None


if __name__ == "__main__":
    sys.exit(main())
