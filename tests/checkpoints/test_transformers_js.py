"""Folders for transformers.js, as ONNX Runtime computes with them. transformers.js: `recipes/test_transformers_js`."""

import json
import sys
import tracemalloc

import numpy as np
import pytest
from common import one_layer_preset, random_backbone, to_numpy

from keras_vaultgemma import VaultGemmaBackbone, VaultGemmaCausalLM, convert
from keras_vaultgemma.checkpoints import lazy_tensor, presets, transformers_js
from keras_vaultgemma.checkpoints.block_quantization import quantize_blocks
from keras_vaultgemma.checkpoints.reader import open_values
from keras_vaultgemma.checkpoints.transformers_js import check_decoder

onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")

pytestmark = pytest.mark.first_backend

TINY = presets.bundled()["vaultgemma_tiny"]
FILES = {
    "f32": "model",
    "f16": "model_fp16",
    "q8": "model_quantized",
    "q4": "model_q4",
}
RNG = np.random.default_rng(0)
IDS = RNG.integers(0, 4096, (2, 9))
RELEASE = {}
OTHER = dict(
    num_layers=3,
    num_key_value_heads=2,
    layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    sliding_window_size=3,
    attention_logit_soft_cap=5.0,
    final_logit_soft_cap=7.0,
    query_pre_attn_scalar=10,
    rope_theta=777.0,
    layer_norm_epsilon=1e-3,
)


def write_preset(tiny, folder, **changes):
    sizes = dict(hidden_dim=64, head_dim=16, intermediate_dim=96, num_layers=1)
    backbone = random_backbone(**{"vocabulary_size": 4096, **sizes, **changes})
    for variable in backbone.variables:
        if variable.path.endswith("scale"):
            variable.assign(RNG.normal(0, 0.3, variable.shape))
    model = VaultGemmaCausalLM(backbone, tiny.preprocessor)
    model.save_to_preset(folder)
    return model


def logits_of(model, ids, mask=None):
    mask = np.ones_like(ids) if mask is None else mask
    inputs = {"token_ids": ids.astype("int32"), "padding_mask": mask.astype("int32")}
    return to_numpy(model(inputs))


class Decoder:
    """A folder in ONNX Runtime, fed as transformers.js feeds it."""

    def __init__(self, folder, dtype="f32"):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        path = folder / f"onnx/{FILES[dtype]}.onnx"
        self.session = onnxruntime.InferenceSession(path, options)
        self.past = None

    def __call__(self, ids, mask, keep=0):
        """Logits of new tokens; `mask` has those in the cache too."""
        if self.past is None:
            self.past = {
                x.name: np.zeros((len(ids), x.shape[1], 0, x.shape[3]), "float32")
                for x in self.session.get_inputs()
                if x.name.startswith("past_key_values")
            }
        positions = np.where(mask, mask.cumsum(1) - 1, 1)[:, -ids.shape[1] :]
        inputs = dict(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            num_logits_to_keep=np.array(keep),
            **self.past,
        )
        names = [x.name for x in self.session.get_outputs()]
        output = dict(zip(names, self.session.run(names, inputs), strict=True))
        logits = output.pop("logits")
        self.past = {k.replace("present", "past_key_values"): v for k, v in output.items()}
        return logits


@pytest.mark.parametrize("changes", [RELEASE, OTHER], ids=["release", "other"])
def test_prefill_and_steps_equal_the_backbone(tiny, tmp_path, changes):
    model = write_preset(tiny, tmp_path / "saved", **changes)
    convert(tmp_path / "saved", tmp_path / "new", to="transformers.js", verify=True)
    ones = np.ones_like(IDS)
    expected = logits_of(model, IDS)
    step = Decoder(tmp_path / "new")
    found = [step(IDS[:, :4], ones[:, :4])]
    found += [step(IDS[:, i : i + n], ones[:, : i + n]) for i, n in ((4, 1), (5, 1), (6, 3))]
    assert np.abs(np.concatenate(found, 1) - expected).max() <= 1e-4
    assert np.abs(expected).max() > 0.5
    # Padding on either side, and in the middle, as after a batch that was padded on the right.
    for mask in (np.tril(ones)[::-1], np.tril(ones, 5), [[1, 1, 0, 0, 0, 1, 1, 1, 1], [1] * 9]):
        mask = np.array(mask)
        expected = logits_of(model, IDS, mask)
        step = Decoder(tmp_path / "new")
        found = np.concatenate([step(IDS[:, :7], mask[:, :7]), step(IDS[:, 7:], mask)], 1)
        assert np.isfinite(found).all()
        assert np.abs((found - expected) * mask[..., None]).max() <= 1e-4


