"""Export of a model to formats that run without this package."""

import functools
import os
from pathlib import Path
from typing import Any

import keras

from keras_vaultgemma import backend
from keras_vaultgemma._files import new_folder
from keras_vaultgemma._validation import check_choice, check_known
from keras_vaultgemma.checkpoints.model_card import training_sentences
from keras_vaultgemma.checkpoints.onnx_graph import INPUTS
from keras_vaultgemma.generation.greedy_graph import greedy_ids
from keras_vaultgemma.lora.state import backbone_of
from keras_vaultgemma.models.onnx_export import export_onnx, export_openvino

SAVED_MODEL, ONNX, OPENVINO = "tf_saved_model", "onnx", "openvino"
SUFFIXES = {ONNX: ".onnx", OPENVINO: ".xml"}
PRIVACY_FIELD = "keras_vaultgemma.privacy"


class Export:
    """Mixin of a model that can be exported. It precedes the Keras class."""

    def export(
        self,
        filepath: str | os.PathLike,
        format: str = SAVED_MODEL,
        verbose: bool | None = None,
        input_signature: Any = None,
        *,
        generate: bool = False,
        **kwargs: Any,
    ) -> None:
        """Export the forward pass, for any batch and length.

        The artifact maps `token_ids` and `padding_mask`, int32 of shape `[B, T]`, to float32 logits
        (of a backbone, hidden states). "onnx" writes `filepath` and, next to it, the weights in a
        file of this name and ".data"; "openvino" writes `filepath` and a .bin file. These two are
        the same on every backend and compute in float32, whatever the dtype of the weights; int8
        matrices stay int8. An adapter is merged into them. Files appear complete or not at all.

        Args:
            filepath: string or path. Folder of "tf_saved_model", file of "onnx" (.onnx) or of
                "openvino" (.xml).
            format: string. "tf_saved_model" (on TensorFlow and JAX), "onnx" or "openvino". Defaults
                to "tf_saved_model".
            verbose: bool. If False, print nothing. Defaults to None, which prints a line.
            input_signature: list of a dict of `keras.InputSpec`, to fix the batch or the length of
                "tf_saved_model". Defaults to None, for any.
            generate: bool. If True, add an endpoint `generate` to "tf_saved_model" on TensorFlow,
                from strings and a number of new tokens to strings, which are continued greedily.
                Loading it needs `import tensorflow_text`. Defaults to False.
            **kwargs: `is_static` and `jax2tf_kwargs` of Keras's `export`, for "tf_saved_model" on
                JAX.

        Raises:
            ImportError: If a package that the format needs is not installed.
            TypeError: If an argument is unknown.
            ValueError: If the backend does not have the format, an argument has no effect on it, or
                a matrix is quantized to int4 (for "onnx" and "openvino").

        Example:

        ```python
        from keras_vaultgemma import VaultGemmaCausalLM

        model = VaultGemmaCausalLM.from_preset("vaultgemma_tiny")
        model.export("model.onnx", format="onnx")
        ```
        """
        path, has_saved_model = Path(filepath).expanduser(), bool(backend.SAVED_MODEL_KINDS)
        check_known("export", kwargs, ("is_static", "jax2tf_kwargs"))
        check_choice("format", format, (SAVED_MODEL, *SUFFIXES) if has_saved_model else SUFFIXES)
        if format == SAVED_MODEL:
            self._export_saved_model(path, input_signature, generate, kwargs)
        else:
            _check_unused(format, input_signature=input_signature, generate=generate, **kwargs)
            if path.suffix != SUFFIXES[format]:
                raise ValueError(
                    f"`filepath` must end with {SUFFIXES[format]!r} for format={format!r}. "
                    f"Received: filepath={str(filepath)!r}"
                )
            backbone = backbone_of(self)
            sentences = "\n".join(training_sentences(backbone.privacy.ledger))
            write = export_onnx if format == ONNX else export_openvino
            write(path, backbone, backbone is not self, {PRIVACY_FIELD: sentences})
        if verbose is not False:
            print(f"Saved artifact at '{filepath}'.")

    def _export_saved_model(self, path, signature, generate, options):
        text_function = None
        if generate:
            if "text" not in backend.SAVED_MODEL_KINDS:
                raise ValueError(
                    "`generate` must be False except on TensorFlow, whose graphs alone can "
                    f"tokenize. Received: generate={generate!r} on {backend.NAME}"
                )
            if getattr(self, "preprocessor", None) is None:
                raise ValueError(
                    "`generate` must be False for a model without a preprocessor, which cannot "
                    f"tokenize. Received: generate={generate!r}"
                )
            text_function = self._text_function()
        if signature is None:
            specs = {
                name: keras.InputSpec(shape=(None, None), dtype="int32", name=name)
                for name in INPUTS
            }
            signature = [specs]
        with new_folder(path) as new:
            backend.write_saved_model(new, self, *signature, text_function, options)

    def _text_function(self):
        tokenizer = self.preprocessor.tokenizer
        generate_ids = functools.partial(greedy_ids, self, stop_token_ids=[tokenizer.end_token_id])
        return backend.text_function(
            tokenizer.proto,
            generate_ids,
            [tokenizer.start_token_id],
            tokenizer.special_token_ids,
        )


def _check_unused(format, **arguments):
    """Raise ValueError for an argument that has no effect on a format."""
    for name, value in arguments.items():
        if value is not None and value is not False:
            raise ValueError(
                f"`{name}` must not be given for format={format!r}, whose files take any batch and "
                f"length. Received: {name}={value!r}"
            )
