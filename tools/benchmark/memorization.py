"""What the tiny preset remembers of dialogues of doctors (MTS-Dialog) after training.

    python tools/benchmark/memorization.py FOLDER [--runs before plain_96x16 plain_18x40 private]
        [--json FILE]
    python tools/benchmark/memorization.py --speed 10000

FOLDER has train.csv (Ben Abacha et al., EACL 2023; CC BY 4.0). Each run trains all weights on 120
dialogues and compares them with 120 others, in a process of its own. Exits with 1 if one failed, or
if 18 plain steps do not give 0 % of exact matches and an AUC above 0.95, or 18 private ones an AUC
within 0.5 ± 0.1. `--speed` measures how long `measure_memorization` takes for that many random
records of 100 tokens, without a baseline.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

COLUMN, RECORDS, PREFIX, SUFFIX = "dialogue", 120, 25, 25
EPSILON, LEARNING_RATE, ROW = 8.0, 2e-3, 128

RUNS = {
    "before": None,
    "plain_96x16": dict(steps=96, batch_size=16),
    "plain_18x40": dict(steps=18, batch_size=40),
    "private": dict(steps=18, batch_size=40, epsilon=EPSILON),
}


def read(folder, tokenizer):
    """Return members and controls: dialogues that are long enough, in random order."""
    import numpy as np

    from keras_vaultgemma.data.text_files import read_records

    texts = dict.fromkeys(read_records(folder / "train.csv", text_column=COLUMN).texts)
    texts = [
        x
        for x, ids in zip(texts, tokenizer.tokenize([*texts]), strict=True)
        if len(ids) >= PREFIX + SUFFIX
    ]
    chosen = np.random.default_rng(0).permutation(len(texts))[: 2 * RECORDS]
    texts = [texts[i] for i in chosen]
    return texts[:RECORDS], texts[RECORDS:]


def train(model, records, steps, batch_size, epsilon=None):
    import keras

    from keras_vaultgemma import privacy

    model.preprocessor.sequence_length = ROW
    guarantee = None if epsilon is None else privacy.DPSGD(epsilon=epsilon, delta=1e-3)
    model.compile(keras.optimizers.Adam(LEARNING_RATE), privacy=guarantee)
    per_epoch = len(records) // batch_size
    if steps % per_epoch == 0:
        return model.fit(records, batch_size=batch_size, epochs=steps // per_epoch, verbose=0)
    rows = [records[i % len(records)] for i in range(steps * batch_size)]
    return model.fit(rows, batch_size=batch_size, epochs=1, verbose=0)


def measure(folder, name):
    import keras

    from keras_vaultgemma import VaultGemmaCausalLM, evaluation

    keras.utils.set_random_seed(0)
    start = time.perf_counter()
    base = VaultGemmaCausalLM.from_preset("vaultgemma_tiny")
    members, controls = read(folder, base.preprocessor.tokenizer)
    model = VaultGemmaCausalLM.from_preset("vaultgemma_tiny")
    if RUNS[name]:
        train(model, members, **RUNS[name])
    seconds = time.perf_counter() - start
    options = dict(prefix_length=PREFIX, suffix_length=SUFFIX, controls=controls)
    memorization = evaluation.measure_memorization(model, members, baseline=base, **options)
    membership = evaluation.measure_membership(model, members, controls, reference=base)
    spent = model.privacy.spent().epsilon if model.privacy.ledger.runs else None
    return {
        "epsilon": spent,
        "training_seconds": seconds,
        "seconds": time.perf_counter() - start,
        "memorization": memorization.as_dict(),
        "membership": membership.as_dict(),
    }


def measure_speed(count):
    """Print the seconds and the processor seconds of one call."""
    import numpy as np

    from keras_vaultgemma import VaultGemmaCausalLM, evaluation

    model = VaultGemmaCausalLM.from_preset("vaultgemma_tiny")
    records = np.random.default_rng(0).integers(500, 4096, (count, 100)).tolist()
    start, processor = time.perf_counter(), time.process_time()
    evaluation.measure_memorization(model, records)
    seconds, used = time.perf_counter() - start, time.process_time() - processor
    print(f"{count:,} records: {seconds:.0f} s, {used:.0f} processor seconds")


def auc(result, name):
    """Return the area under the curve of an attack."""
    return next(x["auc"] for x in result["membership"]["attacks"] if x["name"] == name)


def is_expected(name, result):
    exact = result["memorization"]["members"]["exact"]["count"]
    attacks = [auc(result, x) for x in ("loss", "reference", "min_k")]
    if name == "plain_18x40":
        return exact == 0 and min(attacks) > 0.95
    if name == "private":
        return exact == 0 and all(abs(x - 0.5) <= 0.1 for x in attacks)
    return True


def table_row(name, result):
    found = result["memorization"]
    distances = [f"{found[x]['median_distance']:.2f}" for x in ("members", "controls")]
    areas = [f"{auc(result, x):.2f}" for x in ("loss", "reference", "min_k", "min_k_plus_plus")]
    loss = result["membership"]["attacks"][0]
    cells = (
        name,
        f"{100 * found['members']['exact']['value']:.1f} %",
        " / ".join(distances),
        " / ".join(areas),
        f"{loss['true_positive_rates'][0]['rate']['value']:.2f}",
        f"{result['epsilon'] or ''}",
    )
    return f"| {' | '.join(cells)} |"


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=list(RUNS))
    parser.add_argument("--json", type=Path, help="write all results into this file")
    parser.add_argument("--speed", type=int, metavar="N", help="measure the time of N records")
    parser.add_argument("--run", choices=RUNS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.speed:
        return measure_speed(options.speed)
    if options.folder is None:
        parser.error("FOLDER is required")
    if options.run:
        return print(json.dumps(measure(options.folder, options.run)))
    columns = (
        "trained",
        "greedy exact match",
        "median edit distance, members / others",
        "AUC loss / reference / min-k / min-k++",
        "TPR at 1 % FPR",
        "ε spent",
    )
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}", flush=True)
    results = {}
    for name in options.runs:
        command = [sys.executable, __file__, str(options.folder), "--run", name]
        # A home of its own: the dialogues are public, and each run has a budget of its own.
        with tempfile.TemporaryDirectory() as home:
            environment = {**os.environ, "KERAS_VAULTGEMMA_HOME": home, "PYTHONWARNINGS": "ignore"}
            done = subprocess.run(
                command, env=environment, stdout=subprocess.PIPE, text=True, check=False
            )
        if done.returncode:
            return f"{name} failed"
        results[name] = json.loads(done.stdout.splitlines()[-1])
        print(table_row(name, results[name]), flush=True)
        if options.json:
            options.json.write_text(json.dumps(results, indent=1))
    wrong = [name for name, result in results.items() if not is_expected(name, result)]
    return f"Not as expected: {', '.join(wrong)}" if wrong else None


if __name__ == "__main__":
    sys.exit(main())
