"""What test_distribution.py runs in processes of their own, for JAX counts its devices once: one step on each mesh.

    python distribution_worker.py FILE [case ...]

saves `{"case/quantity": array}`. Several such processes, told of each other by Keras's environment variables, work
together; the first one saves.
"""

import contextlib
import os
import sys

import jax
import keras
import numpy as np
from common import RELEASE_LIKE, random_backbone
from jax.experimental import multihost_utils
from keras.distribution import DataParallel, DeviceMesh, ModelParallel

from keras_vaultgemma import (
    TrainingCheckpoint,
    VaultGemmaBackbone,
    VaultGemmaCausalLM,
    backend,
    privacy,
)
from keras_vaultgemma.checkpoints import weight_map
from keras_vaultgemma.lora import injection
from keras_vaultgemma.lora.adapters import load_adapter, save_adapter
from keras_vaultgemma.lora.merging import merge
from keras_vaultgemma.lora.peft_format import Adapter, read_adapter, write_adapter
from keras_vaultgemma.privacy import machine_ledger, mechanism
from keras_vaultgemma.privacy.accounting import Steps
from keras_vaultgemma.privacy.groups import Groups
from keras_vaultgemma.privacy.sampling import PrivateBatches
from keras_vaultgemma.privacy.seeds import fixed_secret, noise_seed

ROWS, LENGTH, C = 8, 12, 1.0
SIZES = {**RELEASE_LIKE, "num_layers": 1}
PROMPTS = [[2, 17, 5, 99], [2, 8, 100, 31, 77, 3, 64]]


class Stored:
    def __init__(self, array):
        self.array, self.shape = array, array.shape

    def read(self, dtype):
        return self.array.astype(dtype)


def weights():
    rng = np.random.default_rng(0)
    return {w.path: Stored(rng.normal(size=w.shape) * 0.15) for w in weight_map.weight_map(SIZES)}


def model():
    return VaultGemmaCausalLM(random_backbone(num_layers=1, initial_values=weights()))


def batch():
    """Rows of different lengths, of which each process of a divided batch takes its share."""
    rng = np.random.default_rng(1)
    ids = rng.integers(3, SIZES["vocabulary_size"], (ROWS, LENGTH + 1))
    mask = np.arange(LENGTH) < rng.integers(3, LENGTH + 1, (ROWS, 1))
    x = {"token_ids": (ids[:, :-1] * mask).astype("int32"), "padding_mask": mask.astype("int32")}
    return x, ids[:, 1:].astype("int32"), mask.astype("float32")


def whole(x):
    """The value of a variable that may be divided among devices and processes."""
    x = x.value
    return (
        np.asarray(x)
        if x.is_fully_addressable
        else multihost_utils.process_allgather(x, tiled=True)
    )


def layout(variable):
    """The mesh axis of each axis of a variable, as text."""
    if keras.distribution.distribution() is None:
        return np.array("")
    axes = tuple(variable.value.sharding.spec)
    return np.array(str(axes + (None,) * (len(variable.shape) - len(axes))))


def fit(model, optimizer, steps=1, batches=1, **compile_options):
    """Losses of `steps` epochs of as many equal batches."""
    model.compile(optimizer=optimizer, **compile_options)
    x, y, weight = batch()
    distribution = keras.distribution.distribution()
    shares = (
        1 if distribution is None else min(distribution.num_model_replicas, jax.process_count())
    )
    share = slice(jax.process_index(), None, shares) if shares > 1 else slice(None)
    x, y, weight = jax.tree.map(lambda a: a[share], (x, y, weight))
    options = dict(batch_size=len(y), epochs=steps, shuffle=False, verbose=0)
    x, y, weight = jax.tree.map(lambda a: np.concatenate([a] * batches), (x, y, weight))
    return np.array(model.fit(x, y, sample_weight=weight, **options).history["loss"])


def full(results):
    """Loss, and the gradient as the step that SGD makes with a learning rate of 1."""
    trained = model()
    for v in trained.backbone.variables:
        results[f"layout/{v.path}"] = layout(v)
    before = {v.path: whole(v) for v in trained.backbone.variables}
    results["loss"] = fit(trained, keras.optimizers.SGD(1.0))
    for v in trained.backbone.variables:
        results[f"gradient/{v.path}"] = before[v.path] - whole(v)


def lora(results, quantized=False):
    """Four accumulated steps of Adam on LoRA factors of a matrix cut by columns, one cut by rows, and the embedding."""
    trained = model()
    if quantized:
        trained.quantize("int8")
        results["greedy"] = generated(trained)
    trained.backbone.enable_lora(
        2, target_layer_names=["up", "attention_output", "token_embedding"]
    )
    factors = [v for v in trained.backbone.variables if "lora" in v.path]
    rng = np.random.default_rng(2)
    for v in factors:
        v.assign(rng.normal(size=v.shape) * 0.1)
    optimizer = keras.optimizers.Adam(0.01, gradient_accumulation_steps=2, name="adam")
    results["loss"] = fit(trained, optimizer, steps=2, batches=2)
    for v in [*trained.backbone.variables, *optimizer.variables]:
        results[f"layout/{v.path}"] = layout(v)
    for v in factors:
        results[f"trained/{v.path}"] = whole(v)
    folder = f"{sys.argv[1]}.adapter"
    save_adapter(trained, folder)
    for path, values in read_adapter(folder, trained.backbone.get_config()).factors.items():
        results.update({f"saved/{path}/{i}": value for i, value in enumerate(values)})


