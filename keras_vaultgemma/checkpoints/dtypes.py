"""The dtype that a preset has of its own."""

from pathlib import Path

from keras_vaultgemma._files import read_json
from keras_vaultgemma.checkpoints import presets
from keras_vaultgemma.checkpoints.config import keras_policy
from keras_vaultgemma.checkpoints.lazy_tensor import widest
from keras_vaultgemma.checkpoints.reader import open_values


def own_dtype(folder):
    """Return the name of the dtype policy that a preset was saved with.

    Args:
        folder: `pathlib.Path` or string.

    Returns:
        String, such as "bfloat16" or "mixed_bfloat16": the policy of a preset of this package. Of
        another checkpoint it is the dtype of the weights, or without them of its config. None for
        quantized layers and where it is not known.
    """
    folder = Path(folder)
    if presets.is_keras(folder):
        return keras_policy(folder)
    if presets.file(folder, "weights"):
        try:
            return widest(value.dtype for value in open_values(folder)[1].values()).name
        except (ValueError, OSError):
            pass  # Loading the weights reports what is wrong with them.
    return _of_config(read_json(folder / presets.CONFIG))


def quantization_modes(folder):
    """Return the sorted names of the modes, such as "int8", in which a preset is quantized."""
    if not presets.is_keras(folder):
        return []
    policy = read_json(Path(folder) / presets.CONFIG).get("config", {}).get("dtype")
    modes, nested = set(), [policy]
    while nested:
        node = nested.pop()
        if isinstance(node, dict):
            nested += node.values()
            if isinstance(node.get("mode"), str):
                modes.add(node["mode"])
    return sorted(modes)


def saved_policy(config):
    """Return the `dtype` of a backbone's config if it is mixed or quantized, else None.

    Such a policy is a decision that came with the weights. A plain dtype is not: it follows Keras's
    global policy, as in keras-hub.

    Args:
        config: dict. The config of a `VaultGemmaBackbone`.
    """
    policy = config.get("dtype")
    if isinstance(policy, dict) and policy.get("class_name") == "DTypePolicy":
        policy = (policy.get("config") or {}).get("name")
    if isinstance(policy, str) and not policy.startswith("mixed_"):
        return None
    return policy


def _of_config(config):
    config = config.get("config", config)
    dtype = config.get("dtype") or config.get("torch_dtype")  # the older name in transformers
    if isinstance(dtype, dict):
        dtype = (dtype.get("config") or {}).get("name")
    return dtype.removeprefix("torch.") if isinstance(dtype, str) else None
