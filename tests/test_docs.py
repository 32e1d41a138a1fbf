"""Every snippet of README.md and of the guides runs in an empty folder; one that depends on how Keras is imported, in a new process."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.any_backend

TOP = Path(__file__).parents[1]
PAGES = [TOP / "README.md", *sorted((TOP / "docs").glob("*/*.md"))]
SNIPPETS = {
    f"{page.stem}-{i}": code
    for page in PAGES
    for i, code in enumerate(re.findall(r"^```python\n(.*?)^```", page.read_text(), re.M | re.S))
}
"""Code by page and number."""

IN_A_PROCESS = "README-1", "many-devices-0", "load-0"
PRINTS = {
    "README-0": "",
    "README-2": "Epoch 2/2",
    "adapters-0": "Once upon a time",
    "convert-0": "Once upon a time",
    "data-0": "",
    "evaluate-0": r"1\.0000 ± nan \(1 of 1\)\n.*bits per byte",
    "export-0": r"Saved artifact at 'model.onnx'\.\n\(1, \d+, 4096\)",
    "fine-tune-0": "Epoch 2/2",
    "generate-0": "Once upon a time",
    "people-0": "one user of at most 2 rows of at most 16 tokens",
    "remember-0": r"(?s)greedy exact match: 0 of 60, at most 4\.9 % .*reference: AUC 0\.500.*no claim",
    "report-0": "No claim: The model has no privacy ledger, so nothing is known",
    "resume-0": "Epoch 2/2",
    "start-0": r"PrivacySpent\(epsilon=(2\.9\d*|3\.0), delta=0.0001, steps=15, .*zero-out",
}
PACKAGES = {"export-0": "onnxruntime"}
"""Optional package of a snippet, which is skipped where it is not installed."""
NEED_A_SERVER = {"serve-0"}  # tests/serving has the same calls
REPEATED = {"README-3": "start-0", "README-4": "load-0"}


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
        exec(compile(code, "docs", "exec"), {"__name__": "__main__"})
        return capsys.readouterr().out

    return run_here


def test_every_snippet_is_tested():
    assert set(SNIPPETS) == {*IN_A_PROCESS, *PRINTS, *REPEATED, *NEED_A_SERVER}
    for name, other in REPEATED.items():
        differ = [
            a
            for a, b in zip(*(SNIPPETS[x].split("\n") for x in (name, other)), strict=True)
            if a != b
        ]
        # Other rows: who runs both would meet the end of a budget.
        assert all(line.startswith("records = ") for line in differ)


@pytest.mark.parametrize("name", PRINTS)
def test_snippet_runs(name, execute):
    if name in PACKAGES:
        pytest.importorskip(PACKAGES[name])
    assert re.search(PRINTS[name], execute(SNIPPETS[name]))


def test_the_backend_is_switched(tmp_path):
    result = run(SNIPPETS["README-1"], tmp_path)
    assert result.returncode == 0, result.stderr[-2000:]
    assert "There was once a" in result.stdout


@pytest.mark.parametrize("devices", [pytest.param(1, marks=pytest.mark.long), 2])
def test_snippet_for_many_devices_runs_on_jax(devices, tmp_path):
    flags = f"--xla_force_host_platform_device_count={devices}"
    result = run(SNIPPETS["many-devices-0"], tmp_path, KERAS_BACKEND="jax", XLA_FLAGS=flags)
    assert result.returncode == 0, result.stderr[-2000:]


def test_the_run_that_survives(execute):
    """The second time there is nothing left to train."""
    for left in ("Epoch 2/2", "my_run/training.state: resuming after epoch 2"):
        printed = execute(SNIPPETS["resume-0"])
        assert left in printed and printed.endswith("None\n")


def test_snippets_that_need_the_weights_name_what_is_missing(tmp_path):
    """Each line is the real one; none of the places has the gated weights here, and each says so in its own way."""
    imports, *lines = SNIPPETS["load-0"].strip().splitlines()
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


def test_snippet_loads_weights_from_the_users_folder(execute, tmp_path):
    """The first line of the same snippet, with a small model where the weights would be."""
    place = tmp_path / "vaultgemma_1b"
    code = (
        "from keras_vaultgemma import VaultGemmaCausalLM\n"
        f"VaultGemmaCausalLM.from_preset('vaultgemma_tiny').save_to_preset({str(place)!r})\n"
        "model = VaultGemmaCausalLM.from_preset('vaultgemma_1b', dtype='bfloat16')\n"
        "print(model.backbone.count_params(), model.backbone.compute_dtype)\n"
    )
    assert execute(code).strip() == "5638400 bfloat16"


def test_links_inside_the_repository():
    for page in [*TOP.glob("*.md"), *(TOP / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / target).exists(), (page.name, target)


def test_the_site_is_built(tmp_path):
    """Without a warning: each link, and each name in the reference, exists."""
    command = [sys.executable, "-m", "mkdocs", "build", "--site-dir", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=TOP, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
