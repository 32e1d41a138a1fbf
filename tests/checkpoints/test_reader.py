"""Weights of checkpoints of transformers, keras-hub and this package, and checkpoints that do not fit."""

import json
import shutil
import time
import tracemalloc
import warnings
from pathlib import Path

import h5py
import keras
import keras_hub
import ml_dtypes
import numpy as np
import pytest
import safetensors.torch
import torch
import transformers
from common import random_backbone, to_numpy

from keras_vaultgemma import VaultGemmaBackbone, VaultGemmaCausalLM
from keras_vaultgemma.checkpoints.config import read_config
from keras_vaultgemma.checkpoints.lazy_tensor import LazyTensor
from keras_vaultgemma.checkpoints.reader import KerasOnly, format_of, open_values
from keras_vaultgemma.recipes.convert import convert

pytestmark = pytest.mark.first_backend

VOCABULARY = Path(__file__).parents[2] / "presets/vaultgemma_tiny/assets/tokenizer/vocabulary.spm"
DTYPES = ("float32", "float16", "bfloat16")
EMBEDDING = "model.embed_tokens.weight"
QUERY = "model.layers.1.self_attn.q_proj.weight"

HUGGING_FACE = {
    "attention_norm/scale": "input_layernorm.weight",
    "attention/query/weight": "self_attn.q_proj.weight",
    "attention/key/weight": "self_attn.k_proj.weight",
    "attention/value/weight": "self_attn.v_proj.weight",
    "attention/attention_output/weight": "self_attn.o_proj.weight",
    "mlp_norm/scale": "pre_feedforward_layernorm.weight",
    "gate/weight": "mlp.gate_proj.weight",
    "up/weight": "mlp.up_proj.weight",
    "down/weight": "mlp.down_proj.weight",
}
"""End of each variable's path and of its tensor's name, independent of the map under test."""


def with_random_norms(model):
    for name, parameter in model.named_parameters():
        if "norm" in name:  # transformers starts them as zeros
            torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture(scope="module")
def theirs():
    """No two widths alike, so that no tensor fits a wrong variable."""
    torch.manual_seed(0)
    config = transformers.VaultGemmaConfig(
        vocab_size=160,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=10,
        max_position_embeddings=64,
        initializer_range=0.3,
    )
    return with_random_norms(transformers.VaultGemmaForCausalLM(config).eval())


@pytest.fixture
def folder(theirs, tmp_path):
    theirs.save_pretrained(tmp_path)
    return tmp_path


def edit(folder, change):
    """Rewrite model.safetensors after `change(tensors)`."""
    path = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in safetensors.torch.load_file(path).items()}
    change(tensors)
    safetensors.torch.save_file(tensors, path, {"format": "pt"})


def expected_values(state):
    """{end of a variable's path: value} from transformers' state dict, float32."""
    arrays = {name: tensor.float().numpy() for name, tensor in state.items()}
    values = {
        "token_embedding/embeddings": arrays[EMBEDDING],
        "final_norm/scale": arrays["model.norm.weight"],
    }
    for i in range(3):
        for ours, name in HUGGING_FACE.items():
            values[f"decoder_block_{i}/{ours}"] = arrays[f"model.layers.{i}.{name}"]
    return values


def our_values(backbone):
    return {
        variable.path: to_numpy(keras.ops.cast(variable.value, "float32"))
        for variable in backbone.variables
    }


def assert_values(backbone, values):
    ours = our_values(backbone)
    assert len(ours) == len(values)
    for end, value in values.items():
        (path,) = [path for path in ours if path.endswith(end)]
        assert np.array_equal(ours[path], value), path


@pytest.mark.parametrize("target", DTYPES)
@pytest.mark.parametrize("source", ["float32", "bfloat16"])
def test_every_tensor_loads_in_every_dtype(theirs, tmp_path, source, target):
    state = {
        name: tensor.to(getattr(torch, source)) for name, tensor in theirs.state_dict().items()
    }
    theirs.save_pretrained(tmp_path, state_dict=dict(state))  # it empties the dict
    backbone = VaultGemmaBackbone.from_preset(tmp_path, dtype=target)
    assert {variable.dtype for variable in backbone.variables} == {target}
    values = expected_values(state)
    dtype = np.dtype(ml_dtypes.bfloat16 if target == "bfloat16" else target)
    assert_values(
        backbone, {name: value.astype(dtype).astype("float32") for name, value in values.items()}
    )


