"""Compare the adapter for lm-evaluation-harness with the harness's own model "hf", item by item.

The preset is exported with `convert --to hf`. The harness evaluates the exported folder with its
model "hf" on PyTorch, and the preset with ours on the backend of `KERAS_BACKEND`, on PIQA, on sets
of BLiMP, and on texts (rolling likelihood). Needs `pip install "keras-vaultgemma[eval,torch]"
transformers`.

    python tools/benchmark/lm_eval_agreement.py --data eval --text tales.txt

`--data` is a folder with `piqa_valid.jsonl`, `piqa_valid_labels.lst` and `blimp/*.jsonl`, as their
authors publish them. Exits with 1 if an item differs, or the bits per byte by more than 1e-6 of
them, or if PIQA takes more than 1.3 times as many tokens as without padding or more than 12
compiled functions.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from keras_vaultgemma import VaultGemmaCausalLM, convert, evaluation
from keras_vaultgemma.evaluation.packed_pairs import computed_tokens, ideal_tokens, pack_pairs
from keras_vaultgemma.evaluation.pairs import cut_pair, encode_pairs

TEXT_LENGTH = 5000
"""Characters of a text for the rolling likelihood."""


def write_tasks(folder, data, text):
    """Write the tasks as files of the harness, and return their names."""

    def write(name, split, rows, **settings):
        path = folder / f"{name}.jsonl"
        path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
        files = {"dataset_path": "json", "dataset_kwargs": {"data_files": {split: str(path)}}}
        split_name = "validation_split" if split == "validation" else "test_split"
        task = {"task": name, **files, split_name: split, "num_fewshot": 0, **settings}
        (folder / f"{name}.yaml").write_text(json.dumps(task), encoding="utf-8")
        return name

    def metrics(*names):
        return [dict(metric=x, aggregation="mean", higher_is_better=True) for x in names]

    labels = map(int, (data / "piqa_valid_labels.lst").read_text().split())
    rows = [json.loads(line) for line in (data / "piqa_valid.jsonl").open(encoding="utf-8")]
    names = [
        write(
            "piqa",
            "validation",
            [{**row, "label": label} for row, label in zip(rows, labels, strict=True)],
            output_type="multiple_choice",
            doc_to_text="Question: {{goal}}\nAnswer:",
            doc_to_target="label",
            doc_to_choice="{{[sol1, sol2]}}",
            metric_list=metrics("acc", "acc_norm"),
        )
    ]
    for path in sorted((data / "blimp").glob("*.jsonl")):
        names.append(
            write(
                f"blimp_{path.stem}",
                "validation",
                [json.loads(line) for line in path.open(encoding="utf-8")],
                output_type="multiple_choice",
                doc_to_text="",
                doc_to_target=0,
                doc_to_choice="{{[sentence_good, sentence_bad]}}",
                metric_list=metrics("acc", "acc_norm"),
            )
        )
    texts = text.read_text(encoding="utf-8")[: 20 * TEXT_LENGTH]
    names.append(
        write(
            "texts",
            "test",
            [{"text": texts[i : i + TEXT_LENGTH]} for i in range(0, len(texts), TEXT_LENGTH)],
            output_type="loglikelihood_rolling",
            doc_to_text="",
            doc_to_target="{{text}}",
            metric_list=[
                dict(metric="bits_per_byte", aggregation="bits_per_byte", higher_is_better=False)
            ],
        )
    )
    return names


def evaluate(lm, names, folder, limit):
    """Return the results of the harness by task: metrics, and log-probabilities of the items."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    found = {}
    for name in names:
        start = time.perf_counter()
        results = lm_eval.simple_evaluate(
            model=lm,
            tasks=[name],
            task_manager=TaskManager(include_path=str(folder), include_defaults=False),
            limit=limit,
            bootstrap_iters=0,
        )
        samples = sorted(results["samples"][name], key=lambda sample: sample["doc_id"])
        found[name] = {
            "seconds": time.perf_counter() - start,
            "metrics": {
                key.partition(",")[0]: value
                for key, value in results["results"][name].items()
                if key.endswith(",none") and "stderr" not in key
            },
            "items": [
                {key: sample[key] for key in ("acc", "acc_norm") if key in sample}
                for sample in samples
            ],
            "log_probs": [
                x[0] if isinstance(x, (list, tuple)) else x
                for sample in samples
                for x in sample["filtered_resps"]
            ],
        }
    return found


