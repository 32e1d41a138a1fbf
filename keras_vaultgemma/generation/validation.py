"""Checks of what `generate`, `stream` and `score` are given, and the sentence for each mistake."""

import math
import numbers
from collections.abc import Mapping

import keras_hub
import numpy as np
from keras import ops

from keras_vaultgemma import backend
from keras_vaultgemma._validation import check_integer, check_known, check_number, is_integer
from keras_vaultgemma.data.token_ids import check_ids

PADDED_KEYS = ("token_ids", "padding_mask")

_SAMPLERS = "model.compile(sampler=keras_hub.samplers."

INSTEAD = {
    "temperature": f"`{_SAMPLERS}RandomSampler(temperature=...))`",
    "top_k": f"`{_SAMPLERS}TopKSampler(k=..., temperature=...))`",
    "top_p": f"`{_SAMPLERS}TopPSampler(p=..., temperature=...))`",
    "do_sample": '`model.compile(sampler="random")`, or "greedy", the default, for no sampling',
    "num_beams": f"`{_SAMPLERS}BeamSampler(num_beams=...))`",
    "penalty_alpha": f"`{_SAMPLERS}ContrastiveSampler(k=..., alpha=...))`",
    "sampler": "`model.compile(sampler=...)`",
    "early_stopping": "`length_penalty`; a beam search ends once no beam can improve",
    "stop_strings": "`stop`",
    "stop_sequences": "`stop`",
    "eos_token_id": "`stop_token_ids`",
    "end_token_id": "`stop_token_ids`",
    "max_tokens": "`max_new_tokens`",
    "max_output_tokens": "`max_new_tokens`",
    "random_seed": "`seed`",
    "bad_words_ids": "`logit_bias={id: -math.inf}`",
    "suppress_tokens": "`logit_bias={id: -math.inf}`",
    "logprobs": "`return_log_probs=True`",
    "output_scores": "`return_log_probs=True`",
    "output_logits": "`return_log_probs=True`, or `model(...)` for logits",
    "return_dict_in_generate": "`return_log_probs=True` and `return_finish_reason=True`",
    "num_return_sequences": "a list that has the prompt several times",
    "streamer": "`model.stream(...)`",
    "attention_mask": "`inputs={'token_ids': ..., 'padding_mask': ...}`",
    "padding_mask": "`inputs={'token_ids': ..., 'padding_mask': ...}`",
    "input_ids": "`inputs`",
    "prompt_lookup_num_tokens": "`prompt_lookup=True`",
}
"""What to use instead of arguments that `generate` of other libraries has."""


def check_no_unknown(function, unknown, known):
    """Raise TypeError for arguments that a function does not have, naming what to use instead.

    Args:
        function: string. Name of the function.
        unknown: dict of the arguments.
        known: names of the arguments that it has.
    """
    for name, value in unknown.items():
        if name in INSTEAD:
            raise TypeError(
                f"`{function}` has no argument `{name}`. Use {INSTEAD[name]}. "
                f"Received: {name}={value!r}"
            )
    check_known(f"`{function}`", unknown, known)


def check_outside_graph(function, inputs):
    """Raise ValueError inside a compiled function, where tensors have no values."""
    if backend.is_tracing() or backend.is_symbolic_tensorflow(inputs):
        raise ValueError(
            f"`{function}` compiles its own loop and needs values, so it must not be called inside "
            "`tf.function`, `tf.data.Dataset.map` or `jax.jit`. Call it outside, or call the model "
            "itself, which returns logits"
        )


def check_options(config):
    """Raise ValueError if a field of a `GenerationConfig` is out of its range."""
    if config.max_length is not None and config.max_new_tokens is not None:
        raise ValueError(
            "Only one of `max_length` and `max_new_tokens` can be given. Received: "
            f"max_length={config.max_length} and max_new_tokens={config.max_new_tokens}"
        )
    check_integer("max_length", config.max_length, allow_none=True)
    check_integer("max_new_tokens", config.max_new_tokens, allow_none=True)
    check_integer("seed", config.seed, minimum=0, maximum=2**31 - 1, allow_none=True)
    check_number("repetition_penalty", config.repetition_penalty, above=0)
    check_number("min_p", config.min_p, minimum=0, maximum=1)
    # Within what a length can be raised to without overflow.
    check_number("length_penalty", config.length_penalty, minimum=-50, maximum=50, allow_none=True)