def test_shards_and_their_index(theirs, tmp_path):
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert_values(VaultGemmaBackbone.from_preset(tmp_path), expected_values(theirs.state_dict()))


def test_a_model_without_its_head(theirs, tmp_path):
    """`AutoModel` saves the tensors without the prefix."""
    theirs.model.save_pretrained(tmp_path)
    assert "embed_tokens.weight" in safetensors.torch.load_file(tmp_path / "model.safetensors")
    assert_values(VaultGemmaBackbone.from_preset(tmp_path), expected_values(theirs.state_dict()))
    (tmp_path / "model.safetensors").unlink()
    theirs.model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert_values(VaultGemmaBackbone.from_preset(tmp_path), expected_values(theirs.state_dict()))


@pytest.mark.parametrize("target", [None, "bfloat16"])
def test_float64_tensors(theirs, folder, target):
    edit(folder, lambda tensors: tensors.update({n: t.double() for n, t in tensors.items()}))
    kwargs = {} if target is None else {"dtype": target}
    backbone = VaultGemmaBackbone.from_preset(folder, **kwargs)
    assert {variable.dtype for variable in backbone.variables} == {target or "float32"}
    state = {name: tensor.float() for name, tensor in theirs.state_dict().items()}
    if target:
        state = {name: tensor.bfloat16() for name, tensor in state.items()}
    assert_values(backbone, expected_values(state))


def test_float64_is_converted_to_float32(theirs, folder, tmp_path):
    edit(folder, lambda tensors: tensors.update({n: t.double() for n, t in tensors.items()}))
    with pytest.warns(UserWarning, match="has no vocabulary"):
        metadata = convert(folder, tmp_path / "new", to="hf")
    assert metadata["dtype"] == "float32"
    assert_values(
        VaultGemmaBackbone.from_preset(tmp_path / "new"), expected_values(theirs.state_dict())
    )


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn])
def test_quantized_tensors_are_named(folder, dtype):
    edit(folder, lambda tensors: tensors.update({QUERY: tensors[QUERY].to(dtype)}))
    with pytest.raises(ValueError, match=f"the entry of {QUERY}.*This checkpoint is quantized"):
        open_values(folder)


def test_float64_keras_weights(tmp_path):
    backbone = random_backbone(num_layers=1)
    backbone.save_to_preset(tmp_path)
    path = tmp_path / "model.weights.h5"
    found = {}
    with h5py.File(path) as file:
        file.visititems(
            lambda name, item: (
                found.update({name: item[()]}) if isinstance(item, h5py.Dataset) else None
            )
        )
    with h5py.File(path, "r+") as file:
        for name, value in found.items():
            del file[name]
            file.create_dataset(name, data=value.astype("float64"))
    loaded = VaultGemmaBackbone.from_preset(tmp_path)
    for ours, expected in zip(loaded.get_weights(), backbone.get_weights(), strict=True):
        assert ours.dtype == expected.dtype and np.array_equal(ours, expected)


def test_weights_do_not_change_with_the_file(theirs, folder):
    """The data of the file are aligned, because JAX adopts only memory aligned to 64 bytes."""
    path = folder / "model.safetensors"
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + length].ljust(-(-(8 + length) // 64) * 64 - 8)
    path.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + length :])
    backbone = VaultGemmaBackbone.from_preset(folder)
    with path.open("r+b") as file:
        file.write(bytes(path.stat().st_size))
    assert_values(backbone, expected_values(theirs.state_dict()))


def test_a_head_equal_to_the_embedding_is_accepted(theirs, folder):
    edit(folder, lambda tensors: tensors.update({"lm_head.weight": tensors[EMBEDDING].clone()}))
    assert_values(VaultGemmaBackbone.from_preset(folder), expected_values(theirs.state_dict()))


