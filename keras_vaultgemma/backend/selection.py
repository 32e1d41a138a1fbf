"""Selection of the Keras backend, before Keras is imported."""

import contextlib
import importlib.util
import os
import sys
from pathlib import Path

BACKENDS = ("jax", "torch", "tensorflow")


def _select_backend():
    """Select an installed backend where Keras would default to a TensorFlow that is not installed.

    Keras's own choice has priority: `KERAS_BACKEND`, then its `keras.json`, then TensorFlow.

    Raises:
        ValueError: If `KERAS_BACKEND` is no backend of this package.
        ImportError: If no backend is installed.
    """
    if "keras" in sys.modules:
        return
    named = os.environ.get("KERAS_BACKEND")
    if named and named not in BACKENDS:
        raise ValueError(
            f"KERAS_BACKEND must be one of {', '.join(BACKENDS)}. Received: KERAS_BACKEND={named!r}"
        )
    home = Path(os.environ.get("KERAS_HOME") or "~/.keras").expanduser()
    if named or (home / "keras.json").exists() or importlib.util.find_spec("tensorflow"):
        return
    installed = [name for name in BACKENDS if importlib.util.find_spec(name)]
    if not installed:
        raise ImportError(
            "Keras needs a backend and none is installed. Install one with "
            "`pip install keras-vaultgemma[jax]`, `[torch]` or `[tensorflow]`."
        )
    os.environ["KERAS_BACKEND"] = installed[0]


@contextlib.contextmanager
def without_tensorflow():
    """Hide TensorFlow from imports in the `with` block, on JAX and PyTorch.

    keras-hub works without it. A TensorFlow that is already imported stays visible, because it
    costs nothing more.
    """
    import keras

    hide = keras.config.backend() != "tensorflow" and "tensorflow" not in sys.modules
    names = ("tensorflow", "tensorflow_text") if hide else ()
    sys.modules.update(dict.fromkeys(names))  # None makes an import fail
    try:
        yield
    finally:
        for name in names:
            del sys.modules[name]


_select_backend()

import keras  # noqa: E402

if keras.config.backend() not in BACKENDS:
    raise ValueError(
        f"keras_vaultgemma runs on the Keras backends {', '.join(BACKENDS)}. Received: "
        f"{keras.config.backend()!r}"
    )
with without_tensorflow():
    import keras_hub  # noqa: F401

NAME = keras.config.backend()
