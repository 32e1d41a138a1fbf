"""Requests: the arguments of `generate` as rows of ids and limits, and the form of its results."""

import dataclasses
import math
from typing import NamedTuple

from keras_vaultgemma._validation import check_integer, check_number
from keras_vaultgemma.data.token_ids import check_ids, check_lengths
from keras_vaultgemma.generation.prompts import (
    Prompts,
    concatenate_rows,
    format_rows,
    read_prompts,
)
from keras_vaultgemma.generation.state import Settings
from keras_vaultgemma.generation.stream import TextStream, detokenizer, turn_end_stripper


@dataclasses.dataclass(frozen=True)
class GenerationConfig:
    """Options of one call of `generate` or `stream`, which document them.

    Raises:
        ValueError: If an option is out of its range or contradicts another.
    """

    max_length: int | None = None
    max_new_tokens: int | None = None
    stop_token_ids: object = "auto"
    stop: object = ()
    seed: int | None = None
    repetition_penalty: float = 1.0
    min_p: float = 0.0
    logit_bias: dict | None = None

    def __post_init__(self):
        if self.max_length is not None and self.max_new_tokens is not None:
            raise ValueError(
                "Only one of `max_length` and `max_new_tokens` can be given. Received: "
                f"max_length={self.max_length} and max_new_tokens={self.max_new_tokens}"
            )
        check_integer("max_length", self.max_length, allow_none=True)
        check_integer("max_new_tokens", self.max_new_tokens, allow_none=True)
        check_integer("seed", self.seed, minimum=0, maximum=2**31 - 1, allow_none=True)
        check_number("repetition_penalty", self.repetition_penalty, above=0)
        check_number("min_p", self.min_p, minimum=0, maximum=1)
        for token, bias in (self.logit_bias or {}).items():
            if not -math.inf <= bias < math.inf:
                raise ValueError(
                    "`logit_bias` must have numbers below infinity. Received: "
                    f"{bias} for id {token}"
                )

    def settings(self, vocabulary_size):
        """Return the `Settings` after a check of the ids in `logit_bias`."""
        logit_bias = dict(self.logit_bias or {})
        check_ids(list(logit_bias), vocabulary_size)
        return Settings(self.seed, self.repetition_penalty, self.min_p, logit_bias)


class Request(NamedTuple):
    """A validated call of `generate` or `stream`.

    Attributes:
        prompts: `Prompts`.
        limits: list of ints. Maximum number of new tokens of each row.
        stop_token_ids: tuple of ids.
        stop: tuple of strings.
        settings: `Settings`.
    """

    prompts: Prompts
    limits: list
    stop_token_ids: tuple
    stop: tuple
    settings: Settings


class GenerationOutput(NamedTuple):
    """Results of `generate` with `return_log_probs` or `return_finish_reason`.

    For a batch, `log_probs` and `finish_reason` are lists with an entry for each prompt.

    Attributes:
        output: what `generate` returns without these options.
        log_probs: list of floats. Log-probability of each generated token given those before it, in
            nats, before temperature, penalties and filters. None unless requested.
        finish_reason: "stop" for a stop id or stop string, "length" for a limit. None unless
            requested.

    Example:

    ```python
    from keras_vaultgemma import VaultGemmaCausalLM

    model = VaultGemmaCausalLM.from_preset("vaultgemma_tiny")
    result = model.generate("A fox", max_new_tokens=4, return_log_probs=True)
    print(result.output, sum(result.log_probs))
    ```
    """

    output: object
    log_probs: list | None = None
    finish_reason: object = None


def make_request(inputs, backbone, preprocessor, config):
    """Return the `Request` of one call of `VaultGemmaCausalLM.generate`.

    Args:
        inputs: as for `generate`.
        backbone: `VaultGemmaBackbone`.
        preprocessor: `VaultGemmaCausalLMPreprocessor` or None.
        config: `GenerationConfig`.

    Raises:
        ValueError: If `inputs` or `config` do not fit the model.
    """
    settings = config.settings(backbone.vocabulary_size)
    stop = _stop_strings(config.stop, preprocessor)
    prompts = read_prompts(inputs, preprocessor, backbone.vocabulary_size)
    if config.max_new_tokens is not None:
        limits = [config.max_new_tokens] * len(prompts.rows)
    else:
        max_length = (
            config.max_length
            or prompts.length
            or getattr(preprocessor, "sequence_length", None)
            or backbone.max_sequence_length
        )
        check_lengths(prompts.rows, max_length)
        limits = [max_length - len(row) for row in prompts.rows]
    lengths = [len(row) + limit for row, limit in zip(prompts.rows, limits, strict=True)]
    backbone.warn_if_long(max(lengths))
    stop_token_ids = _stop_ids(config.stop_token_ids, prompts.form, preprocessor)
    return Request(prompts, limits, stop_token_ids, stop, settings)