def test_a_head_with_the_embeddings_nan_is_equal(folder):
    def change(tensors):
        tensors[EMBEDDING][3, 3] = float("nan")
        tensors["lm_head.weight"] = tensors[EMBEDDING].clone()

    edit(folder, change)
    with pytest.warns(UserWarning, match="token_embedding/embeddings holds NaN"):
        VaultGemmaBackbone.from_preset(folder)


def next_smaller(tensors):
    return torch.nextafter(tensors[EMBEDDING], torch.zeros(()))


WRONG = {
    "missing": (
        lambda t: t.pop(QUERY),
        rf"{QUERY} is missing from .*Expected shape: \(60, 24\). Found: None",
    ),
    "no embedding": (lambda t: t.pop(EMBEDDING), rf"{EMBEDDING} is missing from "),
    "extra": (
        lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(60)}),
        r"q_proj.bias is unknown in .*Expected shape: None. Found: \(60,\)",
    ),
    "post norm of Gemma 2": (
        lambda t: t.update({"model.layers.2.post_attention_layernorm.weight": torch.zeros(24)}),
        r"model.layers.2.post_attention_layernorm.weight is unknown in ",
    ),
    "a layer too many": (
        lambda t: t.update({"model.layers.3.input_layernorm.weight": torch.zeros(24)}),
        r"model.layers.3.input_layernorm.weight is unknown in ",
    ),
    "misshapen": (
        lambda t: t.update({QUERY: t[QUERY].T.contiguous()}),
        rf"{QUERY} is misshapen in .*Expected shape: \(60, 24\). Found: \(24, 60\)",
    ),
    "flat": (
        lambda t: t.update({QUERY: t[QUERY].flatten()}),
        rf"{QUERY} is misshapen in .*Expected shape: \(60, 24\). Found: \(1440,\)",
    ),
    "another vocabulary": (
        lambda t: t.update({EMBEDDING: t[EMBEDDING][:-1].clone()}),
        rf"{EMBEDDING} is misshapen in .*Expected shape: \(160, 24\). Found: \(159, 24\)",
    ),
    "integers": (
        lambda t: t.update({QUERY: t[QUERY].to(torch.int8)}),
        rf"the entry of {QUERY} must have a dtype of F32",
    ),
    "another head": (
        lambda t: t.update({"lm_head.weight": next_smaller(t)}),
        r"lm_head.weight must be equal to model.embed_tokens.weight.*float32 \(160, 24\) and float32 \(160, 24\)",
    ),
    "a head of another dtype": (
        lambda t: t.update({"lm_head.weight": t[EMBEDDING].to(torch.bfloat16)}),
        r"lm_head.weight must be equal to .*bfloat16 \(160, 24\) and float32 \(160, 24\)",
    ),
    "a head of another shape": (
        lambda t: t.update({"lm_head.weight": t[EMBEDDING][:-1].clone()}),
        r"lm_head.weight must be equal to .*float32 \(159, 24\) and float32 \(160, 24\)",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_tensor_that_does_not_fit_is_named(folder, case):
    change, message = WRONG[case]
    edit(folder, change)
    with pytest.raises(ValueError, match=message) as error:
        open_values(folder)
    assert str(folder) in str(error.value)


def test_a_truncated_file_is_named(folder):
    path = folder / "model.safetensors"
    content = path.read_bytes()
    for size in (0, 7, 100, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:size])
        with pytest.raises(ValueError, match=r"model.safetensors is truncated"):
            open_values(folder)


