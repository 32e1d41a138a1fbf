"""The benchmark of generation runs, on a model of its smallest size, and reports what it measured."""

import math
import os
import re
import subprocess
import sys
from pathlib import Path

import keras
import pytest

pytestmark = pytest.mark.any_backend

BENCHMARK = Path(__file__).parents[1] / "tools" / "benchmark"


@pytest.mark.long
def test_it_measures_and_prints_tables():
    backend = keras.config.backend()
    command = [
        sys.executable,
        BENCHMARK / "generate.py",
        "--size",
        "tiny",
        "--backends",
        backend,
        "--rows",
        "2",
    ]
    command += ["--dtypes", "float32", "--only", "generate", "batch", "memory"]
    environment = {**os.environ, "PYTHONPATH": str(BENCHMARK.parents[1])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = dict(
        line.split(": ", 1)
        for line in done.stdout.splitlines()
        if line.endswith(tuple("0123456789"))
    )
    assert set(lines) == {f"{step} {backend} float32" for step in ("generate", "batch", "memory")}
    for line in lines.values():
        figures = [float(figure.split()[1]) for figure in line.split(", ")]
        assert figures and all(map(math.isfinite, figures))
    assert re.search(
        rf"^\| keras_vaultgemma, {backend}, float32 \| \d+\.\d\d \|", done.stdout, re.MULTILINE
    )
    assert re.search(
        rf"^\| {backend}, float32 \| \d+\.\d \(2\) \| \d+\.\d\d \|", done.stdout, re.MULTILINE
    )


def test_the_loss_of_int8_is_reported(monkeypatch, capsys):
    monkeypatch.syspath_prepend(BENCHMARK)
    import generate_report

    generate_report.print_tables({("int8_loss", "jax", ""): {"float32": 1.51234, "int8": 1.52}})
    assert capsys.readouterr().out == (
        "\nBits per byte of the bundled model on held-out text, jax: 1.5123, int8 1.5200\n"
    )
