"""Requests: the arguments of `generate` as rows of ids and limits, and the form of its results."""

import dataclasses
from typing import NamedTuple

from keras_vaultgemma.data.token_ids import check_lengths
from keras_vaultgemma.generation import validation
from keras_vaultgemma.generation.prompts import (
    Prompts,
    concatenate_rows,
    format_rows,
    read_prompts,
)
from keras_vaultgemma.generation.state import Settings
from keras_vaultgemma.generation.stream import (
    TextStream,
    detokenizer,
    stop_finder,
    turn_end_stripper,
)


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
    length_penalty: float | None = None

    def __post_init__(self):
        validation.check_options(self)

    def settings(self, vocabulary_size):
        """Return the `Settings` after a check of the ids in `logit_bias`."""
        logit_bias = validation.read_logit_bias(self.logit_bias, vocabulary_size)
        return Settings(
            self.seed, self.repetition_penalty, self.min_p, logit_bias, self.length_penalty
        )


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
    stop = validation.read_stop(config.stop, preprocessor)
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
    stop_token_ids = validation.read_stop_ids(
        config.stop_token_ids, preprocessor, prompts.form == "chat", backbone.vocabulary_size
    )
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
    tokens, probs, reasons = generator.generate(
        prompts.rows,
        request.limits,
        request.stop_token_ids,
        request.settings,
        stop_finder(request, preprocessor),
    )
    if log_probs and probs is None:
        raise ValueError("`return_log_probs` needs a sampler that chooses one token at a time")
    cut = [0] * len(tokens)
    if request.stop:
        texts = [TextStream(detokenize, request.stop) for _ in tokens]
        for text, row in zip(texts, tokens, strict=True):
            text.push(row)
        tokens = [
            text.ids if text.stopped else row for text, row in zip(texts, tokens, strict=True)
        ]
        reasons = [
            "stop" if text.stopped else reason for text, reason in zip(texts, reasons, strict=True)
        ]
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
