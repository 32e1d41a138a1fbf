"""Private fine-tuning on questions and answers, next to transformers, PEFT and Opacus.

    python tools/benchmark/private_qa.py FOLDER [--backends jax torch tensorflow]
        [--runs float32 int4 opacus] [--epochs 6] [--batch-size 120] [--length 128] [--json FILE]

FOLDER has train.csv and validation.csv of MTS-Dialog (Ben Abacha et al., EACL 2023; CC BY 4.0): a
dialogue is the question, its clinical note (`section_text`) the answer.

The job is the cookbook's: an adapter of rank 8, alpha 16 and dropout 0.05 on all seven projections,
a cosine schedule with warm-up, ε = 8 at δ = 1e-5. All runs start from the bundled model and get the
same token ids, the same labels (those of the answers), expected batch size, steps and clipping
norm, and sample rows at random. Opacus's base is float32, because the 4 bits of bitsandbytes need a
GPU; that of this package is float32 or int4. Each run is a process of its own. A step's time is the
mean of all steps but the first. Memory is the most that is resident above the loaded model.
Exits with 1 if a run failed.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import opacus_stack
import random_model

BACKENDS = ("jax", "torch", "tensorflow")
RUNS = ("float32", "int4", "opacus")
PRESET, COLUMNS = "vaultgemma_tiny", dict(prompt_column="dialogue", response_column="section_text")
RANK, ALPHA, DROPOUT = 8, 16, 0.05
EPSILON, DELTA, CLIP_NORM, RATE, WARM_UP = 8.0, 1e-5, 1.0, 1e-2, 0.1


def read(folder, length):
    """Return token ids and labels of the files for training and validation."""
    from keras_vaultgemma import VaultGemmaCausalLM
    from keras_vaultgemma.data.fit_inputs import TruncationCounter
    from keras_vaultgemma.data.text_files import read_records

    preprocessor = VaultGemmaCausalLM.from_preset(PRESET).preprocessor
    preprocessor.sequence_length = length
    return [
        read_records(folder / name, **COLUMNS).tokenize(preprocessor, False, TruncationCounter())
        for name in ("train.csv", "validation.csv")
    ]


def train_here(training, held_out, options):
    """Train with this package. Return the figures of a run."""
    import keras

    from keras_vaultgemma import VaultGemmaCausalLM
    from keras_vaultgemma.evaluation.likelihood import measure
    from keras_vaultgemma.privacy import DPSGD

    keras.utils.set_random_seed(0)
    model = VaultGemmaCausalLM.from_preset(PRESET)
    if options.run == "int4":
        model.quantize("int4")
    before = measure(model, **held_out)
    model.backbone.enable_lora(RANK, [*opacus_stack.PROJECTIONS], alpha=ALPHA, dropout=DROPOUT)
    steps = number_of_steps(training, options)
    warm_up = round(WARM_UP * steps)
    schedule = keras.optimizers.schedules.CosineDecay(
        0.0, steps - warm_up, warmup_target=RATE, warmup_steps=warm_up
    )
    guarantee = DPSGD(epsilon=EPSILON, delta=DELTA, clip_norm=CLIP_NORM)
    model.compile(keras.optimizers.Adam(schedule), privacy=guarantee)
    ends = [time.perf_counter()]

    class Clock(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            float(next(iter(logs.values())))  # waits until the step is done
            ends.append(time.perf_counter())

    peak = random_model.reset_peak()
    fit = dict(batch_size=options.batch_size, epochs=options.epochs, verbose=0)
    model.fit(**training, **fit, callbacks=[Clock()])
    peak = random_model.resident("VmHWM") - peak
    after = measure(model, **held_out)
    return figures(
        [likelihood.nats / likelihood.tokens for likelihood in (before, after)],
        model.privacy.spent().epsilon,
        ends,
        peak,
    )


def train_with_opacus(training, held_out, options):
    """Train with transformers, PEFT and Opacus. Return the figures of a run."""
    import torch
    from opacus import PrivacyEngine
    from transformers import VaultGemmaForCausalLM, get_cosine_schedule_with_warmup

    from keras_vaultgemma import convert

    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        convert(PRESET, Path(folder) / "hf", to="hf", progress=False)
        model = VaultGemmaForCausalLM.from_pretrained(Path(folder) / "hf")
    model = opacus_stack.add_lora(model, RANK, alpha=ALPHA, dropout=DROPOUT)
    training, held_out = (_tensors(data) for data in (training, held_out))
    before = _nats(model, held_out, options.batch_size)
    engine = PrivacyEngine()
    model, optimizer, loader = engine.make_private_with_epsilon(
        module=model,
        optimizer=torch.optim.Adam(opacus_stack.trained_parameters(model), lr=RATE),
        data_loader=torch.utils.data.DataLoader(
            torch.utils.data.TensorDataset(*training), batch_size=options.batch_size
        ),
        target_epsilon=EPSILON,
        target_delta=DELTA,
        epochs=options.epochs,
        max_grad_norm=CLIP_NORM,
    )
    steps = options.epochs * len(loader)
    schedule = get_cosine_schedule_with_warmup(optimizer, round(WARM_UP * steps), steps)
    ends, peak = [time.perf_counter()], random_model.reset_peak()
    for _ in range(options.epochs):
        for batch in loader:
            _row_losses(model, *batch)[0].mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            ends.append(time.perf_counter())
    peak = random_model.resident("VmHWM") - peak
    after = _nats(model, held_out, options.batch_size)
    return figures([before, after], engine.get_epsilon(delta=DELTA), ends, peak)


def _tensors(data):
    """Return token ids, mask, next ids and weights as tensors."""
    import torch

    arrays = (data["x"]["token_ids"], data["x"]["padding_mask"], data["y"], data["sample_weight"])
    return [torch.from_numpy(np.asarray(array).astype("int64")) for array in arrays]


def _row_losses(model, ids, mask, labels, weights):
    """Return the mean of -log p of the labels of each row, and the sum over all rows.

    transformers' own loss is the mean over all tokens of a batch, in which the number of tokens of
    one row changes the gradients of the others.
    """
    import torch

    # Opacus needs positions of each row.
    positions = torch.arange(ids.shape[1])[None].repeat(len(ids), 1)
    logits = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
    losses = losses * weights
    return losses.sum(1) / weights.sum(1).clamp(min=1), losses.sum()


def _nats(model, data, batch_size):
    """Return the mean of -log p of the labels."""
    import torch

    model.eval()
    with torch.no_grad():
        batches = zip(*(part.split(batch_size) for part in data), strict=True)
        total = sum(float(_row_losses(model, *batch)[1]) for batch in batches)
    model.train()
    return total / int(data[-1].sum())


def number_of_steps(training, options):
    """Return the number of steps of a run."""
    from keras_vaultgemma.privacy import planning

    return options.epochs * planning.steps_per_epoch(len(training["y"]), options.batch_size)


def figures(nats, epsilon, ends, peak):
    """Return what a run has measured.

    Args:
        nats: pair of floats. -log p of a token of held-out answers, before and after.
        epsilon: float. ε that was spent.
        ends: list of floats. The start and the end of each step, in seconds.
        peak: int. Bytes above the loaded model.
    """
    return {
        "before": nats[0],
        "after": nats[1],
        "epsilon": float(epsilon),
        "steps": len(ends) - 1,
        "step_s": float(np.mean(np.diff(ends)[1:])),
        "gb_above_model": peak / 1e9,
    }


def run(name, backend, arguments):
    """Run once in a process of its own. Return the figures, or {} if it fails."""
    command = [sys.executable, __file__, *arguments, "--run", name]
    # A home of its own: the dialogues are public, and each run measures a budget of its own.
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


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=BACKENDS)
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=RUNS)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--batch-size", type=int, default=120)
    parser.add_argument("--length", type=int, default=128, help="tokens of a row")
    parser.add_argument("--json", type=Path, help="write results into this file, one a line")
    parser.add_argument("--run", choices=RUNS, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.run:
        train = train_with_opacus if options.run == "opacus" else train_here
        return print(json.dumps(train(*read(options.folder, options.length), options)))

    settings = ("epochs", "batch_size", "length")
    given = [f"--{name.replace('_', '-')}={getattr(options, name)}" for name in settings]
    results, failed = [], []
    for name in options.runs:
        for backend in ("torch",) if name == "opacus" else options.backends:
            result = run(name, backend, [str(options.folder), *given])
            print(f"{name} {backend}: {result or 'failed'}", flush=True)
            if not result:
                failed.append(f"{name} {backend}")
                continue
            results.append({"run": name, "backend": backend, **result})
            if options.json:
                options.json.write_text("".join(json.dumps(row) + "\n" for row in results))
    columns = ("run", "nats a token before", "after", "ε", "steps", "a step, s", "memory, GB")
    print(f"\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for r in results:
        print(
            f"| {r['run']}, {r['backend']} | {r['before']:.3f} | {r['after']:.3f} "
            f"| {r['epsilon']:.2f} | {r['steps']} | {r['step_s']:.3g} | {r['gb_above_model']:.2f} |"
        )
    return f"Failed: {', '.join(failed)}" if failed else None


if __name__ == "__main__":
    sys.exit(main())
