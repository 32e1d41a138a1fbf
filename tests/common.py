"""Small models that several tests build."""

import functools
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import keras
import numpy as np

import keras_vaultgemma
from keras_vaultgemma import VaultGemmaBackbone, VaultGemmaCausalLM
from keras_vaultgemma.cli import main

RELEASE_LIKE = dict(
    vocabulary_size=128,
    num_layers=3,
    num_query_heads=4,
    num_key_value_heads=4,
    hidden_dim=48,
    intermediate_dim=96,
    head_dim=16,
    max_sequence_length=64,
    initializer_range=0.15,
)
LINES = [
    "A Wolf had been gorging on an animal he had killed, when suddenly a small bone in the meat stuck in his throat.",
    "An Ass, having put on the Lion's skin, roamed about in the forest and amused himself by frightening all.",
    "A Crow, half-dead with thirst, came upon a Pitcher which had once been full of water.",
    "The Hare was once boasting of her speed before the other animals.",
]
IDS = {
    "token_ids": np.array([[2, 17, 5, 99, 31], [2, 40, 8, 0, 0]]),
    "padding_mask": np.array([[1] * 5, [1] * 3 + [0] * 2]),
}


def random_backbone(**changes):
    """A backbone of `RELEASE_LIKE` with two layers and weights large enough to make every part of it matter."""
    return VaultGemmaBackbone(**{**RELEASE_LIKE, "num_layers": 2, **changes})


@functools.cache
def _saved_preset(name, num_layers):
    tiny = VaultGemmaCausalLM.from_preset("vaultgemma_tiny")
    changes = dict(num_layers=num_layers, layer_types=["full_attention"] * num_layers)
    backbone = VaultGemmaBackbone.from_config({**tiny.backbone.get_config(), **changes})
    values = {v.path: v for v in tiny.backbone.variables}
    for v in backbone.variables:
        # The bundled values have 16 bits, and roundings to 16 would change nothing.
        v.assign(values[v.path] * 1.001)
    folder = tempfile.TemporaryDirectory()
    VaultGemmaCausalLM(backbone, tiny.preprocessor).save_to_preset(f"{folder.name}/{name}")
    return folder


def one_layer_preset():
    """Folder of the bundled preset with its first layer alone, which compiles in a third of the time."""
    return f"{_saved_preset('one_layer', 1).name}/one_layer"


def float32_preset():
    """Folder of the bundled preset with values that bfloat16 cannot hold."""
    return f"{_saved_preset('float32', 4).name}/float32"


def to_numpy(x):
    return np.asarray(keras.ops.convert_to_numpy(x))


def gradients(loss, variables):
    """NumPy gradients of the scalar `loss()` with respect to trainable Keras variables."""
    return value_and_gradients(loss, variables, is_compiled=False)()[1]


def value_and_gradients(loss, variables, is_compiled=True):
    """A function of tensors that returns `loss(*tensors)` and its gradients as NumPy arrays.

    If `is_compiled`, JAX and TensorFlow compile it once for all tensors of a shape.
    """
    if keras.config.backend() == "jax":
        import jax

        def stateless(values, tensors):
            with keras.StatelessScope(state_mapping=zip(variables, values, strict=True)):
                return loss(*tensors)

        function = jax.value_and_grad(stateless)
        function = jax.jit(function) if is_compiled else function

        def run(*tensors):
            return function([variable.value for variable in variables], tensors)

    elif keras.config.backend() == "tensorflow":
        import tensorflow as tf

        def run(*tensors):
            with tf.GradientTape() as tape:
                value = loss(*tensors)
            found = tape.gradient(value, [variable.value for variable in variables])
            return value, [tf.convert_to_tensor(gradient) for gradient in found]

        run = tf.function(run, autograph=False) if is_compiled else run

    else:
        import torch

        def run(*tensors):
            value = loss(*tensors)
            return value, torch.autograd.grad(value, [variable.value for variable in variables])

    def as_numpy(*tensors):
        value, found = run(*tensors)
        return to_numpy(value), [to_numpy(gradient) for gradient in found]

    return as_numpy


def shapes_made(total, *arrays):
    """Shapes of all arrays on the way from NumPy arrays to the scalar `total(*tensors)` and to its gradients."""
    shapes = set()
    if keras.config.backend() == "torch":
        import torch
        from torch.utils._python_dispatch import TorchDispatchMode

        class Note(TorchDispatchMode):
            def __torch_dispatch__(self, function, types, args=(), kwargs=None):
                result = function(*args, **(kwargs or {}))
                shapes.update(
                    tuple(x.shape)
                    for x in keras.tree.flatten(result)
                    if isinstance(x, torch.Tensor)
                )
                return result

        tensors = [torch.tensor(array, requires_grad=True) for array in arrays]
        with Note():
            total(*tensors).backward()
        return shapes
    if keras.config.backend() == "jax":
        import jax

        text = str(jax.make_jaxpr(jax.grad(total, argnums=tuple(range(len(arrays)))))(*arrays))
    else:
        import tensorflow as tf

        @tf.function(jit_compile=True)
        def gradient(*tensors):
            with tf.GradientTape() as tape:
                tape.watch(tensors)
                value = total(*tensors)
            return tape.gradient(value, tensors)

        text = gradient.experimental_get_compiler_ir(*map(tf.constant, arrays))(stage="hlo")
    return {tuple(map(int, shape.split(","))) for shape in re.findall(r"\[(\d+(?:,\d+)*)\]", text)}


class count_compilations:
    """A context that counts the programs XLA compiles on JAX; `count` stays None on other backends."""

    count = None

    def __enter__(self):
        self.is_open = True
        if keras.config.backend() == "jax":
            import jax

            self.count = 0
            jax.monitoring.register_event_duration_secs_listener(self._listen)
        return self

    def __exit__(self, *error):
        self.is_open = False

    def _listen(self, event, duration, **kwargs):
        if self.is_open and event == "/jax/core/compile/backend_compile_duration":
            self.count += 1


def table(text):
    """Parse a description: `{section: {label: value}}`, or `{section: {sentence: ""}}`."""
    sections, section = {}, None
    for line in text.splitlines():
        if line.startswith("  "):
            name, _, value = line.strip().partition("  ")
            section[name] = value.strip()
        else:
            section = sections[line] = {}
    return sections


def check_schema(document, name):
    """Validate a document, as JSON, against a schema of `evaluation/schemas`."""
    import jsonschema

    folder = Path(keras_vaultgemma.__file__).parent / "evaluation/schemas"
    schema = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(json.loads(json.dumps(document, allow_nan=False)), schema)


def error_of(capsys, *arguments):
    """The message of a command that has to fail: one line on standard error, nothing on standard output."""
    assert main(list(arguments)) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("keras-vaultgemma: ") and err.endswith("\n") and err.count("\n") == 1
    return err.removeprefix("keras-vaultgemma: ").removesuffix("\n")


def run_command(*arguments, **kwargs):
    """`python -m keras_vaultgemma` in a process of its own."""
    root = str(Path(keras_vaultgemma.__file__).parents[1])
    env = {**os.environ, "PYTHONPATH": root, **kwargs.pop("env", {})}
    command = [sys.executable, "-m", "keras_vaultgemma", *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True, **kwargs)