def complete(
    generator, request, preprocessor, strip_prompt=None, log_probs=False, finish_reason=False
):
    """Generate, and return the result in the form of the prompts.

    Args:
        generator: has `generate`, as `generator.Generator`.
        request: `Request`.
        preprocessor: the preprocessor that the request was made with.
        strip_prompt: bool. True to leave the prompts out. Defaults to True for chats alone.
        log_probs: bool. True to return log-probabilities, too.
        finish_reason: bool. True to return finish reasons, too.

    Returns:
        What `VaultGemmaCausalLM.generate` returns.

    Raises:
        ValueError: If `log_probs` is True and the sampler has none.
    """
    prompts, detokenize = request.prompts, detokenizer(request, preprocessor)
    texts = [TextStream(detokenize, request.stop) for _ in prompts.rows] if request.stop else None

    def ends(i, tokens):
        texts[i].push(tokens[len(texts[i].ids) :])
        return texts[i].stopped

    tokens, probs, reasons = generator.generate(
        prompts.rows,
        request.limits,
        request.stop_token_ids,
        request.settings,
        ends if texts else None,
    )
    if log_probs and probs is None:
        raise ValueError("`return_log_probs` needs a sampler that chooses one token at a time")
    cut = [0] * len(tokens)
    if texts:
        ended = [ends(i, row) for i, row in enumerate(tokens)]
        tokens = [
            text.ids if end else row for text, row, end in zip(texts, tokens, ended, strict=True)
        ]
        reasons = ["stop" if end else reason for reason, end in zip(reasons, ended, strict=True)]
        cut = [len(detokenize(text.ids)) - len(text.text) if text.stopped else 0 for text in texts]
    stripped = list(map(turn_end_stripper(request, preprocessor), tokens))
    output = format_rows(prompts, stripped, strip_prompt, preprocessor, cut)
    if not (log_probs or finish_reason):
        return output
    probs = [row[: len(ids)] for row, ids in zip(probs, tokens, strict=True)] if log_probs else None
    reasons = reasons if finish_reason else None
    if prompts.is_single:
        probs, reasons = probs and probs[0], reasons and reasons[0]
    return GenerationOutput(output, probs, reasons)


def concatenate(outputs):
    """Concatenate the outputs of `complete` for several batches.

    Raises:
        ValueError: If `outputs` is empty.
    """
    if not outputs:
        raise ValueError("`inputs` must have at least one prompt. Received: an empty dataset")
    if not isinstance(outputs[0], GenerationOutput):
        return concatenate_rows(outputs)
    rows, probs, reasons = zip(*outputs, strict=True)
    lists = (
        None if parts[0] is None else [item for part in parts for item in part]
        for parts in (probs, reasons)
    )
    return GenerationOutput(concatenate_rows(rows), *lists)


def _stop_strings(stop, preprocessor):
    stop = (stop,) if isinstance(stop, str) else tuple(stop or ())
    if not all(isinstance(string, str) and string for string in stop):
        raise ValueError(f"`stop` must be non-empty strings. Received: stop={stop!r}")
    if stop and preprocessor is None:
        raise ValueError("`stop` needs a preprocessor; use `stop_token_ids` without one")
    return stop


def _stop_ids(stop_token_ids, form, preprocessor):
    if not isinstance(stop_token_ids, str):
        return () if stop_token_ids is None else tuple(map(int, stop_token_ids))
    if stop_token_ids != "auto":
        raise ValueError(
            "`stop_token_ids` must be 'auto', None or a list of ids. Received: "
            f"stop_token_ids={stop_token_ids!r}"
        )
    if preprocessor is None:
        raise ValueError("`stop_token_ids='auto'` needs a preprocessor; pass None or a list of ids")
    tokenizer = preprocessor.tokenizer
    turn_ends = form == "chat" and tokenizer.end_of_turn_id is not None
    return (tokenizer.end_token_id, *([tokenizer.end_of_turn_id] if turn_ends else []))
