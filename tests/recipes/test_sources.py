"""What commands accept as a model: presets, adapters, and folders that `finetune` wrote."""

import json
import shutil

import numpy as np
import pytest
from common import error_of, one_layer_preset, table

from keras_vaultgemma import VaultGemmaCausalLM, cli, convert, describe, finetune, lora
from keras_vaultgemma.recipes.sources import Source, find_source, load_model

pytestmark = [pytest.mark.first_backend, pytest.mark.usefixtures("no_cache")]

PROMPT = "Once upon a time"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folder of two runs: `adapted` wrote an adapter, and `merged` a preset."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "data.txt").write_text("\n\n".join(f"Once there were {i} hares." for i in range(8)))
    options = dict(preset=one_layer_preset(), sequence_length=16, batch_size=4)
    finetune(
        folder / "data.txt", folder / "adapted", lora_rank=2, learning_rate=0.2, epochs=3, **options
    )
    shutil.copytree(folder / "adapted", folder / "merged")
    model = VaultGemmaCausalLM.from_preset(one_layer_preset())
    lora.load_adapter(model, folder / "adapted" / "adapter")
    lora.merge(model)
    shutil.rmtree(folder / "merged" / "adapter")
    model.save_to_preset(folder / "merged" / "preset")
    run = json.loads((folder / "merged" / "run.json").read_text())
    run["options"]["merge"] = True
    (folder / "merged" / "run.json").write_text(json.dumps(run))
    return folder


@pytest.fixture(scope="module")
def text(runs):
    """What the adapted model generates."""
    model = VaultGemmaCausalLM.from_preset(one_layer_preset())
    plain = model.generate(PROMPT, max_new_tokens=8)
    lora.load_adapter(model, runs / "adapted" / "adapter")
    text = model.generate(PROMPT, max_new_tokens=8)
    assert text != plain
    return text


@pytest.mark.parametrize(
    "arguments",
    [
        ["--preset", "adapted"],
        ["--preset", "merged"],
        ["--preset", "adapted/adapter"],
        ["--adapter", "adapted"],
        ["--adapter", "adapted/adapter"],
        ["--adapter", "adapted", "--preset", "BASE"],
    ],
)
def test_generate_takes_what_finetune_wrote(runs, text, capsys, monkeypatch, arguments):
    monkeypatch.chdir(runs)
    arguments = [one_layer_preset() if word == "BASE" else word for word in arguments]
    assert cli.main(["generate", PROMPT, "--max-new-tokens", "8", *arguments]) == 0
    assert capsys.readouterr().out == text + "\n"


