"""Files that version 0.1.0 saved load and compute what they did (tests/fixtures/make_fixtures.py)."""

import json
import shutil
from pathlib import Path

import keras
import numpy as np
import pytest
from common import to_numpy
from fixtures.make_fixtures import (
    ADAPTERS,
    CHAT,
    HYPERPARAMETERS,
    IDS,
    KEY,
    MASK,
    TEXTS,
    finetune_run,
    logits,
    plain_run,
    private_run,
    trained,
)

from keras_vaultgemma import (
    TrainingCheckpoint,
    VaultGemmaBackbone,
    VaultGemmaCausalLM,
    backend,
    convert,
    finetune,
    lora,
)
from keras_vaultgemma.privacy import accounting
from keras_vaultgemma.privacy.ledger import FILE, read_ledger

SAVED = Path(__file__).parent / "fixtures/saved_by_0_1_0"
RUNS = SAVED / "runs" / backend.NAME
TEXT = json.loads((SAVED / "expected.json").read_text())
RUN_TEXT = json.loads((RUNS / "expected.json").read_text())
EXPECTED = np.load(SAVED / "logits.npz")

pytestmark = [
    pytest.mark.first_backend,
    pytest.mark.filterwarnings("ignore::keras_vaultgemma.privacy.NotPrivateWarning"),
    pytest.mark.filterwarnings("ignore:Layer .* does not have a `quantize`"),
]


def load(name="task", **arguments):
    return VaultGemmaCausalLM.from_preset(SAVED / name, preprocessor=None, **arguments)


def check(model, name):
    """The model computes and generates what the one did that was saved as `name`."""
    np.testing.assert_allclose(logits(model), EXPECTED[name], rtol=1e-5, atol=1e-5)
    generated = model.generate(IDS[:1].tolist(), max_new_tokens=12, stop_token_ids=None)
    assert generated[0] == TEXT["ids generated"][name]


def same_weights(model, other):
    for one, two in zip(model.backbone.weights, other.backbone.weights, strict=True):
        assert one.path.partition("/")[2] == two.path.partition("/")[2]
        np.testing.assert_array_equal(to_numpy(one), to_numpy(two))


# Presets


@pytest.fixture(scope="module", params=["preset", ".keras"])
def task(request):
    if request.param == "preset":
        return VaultGemmaCausalLM.from_preset(SAVED / "task")
    return keras.saving.load_model(SAVED / "task.keras")


def test_a_task(task):
    check(task, "task")
    config = task.backbone.get_config()
    assert {name: config[name] for name in HYPERPARAMETERS} == HYPERPARAMETERS
    assert task.preprocessor.sequence_length == 24


def test_text_of_a_task(task):
    tokenizer = task.preprocessor.tokenizer
    for text, ids in zip((TEXTS[1], "Füchse \u20ac 3"), TEXT["ids"], strict=True):
        assert np.asarray(tokenizer(text)).tolist() == ids
        assert tokenizer.detokenize(ids) == text
    x, y, weights = task.preprocessor([CHAT])
    expected = TEXT["chat"]
    assert np.asarray(x["token_ids"]).tolist() == expected["x"]
    assert np.asarray(x["padding_mask"]).tolist() == expected["mask"]
    assert np.asarray(y).tolist() == expected["y"]
    assert np.asarray(weights).tolist() == expected["weights"]


@pytest.mark.every_backend
def test_what_a_task_generates_and_scores(task):
    options = dict(max_new_tokens=12, stop_token_ids=None)
    assert task.generate(["The hare", "A"], **options) == TEXT["generated"]
    reply = task.generate(CHAT[:1], max_new_tokens=6, stop_token_ids=None)
    assert reply == TEXT["reply"]
    scores = task.score(IDS, MASK)
    np.testing.assert_allclose(to_numpy(scores), TEXT["scores"], rtol=1e-5, atol=1e-5)


def test_a_backbone_in_bfloat16():
    backbone = VaultGemmaBackbone.from_preset(SAVED / "bfloat16_backbone", dtype="bfloat16")
    assert {v.dtype for v in backbone.weights} == {"bfloat16"}
    check(load("bfloat16_backbone", dtype="float32"), "bfloat16_backbone")
    for one, two in zip(backbone.weights, load().backbone.weights, strict=True):
        np.testing.assert_array_equal(
            to_numpy(one).astype("float32"),
            to_numpy(keras.ops.cast(keras.ops.cast(two, "bfloat16"), "float32")),
        )


def test_a_quantized_task():
    model = load("int8")
    assert [v.dtype for v in model.backbone.weights].count("int8") == 2 * 7 + 1
    check(model, "int8")


def test_a_task_in_several_files():
    assert len(list((SAVED / "shards").glob("*.weights.h5"))) > 1
    same_weights(load("shards"), load())


@pytest.mark.parametrize("folder", ["converted_to_hf", "converted_to_keras"])
def test_a_converted_task(folder):
    model = VaultGemmaCausalLM.from_preset(SAVED / folder)
    same_weights(model, load())
    assert (
        model.generate("The hare", max_new_tokens=12, stop_token_ids=None) == TEXT["generated"][0]
    )


