"""A Keras preset, written without a model in memory: the files of `save_to_preset`."""

import json

from keras_vaultgemma.checkpoints import weight_map
from keras_vaultgemma.checkpoints.hdf5_format import write_hdf5
from keras_vaultgemma.checkpoints.lazy_tensor import dtype_name
from keras_vaultgemma.checkpoints.presets import CONFIG
from keras_vaultgemma.checkpoints.reader import WEIGHTS_FILE

BACKBONE_NAME, TASK_NAME = "vault_gemma_backbone", "vault_gemma_causal_lm"
LAYERS_WITHOUT_WEIGHTS = {
    "layers/input_layer/vars": "padding_mask",
    "layers/input_layer_1/vars": "token_ids",
    "layers/rescaling/vars": "embedding_scale",
    "layers/rotary_angles/vars": "rotary_angles",
    "vars": BACKBONE_NAME,
}
"""Groups that Keras writes for layers without weights, and the layer name of each."""


def write_keras_config(folder, hyperparameters, dtype, preprocessor):
    """Write config.json, task.json and the files of the preprocessor.

    Args:
        folder: `pathlib.Path` of an existing folder.
        hyperparameters: dict. Constructor arguments of the backbone, as `reader.open_values`
            returns them.
        dtype: NumPy dtype of the weights, which becomes the preset's dtype.
        preprocessor: `VaultGemmaCausalLMPreprocessor`, or None.
    """
    # A literal, because `serialize_keras_object` would import TensorFlow.
    policy = {
        "module": "keras",
        "class_name": "DTypePolicy",
        "config": {"name": dtype_name(dtype)},
        "registered_name": None,
    }
    config = {"name": BACKBONE_NAME, "trainable": True, "dtype": policy, **hyperparameters}
    backbone = _serialized("backbone", "VaultGemmaBackbone", config)
    preprocessor_config = None
    if preprocessor is not None:
        preprocessor.save_to_preset(folder)
        preprocessor_config = json.loads((folder / "preprocessor.json").read_text(encoding="utf-8"))
    task = _serialized(
        "causal_lm",
        "VaultGemmaCausalLM",
        {"backbone": backbone, "preprocessor": preprocessor_config, "name": TASK_NAME},
    )
    for name, content in ((CONFIG, backbone), ("task.json", task)):
        (folder / name).write_text(json.dumps(content, indent=4), encoding="utf-8")


def write_keras_weights(folder, hyperparameters, values, dtype, report):
    """Write model.weights.h5, one tensor at a time.

    Args:
        folder: `pathlib.Path` of an existing folder.
        hyperparameters: dict. Constructor arguments of the backbone, as `reader.open_values`
            returns them.
        values: dict of the variables' paths to `LazyTensor`.
        dtype: NumPy dtype to write.
        report: callable. Called with the number of bytes of each block after it is written.
    """
    weights = weight_map.weight_map(hyperparameters)
    tensors = [(weight.locations[weight_map.KERAS], values[weight.path]) for weight in weights]
    write_hdf5(folder / WEIGHTS_FILE, tensors, dtype, _layer_names(weights), report)


def _layer_names(weights):
    names = dict(LAYERS_WITHOUT_WEIGHTS)
    for weight in weights:
        layers = weight.path.split("/")[:-1]
        groups = weight.locations[weight_map.KERAS].name.removesuffix("/vars/0").split("/")
        for depth, layer in enumerate(layers, 1):
            names["/".join([*groups[: depth + 1], "vars"])] = layer
    return names


def _serialized(module, name, config):
    """Return the serialised form of an object of one of the registered classes of `models`."""
    return {
        "module": f"keras_vaultgemma.models.{module}",
        "class_name": name,
        "config": config,
        "registered_name": f"keras_vaultgemma>{name}",
    }
