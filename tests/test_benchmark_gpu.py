"""The benchmark for a GPU: its processes, its report and, in the long test, a run on the CPU."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

pytestmark = pytest.mark.any_backend

BENCHMARK = Path(__file__).parents[1] / "tools" / "benchmark"
PROBED = {"device": "Some GPU", "versions": {"torch": "2.0", "keras": "3"}, "missing": None}
NO_GPU = {"device": None, "versions": {}, "missing": "jax sees no GPU: it needs a build."}
DECODED = dict(first_call_s=1.0, first_token_s=0.01, tokens_per_s=250.0, peak_gb=2.5)
RESULTS = {
    ("correctness", "torch"): {
        "logits": {"error": 1e-7, "allowed": 1e-5},
        "noise": {"error": 0.5, "allowed": 1e-5},
        "loss": {"failed": "ValueError: no"},
    },
    ("bandwidth", "torch"): {"gb_per_s": 4000.0},
    ("decode", "torch"): {"1": DECODED, "32": DECODED},
    ("decode_transformers", "torch"): {
        "failed": "ModuleNotFoundError: No module named 'transformers'"
    },
    ("plain", "torch"): {"step_s": 0.2, "peak_gb": 9.0},
    ("private", "torch"): {"step_s": 0.3, "peak_gb": 8.0},
    ("opacus", "torch"): {"failed": "took more than 90 s"},
}


@pytest.fixture(autouse=True)
def sigterm():
    """The tool ends its process by a handler of its own, which this process keeps from it."""
    handler = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, handler)


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARK)
    import gpu

    return gpu


@pytest.fixture
def replace(gpu, monkeypatch, tmp_path):
    """A function that replaces what a section's process runs. Its argument is `section`."""

    def to(code):
        script = tmp_path / "sections.py"
        script.write_text(
            f"import json, os, subprocess, sys, time\nsection = sys.argv[1]\n{code}\n"
        )
        monkeypatch.setattr(gpu, "SCRIPT", script)

    return to


def found(results):
    """A script that prints results, and of the probe what it would find."""
    by_section = {section: result for (section, _), result in results.items()}
    return (
        f"probes = {dict(torch=PROBED, jax=NO_GPU, tensorflow=NO_GPU)}\n"
        f"results = {by_section}\n"
        'backend = os.environ["KERAS_BACKEND"]\n'
        'print(json.dumps(probes[backend] if section == "probe" else results[section]))'
    )


def main(gpu, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["gpu.py", *map(str, arguments)])
    return gpu.main()


def runs(process):
    """Whether a process, given by its number, has not ended."""
    try:
        return Path(f"/proc/{process}/stat").read_text().split()[2] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def rows_of(page):
    return [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("| ")]


def test_tables_and_figure(gpu, tmp_path):
    about = {
        "devices": {"torch": PROBED, "jax": NO_GPU},
        "tiny": False,
        "commit": "abc",
        "date": "today",
    }
    gpu.gpu_report.write(tmp_path, about, RESULTS)
    page = (tmp_path / "report.md").read_text()
    assert page.startswith(
        "# Some GPU\n\nVaultGemma 1B's size, random weights. today, commit abc, torch 2.0"
    )
    assert NO_GPU["missing"] in page
    rows = {cells[0]: cells[1:] for cells in rows_of(page)}
    assert rows["logits"] == ["1e-05", "1e-07"]
    assert rows["noise"] == ["1e-05", "**0.5: too far**"]
    assert rows["loss"][-1] == "failed: ValueError: no"
    assert rows["keras_vaultgemma, PyTorch"] == ["0.200", "9.00", "0.300", "8.00", "1.50"]
    assert "| keras_vaultgemma, PyTorch | 250.0 | 10.0 | 1.0 | 2.50 |" in page
    assert "| transformers, PyTorch | failed: ModuleNotFoundError" in page
    assert "| transformers, PEFT and Opacus |  |  | failed: took more than 90 s |" in page
    for table in page.split("\n\n"):
        if table.startswith("|"):
            assert len({line.count("|") for line in table.splitlines()}) == 1
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")


def test_what_fails_has_a_reason(gpu, replace, tmp_path):
    def reason(code, seconds=30):
        replace(code)
        return gpu.run("decode", "torch", False, seconds, tmp_path / "log")["failed"]

    assert reason("raise ValueError('too small')") == "ValueError: too small"
    assert reason("sys.exit(3)") == "exit status 3"
    assert reason("os.kill(os.getpid(), 9)") == "ended by SIGKILL"
    assert reason("pass") == "printed nothing"
    assert reason("", seconds=1) == "no time was left"