def test_an_index_that_points_outside_raises(folder):
    (folder / "model.safetensors").rename(folder.parent / "elsewhere.safetensors")
    index = {"weight_map": {EMBEDDING: "../elsewhere.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(
        ValueError, match=r"index.json: files must be .* Received: '../elsewhere.safetensors'"
    ):
        VaultGemmaBackbone.from_preset(folder)


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_weights_that_are_not_finite_warn(folder, value):
    edit(
        folder,
        lambda tensors: tensors["model.layers.2.mlp.down_proj.weight"].view(-1)[7:8].fill_(value),
    )
    with pytest.warns(
        UserWarning, match="decoder_block_2/down/weight holds NaN or infinite values"
    ):
        VaultGemmaBackbone.from_preset(folder)


def test_weights_too_large_for_the_dtype_warn(folder, recwarn):
    edit(folder, lambda tensors: tensors["model.norm.weight"].fill_(1e5))
    VaultGemmaBackbone.from_preset(folder, dtype="bfloat16")
    assert not [w for w in recwarn if "infinite" in str(w.message)]
    with pytest.warns(
        UserWarning, match="final_norm/scale holds NaN or infinite values.*out of range for float16"
    ):
        VaultGemmaBackbone.from_preset(folder, dtype="float16")


@pytest.mark.parametrize("dtype", DTYPES)
def test_finite_weights_do_not_warn(folder, dtype):
    """Not even where their sum overflows."""
    edit(folder, lambda tensors: tensors[EMBEDDING].fill_(60_000))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*holds NaN or infinite")
        VaultGemmaBackbone.from_preset(folder, dtype=dtype)


@pytest.mark.every_backend
@pytest.mark.parametrize("form", ["hugging_face", "keras"])
def test_weights_are_in_memory_once(tmp_path, form):
    """With a margin for Keras's objects. NumPy's memory is traced; JAX's own is not."""
    small = random_backbone(
        num_layers=1,
        vocabulary_size=16_384,
        hidden_dim=512,
        intermediate_dim=4096,
        dtype="bfloat16",
    )
    small.save_to_preset(tmp_path / "keras")
    if form == "hugging_face":
        convert(tmp_path / "keras", tmp_path / form, to="hf")
    size = 2 * small.count_params()
    VaultGemmaBackbone.from_preset(tmp_path / form, dtype="bfloat16")
    tracemalloc.start()
    VaultGemmaBackbone.from_preset(tmp_path / form, dtype="bfloat16")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert size > 25e6 and peak < 1.15 * size + 5e6


# keras-hub's format: `GemmaBackbone` with its post-norms off.

HUB = dict(
    vocabulary_size=160,
    num_layers=2,
    num_query_heads=6,
    num_key_value_heads=2,
    hidden_dim=24,
    intermediate_dim=80,
    head_dim=10,
)
TOKEN_IDS = np.array([[2, *range(20, 39)], [2, 5, 3, 150, 9, *range(100, 115)]], "int32")


def hub_backbone(**changes):
    hub = keras_hub.models.GemmaBackbone(**{**HUB, **changes})
    random = np.random.default_rng(0)
    for (
        variable
    ) in hub.variables:  # large enough that attention is far from uniform and both caps bite
        variable.assign(random.normal(0, 0.3, variable.shape).astype("float32"))
    return hub


@pytest.fixture(scope="module")
def hub_preset(tmp_path_factory):
    """(keras-hub's backbone, its folder, which no test may change)."""
    hub, folder = hub_backbone(), tmp_path_factory.mktemp("preset") / "hub"
    hub.save_to_preset(folder)
    return hub, folder


@pytest.fixture
def hub_folder(hub_preset, tmp_path):
    return shutil.copytree(hub_preset[1], tmp_path / "hub")


def assert_equal_hidden_states(ours, hub):
    mask = np.ones_like(TOKEN_IDS)
    mask[1, 12:] = 0
    inputs = {"token_ids": TOKEN_IDS, "padding_mask": mask}
    expected = to_numpy(hub(inputs))
    assert np.abs((to_numpy(ours(inputs)) - expected) * mask[:, :, None]).max() <= 1e-5
    assert ours.count_params() == hub.count_params()
    return inputs, expected


@pytest.mark.every_backend
def test_hidden_states_equal_keras_hub(hub_preset):
    hub, folder = hub_preset
    assert_equal_hidden_states(VaultGemmaBackbone.from_preset(folder), hub)


def test_hidden_states_equal_keras_hub_with_caps_and_sliding_layers(tmp_path):
    hub = hub_backbone(
        num_key_value_heads=1,
        attention_logit_soft_cap=1.5,
        final_logit_soft_cap=2.0,
        use_sliding_window_attention=True,
        sliding_window_size=3,
    )
    hub.save_to_preset(tmp_path / "hub")
    ours = VaultGemmaBackbone.from_preset(tmp_path / "hub")
    inputs, expected = assert_equal_hidden_states(ours, hub)
    # Each of them matters here, so equal does not mean ignored by both.
    for change in ({"attention_logit_soft_cap": None}, {"sliding_window_size": 4}):
        other = VaultGemmaBackbone(**{**read_config(tmp_path / "hub"), **change})
        other.set_weights(ours.get_weights())
        assert np.abs(to_numpy(other(inputs)) - expected)[0].max() > 1e-2, change


def test_a_keras_hub_task_loads_with_its_vocabulary(tmp_path):
    tokenizer = keras_hub.models.GemmaTokenizer(proto=str(VOCABULARY))
    backbone = hub_backbone(vocabulary_size=tokenizer.vocabulary_size(), final_logit_soft_cap=2.0)
    task = keras_hub.models.GemmaCausalLM(
        backbone, keras_hub.models.GemmaCausalLMPreprocessor(tokenizer)
    )
    task.save_to_preset(tmp_path / "hub")
    ours = VaultGemmaCausalLM.from_preset(tmp_path / "hub")
    text = "Once upon a time"
    assert np.array_equal(to_numpy(ours.preprocessor.tokenizer(text)), to_numpy(tokenizer(text)))
    inputs = {"token_ids": TOKEN_IDS, "padding_mask": np.ones_like(TOKEN_IDS)}
    expected = to_numpy(backbone.token_embedding(backbone(inputs), reverse=True))
    assert np.abs(to_numpy(ours(inputs)) - expected).max() <= 1e-5
    assert np.abs(expected).max() > 1.9  # near its cap of 2


@pytest.mark.every_backend
def test_a_bfloat16_keras_hub_preset(tmp_path):
    hub = hub_backbone(dtype="bfloat16")
    hub.save_to_preset(tmp_path / "hub")
    ours = our_values(VaultGemmaBackbone.from_preset(tmp_path / "hub"))
    for i, block in enumerate(hub.transformer_layers):
        query = to_numpy(block.attention.query_dense.kernel.value).astype("float32")
        output = to_numpy(block.attention.output_dense.kernel.value).astype("float32")
        for n in range(6):
            channels = slice(10 * n, 10 * n + 10)
            assert np.array_equal(
                ours[f"decoder_block_{i}/attention/query/weight"][channels], query[n].T
            )
            assert np.array_equal(
                ours[f"decoder_block_{i}/attention/attention_output/weight"][:, channels],
                output[n].T,
            )


BLOCK = "layers/gemma_decoder_block_1"


def transpose(file):
    value = file[f"{BLOCK}/ffw_linear/vars/0"][()]
    del file[f"{BLOCK}/ffw_linear/vars/0"]
    file[f"{BLOCK}/ffw_linear/vars/0"] = value.T


def extend(file):
    file[f"{BLOCK}/post_ffw_norm/vars/0"] = np.zeros(24, "float32")


def remove(file):
    del file[f"{BLOCK}/pre_ffw_norm/vars/0"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            remove,
            rf"{BLOCK}/pre_ffw_norm/vars/0 is missing from .*Expected shape: \(24,\). Found: None",
        ),
        (
            extend,
            rf"{BLOCK}/post_ffw_norm/vars/0 is unknown in .*Expected shape: None. Found: \(24,\)",
        ),
        (
            transpose,
            rf"{BLOCK}/ffw_linear/vars/0 is misshapen in .*Expected shape: \(40, 24\). Found: \(24, 40\)",
        ),
    ],
)
def test_a_dataset_of_keras_hub_that_does_not_fit_is_named(hub_folder, change, message):
    with h5py.File(hub_folder / "model.weights.h5", "r+") as file:
        change(file)
    with pytest.raises(ValueError, match=message):
        VaultGemmaBackbone.from_preset(hub_folder)


