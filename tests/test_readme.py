"""Every snippet of README.md runs in an empty folder; one that depends on how Keras is imported, in a new process."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.any_backend

README = Path(__file__).parents[1] / "README.md"
SNIPPETS = dict(
    re.findall(
        r"^## ([^\n]+)\n(?:(?!^## ).)*?^```python\n(.*?)^```", README.read_text(), re.M | re.S
    )
)
SURVIVES = re.search(
    r"A run that may be killed.*?^```python\n(.*?)^```", README.read_text(), re.M | re.S
)[1]


def run(code, folder, **environment):
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "KERAS_VAULTGEMMA_HOME": str(folder),
        **environment,
    }
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=folder,
        env=environment,
        check=False,
    )


@pytest.fixture
def execute(tmp_path, monkeypatch, capsys):
    """A function that runs code in an empty folder and returns what it printed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KERAS_VAULTGEMMA_HOME", str(tmp_path))

    def run_here(code):
        exec(compile(code, "README.md", "exec"), {"__name__": "__main__"})
        return capsys.readouterr().out

    return run_here


def test_the_promised_snippets_are_there():
    assert list(SNIPPETS) == [
        "Generate",
        "Switch the backend",
        "Fine-tune",
        "Evaluate",
        "Adapters",
        "Train on documents or pairs",
        "On a pod or a GPU cluster",
        "Fine-tune privately",
        "Measure what a model remembers",
        "Load the 1B weights",
        "Save",
    ]


def test_what_a_model_remembers_is_measured(execute):
    printed = execute(SNIPPETS["Measure what a model remembers"])
    assert "greedy exact match: 0 of 60, at most 4.9 % (95 % confidence)" in printed
    assert "reference: AUC 0.500" in printed
    assert "no claim" in printed


@pytest.mark.parametrize(
    "title", ["Generate", "Fine-tune", "Adapters", "Train on documents or pairs", "Save"]
)
def test_snippet_runs(title, execute):
    printed = execute(SNIPPETS[title])
    if title not in ("Fine-tune", "Train on documents or pairs"):
        assert "Once upon a time" in printed


def test_the_evaluation_snippet_prints_its_figures(execute):
    printed = execute(SNIPPETS["Evaluate"])
    assert "1.0000 ± nan (1 of 1)" in printed and "bits per byte" in printed


def test_the_backend_is_switched(tmp_path):
    result = run(SNIPPETS["Switch the backend"], tmp_path)
    assert result.returncode == 0, result.stderr[-2000:]
    assert "Once upon a time" in result.stdout


def test_the_private_snippet_keeps_to_its_budget(execute):
    printed = execute(SNIPPETS["Fine-tune privately"])
    spent = re.search(
        r"PrivacySpent\(epsilon=([\d.]+), delta=0.0001, steps=15, .*zero-out", printed
    )
    assert 2.9 < float(spent[1]) <= 3.0


@pytest.mark.parametrize("devices", [1, 2])
def test_snippet_for_many_devices_runs_on_jax(devices, tmp_path):
    flags = f"--xla_force_host_platform_device_count={devices}"
    result = run(
        SNIPPETS["On a pod or a GPU cluster"], tmp_path, KERAS_BACKEND="jax", XLA_FLAGS=flags
    )
    assert result.returncode == 0, result.stderr[-2000:]


def test_the_run_that_survives(execute):
    """The second time there is nothing left to train."""
    for left in ("Epoch 2/2", "my_run/training.state: resuming after epoch 2"):
        printed = execute(SURVIVES)
        assert left in printed and printed.endswith("None\n")


def test_snippets_that_need_the_weights_name_what_is_missing(tmp_path):
    """Each line is the real one; none of the places has the gated weights here, and each says so in its own way."""
    imports, *lines = SNIPPETS["Load the 1B weights"].strip().splitlines()
    lines = [line for line in lines if line]
    assert len(lines) == 4
    code = f"{imports}\nfor line in {lines!r}:\n    try:\n        exec(line)\n    except Exception as e:\n        print(type(e).__name__, e)"
    result = run(
        code,
        tmp_path,
        KAGGLE_API_TOKEN="",
        HTTPS_PROXY="http://127.0.0.1:9",
        HTTP_PROXY="http://127.0.0.1:9",
    )
    assert result.returncode == 0, result.stderr[-2000:]
    bundled, hugging_face, kaggle, folder = re.split(
        r"^(?=FileNotFoundError |ValueError )", result.stdout, flags=re.M
    )[1:]
    assert "Three ways" in bundled and "hf auth login" in bundled
    assert "hf://google/vaultgemma-1b" in hugging_face
    assert "kaggle://keras/vaultgemma/keras/vault_gemma_1b_en/2" in kaggle
    assert folder.startswith("ValueError") and "'path/to/a/hugging_face_folder'" in folder


def test_snippet_loads_weights_from_the_users_folder(tmp_path):
    """The first line of the same snippet, with a small model where the weights would be."""
    place = tmp_path / "vaultgemma_1b"
    code = (
        "from keras_vaultgemma import VaultGemmaCausalLM\n"
        f"VaultGemmaCausalLM.from_preset('vaultgemma_tiny').save_to_preset({str(place)!r})\n"
        "model = VaultGemmaCausalLM.from_preset('vaultgemma_1b', dtype='bfloat16')\n"
        "print(model.backbone.count_params(), model.backbone.compute_dtype)\n"
    )
    result = run(code, tmp_path)
    assert result.stdout.strip() == "2754240 bfloat16", result.stderr[-2000:]
