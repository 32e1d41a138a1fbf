"""What a command loads a model from: a preset, an adapter on its base, or the folder of a run."""

import contextlib
import os
import shutil
from pathlib import Path
from typing import NamedTuple

import keras

from keras_vaultgemma import backend
from keras_vaultgemma._files import read_json
from keras_vaultgemma._partial_folders import partial_folder
from keras_vaultgemma.checkpoints import names, presets
from keras_vaultgemma.checkpoints.dtypes import own_dtype
from keras_vaultgemma.checkpoints.lazy_tensor import DTYPES
from keras_vaultgemma.lora import adapters, peft_format
from keras_vaultgemma.lora.merging import merge
from keras_vaultgemma.models.causal_lm import VaultGemmaCausalLM
from keras_vaultgemma.recipes.finetune_output import ADAPTER, PRESET, RUN
from keras_vaultgemma.recipes.samplers import make_sampler

DEFAULT_PRESET = "vaultgemma_tiny"


class Source(NamedTuple):
    """What a model is loaded from.

    Attributes:
        preset: string or path, as for `VaultGemmaCausalLM.from_preset`.
        adapter: path of the adapter that is loaded onto it, or None.
    """

    preset: str | os.PathLike
    adapter: str | os.PathLike | None = None


def find_source(preset=None, adapter=None):
    """Return the `Source` that a preset or folder stands for.

    Args:
        preset: string or path. What `VaultGemmaCausalLM.from_preset` takes, a folder that
            `finetune` wrote, or the folder of an adapter that names its base. Defaults to the base
            of `adapter`, and to "vaultgemma_tiny" without one.
        adapter: string or path of an adapter, or of a folder that `finetune` wrote. Defaults to
            None.

    Raises:
        ValueError: If a run has not finished, an adapter names no base, or there are two adapters.
    """
    source = Source(DEFAULT_PRESET) if preset is None else _expand(names.canonical(preset))
    if adapter is None:
        return source
    if source.adapter is not None:
        raise ValueError(
            f"`adapter` must be None, because {preset} is an adapter itself. "
            f"Received: adapter={adapter}"
        )
    found = _adapter_in(os.path.expanduser(adapter))
    if preset is None:
        source = Source(_base_of(found))
    return source._replace(adapter=found)


def load_model(source, dtype=None, quantization=None):
    """Load the model of a `Source` to compute with it, not to train it.

    From then on, compiled functions are cached in the package's home for later processes, and for
    models that differ in nothing but their weights (`backend.cache_compilations`).

    Args:
        source: `Source`.
        dtype: string. Dtype policy. Defaults to the preset's own, because training, for which
            Keras's default of float32 is made, is not wanted.
        quantization: string, "int8" or "int4". Quantize the weights. Defaults to None.

    Returns:
        `VaultGemmaCausalLM`.
    """
    backend.cache_compilations(presets.cache_home() / "compiled")
    dtype = dtype or _other_dtype(source.preset)
    model = VaultGemmaCausalLM.from_preset(source.preset, **({"dtype": dtype} if dtype else {}))
    if quantization:
        model.quantize(quantization)
    if source.adapter is not None:
        adapters.load_adapter(model, source.adapter)
    return model


def load_with_sampler(preset, adapter, dtype, quantization, sampler, top_k=None, **options):
    """Load a preset and compile it with a sampler.

    Args:
        preset, adapter: as for `find_source`.
        dtype, quantization: as for `load_model`.
        sampler: string or None, the `name` of `samplers.make_sampler`.
        top_k: int. At most as large as the model's vocabulary. Defaults to that of the sampler.
        **options: the other options of `samplers.make_sampler`.

    Returns:
        Tuple `(model, source)` of a `VaultGemmaCausalLM` and a `Source`.
    """
    sampler = make_sampler(sampler, top_k=top_k, **options)
    source = find_source(preset, adapter)
    model = load_model(source, dtype, quantization)
    if top_k is not None:
        sampler.k = min(top_k, model.backbone.vocabulary_size)
    model.compile(sampler=sampler)
    return model, source


