"""The examples run as they are, and stay short."""

import os
import subprocess
import sys
from pathlib import Path

import jupytext
import pytest

pytestmark = pytest.mark.any_backend

TOP = Path(__file__).parents[1]
EXAMPLES = sorted((TOP / "examples").glob("*.py"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_are_short_and_have_a_page(path):
    lines = path.read_text().splitlines()
    assert sum(bool(line) and not line.startswith("#") for line in lines) < 100
    page = f"examples/{path.stem}.md"
    assert (TOP / "docs" / page).exists() and page in (TOP / "mkdocs.yml").read_text()


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_are_notebooks(path):
    """Text and code in turns, of which `make notebooks` makes cells."""
    cells = jupytext.read(path, fmt="py:percent").cells
    assert [cell.cell_type for cell in cells[:2]] == ["markdown", "code"]
    assert cells[0].source.startswith("# ") and "It takes about" in cells[0].source
    for cell in cells:
        assert cell.source.strip()
        if cell.cell_type == "code":
            compile(cell.source, path.name, "exec")


@pytest.mark.long
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_run(path, tmp_path):
    python_path = os.pathsep.join([str(TOP), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "KERAS_VAULTGEMMA_HOME": str(tmp_path), "PYTHONPATH": python_path}
    result = subprocess.run(
        [sys.executable, str(path)], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr[-2000:]
