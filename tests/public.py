"""The public classes, functions and methods of the package."""

import inspect

import keras_vaultgemma

MODULES = ("evaluation", "lora", "privacy")


def public_names():
    """Return all public names, such as `VaultGemmaCausalLM` and `lora.add`."""
    names = [name for name in keras_vaultgemma.__all__ if name != "__version__"]
    for module in MODULES:
        names += [f"{module}.{name}" for name in getattr(keras_vaultgemma, module).__all__]
    return names


def public_objects():
    """Return `{name: object}` of the public classes and functions."""
    objects = {}
    for name in public_names():
        value = keras_vaultgemma
        for part in name.split("."):
            value = getattr(value, part)
        if inspect.isclass(value) or inspect.isfunction(value):
            objects[name] = value
    return objects


def public_methods():
    """Return `{name: function}` of the public methods that this package documents with an example."""
    methods = {}
    for class_name, cls in public_objects().items():
        for base in getattr(cls, "__mro__", ())[::-1]:
            if not base.__module__.startswith("keras_vaultgemma"):
                continue
            for name, value in vars(base).items():
                function = value.fget if isinstance(value, property) else value
                function = inspect.unwrap(getattr(function, "__func__", function))
                if inspect.isfunction(function) and not name.startswith("_"):
                    methods[f"{class_name}.{name}"] = function
    return {name: method for name, method in methods.items() if "Example:" in docstring(method)}


def constructors():
    """Return `{name: function}` of the constructors that this package defines for public classes."""
    found = {}
    for name, cls in public_objects().items():
        if inspect.isclass(cls) and inspect.isfunction(vars(cls).get("__init__")):
            found[f"{name}.__init__"] = inspect.unwrap(vars(cls)["__init__"])
    return found


def docstring(value):
    """Return an object's own docstring without indentation, never that of a base class."""
    return inspect.cleandoc(value.__doc__ or "")
