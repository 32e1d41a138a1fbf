"""What users hand to `generate`, as rows of ids, and what they get back for it."""

import math
from typing import NamedTuple

import numpy as np
from keras import ops

from keras_vaultgemma.data.text_inputs import apply_chat_template, as_chats, as_texts
from keras_vaultgemma.data.token_ids import check_ids, check_lengths, pad_rows, unpad_rows
from keras_vaultgemma.generation.state import Settings
from keras_vaultgemma.generation.stream import TextStream, detokenizer, shown


class Prompts(NamedTuple):
    """Prompts as ids, and the form they came in.

    Attributes:
        rows: list of non-empty lists of ids.
        form: "text", "chat", "ids" (lists of ints) or "padded" (a dict of arrays).
        is_single: whether the input was one prompt and not a batch of them.
        width: T of padded arrays, else None.
    """

    rows: list
    form: str
    is_single: bool = False
    width: int | None = None


def read_prompts(inputs, preprocessor, vocabulary_size):
    """`Prompts` from a string, a chat or ids, or from a batch of one of these.

    Raises:
        ValueError: for no prompts, an empty one, items that are neither strings nor ids, ids outside the vocabulary, or
            text without a preprocessor.
    """
    if isinstance(inputs, dict) and "token_ids" in inputs:
        token_ids, mask = (
            ops.convert_to_numpy(inputs[key]) for key in ("token_ids", "padding_mask")
        )
        prompts = Prompts(unpad_rows(token_ids, mask), "padded", width=token_ids.shape[1])
    elif _are_ids(inputs):
        is_single = (inputs.ndim if hasattr(inputs, "ndim") else np.ndim(inputs[0]) + 1) == 1
        prompts = Prompts(
            [list(map(int, row)) for row in ([inputs] if is_single else inputs)], "ids", is_single
        )
    elif preprocessor is None:
        raise ValueError(
            "Without a preprocessor, `inputs` must be ids: {'token_ids', 'padding_mask'} or lists of ints. "
            f"Received: {inputs!r}"
        )
    elif as_chats(inputs)[0]:
        chats, is_single = as_chats(inputs)
        texts = [apply_chat_template(chat, add_generation_prompt=True) for chat in chats]
        prompts = Prompts(preprocessor.tokenize_prompts(texts), "chat", is_single)
    else:
        texts, is_single = as_texts(inputs)
        prompts = Prompts(preprocessor.tokenize_prompts(texts), "text", is_single)

    if not prompts.rows:
        raise ValueError("`inputs` must have at least one prompt. Received: none")
    for i, row in enumerate(prompts.rows):
        if not row:
            raise ValueError(f"A prompt must have at least one token. Received: none in prompt {i}")
        check_ids(row, vocabulary_size)
    return prompts


def _answer(prompts, generated, strip_prompt, preprocessor, cut):
    """What `generate` returns for rows of generated ids: in the form of the prompts, with or without them.

    Args:
        cut: list of ints, how many characters to leave out at the end of each text.
    """
    if strip_prompt is None:
        strip_prompt = prompts.form == "chat"
    rows = (
        generated if strip_prompt else [a + b for a, b in zip(prompts.rows, generated, strict=True)]
    )
    if prompts.form == "padded":
        token_ids, padding_mask = pad_rows(rows, max(prompts.width, *map(len, rows)))
        return {"token_ids": token_ids, "padding_mask": padding_mask}
    if prompts.form == "ids":
        return rows[0] if prompts.is_single else rows
    texts = preprocessor.detokenize(rows)
    outputs = [text[: len(text) - n] for text, n in zip(texts, cut, strict=True)]
    return outputs[0] if prompts.is_single else outputs


def _concatenate_rows(outputs):
    """One output for several batches' outputs, each a list or a dict of padded arrays."""
    if not isinstance(outputs[0], dict):
        return [output for batch in outputs for output in batch]
    rows = [
        row for batch in outputs for row in unpad_rows(batch["token_ids"], batch["padding_mask"])
    ]
    token_ids, padding_mask = pad_rows(rows, max(batch["token_ids"].shape[1] for batch in outputs))
    return {"token_ids": token_ids, "padding_mask": padding_mask}