def test_a_section_that_takes_too_long_ends_with_its_children(gpu, replace, tmp_path):
    child = tmp_path / "child"
    replace(
        "process = subprocess.Popen(['sleep', '100'])\n"
        f"open({str(child)!r}, 'w').write(str(process.pid))\n"
        "time.sleep(100)"
    )
    started = time.monotonic()
    assert gpu.run("decode", "torch", False, 5, tmp_path / "log") == {
        "failed": "took more than 5 s"
    }
    assert time.monotonic() - started < 60
    # The signal has been sent, and a busy machine may take a while to end the child by it.
    deadline = time.monotonic() + 30
    while runs(child.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not runs(child.read_text())


def test_a_second_run_measures_what_failed(gpu, replace, monkeypatch, tmp_path, capsys):
    folder = tmp_path / "results"
    replace(found(RESULTS))
    failed = main(gpu, monkeypatch, folder, "--only", "decode", "lora", "--seconds", "4800")
    # No result of "peft" is in the script.
    assert failed == "Failed: decode_transformers torch, peft torch"
    assert "KeyError" in json.loads((folder / "peft_torch.json").read_text())["result"]["failed"]
    assert NO_GPU["missing"] in capsys.readouterr().out
    known = {**RESULTS, ("plain", "torch"): {"step_s": 7.0, "peak_gb": 9.0}}
    known["peft", "torch"] = known["decode_transformers", "torch"] = {"1": DECODED, "32": DECODED}
    known["peft", "torch"] = {"step_s": 5.0, "peak_gb": 9.0}
    replace(found(known))
    assert main(gpu, monkeypatch, folder, "--only", "decode", "lora", "--seconds", "4800") is None
    page = (folder / "report.md").read_text()
    assert "| 5.000 |" in page and "| 0.200 |" in page and "7.000" not in page


def test_without_a_gpu_it_says_what_is_missing(gpu, replace, monkeypatch, tmp_path, capsys):
    replace(f"print(json.dumps({NO_GPU}))")
    assert "no backend sees a GPU" in main(gpu, monkeypatch, tmp_path / "out", "--seconds", "4800")
    assert capsys.readouterr().out == f"{NO_GPU['missing']}\n" * 3


def test_a_run_that_is_ended_leaves_its_tables(gpu, tmp_path):
    script = tmp_path / "sections.py"
    script.write_text(
        "import json, os, sys, time\nsection = sys.argv[1]\n"
        f"{found(RESULTS)} if section != 'decode' else time.sleep(1000)"
    )
    code = f"import pathlib, gpu; gpu.SCRIPT = pathlib.Path({str(script)!r}); gpu.main()"
    folder = tmp_path / "results"
    arguments = [
        folder,
        "--backends",
        "torch",
        "--only",
        "correctness",
        "decode",
        "--seconds",
        "4800",
    ]
    process = subprocess.Popen([sys.executable, "-c", code, *arguments], cwd=BENCHMARK)
    deadline = time.monotonic() + 120
    while not (folder / "bandwidth_torch.json").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(0.5)
    process.terminate()
    assert process.wait(timeout=60)
    assert "**0.5: too far**" in (folder / "report.md").read_text()


def test_errors_of_a_device_are_seen(gpu):
    import gpu_correctness

    x = [np.ones(4), np.arange(4.0)]
    assert gpu_correctness.relative_error(x, x) == 0
    assert 0.1 < gpu_correctness.relative_error([x[0], x[1] + 0.2], x) < 0.2
    assert gpu_correctness.relative_error([x[0] * np.nan, x[1]], x) == np.inf
    ids = np.arange(6).reshape(3, 2)
    assert gpu_correctness.different_rows([ids + np.array([[0], [1], [0]])], [ids]) == 1
    z = np.random.default_rng(0).normal(size=200_000)
    assert gpu_correctness.distance_from_normal([z], None) < 5
    assert gpu_correctness.distance_from_normal([1.02 * z], None) > 5
    assert gpu_correctness.distance_from_normal([z + np.inf], None) == np.inf


@pytest.mark.long
def test_a_run_on_the_cpu(tmp_path):
    """Every section at tiny sizes, and no check fails where both devices are the CPU."""
    command = [BENCHMARK / "gpu.sh", tmp_path, "--tiny", "--backends", "torch", "--seconds", "4800"]
    environment = {**os.environ, "PYTHON": sys.executable}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    page = (tmp_path / "report.md").read_text()
    assert "failed" not in page and "too far" not in page
    assert "sees no GPU" in page or "cuda" in page.lower()
    labels = [cells[0] for cells in rows_of(page)]
    for label in (
        "keras_vaultgemma, PyTorch",
        "transformers, PyTorch",
        "transformers, PEFT and Opacus",
    ):
        assert label in labels
    assert (tmp_path / "report.png").stat().st_size > 10_000
