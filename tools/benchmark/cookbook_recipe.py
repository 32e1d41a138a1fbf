"""Show what the cookbook's recipe for private fine-tuning of VaultGemma computes.

    pip install "keras-vaultgemma[torch,bench]"
    python tools/benchmark/cookbook_recipe.py [--rows 900]

The recipe is the notebook "[VaultGemma]FineTuning_Inference_Huggingface" in the folder Research of
github.com/google-gemini/gemma-cookbook, read at commit 7cfeffd. Its choices are made here on a
small model with random weights and made-up rows: which labels reach the loss, which rows enter a
step, and which ε Opacus reports for the steps. None of that depends on the weights.

It takes about a minute, most of it for Opacus's accountant.
"""

import argparse
import collections
import sys
import tempfile
import warnings
from pathlib import Path
from typing import NamedTuple

import opacus_stack

ROWS, EPOCHS, ACCUMULATED = 900, 2, 8
"""Of the recipe: 900 of 1,000 rows are trained on, one at a time, and eight make a step."""

EPSILON, DELTA, STORED_DELTA = 15.0, 1e-5, 1e-2
"""What its code asks for, and the δ that its stored output reports."""

MAX_LENGTH, IGNORED = 128, -100
SIZE = dict(
    vocabulary_size=64,
    hidden_dim=16,
    intermediate_dim=32,
    num_layers=1,
    num_query_heads=1,
    num_key_value_heads=1,
    head_dim=16,
)
PROMPT = "Instruction:\nAnswer this question truthfully.\n\nQuestion:\nWhat helps against a cough?"
RESPONSE = "\n\nResponse:\nHoney and hot steam."


class Labels(NamedTuple):
    """How many tokens of one row have a label.

    Attributes:
        prompt: number of tokens of the prompt with a label, and of all.
        response: the same of the response.
        padding: the same of the padding.
        end: string. The last token.
    """

    prompt: tuple[int, int]
    response: tuple[int, int]
    padding: tuple[int, int]
    end: str


def labels():
    """Return the `Labels` of a row as the recipe masks them, and as its collator returns them."""
    import torch
    from transformers import DataCollatorForLanguageModeling, GemmaTokenizer

    from keras_vaultgemma import convert

    with tempfile.TemporaryDirectory() as folder:
        convert("vaultgemma_tiny", Path(folder) / "hf", to="hf", progress=False)
        tokenizer = GemmaTokenizer.from_pretrained(Path(folder) / "hf")
    tokenizer.pad_token = tokenizer.eos_token
    options = dict(truncation=True, max_length=MAX_LENGTH, padding="max_length")
    row = tokenizer(PROMPT + RESPONSE, **options)
    prompt_length = sum(tokenizer(PROMPT, **options)["attention_mask"])
    ids = torch.tensor(row["input_ids"])
    masked = ids.clone()
    masked[:prompt_length] = IGNORED
    collate = DataCollatorForLanguageModeling(tokenizer=tokenizer, mlm=False)
    collated = collate([{**row, "labels": masked.tolist()}])["labels"][0]

    # The padding comes first, as Gemma's tokenizer has it, then the prompt.
    padding = MAX_LENGTH - sum(row["attention_mask"])
    answer = padding + prompt_length
    parts = [slice(padding, answer), slice(answer, None), slice(0, padding)]
    end = tokenizer.convert_ids_to_tokens(row["input_ids"][-1])
    return tuple(
        Labels(*((int((found[part] != IGNORED).sum()), len(found[part])) for part in parts), end)
        for found in (masked, collated)
    )


class Run(NamedTuple):
    """What happened in the steps of a run.

    Attributes:
        noise_multiplier: float. σ, as Opacus chose it.
        planned: tuple of the number of steps and the sampling rate that σ was chosen for.
        steps: list with the rows of each step, lists of their numbers.
        history: Opacus's record: a list of `(σ, sampling rate, number of steps)`.
        epsilon: function of δ, the ε that Opacus reports for the history.
    """

    noise_multiplier: float
    planned: tuple[int, float]
    steps: list
    history: list
    epsilon: object


