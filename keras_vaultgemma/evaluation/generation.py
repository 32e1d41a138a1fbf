"""Greedy text until a stop string, by the rules of lm-evaluation-harness."""

import contextlib
from collections.abc import Mapping

import keras_hub

from keras_vaultgemma.data.token_ids import pad_rows, unpad_rows
from keras_vaultgemma.evaluation.parts import Parts

BATCH_ROWS = 16
"""Prompts that are continued together."""

MAX_NEW_TOKENS = 256
"""Most tokens of a request that does not give a number, as in the harness."""

LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""Names of the number of tokens, the first of which counts."""


def generate_until(model, requests, max_length, truncation, checkpoint=None, verbose=True):
    """Continue prompts greedily, each until its first stop string.

    Args:
        model: `VaultGemmaCausalLM` with a preprocessor.
        requests: list of `(prompt, options)`: a string, and a dict with `until`, a string or list
            of strings, and the number of tokens under one of the names in `LENGTHS`.
        max_length: int. Positions of the prompt and its continuation. Longer prompts are cut.
        truncation: string, as for `score_pairs`.
        checkpoint: path of a folder or None, as for `score_pairs`.
        verbose: bool, as for `score_pairs`.

    Returns:
        List of strings, each without its stop string.

    Raises:
        ValueError: If a request asks for sampling, or for as many tokens as there are positions.
    """
    texts = [prompt for prompt, _ in requests]
    prompts = model.preprocessor.tokenize_prompts(texts) if texts else []
    groups = {}
    for i, (_, options) in enumerate(requests):
        groups.setdefault(_limits(options, max_length), []).append(i)
    outputs = [None] * len(requests)
    for (until, new_tokens), members in groups.items():
        rows = [_cut(prompts[i], max_length - new_tokens, truncation) for i in members]
        order = sorted(range(len(members)), key=lambda k: -len(rows[k]))
        batches = [order[k : k + BATCH_ROWS] for k in range(0, len(order), BATCH_ROWS)]
        arrays = [pad_rows([rows[k] for k in batch], len(rows[batch[0]])) for batch in batches]
        generated = _generate(model, arrays, until, new_tokens, checkpoint, verbose)
        for batch, found in zip(batches, generated, strict=True):
            ids = unpad_rows(found["token_ids"], found["padding_mask"])
            for k, text in zip(batch, model.preprocessor.detokenize(ids), strict=True):
                outputs[members[k]] = _before_stop(text, until)
    return outputs


def _generate(model, arrays, until, new_tokens, checkpoint, verbose):
    """Return `{"token_ids", "padding_mask"}` of the continuations of each padded batch."""
    tokenizer = model.preprocessor.tokenizer
    ends = [i for i in (tokenizer.end_token_id, tokenizer.end_of_turn_id) if i is not None]

    def generate(token_ids, padding_mask):
        rows = model.generate(
            unpad_rows(token_ids, padding_mask),
            max_new_tokens=new_tokens,
            stop=list(until),
            stop_token_ids=ends,
            strip_prompt=True,
        )
        return dict(zip(("token_ids", "padding_mask"), pad_rows(rows, new_tokens), strict=True))

    options = {"until": until, "new_tokens": new_tokens}
    with _greedy(model):
        return Parts(checkpoint).compute(generate, arrays, model, options, "generation", verbose)


@contextlib.contextmanager
def _greedy(model):
    """Let the model be greedy for a block, whatever sampler it is compiled with."""
    sampler = model.sampler
    if type(sampler) is not keras_hub.samplers.GreedySampler:
        model.sampler = keras_hub.samplers.GreedySampler()
    try:
        yield
    finally:
        model.sampler = sampler


def _limits(options, max_length):
    """Return a request's stop strings, a tuple, and its number of new tokens."""
    if not isinstance(options, Mapping):
        raise ValueError(f"The options of a request must be a dict. Received: {options!r}")
    if options.get("do_sample", options.get("temperature") or 0):
        raise ValueError(
            f"Requests must be greedy, with do_sample=False. Received: {dict(options)!r}"
        )
    until = options.get("until") or ()
    until = (until,) if isinstance(until, str) else tuple(until)
    given = [options[name] for name in LENGTHS if options.get(name) is not None]
    new_tokens = int(given[0]) if given else MAX_NEW_TOKENS
    if not 1 <= new_tokens < max_length:
        raise ValueError(
            f"Requests must be for 1 to {max_length - 1} new tokens, because the model has "
            f"{max_length} positions. Received: {new_tokens}"
        )
    return tuple(stop for stop in until if stop), new_tokens


def _cut(row, length, truncation):
    if len(row) <= length:
        return row
    return [row[0], *row[len(row) - length + 1 :]] if truncation == "keep_bos" else row[-length:]


def _before_stop(text, until):
    for stop in until:  # one after the other, as the harness does
        text = text.split(stop)[0]
    return text
