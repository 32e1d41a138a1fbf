"""The examples in the docstrings of public classes, functions and methods run as they stand."""

import re

import pytest
from public import docstring, public_methods, public_objects

OBJECTS = public_objects()
DOCUMENTED = {**OBJECTS, **public_methods()}


def examples(value):
    """Return the Python blocks of an object's docstring."""
    return re.findall(r"^```python\n(.*?)^```", docstring(value), re.M | re.S)


@pytest.mark.any_backend
@pytest.mark.parametrize("name", OBJECTS)
def test_there_is_an_example(name):
    assert examples(OBJECTS[name])


@pytest.mark.first_backend
@pytest.mark.parametrize("name", [name for name, x in DOCUMENTED.items() if examples(x)])
def test_examples_run(name, tmp_path, monkeypatch):
    """All blocks of a docstring share one namespace, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KERAS_VAULTGEMMA_HOME", str(tmp_path))
    namespace = {"__name__": "__main__"}
    for i, example in enumerate(examples(DOCUMENTED[name]), 1):
        try:
            exec(compile(example, f"<example {i} of {name}>", "exec"), namespace)
        except ImportError as error:
            if "pip install 'keras-vaultgemma[eval]'" not in str(error):
                raise
            pytest.skip("lm-evaluation-harness is not installed")