def _are_ids(inputs):
    """Whether `inputs` is one row of ints or a batch of rows, as lists or arrays."""
    if hasattr(inputs, "dtype"):
        return "int" in str(inputs.dtype) and inputs.ndim in (1, 2)
    if not isinstance(inputs, (list, tuple)) or not len(inputs):
        return False
    first = inputs[0]
    if isinstance(first, (list, tuple)) and len(first):
        first = first[0]
    return hasattr(first, "__index__") or (hasattr(first, "dtype") and "int" in str(first.dtype))


# MERGED: """Between what users ask of `generate` and `stream`, and rows of ids: limits, stops, text that ends where it should."""
class GenerationOutput(NamedTuple):
    """What `generate` returns where more than the output was asked for; a batch has lists, a single prompt has not.

    Attributes:
        output: what `generate` returns alone.
        log_probs: list of floats, the log-probability of each generated token in nats, given what stands before it,
            under the model itself: before temperature, penalties and filters. None unless asked for.
        finish_reason: "stop" for a stop id or stop string, "length" for a limit. None unless asked for.
    """

    output: object
    log_probs: list | None = None
    finish_reason: object = None


class Request(NamedTuple):
    """A call of `generate` or `stream`, checked.

    Attributes:
        asked: `prompts.Prompts`.
        limits: list of ints, tokens that each row may get.
        stop_token_ids: tuple of ids.
        stop: tuple of strings.
        settings: `decode_state.Settings`.
    """

    asked: Prompts
    limits: list
    stop_token_ids: tuple
    stop: tuple
    settings: Settings


def make_request(
    inputs,
    backbone,
    preprocessor,
    max_length=None,
    max_new_tokens=None,
    stop_token_ids="auto",
    stop=(),
    seed=None,
    repetition_penalty=1.0,
    min_p=0.0,
    logit_bias=None,
):
    """`Request` from the arguments of `VaultGemmaCausalLM.generate`, which says what they mean.

    Raises:
        ValueError: as there.
    """
    if max_length is not None and max_new_tokens is not None:
        raise ValueError(
            f"Give one of `max_length` and `max_new_tokens`. Received: {max_length} and {max_new_tokens}"
        )
    for name, value in (("max_length", max_length), ("max_new_tokens", max_new_tokens)):
        if value is not None and value < 1:
            raise ValueError(f"`{name}` must be 1 or more. Received: {value}")
    settings = _settings(seed, repetition_penalty, min_p, logit_bias, backbone.vocabulary_size)
    stop = _stop_strings(stop, preprocessor)
    asked = read_prompts(inputs, preprocessor, backbone.vocabulary_size)
    if max_new_tokens is not None:
        limits = [max_new_tokens] * len(asked.rows)
    else:
        if max_length is None:
            max_length = (
                asked.width
                or getattr(preprocessor, "sequence_length", None)
                or backbone.max_sequence_length
            )
        check_lengths(asked.rows, max_length)
        limits = [max_length - len(row) for row in asked.rows]
    backbone.warn_if_long(
        max(len(row) + limit for row, limit in zip(asked.rows, limits, strict=True))
    )
    return Request(
        asked, limits, _stop_ids(stop_token_ids, asked.form, preprocessor), stop, settings
    )


