"""The files of a Keras preset of this package, without a model to save: what `save_to_preset` would write."""

import json

import keras

from keras_vaultgemma import checkpoint, weight_layout
from keras_vaultgemma.backbone import VaultGemmaBackbone
from keras_vaultgemma.causal_lm import VaultGemmaCausalLM
from keras_vaultgemma.h5_file import write_h5
from keras_vaultgemma.presets import CONFIG
from keras_vaultgemma.stored_tensor import dtype_name

BACKBONE_NAME, TASK_NAME = "vault_gemma_backbone", "vault_gemma_causal_lm"
LAYERS_WITHOUT_WEIGHTS = {
    "layers/input_layer/vars": "padding_mask",
    "layers/input_layer_1/vars": "token_ids",
    "layers/rescaling/vars": "embedding_scale",
    "layers/rotary_angles/vars": "rotary_angles",
    "vars": BACKBONE_NAME,
}
"""Groups in the weights file, and the layers' names that Keras notes there."""


def write_config(folder, hyperparameters, dtype, preprocessor):
    """Write config.json, task.json and the files of the preprocessor.

    Args:
        folder: that exists.
        hyperparameters: as `checkpoint.open_values` returns them.
        dtype: NumPy dtype of the weights, which becomes the preset's dtype.
        preprocessor: `VaultGemmaCausalLMPreprocessor`, or None.
    """
    # Written out, for `serialize_keras_object` would import TensorFlow.
    policy = {
        "module": "keras",
        "class_name": "DTypePolicy",
        "config": {"name": dtype_name(dtype)},
        "registered_name": None,
    }
    config = {"name": BACKBONE_NAME, "trainable": True, "dtype": policy, **hyperparameters}
    backbone = _serialized(VaultGemmaBackbone, config)
    reader = None
    if preprocessor is not None:
        preprocessor.save_to_preset(folder)
        reader = json.loads((folder / "preprocessor.json").read_text(encoding="utf-8"))
    task = _serialized(VaultGemmaCausalLM, {"backbone": backbone, "preprocessor": reader, "name": TASK_NAME})
    for name, content in ((CONFIG, backbone), ("task.json", task)):
        (folder / name).write_text(json.dumps(content, indent=4), encoding="utf-8")


def write_weights(folder, hyperparameters, values, dtype, report):
    """Write model.weights.h5, tensor by tensor; the arguments are those of `write_config` and `write_h5`."""
    weights = weight_layout.layout(hyperparameters)
    tensors = [(weight.places[weight_layout.KERAS], values[weight.path]) for weight in weights]
    write_h5(folder / checkpoint.H5, tensors, dtype, _layer_names(weights), report)


def _layer_names(weights):
    names = dict(LAYERS_WITHOUT_WEIGHTS)
    for weight in weights:
        layers = weight.path.split("/")[:-1]
        groups = weight.places[weight_layout.KERAS].name.removesuffix("/vars/0").split("/")
        for depth, layer in enumerate(layers, 1):
            names["/".join([*groups[: depth + 1], "vars"])] = layer
    return names


def _serialized(cls, config):
    return {
        "module": cls.__module__,
        "class_name": cls.__name__,
        "config": config,
        "registered_name": keras.saving.get_registered_name(cls),
    }
