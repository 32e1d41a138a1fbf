"""Which Keras backend runs, settled before Keras is imported, and keras-hub imported without TensorFlow."""

import contextlib
import importlib.util
import os
import sys
from pathlib import Path

BACKENDS = ("jax", "torch", "tensorflow")


def _choose_backend():
    """Settle Keras's backend before Keras is imported, or say why it cannot be.

    Keras's own choice stands (`KERAS_BACKEND`, then its `keras.json`, then TensorFlow); only where that would be
    TensorFlow by default and TensorFlow is not installed, the first backend that is installed is taken instead.
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
            "Keras needs a backend and none is installed. Install one with `pip install keras-vaultgemma[jax]`, "
            "`[torch]` or `[tensorflow]`."
        )
    os.environ["KERAS_BACKEND"] = installed[0]


@contextlib.contextmanager
def without_tensorflow():
    """Inside, on JAX and PyTorch, TensorFlow looks as if it were not installed; keras-hub copes with that.

    A TensorFlow that somebody has imported already stays visible: it costs nothing any more.
    """
    import keras

    hide = keras.config.backend() != "tensorflow" and "tensorflow" not in sys.modules
    names = ("tensorflow", "tensorflow_text") if hide else ()
    sys.modules.update(dict.fromkeys(names))  # None stands for a module that cannot be imported
    try:
        yield
    finally:
        for name in names:
            del sys.modules[name]


_choose_backend()

import keras  # noqa: E402

if keras.config.backend() not in BACKENDS:
    raise ValueError(
        f"keras_vaultgemma runs on the Keras backends {', '.join(BACKENDS)}. Received: {keras.config.backend()!r}"
    )
with without_tensorflow():
    import keras_hub  # noqa: F401

NAME = keras.config.backend()
