"""Generation with a preset, as a function: `keras-vaultgemma generate`."""

from keras_vaultgemma import backend
from keras_vaultgemma.checkpoints import presets
from keras_vaultgemma.generation.requests import read_prompts
from keras_vaultgemma.models.causal_lm import VaultGemmaCausalLM
from keras_vaultgemma.recipes.samplers import make_sampler


def generate(
    prompt,
    preset="vaultgemma_tiny",
    max_new_tokens=64,
    *,
    sampler="greedy",
    temperature=None,
    seed=None,
    dtype=None,
    stop=(),
    chat=False,
):
    """Load a preset and continue a prompt with it.

    Args:
        prompt: string.
        preset: string or path, as for `VaultGemmaCausalLM.from_preset`. Defaults to
            "vaultgemma_tiny".
        max_new_tokens: int. Largest number of tokens to generate. There are fewer if the text ends
            or the context of the model is full. Defaults to 64.
        sampler: string. A key of `samplers.SAMPLERS`. Defaults to "greedy".
        temperature: float. Temperature of the sampler. Defaults to that of the sampler.
        seed: int. Seed of the sampler. Defaults to None, for a random one.
        dtype: string. Dtype of the weights. Defaults to that of the preset.
        stop: iterable of strings that end the text.
        chat: bool. If True, the prompt is a user's turn and the reply alone is returned. Defaults
            to `False`.

    Returns:
        Iterator of strings: the prompt, then its continuation as it is generated.

    Raises:
        ValueError: If an argument is out of its range, or the prompt fills the model's context.
        KeyboardInterrupt: By the iterator, if the user interrupts generation.
    """
    backend.cache_compilations(presets.cache_home() / "compiled")
    sampler = make_sampler(sampler, temperature=temperature, seed=seed)
    model = VaultGemmaCausalLM.from_preset(preset, **({"dtype": dtype} if dtype else {}))
    model.compile(sampler=sampler)
    inputs = [{"role": "user", "content": prompt}] if chat else prompt
    context = model.backbone.max_sequence_length
    (row,) = read_prompts(inputs, model.preprocessor, model.backbone.vocabulary_size).rows
    if len(row) >= context:
        raise ValueError(
            f"PROMPT must have at most {context - 1} tokens, `<bos>` included, because the model's "
            f"context has {context}. Received: {len(row)} tokens"
        )
    stream = model.stream(inputs, max_new_tokens=min(max_new_tokens, context - len(row)), stop=stop)
    return _pieces("" if chat else model.preprocessor.detokenize([row])[0], stream)


def _pieces(prompt, stream):
    yield prompt
    yield from stream
    if stream.finish_reason == "interrupted":
        raise KeyboardInterrupt
