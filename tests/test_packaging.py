"""What is installed: a wheel that carries the presets and nothing that does not belong to it."""

import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--wheel-dir",
        str(folder),
        str(ROOT),
    ]
    subprocess.run(command, check=True)
    (path,) = folder.iterdir()
    return path


def test_wheel_carries_the_presets(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    for preset in (ROOT / "presets").iterdir():
        for path in preset.rglob("*"):
            if path.is_file():
                assert (
                    f"keras_vaultgemma/bundled_presets/{path.relative_to(ROOT / 'presets')}"
                    in names
                )
    assert not [name for name in names if name.split("/")[0] in ("tests", "tools")]
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert wheel.stat().st_size < 13e6


def test_tiny_preset_loads_from_an_installed_wheel(wheel, tmp_path):
    """In an empty environment with nothing but the wheel; its dependencies are borrowed from this one by path, which
    saves a gigabyte of installing. The checkout is not on the path."""
    venv.create(tmp_path / "venv", with_pip=False)
    python = tmp_path / "venv" / "bin" / "python"
    command = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        str(python),
        "install",
        "--quiet",
        "--no-deps",
        str(wheel),
    ]
    subprocess.run(command, check=True)
    borrowed = next(
        path for path in map(Path, sys.path) if (path / "keras" / "__init__.py").exists()
    )
    code = (
        "import keras_vaultgemma\n"
        "model = keras_vaultgemma.VaultGemmaCausalLM.from_preset('vaultgemma_tiny')\n"
        "print(keras_vaultgemma.__file__)\n"
        "print(model.generate('Once upon a time', max_new_tokens=4))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(borrowed)}
    # The editable install of this environment is a .pth file, which a folder on PYTHONPATH does not run.
    result = subprocess.run(
        [python, "-c", code],
        capture_output=True,
        text=True,
        env=environment,
        cwd=tmp_path,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    place, text = result.stdout.splitlines()[:2]
    assert Path(place).is_relative_to(tmp_path / "venv")
    assert text.startswith("Once upon a time")