def complete(
    generator, request, preprocessor, strip_prompt=None, log_probs=False, finish_reason=False
):
    """Generate, and bring the result into the form of the prompts.

    Args:
        generator: with `generate` as of `generation.Generator`.
        request: `Request`.
        preprocessor: the one it was made with.
        strip_prompt: whether to leave the prompts out; None for chats alone.
        log_probs, finish_reason: whether to return these too.

    Returns:
        What `VaultGemmaCausalLM.generate` returns.
    """
    asked, strip_turn_end = request.asked, shown(request, preprocessor)
    detokenize = detokenizer(request, preprocessor)
    texts = [TextStream(detokenize, request.stop) for _ in asked.rows] if request.stop else None

    def ends(i, tokens):
        texts[i].push(tokens[len(texts[i].ids) :])
        return texts[i].stopped

    generated = generator.generate(
        asked.rows,
        request.limits,
        request.stop_token_ids,
        request.settings,
        ends if texts else None,
    )
    if log_probs and generated.log_probs is None:
        raise ValueError("`return_log_probs` needs a sampler that chooses one token at a time")
    tokens, probs, reasons = generated
    cut = [0] * len(tokens)
    if texts:
        tokens = [
            row if not ends(i, row) else text.ids
            for i, (row, text) in enumerate(zip(tokens, texts, strict=True))
        ]
        reasons = [
            "stop" if text.stopped else reason for text, reason in zip(texts, reasons, strict=True)
        ]
        cut = [len(detokenize(text.ids)) - len(text.text) if text.stopped else 0 for text in texts]
    output = _answer(asked, list(map(strip_turn_end, tokens)), strip_prompt, preprocessor, cut)
    if not (log_probs or finish_reason):
        return output
    probs = (
        [row[: len(kept)] for row, kept in zip(probs, tokens, strict=True)] if log_probs else None
    )
    reasons = reasons if finish_reason else None
    if asked.is_single:
        probs, reasons = probs and probs[0], reasons and reasons[0]
    return GenerationOutput(output, probs, reasons)


def concatenate(outputs):
    """One output of `complete` for those of several batches.

    Raises:
        ValueError: for none.
    """
    if not outputs:
        raise ValueError("`inputs` must have at least one prompt. Received: an empty dataset")
    if not isinstance(outputs[0], GenerationOutput):
        return _concatenate_rows(outputs)
    texts, probs, reasons = zip(*outputs, strict=True)
    lists = (
        None if parts[0] is None else [item for part in parts for item in part]
        for parts in (probs, reasons)
    )
    return GenerationOutput(_concatenate_rows(texts), *lists)


def _settings(seed, repetition_penalty, min_p, logit_bias, vocabulary_size):
    if seed is not None and not 0 <= seed < 2**31:
        raise ValueError(f"`seed` must be from 0 to {2**31 - 1}. Received: {seed}")
    # Written so that NaN is refused.
    if not 0 < repetition_penalty < math.inf:
        raise ValueError(
            f"`repetition_penalty` must be a number above 0. Received: {repetition_penalty}"
        )
    if not 0 <= min_p <= 1:
        raise ValueError(f"`min_p` must be from 0 to 1. Received: {min_p}")
    logit_bias = dict(logit_bias or {})
    check_ids(list(logit_bias), vocabulary_size)
    for token, bias in logit_bias.items():
        if not -math.inf <= bias < math.inf:
            raise ValueError(
                f"`logit_bias` must have numbers below infinity. Received: {bias} for id {token}"
            )
    return Settings(seed, repetition_penalty, min_p, logit_bias)


def _stop_strings(stop, preprocessor):
    stop = (stop,) if isinstance(stop, str) else tuple(stop or ())
    if not all(isinstance(string, str) and string for string in stop):
        raise ValueError(f"`stop` must be a non-empty string or several. Received: {stop!r}")
    if stop and preprocessor is None:
        raise ValueError(
            "`stop` needs a preprocessor, to see the text; use `stop_token_ids` without one"
        )
    return stop


def _stop_ids(stop_token_ids, form, preprocessor):
    if not isinstance(stop_token_ids, str):
        return () if stop_token_ids is None else tuple(map(int, stop_token_ids))
    if stop_token_ids != "auto":
        raise ValueError(
            f"`stop_token_ids` must be 'auto', None or a list of ids. Received: {stop_token_ids!r}"
        )
    if preprocessor is None:
        raise ValueError("`stop_token_ids='auto'` needs a preprocessor; pass None or a list of ids")
    tokenizer = preprocessor.tokenizer
    turn_ends = form == "chat" and tokenizer.end_of_turn_id is not None
    return (tokenizer.end_token_id, *([tokenizer.end_of_turn_id] if turn_ends else []))