def read_logit_bias(logit_bias, vocabulary_size):
    """Return `logit_bias` as a dict from ids to numbers.

    Raises:
        ValueError: If it is no dict, an id is outside the vocabulary, or a bias is NaN or infinity.
    """
    if logit_bias is None:
        return {}
    if not isinstance(logit_bias, Mapping) or not all(is_integer(i, 0) for i in logit_bias):
        raise ValueError(
            "`logit_bias` must be None or a dict {token id: number}. "
            f"Received: logit_bias={logit_bias!r}"
        )
    for token, bias in logit_bias.items():
        if not isinstance(bias, numbers.Real) or not -math.inf <= bias < math.inf:
            raise ValueError(
                f"`logit_bias` must have numbers below infinity. Received: {bias!r} for id {token}"
            )
    check_ids(list(logit_bias), vocabulary_size)
    return dict(logit_bias)


def read_stop(stop, preprocessor):
    """Return stop strings as a tuple.

    Raises:
        ValueError: If one is empty or no string, or there are some without a preprocessor.
    """
    is_list = isinstance(stop, (list, tuple, set, frozenset, np.ndarray))
    strings = tuple(stop) if is_list else () if stop is None else (stop,)
    if not all(isinstance(string, str) and string for string in strings):
        raise ValueError(
            "`stop` must be a non-empty string or non-empty strings. Received: stop="
            f"{strings if is_list else stop!r}"
        )
    if strings and preprocessor is None:
        raise ValueError("`stop` needs a preprocessor; use `stop_token_ids` without one")
    return tuple(map(str, strings))


def read_stop_ids(stop_token_ids, preprocessor, is_chat, vocabulary_size):
    """Return stop ids as a tuple.

    Raises:
        ValueError: If it is neither "auto", None nor ids in the vocabulary, or "auto" without a
            preprocessor.
    """
    if stop_token_ids is None:
        return ()
    if isinstance(stop_token_ids, str) and stop_token_ids == "auto":
        if preprocessor is None:
            raise ValueError(
                "`stop_token_ids='auto'` needs a preprocessor; pass None or a list of ids"
            )
        tokenizer = preprocessor.tokenizer
        turn_ends = is_chat and tokenizer.end_of_turn_id is not None
        return (tokenizer.end_token_id, *([tokenizer.end_of_turn_id] if turn_ends else []))
    try:
        ids = None if isinstance(stop_token_ids, (str, bytes)) else list(stop_token_ids)
    except TypeError:
        ids = None
    if ids is None or not all(map(_is_id, ids)):
        raise ValueError(
            "`stop_token_ids` must be 'auto', None or a list of ids. Received: "
            f"stop_token_ids={stop_token_ids!r}"
        )
    ids = tuple(map(int, ids))
    check_ids(ids, vocabulary_size, "`stop_token_ids`")
    return ids


def check_sampler(sampler, length_penalty=None):
    """Raise ValueError if a sampler is none, or has an attribute out of its range.

    Attributes can change at any time, so they are checked before each use.

    Args:
        sampler: the `sampler` of a model.
        length_penalty: argument of `generate`, which beam search alone has.
    """
    samplers = keras_hub.samplers
    if not isinstance(sampler, samplers.Sampler):
        raise ValueError(
            "`sampler` must be the name of a sampler or a `keras_hub.samplers.Sampler`, given to "
            f"`compile(sampler=...)`. Received: sampler={sampler!r}"
        )
    temperature = getattr(sampler, "temperature", 1.0)
    if not isinstance(temperature, numbers.Real) or not 0 < temperature < math.inf:
        raise ValueError(
            "`temperature` of the sampler must be a finite number above 0; the most likely token "
            f'is chosen by `compile(sampler="greedy")`. Received: temperature={temperature!r}'
        )
    if isinstance(sampler, (samplers.TopKSampler, samplers.ContrastiveSampler)):
        check_integer("k", sampler.k)
    if isinstance(sampler, samplers.TopPSampler):
        check_integer("k", sampler.k, allow_none=True)
        check_number("p", sampler.p, minimum=0, maximum=1)
    if isinstance(sampler, samplers.ContrastiveSampler):
        check_number("alpha", sampler.alpha, minimum=0, maximum=1)
    if isinstance(sampler, samplers.BeamSampler):
        check_integer("num_beams", sampler.num_beams)
        if sampler.return_all_beams:
            raise ValueError(
                "`return_all_beams` of the sampler must be False, because `generate` returns the "
                "best beam of each prompt. Received: return_all_beams=True"
            )
    elif length_penalty is not None:
        raise ValueError(
            "`length_penalty` needs `compile(sampler=keras_hub.samplers.BeamSampler(...))`. "
            f"Received: length_penalty={length_penalty} with {type(sampler).__name__}"
        )


