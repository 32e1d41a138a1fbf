"""Verification of a converted model against its source: every tensor bit by bit, and logits."""

import gc
import importlib
import importlib.util

import numpy as np
from keras import ops

from keras_vaultgemma._files import ignore_progress
from keras_vaultgemma.checkpoints import weight_map
from keras_vaultgemma.checkpoints.lazy_tensor import dtype_name, equal_bits
from keras_vaultgemma.checkpoints.reader import format_of, open_values
from keras_vaultgemma.models.causal_lm import VaultGemmaCausalLM

PROMPT_LENGTH = 16
TOLERANCE = 1e-3
"""Absolute and relative tolerance between float32 logits of two libraries."""


def verify_conversion(source, target, dtype, report=ignore_progress):
    """Compare two checkpoint folders.

    Tensors are always compared. Logits are compared if one folder is in Hugging Face's format and
    transformers and torch are installed; the models are loaded one after the other in float32,
    which takes up to 8 bytes of memory per parameter.

    Args:
        source: `pathlib.Path` or string. Folder of the original checkpoint.
        target: `pathlib.Path` or string. Folder of the converted checkpoint.
        dtype: NumPy dtype to which the weights of the source are rounded before the comparison.
        report: callable. Called with the number of bytes of each block after it is compared.

    Raises:
        ValueError: If a tensor or the logits differ. The message names the first such tensor or has
            the largest difference of the logits.
    """
    verify_tensors(source, target, dtype, report)
    formats = {format_of(source), format_of(target)}
    if formats & {*weight_map.SAFETENSORS} and all(
        map(importlib.util.find_spec, ("torch", "transformers"))
    ):
        verify_logits(source, target, dtype)


def verify_tensors(source, target, dtype, report=ignore_progress):
    """Compare the tensors of two folders; see `verify_conversion`."""
    hyperparameters, values = open_values(source)
    _, written = open_values(target)
    for weight in weight_map.weight_map(hyperparameters):
        location = weight.locations[weight_map.KERAS]
        pairs = zip(
            values[weight.path].blocks(location, dtype),
            written[weight.path].blocks(location, dtype),
            strict=True,
        )
        for expected, found in pairs:
            if not equal_bits(expected, found):
                raise ValueError(
                    f"{weight.path} must have the same bits in source and target. "
                    "Received: different bits"
                )
            report(found.nbytes)


def verify_logits(source, target, dtype):
    """Compare the logits of two folders for a fixed prompt; see `verify_conversion`."""
    expected, found = (_logits(folder, dtype) for folder in (source, target))
    if not np.allclose(found, expected, rtol=TOLERANCE, atol=TOLERANCE, equal_nan=True):
        difference = np.abs(found - expected).max()
        raise ValueError(
            f"The logits of source and target must differ by at most {TOLERANCE}. "
            f"Received: {difference:g}"
        )


def verify_exported_logits(source, dtype, run):
    """Compare the logits of a model with those of an exported one, for a fixed prompt.

    Args:
        source: `pathlib.Path` or string. Folder of the original checkpoint.
        dtype: string. Dtype to which the matrices of the source are rounded before the comparison;
            "int8" as `quantize` does it.
        run: function of a dict of NumPy inputs that returns logits.

    Raises:
        ValueError: If the logits differ. For int8, if they differ by 5 % of their deviation on
            average, because few rounded activations are equal in two libraries.
    """
    model = VaultGemmaCausalLM.from_preset(source, preprocessor=None, dtype="float32")
    if dtype == "int8":
        model.quantize("int8")
    elif dtype != "float32":
        # Norms stay in float32 there.
        _round([v for v in model.backbone.variables if len(v.shape) > 1], dtype)
    inputs = _inputs(_prompt(model.backbone.vocabulary_size))
    expected, found = np.asarray(ops.convert_to_numpy(model(inputs))), run(inputs)
    difference = np.abs(found - expected)
    legal, largest = (
        (0.05 * expected.std(), difference.mean())
        if dtype == "int8"
        else (TOLERANCE * (1 + np.abs(expected).max()), difference.max())
    )
    if not largest <= legal:
        raise ValueError(
            f"The logits of source and target must differ by at most {legal:g}. "
            f"Received: {largest:g}"
        )


def _logits(folder, dtype):
    hyperparameters, values = open_values(folder)
    is_rounded = any(value.dtype != dtype for value in values.values())
    prompt = _prompt(hyperparameters["vocabulary_size"])
    if format_of(folder) in weight_map.SAFETENSORS:
        logits = _transformers_logits(folder, prompt, dtype_name(dtype) if is_rounded else None)
    else:
        logits = _keras_logits(folder, prompt, dtype_name(dtype) if is_rounded else None)
    gc.collect()  # Free the model before the next one is loaded.
    return logits


def _keras_logits(folder, prompt, dtype):
    model = VaultGemmaCausalLM.from_preset(folder, preprocessor=None, dtype="float32")
    if dtype:
        _round(model.backbone.variables, dtype)
    return np.asarray(ops.convert_to_numpy(model(_inputs(prompt))))


def _round(variables, dtype):
    for variable in variables:
        variable.assign(ops.cast(ops.cast(variable.value, dtype), "float32"))


def _prompt(vocabulary_size):
    return np.arange(PROMPT_LENGTH)[None] * 7919 % vocabulary_size


def _inputs(prompt):
    return {"token_ids": prompt.astype("int32"), "padding_mask": np.ones_like(prompt, "int32")}


def _transformers_logits(folder, prompt, dtype):
    # Imported by name, because they are no dependencies of this package.
    torch, transformers = map(importlib.import_module, ("torch", "transformers"))
    bars = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        load = transformers.AutoModelForCausalLM.from_pretrained
        model = load(folder, dtype=torch.float32, local_files_only=True).eval()
    finally:
        if bars:
            transformers.utils.logging.enable_progress_bar()
    with torch.inference_mode():
        # Only parameters: one of the buffers scales the embedding, and must not be rounded.
        for parameter in model.parameters() if dtype else ():
            parameter.copy_(parameter.to(getattr(torch, dtype)))
        return model(torch.from_numpy(prompt)).logits.numpy()