def train(rows=ROWS, epsilon=EPSILON, delta=DELTA):
    """Train a small model as the recipe does: one row at a time, a step after every eight.

    Returns:
        `Run`.
    """
    import torch
    from opacus import PrivacyEngine
    from torch.utils.data import DataLoader, TensorDataset

    torch.manual_seed(0)
    numbers, ids = torch.arange(rows), torch.randint(5, SIZE["vocabulary_size"], (rows, 4))
    model = opacus_stack.add_lora(opacus_stack.random_vaultgemma(SIZE), 8, alpha=16, dropout=0.05)
    engine = PrivacyEngine()
    model, optimizer, loader = engine.make_private_with_epsilon(
        module=model,
        optimizer=torch.optim.AdamW(opacus_stack.trained_parameters(model), lr=2e-5),
        data_loader=DataLoader(TensorDataset(numbers, ids), batch_size=1, shuffle=True),
        target_epsilon=epsilon,
        target_delta=delta,
        epochs=EPOCHS,
        max_grad_norm=1.0,
        poisson_sampling=False,
    )
    entered, steps = [], []
    for _ in range(EPOCHS):
        for i, (number, x) in enumerate(loader):
            model(input_ids=x, labels=x, position_ids=torch.arange(4)[None]).loss.backward()
            entered.append(int(number))
            if (i + 1) % ACCUMULATED == 0:
                optimizer.step()
                optimizer.zero_grad()
                steps.append(entered)
                entered = []
    return Run(
        optimizer.noise_multiplier,
        (EPOCHS * len(loader), 1 / len(loader)),
        steps,
        engine.accountant.history,
        lambda delta: engine.get_epsilon(delta=delta),
    )


def without_sampling(run, delta):
    """Return ε of the same steps if an attacker knows which rows entered which step.

    A row's part of all steps together is then one Gaussian mechanism. Its sensitivity is that of a
    row which entered the same steps as often as any row did.
    """
    from opacus.accountants import PRVAccountant

    counts = collections.defaultdict(list)
    for step in run.steps:
        for number, count in collections.Counter(step).items():
            counts[number].append(count)
    squared = max(sum(count**2 for count in found) for found in counts.values())
    accountant = PRVAccountant()
    accountant.history = [(run.noise_multiplier / squared**0.5, 1.0, 1)]
    return float(accountant.get_epsilon(delta=delta))


def report(rows):
    """Print what the recipe computes."""
    own, collated = labels()
    print(f"Tokens of a row, which ends with {own.end!r}, that have a label, of all:")
    for name, found in (("as it masks them", own), ("as its collator returns them", collated)):
        counts = zip(Labels._fields, found[:3], strict=False)
        parts = ", ".join(f"{part} {count} of {size}" for part, (count, size) in counts)
        print(f"  {name}: {parts}")

    run = train(rows)
    sizes = collections.Counter(len(step) for step in run.steps)
    count, rate = run.planned
    first = sorted(number for step in run.steps[: rows // ACCUMULATED] for number in step)
    print(f"σ = {run.noise_multiplier:.4f}, chosen for {count} steps at the rate {rate:.5f}")
    print(f"Steps that were done, by their rows: {dict(sizes)}")
    print(f"Rows that are twice among the first {len(first)}: {len(first) - len({*first})}")
    print(f"Opacus's record of the steps: {run.history}")
    for delta in (DELTA, STORED_DELTA):
        print(
            f"ε at δ = {delta:g}: {run.epsilon(delta):.2f} as Opacus reports it, "
            f"{without_sampling(run, delta):.2f} without sampling"
        )
    stored = train(rows, delta=STORED_DELTA)
    print(f"With a target at δ = {STORED_DELTA:g}, σ = {stored.noise_multiplier:.4f}:")
    for delta in (STORED_DELTA, DELTA):
        print(f"ε at δ = {delta:g}: {stored.epsilon(delta):.2f} as Opacus reports it")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=ROWS)
    options = parser.parse_args()
    warnings.simplefilter("ignore")  # Opacus's, of its generator and of the orders it tries
    report(options.rows)


if __name__ == "__main__":
    sys.exit(main())
