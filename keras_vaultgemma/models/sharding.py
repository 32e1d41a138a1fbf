"""Sharding of the backbone's variables and of the rows of a batch over devices (JAX).

Variables follow the tensor parallelism of Megatron-LM ([Shoeybi et al., 2019](
https://arxiv.org/abs/1909.08053)): matrices into the heads and into the MLP are sharded by columns,
those out of them by rows, the embedding by rows of the vocabulary. Each device then works on its
own heads, channels and tokens, and no weight is ever communicated.
"""

import os
import warnings
from typing import Any

import keras

from keras_vaultgemma import backend
from keras_vaultgemma.models.preset_io import preset_hyperparameters

PARTS = {
    "attention": "num_key_value_heads",
    "the MLP": "intermediate_dim",
    "the embedding": "vocabulary_size",
}
"""The parts that are sharded as a whole or not at all, with the hyperparameter that the number of
devices must divide.

Key-value heads stand for all heads, because the number of query heads is a multiple of theirs, and
a query head that is on one device with its keys needs nothing from another device.
"""

KERAS_BATCH_SIZE = 32
"""Default batch size of `keras.Model.fit`."""


def layout_map(device_mesh, hyperparameters, model_axis="model", data_axis="batch"):
    """Return the layout of each variable of a backbone, including those that LoRA and int8 add.

    Norms, and variables that match no entry, are replicated. Optimizers give their state, including
    accumulated gradients, the layout of the variable it belongs to.

    Args:
        device_mesh: `keras.distribution.DeviceMesh`.
        hyperparameters: dict of the backbone's constructor arguments.
        model_axis: string. Mesh axis that variables are sharded along. Defaults to "model".
        data_axis: string. Mesh axis that the rows of a batch are sharded along. Defaults to
            "batch".

    Returns:
        `keras.distribution.LayoutMap`. A part whose size the devices of `model_axis` do not divide
        is replicated, with a warning.

    Raises:
        ValueError: If `device_mesh` is not a mesh or lacks an axis, both axes are the same, or the
            backend is not JAX.
    """
    backend.check_distribution_support()
    if not isinstance(device_mesh, keras.distribution.DeviceMesh):
        raise ValueError(
            f"`device_mesh` must be a keras.distribution.DeviceMesh. Received: {device_mesh!r}"
        )
    names = tuple(device_mesh.axis_names)
    for argument, axis in (
        ("model_parallel_dim_name", model_axis),
        ("data_parallel_dim_name", data_axis),
    ):
        if axis not in names:
            raise ValueError(
                f"`{argument}` must be one of the mesh's axes {names}. "
                f"Received: {argument}={axis!r}"
            )
    if model_axis == data_axis:
        raise ValueError(
            "`model_parallel_dim_name` and `data_parallel_dim_name` must be two axes of the mesh. "
            f"Received: {model_axis!r} for both"
        )
    devices = device_mesh.shape[names.index(model_axis)]
    whole = [part for part in PARTS if hyperparameters[PARTS[part]] % devices]
    if whole:
        sizes = ", ".join(f"{PARTS[part]}={hyperparameters[PARTS[part]]}" for part in whole)
        warnings.warn(
            f"The {devices} devices of the mesh's axis {model_axis!r} do not divide {sizes}, so "
            f"each of them holds all of {' and '.join(whole)}. The rest is sharded.",
            stacklevel=3,
        )
    layouts = keras.distribution.LayoutMap(device_mesh)
    for pattern, axes in variable_axes(model_axis, whole).items():
        layouts[pattern] = axes
    return layouts


