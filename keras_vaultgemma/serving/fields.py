"""Fields of a request's JSON object: which there are, and their legal values."""

from keras_vaultgemma._validation import check_integer, check_known, check_number
from keras_vaultgemma.generation.batch_loop import TOP
from keras_vaultgemma.serving.errors import RequestError

MAX_CHOICES = 128
"""Largest number of answers to one prompt."""

MAX_STOPS = 16
"""Largest number of stop strings of a request."""

COMMON = {
    "model": None,
    "max_tokens": None,
    "temperature": 1.0,
    "top_p": 1.0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "n": 1,
    "seed": None,
    "stop": (),
    "stream": False,
    "stream_options": None,
}
"""Fields of both kinds of requests with their defaults. null stands for the default."""

COMPLETION = {**COMMON, "prompt": None, "echo": False, "logprobs": None}
CHAT = {
    **COMMON,
    "messages": None,
    "max_completion_tokens": None,
    "logprobs": False,
    "top_logprobs": 0,
}

WITHOUT_EFFECT = {
    "metadata",
    "prompt_cache_key",
    "safety_identifier",
    "service_tier",
    "store",
    "user",
}
"""Fields of OpenAI's that do not change the text. They are ignored."""

NEUTRAL = {
    "best_of": (1,),
    "frequency_penalty": (0,),
    "function_call": ("none",),
    "functions": ([],),
    "logit_bias": ({},),
    "modalities": (["text"],),
    "parallel_tool_calls": (True, False),
    "presence_penalty": (0,),
    "response_format": ({"type": "text"},),
    "suffix": ("",),
    "tool_choice": ("none",),
    "tools": ([],),
}
"""Fields of OpenAI's that this server lacks, with the values that ask for nothing."""


def read_fields(body, known):
    """Return `{field: value}` of a request with all of `known`, after a check of each alone.

    Args:
        body: the JSON value that was sent.
        known: `COMPLETION` or `CHAT`.

    Raises:
        RequestError: If it is no object, or a field is unknown, unsupported or out of its range.
    """
    if not isinstance(body, dict):
        raise RequestError(400, "The body must be a JSON object. Received: another value")
    body = {name: value for name, value in body.items() if value is not None}
    for name in list(body):
        if name in WITHOUT_EFFECT or (name in NEUTRAL and body[name] in NEUTRAL[name]):
            del body[name]
        elif name in NEUTRAL:
            message = f"`{name}` is not supported. Received: {name}={str(body[name])[:100]}"
            raise RequestError(400, message, name)
    for name in body:
        try:
            check_known("The request", [name], known)
        except TypeError as error:
            raise RequestError(400, str(error), name[:100]) from error
    fields = {**known, **body}
    for name, check in CHECKS.items():
        if name in fields:
            try:
                check(name, fields[name])
            except ValueError as error:
                raise RequestError(400, str(error), name) from error
    return fields


def _check_flag(name, value):
    if not isinstance(value, bool):
        raise ValueError(f"`{name}` must be true or false. Received: {name}={value!r}")


def _check_model(name, value):
    if value is not None and not isinstance(value, str):
        raise ValueError(f"`{name}` must be the name of a model. Received: {name}={value!r}")


def _check_stop(name, value):
    strings = [value] if isinstance(value, str) else value
    is_legal = isinstance(strings, (list, tuple)) and len(strings) <= MAX_STOPS
    if not is_legal or not all(isinstance(string, str) and string for string in strings):
        raise ValueError(
            f"`{name}` must be a non-empty string or at most {MAX_STOPS} of them. "
            f"Received: {name}={value!r}"
        )


def _check_stream_options(name, value):
    if value is not None and (not isinstance(value, dict) or set(value) - KNOWN_STREAM_OPTIONS):
        raise ValueError(
            f"`{name}` must be an object with {' or '.join(sorted(KNOWN_STREAM_OPTIONS))}. "
            f"Received: {name}={value!r}"
        )


def _check_log_probs(name, value):
    if not isinstance(value, bool):  # a chat has true or false, a completion a number
        check_integer(name, value, minimum=0, maximum=TOP, allow_none=True)


def _integer(**limits):
    return lambda name, value: check_integer(name, value, **limits)


def _number(**limits):
    return lambda name, value: check_number(name, value, **limits)


KNOWN_STREAM_OPTIONS = {"include_obfuscation", "include_usage"}

CHECKS = {
    "model": _check_model,
    "max_tokens": _integer(minimum=0, allow_none=True),
    "max_completion_tokens": _integer(minimum=0, allow_none=True),
    "temperature": _number(minimum=0, maximum=2),
    "top_p": _number(above=0, maximum=1),
    "min_p": _number(minimum=0, maximum=1),
    "repetition_penalty": _number(above=0),
    "n": _integer(maximum=MAX_CHOICES),
    "seed": _integer(minimum=-(2**63), maximum=2**63 - 1, allow_none=True),
    "stop": _check_stop,
    "stream": _check_flag,
    "stream_options": _check_stream_options,
    "echo": _check_flag,
    "logprobs": _check_log_probs,
    "top_logprobs": _integer(minimum=0, maximum=TOP),
}