@contextlib.contextmanager
def merged_preset(source, target):
    """Write a temporary Keras preset of a `Source` with its adapter merged.

    Its weights are float32, so that a narrower dtype rounds them once. Its metadata.json is that of
    the base, if the base has one.

    Args:
        source: `Source` with an adapter.
        target: path. The temporary folder is on the file system of this path.

    Yields:
        `pathlib.Path` of a folder, which is deleted afterwards.
    """
    base = presets.find(source.preset)
    takes_text = presets.file(base, "vocabulary") is not None
    model = VaultGemmaCausalLM.from_preset(
        source.preset, dtype="float32", **({} if takes_text else {"preprocessor": None})
    )
    adapters.load_adapter(model, source.adapter)
    merge(model)
    parent = next(path for path in Path(target).absolute().parents if path.is_dir())
    with partial_folder(parent) as root:
        folder = root / "new" / Path(source.preset).name
        model.save_to_preset(folder)
        (folder / presets.METADATA).unlink(missing_ok=True)
        if (base / presets.METADATA).is_file():
            shutil.copyfile(base / presets.METADATA, folder / presets.METADATA)
        yield folder


def _other_dtype(preset):
    """Return the dtype of a preset's weights if it is another than Keras's default, else None."""
    dtype = own_dtype(presets.find(preset, "config"))
    return dtype if dtype in DTYPES and dtype != keras.config.dtype_policy().name else None


def _expand(preset):
    if is_run(preset):
        folder, kind = Path(preset), _kind_of_run(preset)
        return Source(folder / PRESET) if kind == PRESET else _adapter_source(folder / ADAPTER)
    return _adapter_source(Path(preset)) if is_adapter(preset) else Source(preset)


def _adapter_source(folder):
    return Source(_base_of(folder), folder)


def _adapter_in(folder):
    """Return the folder of the adapter in a folder that the user has named as an adapter."""
    if not is_run(folder):
        return folder
    if _kind_of_run(folder) == PRESET:
        raise ValueError(
            f"`adapter` must be the folder of an adapter. Received: {folder}, a run that wrote a "
            f"preset. Pass it as the preset instead"
        )
    return Path(folder) / ADAPTER


def is_run(folder):
    """Return True if `finetune` wrote a folder."""
    return (Path(folder) / RUN).is_file() and not presets.file(folder, "config")


def is_adapter(folder):
    """Return True if a folder has an adapter in PEFT's format, and no model."""
    return (Path(folder) / peft_format.CONFIG).is_file() and not presets.file(folder, "config")


def _kind_of_run(folder):
    """Return ADAPTER or PRESET, whichever the latest run in a folder has written."""
    options = _options_of_run(folder)
    is_preset = options.get("merge") or options.get("lora_rank") == 0
    for kind in (PRESET, ADAPTER) if is_preset else (ADAPTER, PRESET):
        if (Path(folder) / kind).is_dir():
            return kind
    raise ValueError(
        f"{folder} has a run that has not finished, so there is no model in it. "
        "Run `finetune` again to resume it"
    )


def _options_of_run(folder):
    options = read_json(Path(folder) / RUN).get("options")
    return options if isinstance(options, dict) else {}


def _base_of(adapter):
    """Return the preset that an adapter was trained on, by its run or its own config."""
    adapter = Path(adapter)
    base = _options_of_run(adapter.parent).get("preset") if is_run(adapter.parent) else None
    config = adapter / peft_format.CONFIG
    if not base and config.is_file():
        base = read_json(config).get("base_model_name_or_path")
    if not base or not isinstance(base, str):
        raise ValueError(
            f"{adapter} does not name the preset that it was trained on. Name it: "
            f"--preset PRESET --adapter {adapter}"
        )
    return base