@pytest.mark.parametrize("option", ["--int8", "--int4"])
def test_generate_on_a_quantized_base(runs, capsys, option):
    command = ["generate", PROMPT, "--max-new-tokens", "8", "--preset", str(runs / "adapted")]
    assert cli.main([*command, option, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["prompt"], result["finish_reason"]) == (PROMPT, "length")
    assert result["new_tokens"] == 8 and result["text"]


def test_evaluate_agrees_with_finetune(runs, capsys):
    """On the rows that the run held out, in the form of rows that it used."""
    run = json.loads((runs / "adapted" / "run.json").read_text())
    held_out = runs / "held_out.txt"
    held_out.write_text("Once there were 4 hares.")
    command = ["evaluate", "--data", str(held_out), "--sequence-length", "16"]
    for arguments, name in (
        (["--preset", one_layer_preset()], "before"),
        (["--preset", str(runs / "adapted")], "after"),
        (["--adapter", str(runs / "adapted" / "adapter")], "after"),
    ):
        assert cli.main([*command, *arguments, "--json"]) == 0
        figures = json.loads(capsys.readouterr().out)
        assert figures.pop("rows") == 1
        assert figures == pytest.approx(run[name], rel=1e-5)
    assert cli.main([*command, "--preset", str(runs / "merged")]) == 0
    out = capsys.readouterr().out
    assert f"perplexity {run['after']['perplexity']:.4g}, " in out
    assert out.startswith(f"{runs / 'merged' / 'preset'} on {held_out}: 1 rows, ")


def test_the_latest_run_counts(runs, tmp_path):
    folder = tmp_path / "both"
    shutil.copytree(runs / "adapted", folder)
    shutil.copytree(runs / "merged" / "preset", folder / "preset")
    assert find_source(folder) == Source(one_layer_preset(), folder / "adapter")
    shutil.copy(runs / "merged" / "run.json", folder)
    assert find_source(folder) == Source(folder / "preset")


def test_a_run_that_has_not_finished(runs, tmp_path, capsys):
    shutil.copy(runs / "adapted" / "run.json", tmp_path)
    for command in (
        ["info", str(tmp_path)],
        ["convert", str(tmp_path), "x"],
        ["generate", "x", "--preset", str(tmp_path)],
    ):
        error = error_of(capsys, *command)
        assert error.startswith(f"{tmp_path} has a run that has not finished")


def test_an_adapter_without_a_base(runs, tmp_path, capsys):
    shutil.copytree(runs / "adapted" / "adapter", tmp_path / "alone")
    config = tmp_path / "alone" / "adapter_config.json"
    content = json.loads(config.read_text())
    config.write_text(json.dumps({**content, "base_model_name_or_path": None}))
    error = error_of(capsys, "generate", PROMPT, "--preset", str(tmp_path / "alone"))
    assert error.startswith(f"{tmp_path / 'alone'} does not name the preset")
    assert error.endswith(f"--preset PRESET --adapter {tmp_path / 'alone'}")
    config.write_text(json.dumps({**content, "base_model_name_or_path": "vaultgemma_tiny"}))
    assert find_source(tmp_path / "alone") == Source("vaultgemma_tiny", tmp_path / "alone")


def test_two_adapters(runs, capsys):
    adapted, merged = str(runs / "adapted"), str(runs / "merged")
    error = error_of(capsys, "generate", PROMPT, "--preset", adapted, "--adapter", adapted)
    assert error.startswith(f"`adapter` must be None, because {adapted} is an adapter itself")
    error = error_of(capsys, "generate", PROMPT, "--adapter", merged)
    assert error.startswith("`adapter` must be the folder of an adapter.")


@pytest.mark.parametrize("to", ["keras", "hf"])
def test_convert_merges_an_adapter(runs, text, tmp_path, to):
    metadata = convert(runs / "adapted", tmp_path / to, to=to, verify=to == "keras")
    model = VaultGemmaCausalLM.from_preset(tmp_path / to)
    assert model.generate(PROMPT, max_new_tokens=8) == text
    assert metadata["source"]["adapter"]["name"] == "adapter"
    assert "adapter_model.safetensors" in metadata["source"]["adapter"]["files"]
    assert metadata["dtype"] == "float32"
    assert [path.name for path in tmp_path.iterdir()] == [to]


def test_convert_rounds_merged_weights_once(runs, tmp_path):
    convert(runs / "adapted", tmp_path / "narrow", dtype="bfloat16")
    convert(runs / "merged", tmp_path / "merged", dtype="bfloat16")
    narrow, merged = (
        VaultGemmaCausalLM.from_preset(tmp_path / name) for name in ("narrow", "merged")
    )
    for a, b in zip(narrow.get_weights(), merged.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


def test_convert_does_not_merge_for_a_target_that_exists(runs, tmp_path, capsys):
    error = error_of(capsys, "convert", str(runs / "adapted"), str(tmp_path))
    assert error.startswith(f"{tmp_path} exists")


def test_info_of_an_adapter(runs):
    sections = table(describe(runs / "adapted"))
    assert sections["Adapter"]["base"] == one_layer_preset()
    assert (sections["Adapter"]["rank"], sections["Adapter"]["alpha"]) == ("2", "2")
    assert sections["Adapter"]["targets"] == "q_proj, v_proj"
    assert sections["Adapter"]["weights"].startswith("adapter_model.safetensors, 9")
    assert sections["Adapter"]["weights"].endswith(" kB")
    assert sections["Files"]["kind"] == "base of the adapter"
    assert sections["Architecture"]["num_layers"] == "1"
    assert table(describe(runs / "merged"))["Files"]["kind"] == "preset"


def test_info_of_an_adapter_whose_base_is_elsewhere(runs, tmp_path):
    shutil.copytree(runs / "adapted", tmp_path / "moved")
    run = json.loads((tmp_path / "moved" / "run.json").read_text())
    run["options"]["preset"] = "another/machine"
    (tmp_path / "moved" / "run.json").write_text(json.dumps(run))
    sections = table(describe(tmp_path / "moved"))
    assert sections["Adapter"]["base"] == "another/machine"
    assert sections["Adapter"]["base is not here"].startswith("`preset` must be")
    with pytest.raises(ValueError, match="another/machine"):
        load_model(find_source(tmp_path / "moved"))


@pytest.fixture(scope="module")
def narrow(tmp_path_factory):
    """Folders of one preset in bfloat16, in both formats and without its weights."""
    folder = tmp_path_factory.mktemp("narrow")
    for to in ("keras", "hf"):
        convert(one_layer_preset(), folder / to, to=to, dtype="bfloat16")
    shutil.copytree(folder / "hf", folder / "bare")
    (folder / "bare" / "model.safetensors").unlink()
    return folder


@pytest.mark.parametrize(
    "name, file_format, weights",
    [
        ("keras", "Keras preset", "model.weights.h5, "),
        ("hf", "Hugging Face", "model.safetensors, "),
        ("bare", "Hugging Face", "not in "),
    ],
)
def test_info_says_dtype_format_and_weights(narrow, name, file_format, weights):
    files = table(describe(narrow / name))["Files"]
    assert files["kind"] == "preset"
    assert files["format"] == file_format
    assert files["dtype"] == "bfloat16"
    assert files["weights"].startswith(weights)


def test_info_of_quantized_and_mixed_presets(tmp_path):
    model = VaultGemmaCausalLM.from_preset(one_layer_preset())
    model.quantize("int8")
    model.save_to_preset(tmp_path / "int8")
    assert table(describe(tmp_path / "int8"))["Files"]["dtype"] == "int8 and float"
    mixed = VaultGemmaCausalLM.from_preset(one_layer_preset(), dtype="mixed_bfloat16")
    mixed.save_to_preset(tmp_path / "mixed")
    assert table(describe(tmp_path / "mixed"))["Files"]["dtype"] == "mixed_bfloat16"


def test_info_of_the_release_says_where_its_weights_are(tmp_path, monkeypatch, narrow):
    monkeypatch.setenv("KERAS_VAULTGEMMA_HOME", str(tmp_path))
    files = table(describe("vaultgemma_1b"))["Files"]
    assert files["dtype"] == "bfloat16"
    assert files["weights"].startswith("not in ")
    shutil.copytree(narrow / "hf", tmp_path / "vaultgemma_1b")
    files = table(describe("vaultgemma_1b"))["Files"]
    assert files["format"] == "Hugging Face"
    assert files["weights"].startswith("model.safetensors, 4.4 MB")


@pytest.mark.parametrize("name", ["keras", "hf"])
def test_commands_that_do_not_train_take_the_presets_dtype(narrow, name):
    assert load_model(find_source(narrow / name)).backbone.compute_dtype == "bfloat16"
    loaded = load_model(find_source(narrow / name), dtype="float32")
    assert loaded.backbone.compute_dtype == "float32"
    assert VaultGemmaCausalLM.from_preset(narrow / name).backbone.compute_dtype == "float32"
