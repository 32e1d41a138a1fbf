"""Between what users ask of `generate` and `stream`, and rows of ids: limits, stops, text that ends where it should."""

import math
from typing import NamedTuple

from keras_vaultgemma import ids, prompts
from keras_vaultgemma.decode_state import Settings
from keras_vaultgemma.text_stream import TextStream


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

    asked: prompts.Prompts
    limits: list
    stop_token_ids: tuple
    stop: tuple
    settings: Settings


def request(
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
        raise ValueError(f"Give one of `max_length` and `max_new_tokens`. Received: {max_length} and {max_new_tokens}")
    for name, value in (("max_length", max_length), ("max_new_tokens", max_new_tokens)):
        if value is not None and value < 1:
            raise ValueError(f"`{name}` must be 1 or more. Received: {value}")
    settings = _settings(seed, repetition_penalty, min_p, logit_bias, backbone.vocabulary_size)
    stop = _stop_strings(stop, preprocessor)
    asked = prompts.read(inputs, preprocessor, backbone.vocabulary_size)
    if max_new_tokens is not None:
        limits = [max_new_tokens] * len(asked.rows)
    else:
        if max_length is None:
            max_length = asked.width or getattr(preprocessor, "sequence_length", None) or backbone.max_sequence_length
        ids.check_lengths(asked.rows, max_length)
        limits = [max_length - len(row) for row in asked.rows]
    backbone.warn_if_long(max(len(row) + limit for row, limit in zip(asked.rows, limits, strict=True)))
    return Request(asked, limits, _stop_ids(stop_token_ids, asked.form, preprocessor), stop, settings)


def complete(generator, request, preprocessor, strip_prompt=None, log_probs=False, finish_reason=False):
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
    asked, shown = request.asked, _shown(request, preprocessor)
    detokenize = _detokenize(request, preprocessor)
    texts = [TextStream(detokenize, request.stop) for _ in asked.rows] if request.stop else None

    def ends(i, tokens):
        texts[i].push(tokens[len(texts[i].ids) :])
        return texts[i].stopped

    generated = generator.generate(
        asked.rows, request.limits, request.stop_token_ids, request.settings, ends if texts else None
    )
    if log_probs and generated.log_probs is None:
        raise ValueError("`return_log_probs` needs a sampler that chooses one token at a time")
    tokens, probs, reasons = generated
    cut = [0] * len(tokens)
    if texts:
        tokens = [
            row if not ends(i, row) else text.ids for i, (row, text) in enumerate(zip(tokens, texts, strict=True))
        ]
        reasons = ["stop" if text.stopped else reason for text, reason in zip(texts, reasons, strict=True)]
        cut = [len(detokenize(text.ids)) - len(text.text) if text.stopped else 0 for text in texts]
    output = prompts.answer(asked, list(map(shown, tokens)), strip_prompt, preprocessor, cut)
    if not (log_probs or finish_reason):
        return output
    probs = [row[: len(kept)] for row, kept in zip(probs, tokens, strict=True)] if log_probs else None
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
        return prompts.concatenate(outputs)
    texts, probs, reasons = zip(*outputs, strict=True)
    lists = (None if parts[0] is None else [item for part in parts for item in part] for parts in (probs, reasons))
    return GenerationOutput(prompts.concatenate(texts), *lists)


class Stream:
    """Pieces of the text that follows one prompt, as it is generated; joined, they are what `generate` returns for it.

    No piece ends within a character, and none has a part of a stop string. An interrupt (Ctrl-C) while the model works
    ends the text there; what was generated so far is returned, and the model stays usable.

    Attributes:
        ids: the tokens generated so far.
        finish_reason: None at first; "stop", "length" or "interrupted" once it has ended.
    """

    def __init__(self, generator, request, preprocessor):
        self.finish_reason = None
        self._text = TextStream(_detokenize(request, preprocessor), request.stop)
        self._stop_token_ids = request.stop_token_ids
        self._parts = generator.stream(
            request.asked.rows, request.limits, request.stop_token_ids, request.settings, length=1
        )
        self._pieces = self._run()

    def __iter__(self):
        return self

    def __next__(self):
        return next(self._pieces)

    @property
    def ids(self):
        return list(self._text.ids)

    def _run(self):
        reason = "length"
        while True:
            try:
                new = next(self._parts)[0][0]
                piece = self._text.push(new)
            except StopIteration:
                break
            except KeyboardInterrupt:
                reason = "interrupted"
                break
            if self._text.stopped or (new and new[-1] in self._stop_token_ids):
                reason = "stop"
            if piece:
                yield piece
            if self._text.stopped:
                break
        self._parts.close()
        self.finish_reason = reason
        if rest := self._text.flush():
            yield rest


def _shown(request, preprocessor):
    """A function of a generated row of ids: without the `<end_of_turn>` that ends a chat's reply."""
    turn_end = preprocessor.tokenizer.end_of_turn_id if request.asked.form == "chat" else None
    if turn_end not in request.stop_token_ids:
        return list
    return lambda row: [i for i in row if i != turn_end]


def _detokenize(request, preprocessor):
    shown = _shown(request, preprocessor)
    return lambda row: preprocessor.detokenize([shown(row)])[0]


def _settings(seed, repetition_penalty, min_p, logit_bias, vocabulary_size):
    if seed is not None and not 0 <= seed < 2**31:
        raise ValueError(f"`seed` must be from 0 to {2**31 - 1}. Received: {seed}")
    # Written so that NaN is refused.
    if not 0 < repetition_penalty < math.inf:
        raise ValueError(f"`repetition_penalty` must be a number above 0. Received: {repetition_penalty}")
    if not 0 <= min_p <= 1:
        raise ValueError(f"`min_p` must be from 0 to 1. Received: {min_p}")
    logit_bias = dict(logit_bias or {})
    ids.check_range(list(logit_bias), vocabulary_size)
    for token, bias in logit_bias.items():
        if not -math.inf <= bias < math.inf:
            raise ValueError(f"`logit_bias` must have numbers below infinity. Received: {bias} for id {token}")
    return Settings(seed, repetition_penalty, min_p, logit_bias)


def _stop_strings(stop, preprocessor):
    stop = (stop,) if isinstance(stop, str) else tuple(stop or ())
    if not all(isinstance(string, str) and string for string in stop):
        raise ValueError(f"`stop` must be a non-empty string or several. Received: {stop!r}")
    if stop and preprocessor is None:
        raise ValueError("`stop` needs a preprocessor, to see the text; use `stop_token_ids` without one")
    return stop


def _stop_ids(stop_token_ids, form, preprocessor):
    if not isinstance(stop_token_ids, str):
        return () if stop_token_ids is None else tuple(map(int, stop_token_ids))
    if stop_token_ids != "auto":
        raise ValueError(f"`stop_token_ids` must be 'auto', None or a list of ids. Received: {stop_token_ids!r}")
    if preprocessor is None:
        raise ValueError("`stop_token_ids='auto'` needs a preprocessor; pass None or a list of ids")
    tokenizer = preprocessor.tokenizer
    turn_ends = form == "chat" and tokenizer.end_of_turn_id is not None
    return (tokenizer.end_token_id, *([tokenizer.end_of_turn_id] if turn_ends else []))
