"""Selection of the Keras backend, before Keras is imported."""

import os
import sys

from keras_vaultgemma._startup import (
    BACKENDS,
    choose_backend,
    configured_backend,
    hide_tensorflow,
    installed_backends,
)


def _select_backend():
    """Select the backend by the rule of `choose_backend`.

    Raises:
        ValueError: If `KERAS_BACKEND` is no backend of this package.
        ImportError: If no backend is installed, or not the chosen one.
    """
    if "keras" in sys.modules:
        return
    named = os.environ.get("KERAS_BACKEND")
    if named and named not in BACKENDS:
        raise ValueError(
            f"KERAS_BACKEND must be one of {', '.join(BACKENDS)}. Received: KERAS_BACKEND={named!r}"
        )
    installed, chosen = installed_backends(), configured_backend()
    if not installed and not chosen:
        raise ImportError(
            "Keras needs a backend and none is installed. Install one with "
            "`pip install 'keras-vaultgemma[jax]'`, `[torch]` or `[tensorflow]`."
        )
    if chosen in BACKENDS and chosen not in installed:
        raise ImportError(
            f"The Keras backend is {chosen!r}, by KERAS_BACKEND or keras.json, and it is not "
            f"installed. Install it with `pip install 'keras-vaultgemma[{chosen}]'`"
            + (f", or choose {' or '.join(installed)}." if installed else ".")
        )
    choose_backend()


_select_backend()
hide_tensorflow()

import keras  # noqa: E402

if keras.config.backend() not in BACKENDS:
    raise ValueError(
        f"keras_vaultgemma runs on the Keras backends {', '.join(BACKENDS)}. Received: "
        f"{keras.config.backend()!r}"
    )

import keras_hub  # noqa: E402, F401

NAME = keras.config.backend()
