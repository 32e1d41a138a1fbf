"""Agreement of a device with the CPU on the same backend.

Models have random weights and the widths of VaultGemma 1B, but two layers and 8,192 tokens. The
CPU computes its answers in another process at the same time.
"""

import dataclasses
import functools
import math
import os
import pickle
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import device
import numpy as np
import random_model

WIDE = dict(random_model.SIZES["1b"], vocabulary_size=8192, num_layers=2)
PROMPTS = ("Once upon a time", "The fox said", "In the garden of the king", "A crow")
CPU = {"JAX_PLATFORMS": "cpu", "KERAS_TORCH_DEVICE": "cpu", "CUDA_VISIBLE_DEVICES": ""}
"""Environment in which every backend computes on the CPU."""


def sizes(tiny):
    return random_model.SIZES["tiny"] if tiny else WIDE


def rows(tiny):
    """Return four rows of token ids, the last of which is padded to half its length, and labels."""
    length = 16 if tiny else 128
    ids = np.random.default_rng(1).integers(5, sizes(tiny)["vocabulary_size"], (4, length + 1))
    mask = np.ones((4, length), "int32")
    mask[3, length // 2 :] = 0
    ids = ids.astype("int32")
    return {"token_ids": ids[:, :-1] * mask, "padding_mask": mask}, ids[:, 1:] * mask


def logits(tiny, dtype="float32"):
    import keras

    model = random_model.vaultgemma(sizes(tiny), dtype)
    x, _ = rows(tiny)
    return [keras.ops.convert_to_numpy(model(x))[x["padding_mask"] != 0].astype("float32")]


def quantized_scores(tiny, mode):
    """Return -log p of each token, by a compiled function."""
    model = random_model.vaultgemma(sizes(tiny), "float32")
    model.quantize(mode)
    return [model.score(rows(tiny)[0])]


def greedy_ids(tiny):
    """Return the ids that the bundled model generates for `PROMPTS`."""
    from keras_vaultgemma import VaultGemmaCausalLM

    model = VaultGemmaCausalLM.from_preset("vaultgemma_tiny")
    ids = [model.preprocessor.tokenizer(prompt).tolist() for prompt in PROMPTS]
    model.preprocessor, new = None, 8 if tiny else 40
    found = model.generate(ids, max_new_tokens=new, stop_token_ids=None)
    return [np.array([row[-new:] for row in found])]


def loss_and_gradients(tiny):
    """Return the loss of a batch and the gradients of all weights."""
    import keras

    class Keep(keras.optimizers.SGD):
        """Overwrites each variable by its gradient."""

        def update_step(self, gradient, variable, learning_rate):
            self.assign(variable, gradient)

    model = random_model.vaultgemma(sizes(tiny), "float32")
    model.compile(Keep(1.0), weighted_metrics=None)
    loss = model.train_on_batch(*rows(tiny))
    gradients = [keras.ops.convert_to_numpy(v) for v in model.trainable_variables]
    return [np.array(float(np.squeeze(loss))), *gradients]


def clipped_sum(tiny, rank, microbatch):
    """Return the sum of the rows' clipped gradients, before noise."""
    import keras

    from keras_vaultgemma import backend
    from keras_vaultgemma.privacy import DPSGD

    model = random_model.vaultgemma(sizes(tiny), "float32")
    if rank:
        model.backbone.enable_lora(rank)
        for i, v in enumerate(model.trainable_variables):  # one factor of each starts at 0
            v.assign(np.random.default_rng(i).normal(0, 0.02, v.shape))
    # It clips the gradients of all weights, and not those of factors.
    settings = DPSGD(noise_multiplier=1.0, clip_norm=0.5, delta=1e-5)
    model.compile(keras.optimizers.SGD(1.0), weighted_metrics=None, privacy=settings)
    training = model.private_training
    training.microbatch = microbatch

    def total(rows, count):
        return training.clipped_sum(rows, count)[0].gradients

    variables = [*model.variables, *model.metrics_variables]
    run = backend.compile_function(total, variables, jit_compile=False)
    x, y = rows(tiny)
    weights = x["padding_mask"].astype("float32")
    tensors = keras.tree.map_structure(keras.ops.convert_to_tensor, ((x, y, weights), np.int32(4)))
    return [keras.ops.convert_to_numpy(g) for g in run(*tensors)]


def noise(tiny, secure, size=100_000):
    """Return noise of a fixed seed, by the generator that is for every device."""
    import keras

    from keras_vaultgemma import backend
    from keras_vaultgemma.privacy.noise import add_noise

    # PyTorch's CPU alone has another generator.
    backend.add_float64_noise = lambda *args: None
    seed = keras.ops.convert_to_tensor(np.array([7, -8, 9, 10], "int32"))
    run = backend.compile_function(
        lambda total, seed: add_noise(total, None, 1.0, seed, secure), [], jit_compile=False
    )
    return [keras.ops.convert_to_numpy(run(keras.ops.zeros((size,)), seed))]


def relative_error(found, expected):
    """Return the largest error of a tensor, relative to its Euclidean norm."""
    pairs = zip(found, expected, strict=True)
    errors = [np.linalg.norm(x - y) / np.linalg.norm(y) for x, y in pairs]
    return float(max(errors)) if np.isfinite(errors).all() else math.inf


def different_rows(found, expected):
    """Return the number of rows that are not equal."""
    return int((found[0] != expected[0]).any(axis=1).sum())


def distance_from_normal(found, expected):
    """Return how far shares of numbers are from a normal distribution's, in standard errors."""
    (z,), normal, errors = found, statistics.NormalDist(), []
    for bound in np.arange(-5, 5.5, 0.5):
        share = normal.cdf(bound)
        deviation = abs(float((z < bound).mean()) - share)
        errors.append(deviation / math.sqrt(share * (1 - share) / z.size))
    return max(errors) if np.isfinite(z).all() else math.inf


@dataclasses.dataclass(frozen=True)
class Check:
    """An answer of a device, and how far it may be from that of the CPU.

    Args:
        answer: function of `tiny` that returns a list of arrays.
        allowed: float. Largest value of `compare`.
        compare: function of both answers. Defaults to `relative_error`.
        reference: string or None. Check whose answer on the CPU is the reference. Defaults to None,
            for the check itself.
        has_reference: bool. False if the answer is not compared with the CPU's. Defaults to True.
        is_exact: bool. True to multiply float32 matrices in full precision. Defaults to True.
    """

    answer: Callable
    allowed: float
    compare: Callable = relative_error
    reference: str | None = None
    has_reference: bool = True
    is_exact: bool = True


CHECKS = {
    "logits, float32": Check(logits, 1e-5),
    "logits, float32 in the default precision": Check(
        logits, 5e-3, reference="logits, float32", is_exact=False
    ),
    "logits, bfloat16": Check(
        functools.partial(logits, dtype="bfloat16"), 5e-2, reference="logits, float32"
    ),
    "scores, int8": Check(functools.partial(quantized_scores, mode="int8"), 2e-3),
    "scores, int4": Check(functools.partial(quantized_scores, mode="int4"), 1e-5),
    "greedy texts that differ": Check(greedy_ids, 0, different_rows),
    "loss and gradients": Check(loss_and_gradients, 1e-4),
    "private clipped sum, all weights": Check(
        functools.partial(clipped_sum, rank=0, microbatch=1), 1e-4
    ),
    "private clipped sum, LoRA": Check(functools.partial(clipped_sum, rank=8, microbatch=2), 1e-4),
    "noise": Check(functools.partial(noise, secure=False), 1e-5),
    "noise of ChaCha20": Check(functools.partial(noise, secure=True), 1e-5),
    "noise from a normal distribution, in standard errors": Check(
        functools.partial(noise, secure=False, size=2**22),
        5.0,
        distance_from_normal,
        has_reference=False,
    ),
}


def answers(names, tiny):
    """Compute the answers of checks.

    Returns:
        Dict from the names to a list of arrays, or to a string: why there is no answer.
    """
    found = {}
    for name in names:
        check = CHECKS[name]
        try:
            if check.is_exact:
                with device.full_precision():
                    found[name] = check.answer(tiny)
            else:
                found[name] = check.answer(tiny)
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"
    return found


def write_reference(path, tiny):
    """Write the answers that others are compared with."""
    names = {check.reference or name for name, check in CHECKS.items() if check.has_reference}
    path.write_bytes(pickle.dumps(answers([name for name in CHECKS if name in names], tiny)))


def measure(tiny):
    """Return `{check: {"error", "allowed"} or {"failed"}}`."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "reference"
        command = [sys.executable, str(Path(__file__).with_name("gpu_sections.py")), "reference"]
        command += ["--out", str(path), *["--tiny"] * tiny]
        process = subprocess.Popen(command, env={**os.environ, **CPU}, stdout=subprocess.DEVNULL)
        try:
            found = answers(CHECKS, tiny)
            if process.wait():
                raise RuntimeError("The process that computes on the CPU failed")
        finally:
            process.kill()
        expected = pickle.loads(path.read_bytes())
    return {name: _verdict(name, found, expected) for name in CHECKS}


def _verdict(name, found, expected):
    check = CHECKS[name]
    reference = expected[check.reference or name] if check.has_reference else None
    if isinstance(found[name], str):
        return {"failed": found[name]}
    if isinstance(reference, str):
        return {"failed": f"on the CPU: {reference}"}
    return {"error": check.compare(found[name], reference), "allowed": check.allowed}