@pytest.mark.parametrize("to", ["hf", "keras"])
def test_a_conversion_writes_the_same_values(to, tmp_path):
    """Of a file that was converted, again: the file of weights is the same to the byte for "hf"."""
    source = SAVED / ("task" if to == "hf" else "converted_to_hf")
    convert(source, tmp_path / "new", to=to, verify=True, progress=False)
    same_weights(load(tmp_path / "new"), load())
    if to == "hf":
        old, new = (f / "model.safetensors" for f in (SAVED / "converted_to_hf", tmp_path / "new"))
        assert old.read_bytes() == new.read_bytes()


# Adapters


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter(name):
    model = load()
    lora.load_adapter(model, SAVED / f"adapter_{name}")
    check(model, f"adapter_{name}")
    lora.use(model, None)
    check(model, "task")


def test_an_adapter_and_a_preset_with_a_ledger():
    merged, model = load("private"), load()
    lora.load_adapter(model, SAVED / "adapter_private")
    for loaded in (model, merged):
        check(loaded, "adapter_private")
        spent = loaded.privacy.spent()
        assert "1 steps" in spent.uncovered and TEXT["private"].items() <= spent._asdict().items()
        assert not spent.is_private
        assert "1 steps" in loaded.privacy.ledger.without_privacy()


# Ledgers


def test_a_ledger_whose_last_line_is_torn():
    found, expected = read_ledger(SAVED / "ledger" / FILE), TEXT["ledger"]
    (stated, plain), runs = found
    assert (stated["epsilon"], stated["unit"]) == (2.0, "one sequence")
    assert found.without_privacy().startswith("7 steps") and plain["steps"] == 7
    assert [count for _, count in runs] == expected["steps"]
    spent = found.spent()["aaaaaaaa:01"]
    assert spent.epsilon == pytest.approx(expected["spent"]["epsilon"], rel=1e-5)
    assert (spent.steps, spent.delta) == (expected["spent"]["steps"], 1e-5)
    epsilon = accounting.epsilon(found.on("aaaaaaaa:01"), 1e-7)
    assert epsilon == pytest.approx(expected["epsilon at 1e-7"], rel=1e-5)


# Runs


@pytest.fixture
def home(tmp_path, monkeypatch):
    """The user's folder, with the key that the fingerprints were made with."""
    (tmp_path / "home").mkdir()
    shutil.copy(SAVED / "home" / KEY, tmp_path / "home")
    monkeypatch.setenv("KERAS_VAULTGEMMA_HOME", str(tmp_path / "home"))


def check_weights(model, name):
    with np.load(RUNS / "weights.npz") as arrays:
        expected = {key: arrays[key] for key in arrays if key.startswith(f"{name}/")}
    found = trained(model)
    assert len(found) == len(expected) > 0
    for i, value in enumerate(found):
        np.testing.assert_allclose(value, expected[f"{name}/{i}"], rtol=1e-5, atol=1e-5)


def check_history(found, expected):
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, rtol=1e-5, atol=1e-5, err_msg=name)


def copy_of(name, tmp_path):
    shutil.copytree(RUNS / name, tmp_path / name)
    return tmp_path / name


@pytest.mark.every_backend
def test_an_interrupted_run_ends_as_it_did(tmp_path):
    folder = copy_of("plain", tmp_path)
    assert TrainingCheckpoint(folder).position == {"epoch": 1, "batch": 1, "is_finished": False}
    model, history = plain_run(SAVED / "task", folder)
    check_weights(model, "plain")
    check_history(history, RUN_TEXT["plain"]["history"])


def test_an_interrupted_private_run_goes_on(tmp_path, home):
    """Its noise is another one than in 0.1.0, and so are its weights."""
    folder = copy_of("private", tmp_path)
    model, history = private_run(SAVED / "task", folder)
    assert all(np.isfinite(value).all() for value in trained(model))
    assert history.keys() == RUN_TEXT["private"]["history"].keys()
    spent, expected = model.privacy.spent(), RUN_TEXT["private"]["spent"]
    # A step that may have been released before the kill counts, and is done again.
    assert spent.steps == expected["steps"] == 10
    assert spent.epsilon == pytest.approx(expected["epsilon"], rel=1e-5)
    assert model.privacy.ledger == read_ledger(folder / FILE)


def test_an_interrupted_fine_tuning_ends_as_it_did(tmp_path, monkeypatch):
    folder = copy_of("finetune", tmp_path)
    monkeypatch.chdir(SAVED)  # The option `preset` is compared as it was given.
    finetune_run(finetune, "task", "records.txt", folder)
    model = load()
    lora.load_adapter(model, folder / "adapter")
    check_weights(model, "finetune")
    found, expected = json.loads((folder / "run.json").read_text()), RUN_TEXT["finetune"]
    for name in ("before", "after"):
        assert found[name] == pytest.approx(expected[name], rel=1e-5)
    for history in (found["history"], expected["history"]):
        del history["tokens_per_second"]
    check_history(found["history"], expected["history"])
