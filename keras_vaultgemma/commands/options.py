"""The options of each subcommand."""

import argparse

from keras_vaultgemma.commands.option_groups import (
    API_KEY,
    COLUMNS,
    DATA,
    DEFAULT,
    DTYPES,
    EXPORT_DTYPES,
    FILE_OPTIONS,
    FORMATS,
    MODEL,
    PRESET_OPTION,
    RULE,
    SAMPLING,
    SOURCE,
    TASK_OPTIONS,
    choice,
    flag,
    value,
)

GENERATE = {
    "prompt": value("PROMPT", "text to continue (default: read from a pipe)", nargs="?"),
    **MODEL,
    "--max-new-tokens": value("N", f"most tokens to generate {DEFAULT}", int, default=64),
    **SAMPLING,
    "--chat": flag("treat the prompt as a user's turn and print only the reply"),
    "--json": flag("print one object: prompt, text, finish_reason, new_tokens", dest="as_json"),
}

CHAT = {
    **MODEL,
    "--max-new-tokens": value("N", f"most tokens of a reply {DEFAULT}", int, default=256),
    **SAMPLING,
}

SERVE = {
    **{name: option for name, option in MODEL.items() if name != "--adapter"},
    "--adapter": value(
        "NAME=FOLDER",
        "adapter that clients call by this name; repeatable",
        action="append",
        default=[],
        dest="adapters",
    ),
    "--host": value("ADDRESS", f"to listen on; 0.0.0.0 for all {DEFAULT}", default="127.0.0.1"),
    "--port": value("N", f"to listen on; 0 for any {DEFAULT}", int, default=8000),
    "--api-key": value("KEY", f"that clients must send (default: ${API_KEY}, or none)"),
    "--allow-host": value(
        "NAME",
        "by which clients may call this machine, besides its addresses; repeatable",
        action="append",
        default=[],
        dest="allow_hosts",
    ),
    "--allow-origin": value(
        "URL",
        "of web pages that may call it, such as https://example.com; repeatable",
        action="append",
        default=[],
        dest="allow_origins",
    ),
    "--max-rows": value("N", f"answers decoded together {DEFAULT}", int, default=8),
    "--max-queue": value("N", f"answers that wait {DEFAULT}", int, default=256),
    "--timeout": value("S", f"seconds for an answer {DEFAULT}", float, default=600.0),
    "--skip-warm-up": flag("compile when requests come instead of at the start"),
}

CONVERT = {
    "source": value("SOURCE", f"{SOURCE}; an adapter is merged"),
    "target": value("TARGET", "folder to write; it appears only when it is complete"),
    "--to": choice(
        FORMATS,
        "Keras preset, transformers folder, file of llama.cpp and Ollama, folder for browsers, or "
        f"graph for ONNX Runtime, OpenVINO or TensorFlow {DEFAULT}",
        default="keras",
    ),
    "--dtype": choice(
        EXPORT_DTYPES,
        "dtype of the weights (default: the source's); q8_0 only with --to gguf, q8 and q4 only "
        "with --to transformers.js, int8 only with --to onnx and openvino",
    ),
    "--as": choice(
        ("vaultgemma", "gemma"),
        "architecture in the files; gemma, for engines that know no VaultGemma, only with "
        f"--to hf {DEFAULT}",
        dest="architecture",
        default="vaultgemma",
    ),
    "--shard-size": value("SIZE", "largest file (default: 5GB); only with --to hf"),
    "--verify": flag("compare every tensor afterwards, and the logits with transformers"),
    "--overwrite": flag("replace the model in TARGET"),
}

INFO = {"preset": value("PRESET", SOURCE)}

