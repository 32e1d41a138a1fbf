"""The distributions: complete, without what does not belong in them, and usable from an empty environment."""

import os
import re
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCUMENTS = ("CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "README.md", "SECURITY.md")

pytestmark = pytest.mark.any_backend


@pytest.fixture(scope="module")
def distributions(tmp_path_factory):
    """The source distribution, and the wheel that is built from it."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--outdir", str(folder), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True)
    return next(folder.glob("*.tar.gz")), next(folder.glob("*.whl"))


def test_the_source_distribution_has_all_a_developer_needs(distributions):
    with tarfile.open(distributions[0]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    expected = (
        "LICENSE",
        "Makefile",
        "constraints.txt",
        "docs/index.md",
        "mkdocs.yml",
        "pyproject.toml",
        "tests/conftest.py",
    )
    assert {*expected, *DOCUMENTS} <= names


def test_the_wheel_carries_the_presets_and_types(distributions):
    names = zipfile.ZipFile(distributions[1]).namelist()
    for path in (ROOT / "presets").rglob("*"):
        if path.is_file():
            preset = path.relative_to(ROOT / "presets")
            assert f"keras_vaultgemma/bundled_presets/{preset}" in names
    for path in ("templates/report.html", "templates/report.css"):
        assert f"keras_vaultgemma/evaluation/{path}" in names
    for name in ("comparison", "memorization", "tasks"):
        assert f"keras_vaultgemma/evaluation/schemas/{name}.json" in names
    assert {"keras_vaultgemma/py.typed", "keras_vaultgemma/serving/page.html"} <= {*names}
    assert not [name for name in names if name.split("/")[0] in ("tests", "tools")]
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert distributions[1].stat().st_size < 13e6


def test_tiny_preset_loads_from_an_installed_wheel(distributions, tmp_path):
    """The environment has nothing but the wheel. Its dependencies are those of this environment, by path, which saves a
    gigabyte of installing; the checkout is not on the path."""
    venv.create(tmp_path / "venv", with_pip=False)
    python = str(tmp_path / "venv" / "bin" / "python")
    pip = [sys.executable, "-m", "pip", "--python", python]
    install = [*pip, "install", "--quiet", "--no-deps", str(distributions[1])]
    subprocess.run(install, check=True)
    dependencies = next(
        path for path in map(Path, sys.path) if (path / "keras" / "__init__.py").exists()
    )
    code = (
        "import keras_vaultgemma\n"
        "model = keras_vaultgemma.VaultGemmaCausalLM.from_preset('vaultgemma_tiny')\n"
        "print(keras_vaultgemma.__file__)\n"
        "print(model.generate('Once upon a time', max_new_tokens=4))\n"
    )
    # The editable install of this environment is a .pth file, which a folder on PYTHONPATH does not run.
    result = subprocess.run(
        [python, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(dependencies)},
        cwd=tmp_path,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    file, text = result.stdout.splitlines()[:2]
    assert Path(file).is_relative_to(tmp_path / "venv")
    assert text.startswith("Once upon a time")


def test_tools_have_one_version_everywhere():
    """pre-commit and the workflow repeat versions that constraints.txt and pyproject.toml decide."""
    constraints = (ROOT / "constraints.txt").read_text()
    versions = dict(re.findall(r"^([\w-]+)==(\S+)$", constraints, re.M))
    hooks = (ROOT / ".pre-commit-config.yaml").read_text()
    assert f"rev: v{versions['ruff']}" in hooks
    assert f"import-linter=={versions['import-linter']}" in hooks

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lowest = dict(requirement.split(">=") for requirement in project["dependencies"])
    workflow = (ROOT / ".github" / "workflows" / "tests.yml").read_text()
    for name in ("keras", "keras-hub"):
        oldest = re.search(rf"versions: .*\b{name}==([\d.]+)", workflow)[1]
        assert oldest.startswith(f"{lowest[name]}.")
    low, high = re.fullmatch(r">=3\.(\d+),<3\.(\d+)", project["requires-python"]).groups()
    assert f'python: ["3.{low}", "3.{int(high) - 1}"]' in workflow


def test_versions_agree():
    from keras_vaultgemma import __version__

    citation = (ROOT / "CITATION.cff").read_text()
    assert f"\nversion: {__version__}\n" in citation
    assert f"\n## [{__version__}]" in (ROOT / "CHANGELOG.md").read_text()
