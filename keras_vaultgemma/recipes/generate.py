"""Generation with a preset, as a function: `keras-vaultgemma generate`."""

import json

from keras_vaultgemma.generation.requests import read_prompts
from keras_vaultgemma.recipes.sources import load_with_sampler


def generate(
    prompt,
    preset=None,
    max_new_tokens=64,
    *,
    adapter=None,
    sampler=None,
    temperature=None,
    top_k=None,
    top_p=None,
    repetition_penalty=None,
    seed=None,
    dtype=None,
    quantization=None,
    stop=(),
    chat=False,
    as_json=False,
):
    """Load a preset and continue a prompt with it.

    Args:
        prompt: string.
        preset: string or path, as for `sources.find_source`. Defaults to the base of `adapter`, and
            to "vaultgemma_tiny" without one.
        max_new_tokens: int. Largest number of tokens to generate. There are fewer if the text ends
            or the context of the model is full. Defaults to 64.
        adapter: string or path, as for `sources.find_source`. Defaults to None.
        sampler: string. A key of `samplers.SAMPLERS`. Defaults to the one that the next three
            options need, and to "greedy" without them.
        temperature: float. Temperature of the sampler. Defaults to that of the sampler.
        top_k: int. Number of likeliest tokens to sample from. Defaults to that of the sampler.
        top_p: float in (0, 1]. Sample from the likeliest tokens that have this probability
            together. Defaults to that of the sampler.
        repetition_penalty: float above 0, as for `VaultGemmaCausalLM.generate`. Defaults to 1.
        seed: int. Seed of the sampler. Defaults to None, for a random one.
        dtype: string. Dtype of the weights. Defaults to that of the preset.
        quantization: string, "int8" or "int4". Quantize the weights. Defaults to None.
        stop: iterable of strings that end the text.
        chat: bool. If True, the prompt is a user's turn and the reply alone is returned. Defaults
            to `False`.
        as_json: bool. If True, return one JSON object instead of the text: `prompt`, `text` (what
            follows it), `finish_reason` and `new_tokens`. Defaults to `False`.

    Returns:
        Iterator of strings: the prompt, then its continuation as it is generated.

    Raises:
        ValueError: If an argument is out of its range, or the prompt fills the model's context.
        KeyboardInterrupt: By the iterator, if the user interrupts generation.
    """
    sampling = dict(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    model, _ = load_with_sampler(preset, adapter, dtype, quantization, sampler, **sampling)
    inputs = [{"role": "user", "content": prompt}] if chat else prompt
    context = model.backbone.max_sequence_length
    (row,) = read_prompts(inputs, model.preprocessor, model.backbone.vocabulary_size).rows
    if len(row) >= context:
        raise ValueError(
            f"PROMPT must have at most {context - 1} tokens, `<bos>` included, because the model's "
            f"context has {context}. Received: {len(row)} tokens"
        )
    penalty = {} if repetition_penalty is None else {"repetition_penalty": repetition_penalty}
    limit = min(max_new_tokens, context - len(row))
    stream = model.stream(inputs, max_new_tokens=limit, stop=stop, **penalty)
    if as_json:
        return _json(prompt, stream)
    return _pieces("" if chat else model.preprocessor.detokenize([row])[0], stream)


def _pieces(prompt, stream):
    yield prompt
    yield from stream
    if stream.finish_reason == "interrupted":
        raise KeyboardInterrupt


def _json(prompt, stream):
    text = "".join(stream)
    reason = stream.finish_reason
    # In ASCII, which every encoding has.
    yield json.dumps(
        dict(prompt=prompt, text=text, finish_reason=reason, new_tokens=len(stream.ids))
    )
    if reason == "interrupted":
        raise KeyboardInterrupt