def loaded(results):
    """An adapter from a file, trained with gradient checkpointing, and merged."""
    rng, folder, trained = np.random.default_rng(2), f"{sys.argv[1]}.loaded", model()
    layers = injection.adaptable_layers(trained.backbone)
    paths = [
        path
        for path, layer in layers.items()
        if layer.name in ("up", "attention_output", "token_embedding")
    ]
    sizes = {path: layers[path].adapted_shape for path in paths}
    factors = {
        path: tuple(
            rng.normal(size=size).astype("float32") * 0.1 for size in ((width, 2), (2, units))
        )
        for path, (width, units) in sizes.items()
    }
    write_adapter(folder, Adapter(2, 4.0, 0.0, factors), trained.backbone.get_config())
    load_adapter(trained, folder)
    results["loss"] = fit(trained, keras.optimizers.SGD(0.5), steps=2, gradient_checkpointing=True)
    for v in trained.backbone.trainable_variables:
        results[f"trained/{v.path}"] = whole(v)
    merge(trained)
    for path in paths:
        (matrix,) = layers[path].weights
        results[f"layout/{matrix.path}"] = layout(matrix)
        results[f"merged/{matrix.path}"] = whole(matrix)


def generate(results):
    results["greedy"] = generated(model())


def generated(model):
    return np.array(
        model.generate(PROMPTS, max_new_tokens=20, strip_prompt=True, stop_token_ids=None)
    )


def save(results):
    """What is read back after saving."""
    folder = f"{sys.argv[1]}.preset"
    model().backbone.save_to_preset(folder)
    for v in VaultGemmaBackbone.from_preset(folder).variables:
        results[v.path] = whole(v)


def shares(results):
    """`backend.in_shares` of rows that the devices divide and of some that they do not, and how many each is given."""
    seen = []

    def function(rows, factor):
        seen.append(rows.shape[0])
        return rows * factor, (rows * factor).sum()

    call = jax.jit(lambda *tensors: backend.per_device(function, *tensors))
    for count in (ROWS, ROWS - 1):
        results[f"{count}/products"], results[f"{count}/sum"] = call(
            np.arange(count, dtype="float32"), np.float32(3)
        )
    results["layout/seen"] = np.array(seen)


def private_model(rank, ledger=None, seed=5):
    """A model whose LoRA factors are trained privately, or, without a rank, all of its weights."""
    trained = model()
    if rank:
        trained.backbone.enable_lora(rank, target_layer_names=["up", "attention_output"])
        rng = np.random.default_rng(2)
        for v in trained.trainable_variables:
            v.assign(rng.normal(size=v.shape) * 0.2)
    settings = privacy.DPSGD(
        noise_multiplier=1.0,
        delta=1e-5,
        clip_norm=C,
        microbatch_size=2 if rank else 1,
        extend_budget=True,
        seed_for_tests=seed,
        ledger=ledger,
    )
    trained.compile(keras.optimizers.SGD(1.0), privacy=settings)
    return trained


def sums(results):
    """Clipped sums of a batch that the devices do not divide: plain ones of rows, and pairs of LoRA factors of users.

    Two users are computed at once.
    """
    x, y, weight = jax.tree.map(lambda a: a[: ROWS - 1], batch())
    for name, rank in (("full", None), ("lora", 2)):
        mechanism.PLAIN_ROUNDING = 0.0 if rank else 1.0
        trained = private_model(rank)
        training, count = trained.private_training, len(trained.trainable_variables)
        steps, size, groups = Steps(1, 7, 1.0, 7, 1.0), training.settings.microbatch_size, None
        training.microbatch, training.capacity = size, 7
        if rank:
            groups, training.capacity = Groups([0, 0, 1, 2, 3, 4, 5], max_rows=2), 6
            steps = Steps(1, 6, 1.0, 6, 1.0)
        parts = dict(groups=groups, devices=backend.data_devices())
        batches = PrivateBatches((x, y, weight), steps, 1, count, b"0" * 16, 0, "", **parts)

        def function(x, y, step, training=training, name=name):
            inputs = x, y, step["sample_weight"]
            found, _ = training.clipped_sum(inputs, step["count"], is_drawn=step.get("is_drawn"))
            results[f"{name}/sensitivity"] = np.array(found.sensitivity)
            return found._replace(sensitivity=0.0)

        variables = [*trained.variables, *trained.metrics_variables]
        found = backend.compile_function(function, variables, jit_compile=False)(*batches[0])
        for part in ("loss", "clipped", "not_finite"):
            results[f"{name}/{part}"] = np.asarray(getattr(found, part))
        for part in ("gradients", "rests"):
            for v, value in zip(trained.trainable_variables, getattr(found, part), strict=False):
                results[f"{name}/{part}/{v.path}"] = np.asarray(value)


