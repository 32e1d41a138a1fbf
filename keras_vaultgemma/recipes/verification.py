"""Whether a converted model is its source: every tensor bit by bit, and logits where another library can be asked."""

import gc
import importlib
import importlib.util

import numpy as np
from keras import ops

from keras_vaultgemma.checkpoints import weight_map
from keras_vaultgemma.checkpoints.lazy_tensor import dtype_name, equal_bits
from keras_vaultgemma.checkpoints.reader import format_of, open_values
from keras_vaultgemma.models.causal_lm import VaultGemmaCausalLM

PROMPT_LENGTH = 16
TOLERANCE = 1e-3
"""Absolute and relative, of float32 logits that two libraries computed."""


def verify_conversion(source, target, dtype, report=lambda name, count: None):
    """Compare two folders; logits only where one is in Hugging Face's format and transformers and torch are installed.

    Logits are computed in float32 by one model after the other, which takes up to 8 bytes of memory a parameter.

    Args:
        source, target: folders.
        dtype: NumPy dtype that the source's weights are rounded to before they are compared.
        report: called with a tensor's name and the bytes that were compared.

    Raises:
        ValueError: names the first tensor that differs, or says by how much logits do.
    """
    verify_tensors(source, target, dtype, report)
    formats = {format_of(source), format_of(target)}
    if weight_map.HUGGING_FACE in formats and all(
        map(importlib.util.find_spec, ("torch", "transformers"))
    ):
        verify_logits(source, target, dtype)


def verify_tensors(source, target, dtype, report=lambda name, count: None):
    """As `check`, for the tensors alone."""
    hyperparameters, values = open_values(source)
    _, written = open_values(target)
    for weight in weight_map.weight_map(hyperparameters):
        place = weight.locations[weight_map.KERAS]
        pairs = zip(
            values[weight.path].blocks(place, dtype),
            written[weight.path].blocks(place, dtype),
            strict=True,
        )
        for expected, found in pairs:
            if not equal_bits(expected, found):
                raise ValueError(
                    f"{weight.path} must be the source's, bit by bit, in the target. Received: other bits"
                )
            report(weight.path, found.nbytes)


def verify_logits(source, target, dtype):
    """As `check`, for the logits of a fixed prompt alone."""
    expected, found = (_logits(folder, dtype) for folder in (source, target))
    if not np.allclose(found, expected, rtol=TOLERANCE, atol=TOLERANCE, equal_nan=True):
        difference = np.abs(found - expected).max()
        raise ValueError(
            f"The logits of source and target must differ by at most {TOLERANCE}. Received: {difference:g}"
        )


def _logits(folder, dtype):
    hyperparameters, values = open_values(folder)
    rounds = any(value.dtype != dtype for value in values.values())
    prompt = np.arange(PROMPT_LENGTH)[None] * 7919 % hyperparameters["vocabulary_size"]
    if format_of(folder) == weight_map.HUGGING_FACE:
        logits = _transformers_logits(folder, prompt, dtype_name(dtype) if rounds else None)
    else:
        logits = _keras_logits(folder, prompt, dtype_name(dtype) if rounds else None)
    gc.collect()  # of the model, before the next one is loaded
    return logits


def _keras_logits(folder, prompt, dtype):
    model = VaultGemmaCausalLM.from_preset(folder, preprocessor=None, dtype="float32")
    for variable in model.backbone.variables if dtype else ():
        variable.assign(ops.cast(ops.cast(variable.value, dtype), "float32"))
    inputs = {"token_ids": prompt.astype("int32"), "padding_mask": np.ones_like(prompt, "int32")}
    return np.asarray(ops.convert_to_numpy(model(inputs)))


def _transformers_logits(folder, prompt, dtype):
    # Not a dependency, and of no other use to this package.
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
        for parameter in (
            model.parameters() if dtype else ()
        ):  # and not the buffers, one of which scales the embedding
            parameter.copy_(parameter.to(getattr(torch, dtype)))
        return model(torch.from_numpy(prompt)).logits.numpy()