def check_finite(log_probs, what="a token"):
    """Raise ValueError if the log-probability of a token is NaN, as it is where logits are."""
    if np.isnan(log_probs).any():
        raise ValueError(
            f"The logits of {what} are NaN or infinite, so that none can be chosen. Weights or an "
            "adapter that are not finite, or float16, which overflows, are the usual causes"
        )


def padded_arrays(inputs, name="inputs"):
    """Return token ids and mask, NumPy arrays [B, T], of a dict.

    Raises:
        ValueError: If a key is missing, a shape differs or ids are no integers.
    """
    if not set(PADDED_KEYS) <= set(inputs):
        hint = " A chat is a list of messages." if "role" in inputs else ""
        raise ValueError(
            f"`{name}` that is a dict must have the keys 'token_ids' and 'padding_mask', arrays of "
            f"shape [B, T].{hint} Received the keys: {sorted(map(str, inputs))}"
        )
    token_ids, mask = (as_array(inputs[key], key) for key in PADDED_KEYS)
    check_padded(token_ids, mask)
    return token_ids, mask


def check_padded(token_ids, mask):
    """Raise ValueError unless token ids are integers [B, T] and the mask has the same shape."""
    if token_ids.ndim != 2 or token_ids.shape != mask.shape:
        raise ValueError(
            "`token_ids` and `padding_mask` must both have the shape [batch, length]. "
            f"Received: {token_ids.shape} and {mask.shape}"
        )
    if token_ids.dtype.kind not in "iu":
        raise ValueError(f"`token_ids` must be integers. Received: dtype {token_ids.dtype}")


def as_array(x, name):
    """Return nested lists or a tensor as a NumPy array of numbers.

    Raises:
        ValueError: If rows differ in length or an item is no number.
    """
    try:
        array = np.asarray(ops.convert_to_numpy(x))
    except (TypeError, ValueError):
        array = np.array(None)
    if array.dtype.kind not in "biuf":
        raise ValueError(f"`{name}` must be an array of numbers. Received: {name}={x!r}")
    return array


def id_rows(inputs):
    """Return ids as rows.

    Args:
        inputs: anything.

    Returns:
        Tuple `(rows, is_single)`: a list of lists of ints, and True if `inputs` was one row. None
        if `inputs` are not ids.

    Raises:
        ValueError: If they are in part.
    """
    if hasattr(inputs, "to_list") and hasattr(inputs, "row_splits"):  # tf.RaggedTensor
        inputs = inputs.to_list()
    if hasattr(inputs, "dtype") and hasattr(inputs, "shape"):
        if "int" not in str(inputs.dtype) or len(inputs.shape) not in (1, 2):
            return None
        inputs = ops.convert_to_numpy(inputs)
        return (inputs.tolist(), False) if inputs.ndim == 2 else ([inputs.tolist()], True)
    if not isinstance(inputs, (list, tuple)) or not len(inputs):
        return None
    if _is_id(inputs[0]):
        return [_id_row(inputs, 0)], True
    leaves = [row[0] for row in inputs if _is_row(row) and len(row)]
    if not _is_row(inputs[0]) or (leaves and not any(map(_is_id, leaves))):
        return None
    return [_id_row(row, i) for i, row in enumerate(inputs)], False


def _id_row(row, number):
    if not _is_row(row) or not all(map(_is_id, row)):
        raise ValueError(f"A prompt must be a list of ids. Received: {row!r} as prompt {number}")
    return list(map(int, row))


def _is_row(x):
    return isinstance(x, (list, tuple)) or (hasattr(x, "dtype") and len(x.shape) == 1)


def _is_id(x):
    is_scalar = hasattr(x, "dtype") and hasattr(x, "shape") and not len(x.shape)
    return is_integer(x, minimum=-math.inf) or (is_scalar and "int" in str(x.dtype))
