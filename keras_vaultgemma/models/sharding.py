"""How the backbone's variables and the rows of a batch are divided among devices, from their sizes alone.

For variables this is the tensor parallelism of Megatron-LM (Shoeybi et al., 2019, arXiv:1909.08053): matrices into the
heads and into the MLP are cut by columns, those out of them by rows, the embedding by rows of the vocabulary. Each
device then works on heads, channels and tokens of its own, and no weight ever travels.
"""

import warnings

import keras

from keras_vaultgemma import backend

PARTS = {
    "attention": "num_key_value_heads",
    "the MLP": "intermediate_dim",
    "the embedding": "vocabulary_size",
}
"""What is divided as a whole or not at all, and the hyperparameter that the number of devices must divide.

Key-value heads stand for all heads: the query heads are a multiple of them, and one that is alone with its keys needs
nothing from another device.
"""

KERAS_BATCH_SIZE = 32
"""What `keras.Model.fit` takes where it is given no batch size."""


def layout_map(device_mesh, hyperparameters, model_axis="model", data_axis="batch"):
    """The layout of each variable of a backbone, also of those that LoRA and int8 add.

    Norms, and variables that stand in no entry, are whole on every device. Optimizers give their state, accumulated
    gradients included, the layout of the variable that it belongs to.

    Args:
        device_mesh: `keras.distribution.DeviceMesh`.
        hyperparameters: the backbone's constructor arguments.
        model_axis: the mesh axis along which variables are divided.
        data_axis: the mesh axis along which the rows of a batch are divided, and no variable is.

    Returns:
        `keras.distribution.LayoutMap`. A part whose size the devices of `model_axis` do not divide stays whole, and a
        warning says so.

    Raises:
        ValueError: for something else than a mesh, an axis that it has not, one axis for both, or another backend than
            JAX.
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
                f"`{argument}` must be one of the mesh's axes {names}. Received: {argument}={axis!r}"
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
            f"The {devices} devices of the mesh's axis {model_axis!r} do not divide {sizes}: each of them holds all of "
            f"{' and '.join(whole)} and computes it alone. The rest is divided.",
            stacklevel=3,
        )
    layouts = keras.distribution.LayoutMap(device_mesh)
    for pattern, axes in variable_axes(model_axis, whole).items():
        layouts[pattern] = axes
    return layouts


def check_batches(x, batch_size):
    """Raise ValueError where the distribution that is set cannot divide each batch of `x` among its devices.

    JAX would find out as well, but at the last batch, after an epoch, and in words of its own.

    Args:
        x: `{"token_ids": [B, T]}`; anything else is not looked at, for its rows cannot be counted.
        batch_size: as given to `fit`.
    """
    distribution = keras.distribution.distribution()
    if distribution is None or not isinstance(x, dict):
        return
    # Each process has its own share of a batch, or the same rows as others of its replica.
    shares = max(1, distribution.num_model_replicas // distribution.num_processes)
    rows, batch_size = x["token_ids"].shape[0], batch_size or KERAS_BATCH_SIZE
    if rows % shares or (rows > batch_size and batch_size % shares):
        raise ValueError(
            f"Every batch, the last one included, must have a multiple of {shares} rows, for the distribution divides "
            f"them among as many devices. Received: batch_size={batch_size} and {rows} rows"
        )


def variable_axes(axis, whole=()):
    """`{pattern of variable paths: the mesh axis, or None, for each axis of the variable}`.

    Args:
        axis: name of the mesh axis.
        whole: those of `PARTS` that are not divided; they have no entry.
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
    """Of a projection, [out, in], or [in, out] in int8; LoRA's first factor [in, rank] is needed by every output."""
    return {
        f"{layer}/weight": (axis, None),
        f"{layer}/(kernel|lora_kernel_b)": (None, axis),
        f"{layer}/kernel_scale": (axis,),
    }


def _by_inputs(layer, axis):
    """As `_by_outputs`; int8 has one scale for each output, and LoRA's second factor is [rank, out]."""
    return {f"{layer}/weight": (None, axis), f"{layer}/(kernel|lora_kernel_a)": (axis, None)}
