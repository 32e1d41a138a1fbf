"""The examples run as they are, and stay short."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.any_backend

TOP = Path(__file__).parents[1]
EXAMPLES = sorted((TOP / "examples").glob("*.py"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_are_short_and_have_a_page(path):
    assert len(path.read_text().splitlines()) < 100
    assert (TOP / f"docs/examples/{path.stem}.md").exists()


@pytest.mark.long
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_run(path, tmp_path):
    python_path = os.pathsep.join([str(TOP), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "KERAS_VAULTGEMMA_HOME": str(tmp_path), "PYTHONPATH": python_path}
    result = subprocess.run(
        [sys.executable, str(path)], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr[-2000:]
