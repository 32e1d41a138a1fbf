"""The public surface: reachable from `import keras_vaultgemma` alone, typed, and quick to import."""

import ast
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest
from public import constructors, public_methods, public_names, public_objects

import keras_vaultgemma
from keras_vaultgemma.commands import COMMANDS

TOP = Path(__file__).parents[1]
PAGES = [TOP / "README.md", *(TOP / "docs").rglob("*.md")]
HEAVY = ("jax", "keras", "keras_hub", "numpy", "tensorflow", "torch")

pytestmark = pytest.mark.any_backend


def run(code, *arguments):
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    "start",
    [
        "import keras_vaultgemma; dir(keras_vaultgemma)",
        "from keras_vaultgemma.cli import main; main(['--version'])",
        *(
            f"from keras_vaultgemma.cli import main; main([*{command!r}.split(), '--help'])"
            for command in ("", *COMMANDS)
        ),
    ],
)
def test_importing_and_asking_for_help_import_no_backend(start):
    """The limit of processor time is ten times what this takes; importing Keras alone takes more."""
    result = run(
        f"import atexit, sys, time\n"
        f"def report():\n"
        f"    loaded = [name for name in {HEAVY!r} if name in sys.modules]\n"
        f"    print(f'\\nloaded: {{loaded}}, seconds: {{time.process_time()}}')\n"
        f"atexit.register(report)\n"
        f"{start}\n"
    )
    assert result.returncode == 0, result.stderr
    loaded, seconds = re.search(r"loaded: (.*), seconds: (.*)", result.stdout).groups()
    assert loaded == "[]"
    assert float(seconds) < 0.5


def test_every_name_is_reachable_from_the_package_alone():
    result = run(
        "import sys\n"
        "import keras_vaultgemma\n"
        "for path in sys.argv[1:]:\n"
        "    value = keras_vaultgemma\n"
        "    for name in path.split('.'):\n"
        "        value = getattr(value, name)\n"
        "    print(path, type(value).__name__)\n",
        *public_names(),
    )
    assert result.returncode == 0, result.stderr
    assert [line.split()[0] for line in result.stdout.splitlines()] == list(public_names())


def test_all_names_are_listed():
    assert set(keras_vaultgemma.__all__) <= set(dir(keras_vaultgemma))
    for name in ("lora", "privacy", "evaluation"):
        module = getattr(keras_vaultgemma, name)
        assert module.__all__ == sorted(module.__all__)
        assert set(module.__all__) <= set(dir(module))


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'keras_vaultgemma' has no attribute 'gemma'"):
        keras_vaultgemma.gemma  # noqa: B018


def test_readme_and_guides_use_public_names_only():
    texts = [page.read_text(encoding="utf-8") for page in PAGES]
    snippets = re.findall(r"^```python\n(.*?)^```", "\n".join(texts), re.M | re.S)
    assert snippets
    for snippet in snippets:
        for node in ast.walk(ast.parse(snippet)):
            if isinstance(node, ast.Import):
                paths = [alias.name for alias in node.names]
                assert not [path for path in paths if path.startswith("keras_vaultgemma.")]
            elif isinstance(node, ast.ImportFrom) and node.module.startswith("keras_vaultgemma"):
                assert node.module == "keras_vaultgemma"
                assert {alias.name for alias in node.names} <= set(keras_vaultgemma.__all__)
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                path = f"{node.value.id}.{node.attr}"
                if node.value.id in ("lora", "privacy", "evaluation"):
                    assert path in public_names()


SIGNATURES = {
    **{name: x for name, x in public_objects().items() if inspect.isfunction(x)},
    **constructors(),
    **public_methods(),
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_public_signatures_have_type_hints(name):
    hints = SIGNATURES[name].__annotations__
    missing = [
        parameter.name
        for parameter in inspect.signature(SIGNATURES[name]).parameters.values()
        if parameter.name not in ("self", "cls", *hints)
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    ]
    if "return" not in hints:
        missing.append("return")
    assert not missing
