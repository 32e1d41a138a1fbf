"""Continue a prompt with a preset: what `keras-vaultgemma generate` does."""

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
    """Continue a prompt.

    Args:
        prompt: string.
        preset: what `VaultGemmaCausalLM.from_preset` takes.
        max_new_tokens: int. Fewer are generated where the text or the model's context ends.
        sampler: string, a key of `samplers.SAMPLERS`.
        temperature, seed: of the sampler, or None for its defaults.
        dtype: string, of the weights. Defaults to the preset's.
        stop: list of strings that end the text.
        chat: bool. If True, the prompt is a user's turn.

    Returns:
        Iterator of strings: the prompt and its continuation as it is generated; in a chat the reply alone.

    Raises:
        ValueError: for an argument out of its range, or a prompt that fills the model's context.
        KeyboardInterrupt: by the iterator, where the user interrupted generation.
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
            f"PROMPT must have at most {context - 1} tokens, `<bos>` included: the model's context is {context}. "
            f"Received: {len(row)} tokens"
        )
    stream = model.stream(inputs, max_new_tokens=min(max_new_tokens, context - len(row)), stop=stop)
    return _pieces("" if chat else model.preprocessor.detokenize([row])[0], stream)


def _pieces(prompt, stream):
    yield prompt
    yield from stream
    if stream.finish_reason == "interrupted":
        raise KeyboardInterrupt