def results_of_hf(options, names, folder):
    """Return the results of the model hf, from the file `--reference` if it exists."""
    if options.reference is not None and options.reference.is_file():
        return json.loads(options.reference.read_text(encoding="utf-8"))
    from lm_eval.models.huggingface import HFLM

    convert(options.preset, folder / "hf", to="hf", dtype="float32")
    hf = HFLM(
        pretrained=str(folder / "hf"),
        dtype="float32",
        device="cpu",
        # In larger batches hf's results depend on the padding, by more than the closest margins.
        batch_size=1,
        max_length=options.max_length,
    )
    results = evaluate(hf, names, folder, options.limit)
    if options.reference is not None:
        options.reference.write_text(json.dumps(results), encoding="utf-8")
    return results


def compare(ours, theirs):
    """Print the results of both, and return True if they agree."""
    agrees = True
    print("task | items | metric: ours, hf | items that differ | largest |Δ log p| | s, s of hf")
    for name, mine in ours.items():
        other = theirs[name]
        is_rolling = "bits_per_byte" in mine["metrics"]
        items = mine["items"], other["items"]
        differing = sum(x != y for x, y in zip(*items, strict=True) if not is_rolling)
        agrees &= not differing
        figures = []
        for metric, value in mine["metrics"].items():
            expected = other["metrics"][metric]
            figures.append(f"{metric}: {value:.8f}, {expected:.8f}")
            agrees &= abs(value - expected) <= 1e-6 * expected
        difference = np.abs(np.subtract(mine["log_probs"], other["log_probs"])).max()
        cells = (
            name,
            len(mine["items"]),
            "; ".join(figures),
            differing,
            f"{difference:.1g}",
            f"{mine['seconds']:.1f}, {other['seconds']:.1f}",
        )
        print(" | ".join(map(str, cells)))
    return agrees


def count_tokens(rows, tokenizer, max_length):
    """Print how many tokens PIQA takes, and return True if they are few, as are the functions."""
    texts = [
        (f"Question: {row['goal']}\nAnswer:", f" {row[choice]}")
        for row in rows
        for choice in ("sol1", "sol2")
    ]
    cut = [
        cut_pair(i, *ids, max_length, "lm_eval")
        for i, ids in enumerate(encode_pairs(tokenizer, texts))
    ]
    pairs = [(pair.context, pair.continuation) for pair in cut]
    batches = pack_pairs(pairs)
    computed, ideal = computed_tokens(batches), ideal_tokens(pairs)
    functions = len({batch.arrays[0].shape for batch in batches})
    print(
        f"PIQA: {computed:,} tokens computed, {ideal:,} without padding: {computed / ideal:.3f}; "
        f"{functions} compiled functions; {sum(pair.tokens_cut > 0 for pair in cut)} pairs cut"
    )
    return computed <= 1.3 * ideal and functions <= 12


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--preset", default="vaultgemma_tiny")
    parser.add_argument("--limit", type=int, help="items of each task")
    parser.add_argument("--reference", type=Path, help="file for the results of the model hf")
    # The bundled model has 256, and PIQA longer solutions, on which the harness fails.
    parser.add_argument("--max-length", type=int, default=1024, help="positions")
    options = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    model = VaultGemmaCausalLM.from_preset(options.preset, dtype="float32")
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        names = write_tasks(folder, options.data, options.text)
        theirs = results_of_hf(options, names, folder)
        lm = evaluation.lm_eval_model(
            model, truncation="lm_eval", score_bos=True, max_length=options.max_length
        )
        agrees = compare(evaluate(lm, names, folder, options.limit), theirs)
        rows = [json.loads(line) for line in (folder / "piqa.jsonl").open(encoding="utf-8")]
    is_small = count_tokens(rows[: options.limit], model.preprocessor.tokenizer, options.max_length)
    return 0 if agrees and is_small else 1


if __name__ == "__main__":
    sys.exit(main())
