"""SentencePiece and padded rows as TensorFlow's operations, for graphs and `tf.data` maps.

TensorFlow is imported by the caller's tensors or by an export, on any backend.
"""


def sentencepiece_in_graph(model, add_bos=False, add_eos=False):
    """Return tensorflow-text's tokenizer of a SentencePiece model, for the graph being traced.

    It belongs to this graph, which holds the vocabulary. What a tokenizer made outside of it refers
    to is deleted when TensorFlow empties its cache of kernels, as `tf.random.set_seed` does
    (tensorflow-text 2.21.1).

    Args:
        model: bytes of the SentencePiece model.
        add_bos: bool. True to put the begin token before each text. Defaults to False.
        add_eos: bool. True to put the end token after each text. Defaults to False.

    Returns:
        `tensorflow_text.SentencepieceTokenizer` of int32 ids.

    Raises:
        ImportError: If tensorflow-text is not installed.
    """
    import tensorflow as tf

    try:
        import tensorflow_text
    except ImportError as error:
        raise ImportError(
            "Text in a TensorFlow graph needs the package `tensorflow-text`: pip install "
            '"keras-vaultgemma[tensorflow]"'
        ) from error
    return tensorflow_text.SentencepieceTokenizer(
        model=model, out_type=tf.int32, add_bos=add_bos, add_eos=add_eos
    )


def tokenize_in_graph(tokenizer, texts):
    """Return the ids of a string tensor of any rank, with one more, ragged axis.

    Text that is not UTF-8 is an error when the graph runs; SentencePiece would replace it.

    Args:
        tokenizer: what `sentencepiece_in_graph` returns.
        texts: string tensor.
    """
    import tensorflow as tf

    checked = tf.strings.unicode_transcode(
        texts, "UTF-8", "UTF-8", errors="strict", replace_control_characters=False
    )
    return tokenizer.tokenize(checked)


def empty_texts_like(texts):
    """Return a tensor of empty strings of the shape of a string tensor."""
    import tensorflow as tf

    return tf.fill(tf.shape(texts), "")


def pad_in_graph(rows, length, pad_id=0):
    """Return ragged ids as an int32 tensor with a last axis of `length`, padded or truncated."""
    shape = [*[None] * (len(rows.shape) - 1), length]
    return rows.to_tensor(default_value=pad_id, shape=shape)


def pack_pairs_in_graph(prompts, responses, special_ids, length, truncate, pad_id):
    """Return the rows of prompts and responses, as the preprocessor makes them.

    `data.truncation.fit_parts` says what is cut.

    Args:
        prompts: ragged int32 tensor [B, ...].
        responses: ragged int32 tensor [B, ...].
        special_ids: tuple of two lists of ints: what rows begin with, and what they end with.
        length: int. Length of the padded rows.
        truncate: string. "prompt_start", "prompt_end" or "row_end".
        pad_id: int.

    Returns:
        Tuple `(token_ids, mask, weights, whole)`. The first three are int32 [B, length]; `whole`
        are the ragged rows before they are cut.
    """
    import tensorflow as tf

    start, end = (_repeat(ids, prompts.nrows()) for ids in special_ids)
    whole = tf.concat([start, prompts, responses, end], axis=1)
    if truncate != "row_end":
        room = length - sum(map(len, special_ids))
        answers, sizes = (tf.cast(x.row_lengths(), tf.int32) for x in (responses, prompts))
        room = tf.where(answers <= room, room - answers, room // 2)
        kept = tf.minimum(sizes, tf.maximum(room, 0))
        first = sizes - kept if truncate == "prompt_start" else tf.zeros_like(kept)
        # On flat values, because broadcasting to ragged tensors takes most of the time to trace.
        index, row = tf.ragged.range(sizes).flat_values, prompts.value_rowids()
        index -= tf.gather(first, row)
        is_kept = prompts.with_flat_values((index >= 0) & (index < tf.gather(kept, row)))
        prompts = tf.ragged.boolean_mask(prompts, is_kept)
    parts = [start, prompts, responses, end]
    trained = [_filled(x, value) for x, value in zip(parts, (0, 0, 1, 1), strict=True)]
    rows = tf.concat(parts, axis=1)
    return (
        pad_in_graph(rows, length, pad_id),
        pad_in_graph(_filled(rows, 1), length),
        pad_in_graph(tf.concat(trained, axis=1), length),
        whole,
    )


def call_in_graph(function, arrays, tensors):
    """Return tensors unchanged, after a Python function was called with NumPy arrays.

    Args:
        function: callable. Its result is ignored.
        arrays: list of tensors that it is called with.
        tensors: list of tensors to return.
    """
    import tensorflow as tf

    def call(*values):
        function(*values)
        return 0

    called = tf.numpy_function(call, arrays, tf.int64)
    with tf.control_dependencies([called]):
        return [tf.identity(tensor) for tensor in tensors]


def _repeat(ids, rows):
    import tensorflow as tf

    return tf.RaggedTensor.from_tensor(tf.tile(tf.constant([ids], tf.int32), [rows, 1]))


def _filled(x, value):
    """Return a ragged tensor like another one, of one value."""
    import tensorflow as tf

    return x.with_flat_values(tf.fill(tf.shape(x.flat_values), value))
