"""Adapters in the file format of PEFT, compared with PEFT itself."""

import json
import warnings
from pathlib import Path

import numpy as np
import peft
import pytest
import safetensors.numpy
import torch
import transformers
from common import random_backbone, to_numpy
from hub_client import run
from hub_stub import HubStub

from keras_vaultgemma import VaultGemmaCausalLM, lora
from keras_vaultgemma.checkpoints import hubs
from keras_vaultgemma.lora import peft_format
from keras_vaultgemma.lora.peft_format import Adapter
from keras_vaultgemma.privacy.ledger import Ledger
from keras_vaultgemma.recipes.convert import convert

pytestmark = pytest.mark.first_backend

IDS = np.array([[2, 5, 77, 9, 100, 31]], "int32")
QUERY = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Return our model, and a folder with the same weights for transformers."""
    folder = tmp_path_factory.mktemp("base")
    model = VaultGemmaCausalLM(random_backbone(num_layers=3))
    model.save_to_preset(folder / "keras")
    convert(folder / "keras", folder / "hf", to="hf", progress=False)
    return model, folder / "hf"


@pytest.fixture
def model(base):
    """Our model, without an adapter before and after each test."""
    yield base[0]
    for name in lora.names(base[0]):
        lora.remove(base[0], name)


@pytest.fixture(scope="module")
def hyperparameters(base):
    return base[0].backbone.get_config()


def logits(model):
    return to_numpy(model({"token_ids": IDS, "padding_mask": np.ones_like(IDS)}))


def their_model(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def their_logits(model):
    with torch.inference_mode():
        return model.eval()(torch.from_numpy(IDS).long()).logits.numpy()


def random_adapter(rank=3, alpha=5.0, **widths):
    """Return an `Adapter` of layers of block 1, given as `name=(in, out)`."""
    random = np.random.default_rng(0)
    factors = {
        f"decoder_block_1/{name.replace('__', '/')}": tuple(
            random.normal(size=shape).astype("float32") for shape in ((width, rank), (rank, units))
        )
        for name, (width, units) in widths.items()
    }
    return Adapter(rank, alpha, 0.25, factors)


def write_like_peft(folder, **changes):
    """Write an adapter of all query and value layers as PEFT does, with `changes` to its config.

    Returns:
        Dict of the tensors.
    """
    random = np.random.default_rng(0)
    tensors = {
        f"base_model.model.model.layers.{i}.self_attn.{name}.{factor}.weight": random.normal(
            size=shape
        ).astype("float32")
        for i in range(3)
        for name in ("q_proj", "v_proj")
        for factor, shape in (("lora_A", (4, 48)), ("lora_B", (64, 4)))
    }
    config = {
        "peft_type": "LORA",
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["v_proj", "q_proj"],
        **changes,
    }
    folder.mkdir(exist_ok=True)
    (folder / peft_format.CONFIG).write_text(json.dumps(config))
    save(folder, tensors)
    return tensors


def save(folder, tensors):
    safetensors.numpy.save_file(tensors, folder / peft_format.WEIGHTS)


ALL = ["query", "key", "value", "attention_output", "gate", "up", "down", "token_embedding"]


@pytest.mark.every_backend
@pytest.mark.parametrize(
    "targets",
    [
        ["query", "value"],
        ALL,
        ["token_embedding"],
        [r"decoder_block_[12]/attention/.*", r".*_0/down"],
    ],
)
def test_peft_loads_our_adapter(model, base, targets, tmp_path):
    before = logits(model)
    model.backbone.enable_lora(3, targets, alpha=7)
    for variable in model.trainable_variables:
        variable.assign(np.random.default_rng(len(variable.path)).normal(0, 0.2, variable.shape))
    lora.save_adapter(model, tmp_path / "ours", base_model=str(base[1]))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Found missing adapter keys")
        theirs = peft.PeftModel.from_pretrained(their_model(base[1]), tmp_path / "ours")
    expected = logits(model)
    assert np.abs(expected - before).max() > 0.1
    np.testing.assert_allclose(their_logits(theirs), expected, atol=2e-4)
    config = peft.PeftConfig.from_pretrained(tmp_path / "ours")
    assert (config.r, config.lora_alpha, config.lora_dropout, config.bias) == (3, 7, 0.0, "none")
    assert (config.peft_type, config.task_type) == (
        "LORA",
        "CAUSAL_LM",
    ) and config.base_model_name_or_path == str(base[1])
    if targets == ALL:
        assert config.target_modules == {
            *(
                "q_proj",
                "k_proj",
                "v_proj",
                "o_proj",
                "gate_proj",
                "up_proj",
                "down_proj",
                "embed_tokens",
                "lm_head",
            )
        }


@pytest.mark.parametrize(
    "options",
    [
        dict(target_modules=["q_proj", "v_proj"]),
        dict(target_modules="all-linear"),
        dict(target_modules=r".*layers\.[01]\.mlp\.(up|down)_proj"),
        dict(target_modules=["k_proj"], layers_to_transform=[0, 2]),
        dict(
            target_modules=["k_proj", "q_proj"], exclude_modules=["model.layers.1.self_attn.k_proj"]
        ),
        dict(target_modules=["embed_tokens", "o_proj"], ensure_weight_tying=True),
        dict(target_modules=["lm_head"], ensure_weight_tying=True),
        dict(target_modules=["embed_tokens", "q_proj"], layers_to_transform=[0]),
        dict(
            target_modules=["embed_tokens", "q_proj"],
            layers_to_transform=[0],
            ensure_weight_tying=True,
        ),
        dict(target_modules=["k_proj", "model.layers.2.mlp.up_proj"], layers_to_transform=0),
        dict(target_modules=["q_proj", "down_proj"], use_rslora=True),
        dict(
            target_modules=["q_proj", "down_proj"],
            rank_pattern={"down_proj": 5, "layers.1.self_attn.q_proj": 2},
            alpha_pattern={"q_proj": 11, "down_proj": 2.5},
        ),
        dict(
            target_modules="all-linear",
            rank_pattern={r"layers\.[01]\..*(q|up)_proj": 2, "model.layers.2.mlp.up_proj": 6},
            alpha_pattern={"^model.layers.0.self_attn.(q|k)_proj": 9},
            use_rslora=True,
        ),
        dict(
            target_modules=["embed_tokens", "o_proj"],
            ensure_weight_tying=True,
            rank_pattern={"embed_tokens": 4, "lm_head": 4},
            alpha_pattern={"embed_tokens|lm_head": 3},
        ),
    ],
)
def test_we_load_an_adapter_of_peft(model, base, options, tmp_path):
    before = logits(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tied embeddings
        theirs = peft.get_peft_model(
            their_model(base[1]),
            peft.LoraConfig(r=3, lora_alpha=5, task_type="CAUSAL_LM", **options),
        )
    torch.manual_seed(0)
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    theirs.save_pretrained(tmp_path / "theirs")
    lora.load_adapter(model, tmp_path / "theirs", name="theirs")
    expected = their_logits(theirs)
    assert np.abs(expected - before).max() > 0.05
    np.testing.assert_allclose(logits(model), expected, atol=2e-4)
    if "use_rslora" in options or "rank_pattern" in options:
        lora.save_adapter(model, tmp_path / "ours")
        ours = peft.PeftModel.from_pretrained(their_model(base[1]), tmp_path / "ours")
        np.testing.assert_allclose(their_logits(ours), expected, atol=2e-4)


def test_adapters_are_written_and_read_bit_for_bit(hyperparameters, tmp_path):
    ours = random_adapter(attention__query=(48, 64), down=(96, 48))
    ours = ours._replace(
        factors={
            "token_embedding": (np.ones((128, 3), "f4"), np.full((3, 48), 2, "f4")),
            **ours.factors,
        }
    )
    peft_format.write_adapter(tmp_path / "a", ours, hyperparameters)
    read = peft_format.read_adapter(tmp_path / "a", hyperparameters)
    assert (
        read[:3] == (3, 5.0, 0.25)
        and read[4:] == ({}, {})
        and list(read.factors) == list(ours.factors)
    )
    for path, factors in ours.factors.items():
        assert all(
            np.array_equal(one, other)
            for one, other in zip(read.factors[path], factors, strict=True)
        )
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == [
        peft_format.CONFIG,
        peft_format.WEIGHTS,
    ]
    config = json.loads((tmp_path / "a" / peft_format.CONFIG).read_text())
    assert config["target_modules"] == [
        "lm_head",
        "model.embed_tokens",
        "model.layers.1.mlp.down_proj",
        "model.layers.1.self_attn.q_proj",
    ]
    assert config["lora_alpha"] == 5 and type(config["lora_alpha"]) is int


OPTIONS = dict(
    use_dora=True,
    bias="lora_only",
    lora_bias=True,
    modules_to_save=["norm"],
    trainable_token_indices=[3],
    layer_replication=[(0, 2), (1, 3)],
    alora_invocation_tokens=[5],
    target_parameters=["model.layers.0.mlp.up_proj.weight"],
)
"""Options of PEFT that change what an adapter computes, and that this package cannot load."""


@pytest.mark.parametrize("option", OPTIONS)
def test_other_options_of_peft_are_rejected_by_name(model, base, option, tmp_path):
    options = dict(target_modules=["q_proj"], task_type="CAUSAL_LM", r=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.LoraConfig(**options, **{option: OPTIONS[option]})
        theirs = peft.get_peft_model(their_model(base[1]), config)
        theirs.save_pretrained(tmp_path / "theirs")
    with pytest.raises(ValueError, match=f"`{option}` must be"):
        lora.load_adapter(model, tmp_path / "theirs")
    assert lora.names(model) == []


def test_an_embedding_with_another_scale_than_the_head_is_rejected(hyperparameters, tmp_path):
    ours = Adapter(
        2, 2.0, 0.0, {"token_embedding": (np.ones((128, 2), "f4"), np.ones((2, 48), "f4"))}
    )
    peft_format.write_adapter(tmp_path / "a", ours, hyperparameters)
    path = tmp_path / "a" / peft_format.CONFIG
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "alpha_pattern": {"lm_head": 7}}))
    with pytest.raises(ValueError, match="must be equal for model.embed_tokens and lm_head"):
        peft_format.read_adapter(tmp_path / "a", hyperparameters)


@pytest.mark.parametrize(
    "preset, name, revision",
    [
        ("hf://org/name@v2", "org/name", "v2"),
        ("hf://org/name", "org/name", None),
        ("vaultgemma_1b", "google/vaultgemma-1b", None),
        ("some/folder", "some/folder", None),
        (None, None, None),
    ],
)
def test_an_adapter_names_its_base(model, preset, name, revision, tmp_path):
    model.backbone.enable_lora(2)
    model.backbone.preset = preset
    lora.save_adapter(model, tmp_path / "a")
    config = peft.PeftConfig.from_pretrained(tmp_path / "a")
    assert (config.base_model_name_or_path, config.revision) == (name, revision)
    lora.save_adapter(model, tmp_path / "b", base_model="mine")
    config = peft.PeftConfig.from_pretrained(tmp_path / "b")
    assert (config.base_model_name_or_path, config.revision) == ("mine", None)
    model.backbone.preset = None


@pytest.mark.any_backend
def test_an_adapter_from_hugging_face(model, hyperparameters, monkeypatch, tmp_path):
    ledger = Ledger(({"training": "without privacy", "steps": 3, "name": "a"},))
    adapter = random_adapter(down=(96, 48))
    peft_format.write_adapter(tmp_path / "theirs", adapter, hyperparameters, ledger=ledger)
    (tmp_path / "theirs" / "training.bin").write_bytes(b"not needed")
    with HubStub({"test/adapter": {"v1": tmp_path / "theirs"}}) as hub:
        env = hub.environment(tmp_path, PYTHONPATH=str(Path(hubs.__file__).parents[2]))

        def download(preset, patterns):
            """Run `hubs.from_hugging_face` in a process that asks the stub."""
            return Path(run(DOWNLOAD, hubs.__file__, preset, *patterns, env=env))

        monkeypatch.setattr(hubs, "from_hugging_face", download)
        lora.load_adapter(model, "hf://test/adapter@v1", name="theirs")
        assert not any("training.bin" in request for request in hub.requests)
    lora.save_adapter(model, tmp_path / "ours")
    one, other = (
        safetensors.numpy.load_file(tmp_path / name / peft_format.WEIGHTS)
        for name in ("ours", "theirs")
    )
    assert one.keys() == other.keys() and all(np.array_equal(one[key], other[key]) for key in one)
    assert ledger.statements[0] in model.privacy.ledger.statements


DOWNLOAD = """
import importlib.util, json, sys
spec = importlib.util.spec_from_file_location("hubs", sys.argv[1])
hubs = importlib.util.module_from_spec(spec)
spec.loader.exec_module(hubs)
print(json.dumps(str(hubs.from_hugging_face(sys.argv[2], sys.argv[3:]))))
"""


def test_tensors_of_another_dtype_are_cast_to_float32(hyperparameters, tmp_path):
    tensors = write_like_peft(tmp_path / "a")
    save(tmp_path / "a", {name: tensor.astype("float16") for name, tensor in tensors.items()})
    read = peft_format.read_adapter(tmp_path / "a", hyperparameters)
    expected = tensors[QUERY].T.astype("float16").astype("float32")
    np.testing.assert_array_equal(read.factors["decoder_block_0/attention/query"][0], expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(peft_type="IA3"), "`peft_type` must be 'LORA'. Received: 'IA3'"),
        (dict(r=0), "`r` must be an integer from 1 to 2147483647. Received: 0"),
        (dict(r=True), "`r` must be .*Received: True"),
        (dict(lora_alpha=-1), "`lora_alpha` must be a finite number above 0. Received: -1"),
        (dict(lora_dropout=1), "`lora_dropout` must be a number in \\[0, 1\\). Received: 1"),
        (dict(bias="all"), "`bias` must be 'none'. Received: 'all'"),
        (dict(use_rslora="yes"), "`use_rslora` must be true, false or null. Received: 'yes'"),
        (dict(use_dora=True), "`use_dora` must be absent"),
        (dict(rank_pattern={"q_proj": 0}), "`rank_pattern` must be null or .* integers above 0"),
        (dict(rank_pattern=["q_proj"]), "`rank_pattern` must be null or an object"),
        (dict(alpha_pattern={"q_proj": -1}), "`alpha_pattern` must be .* finite numbers above 0"),
        (dict(alpha_pattern={"(a|a)*b": 1}), "`alpha_pattern` must be .* at most two of"),
        (dict(alpha_pattern={".*.*.*x": 1}), "`alpha_pattern` must be .* at most two of"),
        (dict(alpha_pattern={"q_proj(": 1}), "`alpha_pattern` must be .* at most two of"),
        (dict(modules_to_save=["lm_head"]), "`modules_to_save` must be absent"),
        (dict(a_new_method=True), "`a_new_method` must be absent"),
        (
            dict(init_lora_weights="pissa"),
            "`init_lora_weights` must be true, false.*do not change the base weights. Received: 'pissa'",
        ),
        (dict(init_lora_weights=1), "`init_lora_weights` must be .*Received: 1"),
        (dict(fan_in_fan_out=True), "`fan_in_fan_out` must be false"),
        (
            dict(target_modules=None),
            "`target_modules` must be a list of names or a string. Received: None",
        ),
        (dict(target_modules=[1]), "`target_modules` must be a list of names or a string"),
        (dict(exclude_modules=3), "`exclude_modules` must be null, a list of names or a string"),
        (
            dict(layers_to_transform="all"),
            "`layers_to_transform` must be null, an integer or a list",
        ),
    ],
)
def test_unsupported_config_fields_raise(hyperparameters, tmp_path, changes, message):
    write_like_peft(tmp_path / "a", **changes)
    with pytest.raises(ValueError, match=f"{peft_format.CONFIG}: {message}"):
        peft_format.read_adapter(tmp_path / "a", hyperparameters)


def test_missing_unknown_and_misshapen_tensors_raise(hyperparameters, tmp_path):
    folder = tmp_path / "a"
    tensors = write_like_peft(folder)
    cases = [
        ({QUERY: None}, f"{QUERY} is missing from .*Expected shape: \\(4, 48\\). Found: None"),
        (
            {QUERY: np.zeros((4, 40), "f4")},
            f"{QUERY} is misshapen in .*Expected shape: \\(4, 48\\). Found: \\(4, 40\\)",
        ),
        (
            {QUERY: np.zeros((2, 48), "f4")},
            f"{QUERY} is misshapen in .*Expected shape: \\(4, 48\\). Found: \\(2, 48\\)",
        ),
        (
            {QUERY.replace("layers.0", "layers.3"): np.zeros((4, 48), "f4")},
            r"layers.3.self_attn.q_proj.lora_A.weight is unknown in .*Expected shape: None. Found: \(4, 48\)",
        ),
        (
            {QUERY.replace("q_proj", "c_attn"): np.zeros((4, 48), "f4")},
            "c_attn.lora_A.weight is unknown",
        ),
        (
            {QUERY.replace("lora_A", "lora_magnitude_vector"): np.zeros(4, "f4")},
            "lora_magnitude_vector.weight is unknown",
        ),
    ]
    for changes, message in cases:
        save(
            folder,
            {name: tensor for name, tensor in {**tensors, **changes}.items() if tensor is not None},
        )
        with pytest.raises(ValueError, match=message):
            peft_format.read_adapter(folder, hyperparameters)


def test_adapters_of_another_model_raise(hyperparameters, tmp_path):
    write_like_peft(tmp_path / "a")
    for change, message in [
        (
            dict(num_layers=4),
            r"layers.3.self_attn.q_proj.lora_A.weight is missing.*\(4, 48\). Found: None",
        ),
        (
            dict(num_layers=2),
            r"layers.2.self_attn.q_proj.lora_A.weight is unknown.*None. Found: \(4, 48\)",
        ),
        (
            dict(hidden_dim=32),
            r"layers.0.self_attn.q_proj.lora_A.weight is misshapen.*\(4, 32\). Found: \(4, 48\)",
        ),
        (
            dict(head_dim=8),
            r"layers.0.self_attn.q_proj.lora_B.weight is misshapen.*\(32, 4\). Found: \(64, 4\)",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            peft_format.read_adapter(tmp_path / "a", {**hyperparameters, **change})
    write_like_peft(tmp_path / "a", target_modules=[])
    save(tmp_path / "a", {})
    with pytest.raises(
        ValueError,
        match=r"`target_modules` must be names of layers that this model has. Received: \[\]",
    ):
        peft_format.read_adapter(tmp_path / "a", hyperparameters)


def test_an_untied_head_raises(hyperparameters, tmp_path):
    ours = Adapter(
        2, 2.0, 0.0, {"token_embedding": (np.ones((128, 2), "f4"), np.ones((2, 48), "f4"))}
    )
    peft_format.write_adapter(tmp_path / "a", ours, hyperparameters)
    tensors = safetensors.numpy.load_file(tmp_path / "a" / peft_format.WEIGHTS)
    head = "base_model.model.lm_head.lora_B.weight"
    save(tmp_path / "a", {**tensors, head: tensors[head] + 1})
    with pytest.raises(
        ValueError,
        match="lm_head.lora_B.weight must be the transpose of .*embed_tokens.lora_embedding_A",
    ):
        peft_format.read_adapter(tmp_path / "a", hyperparameters)
    save(
        tmp_path / "a", {name: tensor for name, tensor in tensors.items() if "lm_head" not in name}
    )
    with pytest.raises(ValueError, match="lm_head.lora_A.weight is missing"):
        peft_format.read_adapter(tmp_path / "a", hyperparameters)


def test_regular_expressions_from_a_file_are_not_evaluated(hyperparameters, tmp_path):
    write_like_peft(
        tmp_path / "a", target_modules="(a*)*(a*)*(a*)*b" + "(m|mo|mod|o|d|e|l|.)*" * 5 + "x"
    )
    assert len(peft_format.read_adapter(tmp_path / "a", hyperparameters).factors) == 6


def test_missing_files_raise(hyperparameters, tmp_path):
    with pytest.raises(ValueError, match=f"{peft_format.CONFIG} does not exist"):
        peft_format.read_adapter(tmp_path / "nowhere", hyperparameters)
    write_like_peft(tmp_path / "a")
    (tmp_path / "a" / peft_format.WEIGHTS).unlink()
    with pytest.raises(ValueError, match=f"{peft_format.WEIGHTS} does not exist"):
        peft_format.read_adapter(tmp_path / "a", hyperparameters)


class FullDisk:
    """A ledger whose file no longer fits on the disk, after config and weights were written."""

    def write(self, folder):
        assert (folder / peft_format.WEIGHTS).exists()
        raise OSError(28, "No space left")


def test_a_failed_save_leaves_the_folder_unchanged(hyperparameters, tmp_path):
    write_like_peft(tmp_path / "a")
    before = {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()}
    adapter = random_adapter(down=(96, 48))
    with pytest.raises(OSError, match="No space left"):
        peft_format.write_adapter(tmp_path / "a", adapter, hyperparameters, ledger=FullDisk())
    assert {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()} == before
