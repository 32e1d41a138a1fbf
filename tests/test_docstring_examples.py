"""The examples in the docstrings of public classes, functions and methods run as they stand."""

import re

import pytest
from public import docstring, public_methods, public_objects

OBJECTS = public_objects()
DOCUMENTED = {**OBJECTS, **public_methods()}
# Public classes and functions whose docstring has no example yet, or one that does not run.
LACKING = {
    "GenerationOutput",
}


def examples(value):
    """Return the Python blocks of an object's docstring."""
    return re.findall(r"^```python\n(.*?)^```", docstring(value), re.M | re.S)


def parameters(names):
    lacks = pytest.mark.xfail(reason="in the list LACKING", strict=False)
    return [pytest.param(name, marks=[lacks] if name in LACKING else []) for name in names]


@pytest.mark.any_backend
@pytest.mark.parametrize("name", parameters(OBJECTS))
def test_there_is_an_example(name):
    assert examples(OBJECTS[name])


@pytest.mark.first_backend
@pytest.mark.parametrize("name", parameters(name for name, x in DOCUMENTED.items() if examples(x)))
def test_examples_run(name, tmp_path, monkeypatch):
    """All blocks of a docstring share one namespace, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KERAS_VAULTGEMMA_HOME", str(tmp_path))
    namespace = {"__name__": "__main__"}
    for i, example in enumerate(examples(DOCUMENTED[name]), 1):
        try:
            exec(compile(example, f"<example {i} of {name}>", "exec"), namespace)
        except ImportError as error:
            if "pip install keras-vaultgemma[eval]" not in str(error):
                raise
            pytest.skip("lm-evaluation-harness is not installed")


@pytest.mark.any_backend
def test_list_of_lacking_examples_is_current():
    assert not LACKING - set(OBJECTS)
