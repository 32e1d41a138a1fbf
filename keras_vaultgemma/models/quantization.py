"""Quantization of a model's matrices."""

import re
from collections.abc import Callable, Sequence
from typing import Any

import keras

from keras_vaultgemma.layers.low_rank import LowRankUpdate


class Quantization:
    """Mixin of a model whose matrices can be quantized. It precedes the Keras class."""

    def quantize(
        self,
        mode: str | None = None,
        config: keras.quantizers.QuantizationConfig | None = None,
        filters: str | Sequence[str] | Callable[[keras.layers.Layer], bool] | None = None,
        **kwargs: Any,
    ) -> None:
        """Quantize the embedding and the projections to int8 or int4.

        The result generates, scores and trains adapters (`lora`), and is saved and loaded as a
        model in floating point is. Norms stay in floating point. "int8" also rounds activations as
        they are used. "int4" takes an eighth of the memory of float32 and is slower, because
        matrices become floating point where they are used.

        Args:
            mode: string. "int8" or "int4", or None with a `config`.
            config: `keras.quantizers.Int8QuantizationConfig`, or `Int4QuantizationConfig`, whose
                `block_size` is the size of the groups that share a scale and a zero point. Defaults
                to None, for Keras's quantizers and, in int4, groups of 128.
            filters: as for `keras.Model.quantize`: regular expression, list of them, or function of
                a layer. Layers without a match stay as they are. Defaults to None, for all.
            **kwargs: other arguments of `keras.Model.quantize`.

        Raises:
            ValueError: If the mode is not int8 or int4, or int4 with quantized activations.

        Example:

        ```python
        from keras_vaultgemma import VaultGemmaCausalLM

        model = VaultGemmaCausalLM.from_preset("vaultgemma_tiny")
        model.quantize("int8")
        ```
        """
        found = getattr(config, "mode", None) if mode is None else mode
        if found not in ("int8", "int4"):
            reason = REASONS.get(str(found), "")
            raise ValueError(f"`mode` must be 'int8' or 'int4'{reason}. Received: mode={found!r}")
        quantizer = getattr(config, "activation_quantizer", None)
        if found == "int4" and quantizer is not None:
            raise ValueError(
                "`config` must have activation_quantizer=None for int4, because the loss and "
                f"adapters need the activations. Received: {quantizer!r}"
            )

        def is_quantized(layer):
            # Of other layers Keras warns that they cannot be quantized.
            return isinstance(layer, LowRankUpdate) and _matches(layer, filters)

        super().quantize(mode, config=config, filters=is_quantized, **kwargs)


REASONS = {
    "float8": ", because float8 saves no memory (Keras keeps the matrices in floating point) and "
    "supports neither the embedding nor adapters",
    "gptq": ", because Keras's GPTQ supports neither the embedding nor adapters",
    "awq": ", because Keras's AWQ supports neither the embedding nor adapters",
}
"""Why modes of Keras are not supported."""


def _matches(layer, filters):
    if callable(filters):
        return filters(layer)
    patterns = [filters] if isinstance(filters, str) else filters
    return patterns is None or any(re.search(pattern, layer.name) for pattern in patterns)