def test_a_truncated_keras_hub_file_is_named(hub_folder):
    path = hub_folder / "model.weights.h5"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(
        ValueError, match=r"model.weights.h5 is missing, truncated or no Keras weights file"
    ):
        VaultGemmaBackbone.from_preset(hub_folder)


def test_keras_hub_post_norms_raise(tmp_path):
    hub_backbone(use_post_ffw_norm=True).save_to_preset(tmp_path / "hub")
    with pytest.raises(ValueError, match=r"`use_post_ffw_norm` must be false. Received: True"):
        VaultGemmaBackbone.from_preset(tmp_path / "hub")


# This package's own presets, and what is the same in all three formats.


@pytest.fixture(scope="module")
def own_preset(tmp_path_factory):
    """(backbone, its folder, which no test may change)."""
    backbone, folder = (
        random_backbone(num_layers=3, num_key_value_heads=2),
        tmp_path_factory.mktemp("preset") / "own",
    )
    backbone.save_to_preset(folder)
    return backbone, folder


def test_open_values_of_every_format(theirs, folder, hub_preset, own_preset):
    own, own_folder = own_preset
    for path, name in (
        (folder, "hugging_face"),
        (hub_preset[1], "keras_hub"),
        (own_folder, "keras"),
    ):
        assert format_of(path) == name
        hyperparameters, values = open_values(str(path))
        assert hyperparameters == read_config(path)
        assert all(type(value) is LazyTensor for value in values.values())
        loaded = our_values(VaultGemmaBackbone.from_preset(path))
        assert list(values) == list(loaded)
        for variable, value in values.items():
            assert np.array_equal(value.read("float32"), loaded[variable]), variable
    _, values = open_values(own_folder)
    assert np.array_equal(
        values["decoder_block_2/up/weight"].read(), our_values(own)["decoder_block_2/up/weight"]
    )