def check_batches(x, batch_size):
    """Raise ValueError if the current distribution cannot shard each batch of `x`.

    JAX would also raise, but at the last batch, after a whole epoch, and without naming the batch
    size.

    Args:
        x: `{"token_ids": [B, T]}`. Anything else is ignored, because its rows cannot be counted.
        batch_size: int or None, as given to `fit`.
    """
    distribution = keras.distribution.distribution()
    if distribution is None or not isinstance(x, dict):
        return
    # Each process has its own part of a batch, or the same rows as others of its replica.
    shards = max(1, distribution.num_model_replicas // distribution.num_processes)
    rows, batch_size = x["token_ids"].shape[0], batch_size or KERAS_BATCH_SIZE
    if rows % shards or (rows > batch_size and batch_size % shards):
        raise ValueError(
            f"Every batch, the last one included, must have a multiple of {shards} rows, because "
            "the distribution shards them over as many devices. "
            f"Received: batch_size={batch_size} and {rows} rows"
        )


def variable_axes(axis, whole=()):
    """Return `{pattern of variable paths: mesh axis or None for each axis of the variable}`.

    Args:
        axis: string. Name of the mesh axis.
        whole: list of those `PARTS` that are not sharded; they get no entry.
    """
    attention, block = r"decoder_block_\d+/attention", r"decoder_block_\d+"
    parts = {
        "attention": {
            **_by_outputs(f"{attention}/(query|key|value)", axis),
            **_by_inputs(f"{attention}/attention_output", axis),
        },
        "the MLP": {**_by_outputs(f"{block}/(gate|up)", axis), **_by_inputs(f"{block}/down", axis)},
        "the embedding": {
            "token_embedding/(embeddings|lora_embeddings_a)": (axis, None),
            "token_embedding/embeddings_scale": (axis,),
        },
    }
    return {
        pattern: axes
        for part in parts
        if part not in whole
        for pattern, axes in parts[part].items()
    }


def _by_outputs(layer, axis):
    """Shard a projection's outputs. Its matrix is [out, in], or [in, out] in int8; every output
    needs LoRA's first factor [in, rank]."""
    return {
        f"{layer}/weight": (axis, None),
        f"{layer}/(kernel|lora_kernel_b)": (None, axis),
        f"{layer}/kernel_scale": (axis,),
    }


def _by_inputs(layer, axis):
    """Shard a projection's inputs. Every input needs int8's scales [out] and LoRA's second factor
    [rank, out]."""
    return {f"{layer}/weight": (None, axis), f"{layer}/(kernel|lora_kernel_a)": (axis, None)}


class LayoutMapMethod:
    """Mixin of a backbone: `get_layout_map`, as the backbones of keras-hub have it."""

    @staticmethod
    def get_layout_map(
        device_mesh: keras.distribution.DeviceMesh,
        model_parallel_dim_name: str = "model",
        data_parallel_dim_name: str = "batch",
        preset: str | os.PathLike = "vaultgemma_1b",
        **hyperparameters: Any,
    ) -> keras.distribution.LayoutMap:
        """Return the layout of a backbone's variables for `keras.distribution.ModelParallel` (JAX).

        Call it before the model is built, because variables are sharded as they are created. See
        `models/sharding.py` for what is sharded how.

        Args:
            device_mesh: `keras.distribution.DeviceMesh`.
            model_parallel_dim_name: string. Mesh axis that variables are sharded along. Defaults to
                "model".
            data_parallel_dim_name: string. Mesh axis that the rows of a batch are sharded along.
                Defaults to "batch".
            preset: string or path. Preset whose sizes must be divided, as for `from_preset`. Only
                its config is read. Defaults to "vaultgemma_1b".
            **hyperparameters: Constructor arguments that replace the preset's.

        Returns:
            `keras.distribution.LayoutMap`. Heads, MLP or vocabulary whose size the devices do not
            divide stay whole on each device, with a warning.

        Raises:
            ValueError: If the mesh lacks one of the axes, the preset or a hyperparameter is
                unknown, or the backend is not JAX.

        Example:

        ```python
        import keras
        from keras_vaultgemma import VaultGemmaBackbone

        if keras.config.backend() == "jax":
            devices = keras.distribution.list_devices()
            mesh = keras.distribution.DeviceMesh((1, len(devices)), ("batch", "model"), devices)
            layout_map = VaultGemmaBackbone.get_layout_map(mesh, preset="vaultgemma_tiny")
        ```
        """
        sizes = preset_hyperparameters(preset)
        if unknown := set(hyperparameters) - set(sizes):
            raise ValueError(f"VaultGemmaBackbone has no argument {', '.join(sorted(unknown))}")
        sizes.update(hyperparameters)
        return layout_map(device_mesh, sizes, model_parallel_dim_name, data_parallel_dim_name)