@pytest.mark.parametrize("dtype", FILES)
def test_the_last_logits_alone(tmp_path, dtype):
    convert(one_layer_preset(), tmp_path / "new", to="transformers.js", dtype=dtype)
    expected, found = (
        Decoder(tmp_path / "new", dtype)(IDS, np.ones_like(IDS), keep) for keep in (0, 2)
    )
    assert expected.shape == (2, 9, 4096) and found.shape == (2, 2, 4096)
    assert np.abs(found - expected[:, -2:]).max() <= 1e-4


def test_q8_is_int8_of_keras(tmp_path):
    convert(one_layer_preset(), tmp_path / "new", to="transformers.js", dtype="q8", verify=True)
    model = VaultGemmaCausalLM.from_preset(one_layer_preset())
    model.quantize("int8")
    ids = IDS[:, :6]
    found = Decoder(tmp_path / "new", "q8")(ids, np.ones_like(ids))
    assert np.abs(found - logits_of(model, ids)).max() <= 1e-3


def test_q4_is_rounded_in_blocks_of_32(tiny, tmp_path):
    convert("vaultgemma_tiny", tmp_path / "new", to="transformers.js", dtype="q4", verify=True)
    graph = onnx.load(tmp_path / "new/onnx/model_q4.onnx").graph
    tensors = {x.name: onnx.numpy_helper.to_array(x) for x in graph.initializer}
    rounded = VaultGemmaBackbone.from_config(tiny.backbone.get_config())
    for variable, original in zip(rounded.variables, tiny.backbone.variables, strict=True):
        value = to_numpy(original)
        if value.ndim == 2:
            packed = tensors[f"{variable.path}_packed"]
            scales = tensors[f"{variable.path}_scales"][..., None]
            integers = np.stack([packed % 16, packed // 16], -1).reshape(*scales.shape[:2], 32)
            blocks = value.reshape(integers.shape)
            restored = (integers.astype("float32") - 8) * scales
            assert (np.abs(restored - blocks) <= np.abs(scales) * 1.001).all()
            assert np.abs(restored - blocks).mean() < 0.3 * np.abs(scales).mean()
            value = restored.reshape(value.shape)
        variable.assign(value)
    ids = IDS[:, :6]
    expected = logits_of(VaultGemmaCausalLM(rounded, None), ids)
    found = Decoder(tmp_path / "new", "q4")(ids, np.ones_like(ids))
    assert np.abs(found - expected).max() <= 0.2  # the other factor is rounded to int8


def test_blocks_by_hand():
    row = np.zeros((1, 64), "float32")
    row[0, :4] = -8, 7, 3.4, 0.6
    packed, scales = quantize_blocks(row)
    assert packed[0, 0, :3].tolist() == [0 | 15 << 4, 11 | 9 << 4, 8 | 8 << 4]
    assert scales.tolist() == [[1, 1]] and packed.shape == (1, 2, 16)
    packed, scales = quantize_blocks(-row)
    assert packed[0, 0, :2].tolist() == [0 | 15 << 4, 11 | 9 << 4] and scales[0, 0] == -1


def test_the_folder(tmp_path):
    metadata = convert(one_layer_preset(), tmp_path / "new", to="transformers.js", dtype="f16")
    names = {p.relative_to(tmp_path / "new").as_posix() for p in (tmp_path / "new").rglob("*.*")}
    assert names == {
        "README.md",
        "config.json",
        "generation_config.json",
        "metadata.json",
        "onnx/model_fp16.onnx",
        "onnx/model_fp16.onnx_data",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
    }
    assert {*metadata["files"], "metadata.json"} == names
    assert metadata["dtype"] == "float16"
    config = json.loads((tmp_path / "new/config.json").read_text())
    assert config["model_type"] == "vaultgemma"
    assert config["transformers.js_config"] == {
        "dtype": "fp16",
        "use_external_data_format": {"model_fp16.onnx": 1},
    }
    model = onnx.load(tmp_path / "new/onnx/model_fp16.onnx", load_external_data=False)
    said = {entry.key: entry.value for entry in model.metadata_props}
    assert said["name"] == "one_layer"
    assert said["keras_vaultgemma.privacy"] == "The source makes no statement about privacy."
    embedded = json.loads(said["keras_vaultgemma.metadata"])
    assert embedded == {name: metadata[name] for name in embedded}
    card = (tmp_path / "new/README.md").read_text()
    assert "library_name: transformers.js" in card and 'pipeline("text-generation"' in card
    convert(TINY, tmp_path / "new", to="keras", overwrite=True)
    assert not list((tmp_path / "new").glob("onnx/*"))


def test_weights_in_several_files(tmp_path, monkeypatch):
    monkeypatch.setattr(transformers_js, "CHUNK", 2 * 10**6)
    convert(one_layer_preset(), tmp_path / "new", to="transformers.js", verify=True)
    found = {path.name for path in (tmp_path / "new/onnx").iterdir()}
    count = len(found) - 1
    data = ["model.onnx_data", *(f"model.onnx_data_{i}" for i in range(1, count))]
    assert found == {"model.onnx", *data} and count > 2
    assert all((tmp_path / "new/onnx" / name).stat().st_size <= 2 * 10**6 for name in data[1:])
    config = json.loads((tmp_path / "new/config.json").read_text())
    assert config["transformers.js_config"]["use_external_data_format"] == {"model.onnx": count}
    model = VaultGemmaCausalLM.from_preset(one_layer_preset())
    found = Decoder(tmp_path / "new")(IDS, np.ones_like(IDS))
    assert np.abs(found - logits_of(model, IDS)).max() <= 1e-4


def test_from_a_folder_for_transformers(tmp_path):
    convert(one_layer_preset(), tmp_path / "hf", to="hf")
    (tmp_path / "hf/chat_template.jinja").write_text("{{ messages[0]['content'] }}!")
    convert(tmp_path / "hf", tmp_path / "new", to="transformers.js", dtype="q4")
    convert(one_layer_preset(), tmp_path / "direct", to="transformers.js", dtype="q4")
    for name in ("onnx/model_q4.onnx_data", "tokenizer.json", "config.json"):
        found, expected = ((tmp_path / root / name).read_bytes() for root in ("new", "direct"))
        assert found == expected
    assert (tmp_path / "new/chat_template.jinja").is_file()


def test_loading_one_says_what_is_missing(tmp_path):
    convert(one_layer_preset(), tmp_path / "new", to="transformers.js", dtype="q4")
    with pytest.raises(FileNotFoundError, match="model.safetensors"):
        VaultGemmaCausalLM.from_preset(tmp_path / "new")


@pytest.mark.parametrize("dtype", ["float32", "q8", "q4"])
def test_one_bit_is_found(tmp_path, dtype):
    convert(one_layer_preset(), tmp_path / "new", to="transformers.js", dtype=dtype)
    path = next((tmp_path / "new/onnx").glob("*_data"))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="must have the same bits in source and target"):
        check_decoder(tmp_path / "new", *open_values(one_layer_preset()), dtype, lambda count: None)


def test_bfloat16_is_written_as_float32(tiny, tmp_path):
    VaultGemmaCausalLM.from_preset(one_layer_preset(), dtype="bfloat16").save_to_preset(
        tmp_path / "saved"
    )
    assert convert(tmp_path / "saved", tmp_path / "new", to="transformers.js")["dtype"] == "float32"
    with pytest.raises(
        ValueError, match="`dtype` must be None or one of 'float32', 'float16', 'q8', 'q4'"
    ):
        convert(TINY, tmp_path / "other", to="transformers.js", dtype="bf16")


def test_what_cannot_be_written(tiny, tmp_path, monkeypatch):
    write_preset(tiny, tmp_path / "saved", intermediate_dim=40)
    message = (
        "the rows of decoder_block_0/down/weight must be a multiple of 32. Received: rows of 40"
    )
    with pytest.raises(ValueError, match=message):
        convert(tmp_path / "saved", tmp_path / "new", to="transformers.js", dtype="q4")
    random_backbone(num_layers=1).save_to_preset(tmp_path / "ids")
    with pytest.raises(ValueError, match="ids must have a vocabulary .* transformers.js generates"):
        convert(tmp_path / "ids", tmp_path / "new", to="transformers.js")
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ImportError, match=r'pip install "keras-vaultgemma\[onnx\]"'):
        convert(TINY, tmp_path / "new", to="transformers.js")
    assert not (tmp_path / "new").exists()


def test_no_more_than_a_block_is_in_memory(tiny, tmp_path, monkeypatch):
    """Of a model of 18 MB. Converted once before, so that imports are not measured."""
    sizes = dict(hidden_dim=256, head_dim=64, intermediate_dim=4096)
    model = write_preset(tiny, tmp_path / "saved", **sizes)
    peaks = []
    for size in (lazy_tensor.BLOCK_BYTES, 2**18):
        monkeypatch.setattr(lazy_tensor, "BLOCK_BYTES", size)
        tracemalloc.start()
        convert(tmp_path / "saved", tmp_path / "new", "transformers.js", "q4", overwrite=True)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert 4 * model.backbone.count_params() > 17e6 and peaks[1] < 7e6