def private(results):
    """Weights after private steps, and what steps add to the weights whose rows have no gradient."""
    x, y, weight = batch()
    trained = private_model(rank=2)
    variables = trained.trainable_variables
    options = dict(batch_size=4, epochs=2, verbose=0)
    history = trained.fit(x, y, sample_weight=weight, **options).history
    results["loss"] = np.array(history["unprotected_loss"])
    before = [whole(v) for v in variables]
    for v, value in zip(variables, before, strict=True):
        results[f"trained/{v.path}"] = value
    trained.fit(x, y, sample_weight=0 * weight, **options)
    secret, zeros = fixed_secret(5), [np.zeros(v.shape, "float32") for v in variables]
    nothing, moved = mechanism.ClippedSum(zeros, C, 0.0, 0.0, 0.0), 0
    for step in range(4, 8):
        seeds = [noise_seed(secret, step, i).view("int32") for i in range(len(zeros))]
        noise = mechanism.noised_mean(nothing, 1.0, keras.ops.stack(seeds), 4.0)
        moved = moved + np.concatenate([np.ravel(x) for x in noise])
    found = np.concatenate([np.ravel(a - whole(v)) for v, a in zip(variables, before, strict=True)])
    results["noise"] = moved
    results["layout/error of noise"] = found - moved
    if jax.process_count() > 1:
        own = np.concatenate([np.ravel(whole(v)) for v in variables])
        results["layout/difference"] = np.ptp(multihost_utils.process_allgather(own), axis=0)


def resumed(results):
    """Weights after private steps that were interrupted after three of four."""
    x, y, weight = batch()
    folder = f"{sys.argv[1]}.{backend.data_devices()}"
    options = dict(batch_size=4, epochs=2, verbose=0, sample_weight=weight)
    for callbacks in ([Stop()], []):
        trained = private_model(rank=2)
        checkpoint = TrainingCheckpoint(f"{folder}/checkpoint", save_freq=1)
        with contextlib.suppress(KeyboardInterrupt):
            trained.fit(x, y, callbacks=[checkpoint, *callbacks], **options)
    for v in trained.trainable_variables:
        results[f"trained/{v.path}"] = whole(v)
    results["steps"] = np.array([count for _, count in trained.privacy.ledger.runs])


class Stop(keras.callbacks.Callback):
    def on_train_batch_begin(self, batch, logs=None):
        if self.model.privacy.run.done == 4:
            raise KeyboardInterrupt


def ledger(results):
    """The run as each process knows it, the file's content, and what parts of the rows are answered with."""
    x, y, weight = batch()
    options = dict(batch_size=4, epochs=1, verbose=0)
    trained = private_model(rank=2, ledger=f"{sys.argv[1]}.{jax.process_index()}", seed=None)
    trained.fit(x, y, sample_weight=weight, **options)
    (run, count), *_ = trained.privacy.ledger.runs
    name = np.frombuffer(bytes.fromhex(run.name), "uint8")
    results["names"] = multihost_utils.process_allgather(name)
    results["steps"] = multihost_utils.process_allgather(np.array(count))
    found = [one for one in machine_ledger.read_runs() if one.run.name == run.name]
    results["machine"] = np.array([one.steps for one in found])
    own = np.arange(ROWS) % 2 == jax.process_index()
    try:
        trained.fit(jax.tree.map(lambda a: a[own], x), y[own], sample_weight=weight[own], **options)
    except ValueError as error:
        results["error"] = np.array(str(error))


TASKS = {
    "sums": sums,
    "private": private,
    "resumed": resumed,
    "ledger": ledger,
    "full": full,
    "lora": lora,
    "qlora": lambda results: lora(results, quantized=True),
    "loaded": loaded,
    "generate": generate,
    "save": save,
    "shares": shares,
}


def distribution_of(mesh):
    """None for "1", DataParallel for "4", ModelParallel for "2x2"."""
    sizes = [int(size) for size in mesh.split("x")]
    devices = keras.distribution.list_devices()[: int(np.prod(sizes))]
    if sizes == [1]:
        return None
    if len(sizes) == 1:
        return DataParallel(devices=devices, auto_shard_dataset=False)
    device_mesh = DeviceMesh(sizes, ("batch", "model"), devices)
    layout_map = VaultGemmaBackbone.get_layout_map(device_mesh, **SIZES)
    return ModelParallel(layout_map=layout_map, auto_shard_dataset=False)


def main(path, cases):
    if "KERAS_DISTRIBUTION_NUM_PROCESSES" in os.environ:
        keras.distribution.initialize()
    results = {}
    for case in cases:
        mesh, task = case.split(":")
        keras.distribution.set_distribution(distribution_of(mesh))
        found = {}
        TASKS[task](found)
        results.update({f"{case}/{name}": value for name, value in found.items()})
    if jax.process_index() == 0:
        np.savez(path, **results)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
