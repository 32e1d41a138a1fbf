"""Options that several subcommands have, and what options are made with."""

from keras_vaultgemma.recipes.samplers import SAMPLERS

API_KEY = "KERAS_VAULTGEMMA_API_KEY"
"""Environment variable with the key of `serve`, which other users of a machine do not see."""


def value(metavar, help, type=str, **settings):
    return dict(metavar=metavar, help=help, type=type, **settings)


def choice(choices, help, **settings):
    return dict(choices=choices, help=help, **settings)


def flag(help, action="store_true", **settings):
    return dict(action=action, help=help, **settings)


DEFAULT = "(default: %(default)s)"
PRESET = "bundled preset, folder, or handle that starts with hf:// or kaggle://"
SOURCE = f"{PRESET}, or what `finetune` wrote"
PRESET_OPTION = dict(default="vaultgemma_tiny", help=f"{PRESET} {DEFAULT}")
RULE = "; with --private by a rule, see `epsilon`"
DTYPES = ("float32", "bfloat16", "float16")
FORMATS = ("keras", "hf", "gguf", "transformers.js", "onnx", "openvino", "saved_model")
EXPORT_DTYPES = (*DTYPES, "f32", "bf16", "f16", "q8_0", "q8", "q4", "int8")

COLUMNS = {
    "--text-column": value("NAME", 'texts or chats (default: "text" or "messages")'),
    "--prompt-column": value("NAME", 'prompts (default: "prompt")'),
    "--response-column": value("NAME", 'responses, which alone count (default: "response")'),
}
DATA = ".txt (a text a paragraph or line), .json(l), .csv, .tsv"
MODEL = {
    "--preset": value("PRESET", f"{SOURCE} (default: the base of --adapter, or vaultgemma_tiny)"),
    "--adapter": value("FOLDER", "adapter to load, of `finetune` or of PEFT"),
    "--dtype": choice(DTYPES, "dtype of the weights (default: the preset's own)"),
    "--int8": flag(
        "quantize the weights to int8, a quarter of the memory of float32",
        "store_const",
        dest="quantization",
        const="int8",
    ),
    "--int4": flag(
        "quantize the weights to int4, an eighth of the memory of float32",
        "store_const",
        dest="quantization",
        const="int4",
    ),
}
"""Options of the commands that compute with a model and do not train it."""

FILE_OPTIONS = {"--data": value("FILE", DATA), **COLUMNS}
TASK_OPTIONS = {
    "--tasks": value("NAMES", 'tasks with commas, such as "piqa,boolq", or "card"'),
    "--include-path": value("FOLDER", "tasks of your own, or with data on this machine"),
    "--limit": value("N", "items of each task; below 1, their fraction (default: all)", float),
    "--num-fewshot": value("N", "examples before each item (default: the task's)", int),
    "--truncation": choice(
        ("keep_bos", "lm_eval"),
        "cut what follows <bos> in a long context (default), or <bos> too, as the harness does",
    ),
    "--score-bos": flag("count <bos> in rolling likelihoods, as the harness's model hf does"),
    "--output": value("FOLDER", "for results.json, and parts from which the command resumes"),
}
"""Options of `evaluate` on a file and on tasks."""

SAMPLING = {
    "--sampler": choice(
        SAMPLERS,
        "how tokens are chosen (default: greedy, or what --top-p, --top-k or --temperature needs)",
    ),
    "--temperature": value("T", "above 0; below 1 prefers likely tokens", float),
    "--top-k": value("K", "sample from the K likeliest tokens", int),
    "--top-p": value("P", "sample from the likeliest tokens of probability P", float),
    "--repetition-penalty": value(
        "X", "above 1 makes tokens less likely that have occurred", float
    ),
    "--seed": value("N", "seed of a random sampler, for repeatable text", int),
    "--stop": value("TEXT", "end before this text; repeatable", action="append", default=[]),
}
"""Options of the commands that generate text."""