def test_values_open_without_being_read(own_preset, tmp_path):
    shutil.copytree(own_preset[1], tmp_path / "own")
    path = tmp_path / "own/model.weights.h5"
    tracemalloc.start()
    _, values = open_values(tmp_path / "own")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000
    with path.open("r+b") as file:
        file.write(bytes(path.stat().st_size))
    assert not values["token_embedding/embeddings"].read().any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_values_of_a_keras_preset_are_cast(own_preset, dtype):
    own, folder = own_preset
    backbone = VaultGemmaBackbone.from_preset(folder, dtype=dtype)
    assert {variable.dtype for variable in backbone.variables} == {dtype}
    expected = {
        path: np.asarray(keras.ops.cast(keras.ops.cast(v, dtype), "float32"))
        for path, v in our_values(own).items()
    }
    assert_values(backbone, expected)


def test_only_keras_loads_a_quantized_preset(tmp_path):
    backbone = random_backbone(num_layers=1)
    backbone.quantize("int8")
    backbone.save_to_preset(tmp_path / "int8")
    with pytest.raises(KerasOnly, match="config.json: `dtype` must be one floating-point policy"):
        open_values(tmp_path / "int8")


def test_only_keras_loads_a_sharded_preset(tmp_path):
    random_backbone(num_layers=3).save_to_preset(tmp_path / "shards", max_shard_size=0.0002)
    assert len(list((tmp_path / "shards").glob("*.h5"))) > 1
    with pytest.raises(
        KerasOnly, match="must have its weights in one file, model.weights.h5. Received: several"
    ):
        open_values(tmp_path / "shards")
    assert issubclass(KerasOnly, ValueError)


@pytest.mark.parametrize(
    "change", [dict(num_layers=1000), dict(hidden_dim=2**31 - 2), dict(vocabulary_size=2**31 - 1)]
)
def test_a_config_of_absurd_sizes_takes_no_memory(own_preset, tmp_path, change):
    folder = shutil.copytree(own_preset[1], tmp_path / "own")
    config = json.loads((folder / "config.json").read_text())
    config["config"].update(change, layer_types=None)
    (folder / "config.json").write_text(json.dumps(config))
    tracemalloc.start()
    start = time.process_time()
    with pytest.raises(
        ValueError, match=r"vars/0 is (missing from|misshapen in) .*own. Expected shape: "
    ):
        open_values(folder)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20e6 and time.process_time() - start < 10


def test_a_keras_preset_without_its_file_is_named(own_preset, tmp_path):
    folder = shutil.copytree(own_preset[1], tmp_path / "own")
    (folder / "model.weights.h5").unlink()
    with pytest.raises(ValueError, match="model.weights.h5 is missing"):
        open_values(folder)
