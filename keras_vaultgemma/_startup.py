"""What precedes the import of Keras: the choice of its backend, and a guard against TensorFlow."""

import importlib.abc
import importlib.util
import inspect
import json
import os
import sys
from pathlib import Path

BACKENDS = ("jax", "torch", "tensorflow")
DEFAULT = "tensorflow"
"""Keras's backend where nothing is configured. Keras writes it to its keras.json by itself."""

HIDDEN = ("tensorflow", "tensorflow_text")


def choose_backend():
    """Set `KERAS_BACKEND` if nothing is configured and exactly one of JAX and PyTorch is installed.

    keras-hub requires TensorFlow, so that Keras's default is installed whichever backend the user
    has asked for. Where it is not, JAX is chosen, then PyTorch. Does nothing once Keras is
    imported.
    """
    if "keras" in sys.modules or configured_backend():
        return
    installed = installed_backends()
    others = [name for name in installed if name != DEFAULT]
    if len(others) == 1 or (others and DEFAULT not in installed):
        os.environ["KERAS_BACKEND"] = others[0]


def configured_backend():
    """Return the name of the backend that the user has chosen, or None.

    A keras.json that names TensorFlow does not count, because Keras writes it at its first import.
    """
    if named := os.environ.get("KERAS_BACKEND"):
        return named
    home = Path(os.environ.get("KERAS_HOME") or "~/.keras").expanduser()
    try:
        config = json.loads((home / "keras.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    named = config.get("backend") if isinstance(config, dict) else None
    return None if named == DEFAULT else named


def installed_backends():
    """Return the names of the backends that are installed."""
    return [name for name in BACKENDS if _is_installed(name)]


def _is_installed(name):
    try:
        return importlib.util.find_spec(name) is not None
    except ValueError:  # A module without a spec, such as a stand-in of a tool, is imported.
        return True


class TensorFlowGuard(importlib.abc.MetaPathFinder):
    """Finder of modules that hides TensorFlow from Keras and keras-hub on JAX and PyTorch.

    keras-hub imports TensorFlow if it can. Keras imports it to find out if it is installed,
    whenever it serializes a config or sets a seed. Both work without it, and the import costs
    seconds and hundreds of megabytes.

    Everyone else finds TensorFlow, and so does a feature of Keras that cannot work without it.
    Once it is imported, nothing is hidden.
    """

    def __init__(self):
        self._answered = []

    def find_spec(self, fullname, path=None, target=None):
        if fullname not in HIDDEN or "tensorflow" in sys.modules:
            return None
        if _backend() in ("jax", "torch"):
            frame = _importing_frame()
            package = frame.f_globals.get("__name__", "").partition(".")[0] if frame else ""
            question = _question(frame, fullname) if package == "keras" else None
            if question is not None:
                self._answered.append(question)
            if question is not None or package == "keras_hub":
                raise ModuleNotFoundError(
                    f"{fullname} is hidden from {package}, because the backend is {_backend()}. "
                    "Import it first to use it with Keras",
                    name=fullname,
                )
        # Keras remembers the answer, which is another one from now on.
        while self._answered:
            self._answered.pop()._available = None
        return None


def hide_tensorflow():
    """Install a `TensorFlowGuard`, once for the process."""
    if not any(isinstance(finder, TensorFlowGuard) for finder in sys.meta_path):
        sys.meta_path.insert(0, TensorFlowGuard())


def _backend():
    """Return the name of Keras's backend, or None while Keras is not imported completely."""
    config = getattr(sys.modules.get("keras"), "config", None)
    return config.backend() if hasattr(config, "backend") else None


def _importing_frame():
    """Return the frame of the import statement that is being executed, or None."""
    frame = inspect.currentframe()
    own = ("importlib", "_frozen_importlib", __name__)
    while frame is not None and frame.f_globals.get("__name__", "").startswith(own):
        frame = frame.f_back
    return frame


def _question(frame, name):
    """Return the object that asks if a module is installed, or None for another import of Keras.

    Keras's internal `LazyModule.available` asks, by `initialize`.
    """
    caller = frame.f_back
    if caller is None or caller.f_code.co_name != "available":
        return None
    lazy_module = caller.f_locals.get("self")
    return lazy_module if getattr(lazy_module, "name", None) == name else None
