"""TensorFlow's SavedModel of a model, from TensorFlow or JAX."""

import keras

from keras_vaultgemma.backend.selection import NAME
from keras_vaultgemma.backend.tf_text import sentencepiece_in_graph, tokenize_in_graph

SAVED_MODEL_KINDS = {
    "tensorflow": ("logits", "text"),
    "jax": ("logits",),
    "torch": (),
}[NAME]
"""What a SavedModel of this backend can return."""

ENDPOINT, TEXT_ENDPOINT = "serve", "generate"


def write_saved_model(folder, model, signature, text_function=None, options=None):
    """Write a SavedModel with the endpoint `serve`, and with `generate` if there is a function.

    Args:
        folder: `pathlib.Path`.
        model: `keras.Model` whose inputs are int32 of shape `[B, T]`.
        signature: nested `keras.InputSpec` of the inputs. None stands for any batch or length.
        text_function: function of strings [B] and an int32 scalar that returns strings [B], as
            `text_function` returns it. Only on TensorFlow. Defaults to None.
        options: dict. Further arguments of Keras's `ExportArchive.add_endpoint`. Defaults to none.
    """
    options = dict(options or {})
    if NAME == "jax":
        # Keras would give the lengths of the inputs different names, so that they could differ.
        shapes = keras.tree.map_structure(
            lambda spec: f"({spec.shape[0] or 'batch'}, {spec.shape[1] or 'length'})", signature
        )
        options["jax2tf_kwargs"] = {
            "polymorphic_shapes": [shapes],
            # JAX cannot lower the gradient for any length (0.10.2), and an export is for inference.
            "with_gradient": False,
            **options.get("jax2tf_kwargs", {}),
        }
    archive = keras.export.ExportArchive()
    if NAME == "jax":
        # On TensorFlow the endpoints are enough, and Keras 3.15 would save all variables twice.
        archive.track(model)
    archive.add_endpoint(ENDPOINT, model.__call__, [signature], **options)
    if text_function is not None:
        import tensorflow as tf

        specs = [tf.TensorSpec([None], tf.string), tf.TensorSpec([], tf.int32)]
        archive.add_endpoint(TEXT_ENDPOINT, text_function, specs)
    archive.write_out(str(folder), verbose=False)


def load_saved_model(folder):
    """Return a function of a dict of NumPy inputs that computes the output of `serve`."""
    import tensorflow as tf

    if "text" in SAVED_MODEL_KINDS:
        import tensorflow_text  # noqa: F401 (registers the operations of `generate`)
    model = tf.saved_model.load(str(folder))

    def run(inputs):
        return model.serve({k: tf.constant(v) for k, v in inputs.items()}).numpy()

    run.model = model  # or its variables would be deleted
    return run


def text_function(model, generate_ids, start_ids, dropped_ids):
    """Return a function from strings to strings for a TensorFlow graph.

    Args:
        model: bytes of a SentencePiece model.
        generate_ids: function of padded ids [B, T], lengths [B] and a number of new tokens, all
            int32. Returns new ids [B, S], negative where there are none.
        start_ids: list of ints that a prompt begins with.
        dropped_ids: list of ints that are not a part of the text.

    Returns:
        Function of strings [B] and an int32 scalar that returns each string with its continuation.
    """

    def generate(prompts, max_new_tokens):
        import tensorflow as tf

        tokenizer = sentencepiece_in_graph(model)
        rows = tokenize_in_graph(tokenizer, prompts)
        start = tf.tile(tf.constant([start_ids], tf.int32), [rows.nrows(), 1])
        rows = tf.concat([start, rows], axis=1)
        lengths = tf.cast(rows.row_lengths(), tf.int32)
        new = generate_ids(rows.to_tensor(), lengths, max_new_tokens)
        rows = tf.concat([rows, tf.RaggedTensor.from_tensor(new)], axis=1)
        ids = rows.flat_values
        is_text = tf.reduce_all(ids[:, None] != tf.constant([dropped_ids]), axis=1) & (ids >= 0)
        return tokenizer.detokenize(tf.ragged.boolean_mask(rows, rows.with_flat_values(is_text)))

    return generate
