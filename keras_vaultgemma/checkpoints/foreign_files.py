"""Files in which other tools store a model, and how to get from them to one that loads."""

import re

QUANTIZED = (
    "Use the checkpoint that it was made from and `quantize('int8')` here; or, if there is none, "
    "load it with transformers, call `model.dequantize()`, and save it with `save_pretrained`"
)
"""Cure for a checkpoint whose weights were quantized by another library."""

RESAVE = (
    "load it with `AutoModelForCausalLM.from_pretrained` of transformers, and save it with "
    "`save_pretrained`, which writes model.safetensors"
)

CURES = (
    (
        r"adapter_(model|config)\..*",
        "an adapter: load its base model and then `lora.load_adapter(model, folder)`",
    ),
    (r".*\.gguf", "in llama.cpp's format: use the safetensors that it was made from"),
    (
        r"model\.(safetensors\.index\.\w+\.json|\w+(-\d+-of-\d+)?\.safetensors)",
        "a variant: rename a single file to model.safetensors; for several files, "
        "load them with `from_pretrained(..., variant=...)` of transformers, and save the model "
        "with `save_pretrained`",
    ),
    (
        r"(consolidated|params).*",
        "in the format of the model's trainer: use the folder in Hugging Face's format, with "
        "model.safetensors",
    ),
    (r"(pytorch_model.*|.*\.(bin|pt|pth|ckpt))", f"a pickle, which can run code: {RESAVE}"),
    (r".*\.(msgpack|onnx|tflite|mlmodel)|tf_model\.h5", f"of another framework: {RESAVE}"),
    (r".*\.keras", "a whole model: load it with `keras.saving.load_model`"),
    (
        r"model-\d+-of-\d+\.safetensors",
        "one of several files: their index, model.safetensors.index.json, is missing",
    ),
    (r".*\.safetensors", "perhaps the weights: rename a single file to model.safetensors"),
    (r".*\.h5", "perhaps the weights: rename a single file to model.weights.h5"),
)
"""Patterns of names of files, and for each what such a file is and how to load the model."""


LFS = b"version https://git-lfs"


def explain_pointer(path):
    """Return a sentence if a file is a pointer of Git LFS to one that was not fetched, else ""."""
    with open(path, "rb") as file:
        is_pointer = file.read(len(LFS)) == LFS
    return ". It is a pointer of Git LFS; run `git lfs pull` in its folder" if is_pointer else ""


def explain(names):
    """Return a sentence about the first file of another tool, or "".

    Args:
        names: iterable of strings. Names of all files of a folder.

    Returns:
        String that continues a message, such as ". There is x.gguf, ...".
    """
    names = sorted(names)
    for pattern, cure in CURES:
        for name in names:
            if re.fullmatch(pattern, name):
                return f". There is {name}, {cure}"
    return ""