FINETUNE = {
    "--preset": PRESET_OPTION,
    "--data": value("FILE", DATA, required=True),
    "--validation": value(
        "FILE", "held-out data (default: every tenth row of --data, at most 100)"
    ),
    **COLUMNS,
    "--group-column": value("NAME", "user of each row; --private then protects users"),
    "--max-rows-per-group": value("K", "rows of a user in a step (default: 4)", int),
    "--no-packing": flag(
        "truncate each text to a row of its own", "store_const", dest="packed", const=False
    ),
    "--lora-rank": value("R", f"rank of the adapter; 0 trains all weights (default: 8{RULE})", int),
    "--lora-targets": value(
        "NAME", f"layers with an adapter (default: query value{RULE})", nargs="+"
    ),
    "--epochs": value("N", f"in total; more continue a run (default: 1{RULE})", int),
    "--batch-size": value("N", f"rows, or users, per step (default: 8{RULE})", int),
    "--learning-rate": value("RATE", f"of Adam (default: 1e-3, 1e-4 for all weights{RULE})", float),
    "--sequence-length": value("N", "tokens per row (default: the preset's)", int),
    "--truncate": choice(
        ("prompt_start", "prompt_end", "row_end"),
        "where to cut pairs longer than a row (default: the preset's, prompt_start)",
    ),
    "--dtype": choice(
        ("float32", "bfloat16", "mixed_bfloat16"),
        "dtype policy; bfloat16 only with an adapter (default: float32, or a mixed or "
        "quantized policy that the preset was saved with)",
    ),
    "--gradient-checkpointing": flag("less memory, for about a third more time per step"),
    "--merge": flag("save a preset with the adapter merged instead of the adapter"),
    "--save-every": value(
        "N", f"steps between checkpoints {DEFAULT}", int, dest="save_freq", default=100
    ),
    "--seed": value("N", f"seed of adapter and data order {DEFAULT}", int, default=0),
    "--output": value(
        "FOLDER",
        f"for the adapter or preset, curves.png, run.json and the checkpoint {DEFAULT}",
        default="finetuned",
    ),
    "--png": value("FILE", "plot of the curves (default: curves.png in FOLDER)"),
    "--private": flag("differential privacy for each row; needs --epsilon or --noise"),
    "--epsilon": value("ε", "privacy budget of all steps together", float),
    "--noise": value("σ", "noise multiplier", float, dest="noise_multiplier"),
    "--delta": value("δ", "δ of the guarantee (default: N^-1.1, at most 1e-5)", float),
    "--extend-budget": flag("go on where earlier runs on these rows used the budget up"),
    "--secure": flag("make the noise with a cryptographic generator"),
    "--clip-norm": value("C", "largest L2 norm of a row's gradient (default: by a rule)", float),
    "--report": flag("also train a plain twin, and write a page that compares the two"),
    "--canaries": value("N", "invented records for an audit in the report", int),
}

EVALUATE = {
    "preset": value("PRESET", "the same as --preset", nargs="?", default=argparse.SUPPRESS),
    **FILE_OPTIONS,
    **TASK_OPTIONS,
    **MODEL,
    "--sequence-length": value(
        "N", "tokens per row, or positions of a task (default: the preset's)", int
    ),
    "--json": flag("print one object with all figures", dest="as_json"),
}

COMPARE = {
    "--private": value("MODEL", f"{SOURCE}; the page is about it", required=True),
    "--plain": value("MODEL", "the same, trained without privacy"),
    "--base": value("MODEL", "the model before training (default: what --private names)"),
    "--train": value("FILE", f"records that were trained on: {DATA}", required=True),
    "--held-out": value(
        "FILE", "unseen records (default: those that `finetune` holds out of --train)"
    ),
    "--canaries": value("FILE", "sealed file of canaries, for an audit"),
    **{name: TASK_OPTIONS[name] for name in ("--tasks", "--include-path", "--limit")},
    "--html": value("FILE", f"page to write {DEFAULT}", default="report.html"),
    **COLUMNS,
    "--sequence-length": value("N", "tokens per row (default: the run's)", int),
    "--prefix-length": value("N", "tokens that a model is shown (default: 50)", int),
    "--suffix-length": value("N", "tokens that it has to repeat (default: 50)", int),
    "--max-records": value("N", f"most records to test, of each file {DEFAULT}", int, default=1000),
    "--dtype": choice(DTYPES, "dtype of the weights (default: the preset's own)"),
    "--show-text": flag("show text of records on the page"),
    "--public-records": flag("the records are public, and nothing needs protection"),
}

EPSILON = {
    "--rows": value("N", "rows in the dataset; each is protected", int, required=True),
    "--max-rows-per-group": value("K", "records are users of at most K rows a step", int),
    "--batch": value("B", "rows per step (default: by a rule)", int, dest="batch_size"),
    "--epochs": value("E", "expected number of times a row is drawn (default: by a rule)", int),
    "--noise": value("σ", "noise multiplier, to compute ε", float, dest="noise_multiplier"),
    "--epsilon": value("ε", "privacy budget, to compute the noise multiplier", float),
    "--delta": value("δ", "δ of the guarantee (default: N^-1.1, at most 1e-5)", float),
    "--png": value("FILE", "plot of ε against steps and of σ against ε"),
    "--preset": PRESET_OPTION,
}

LEDGER = {"--delta": value("δ", "δ of every ε (default: the smallest of the runs)", float)}
