"""Greedy generation in one graph of any batch and length, for exported models."""

from keras import ops

from keras_vaultgemma.generation.state import NO_TOKEN
from keras_vaultgemma.layers.kv_cache import EMPTY, KVCache, write


def greedy_ids(model, token_ids, lengths, max_new_tokens, stop_token_ids):
    """Return the most likely continuation of each row.

    Args:
        model: `VaultGemmaCausalLM`.
        token_ids: int32 tensor [B, T], padded on the right.
        lengths: int32 tensor [B]. Number of tokens of each row, at least 1.
        max_new_tokens: int32 scalar, at least 1.
        stop_token_ids: list of ids that end a row.

    Returns:
        int32 tensor [B, max_new_tokens]: new ids up to a stop id, then `NO_TOKEN`.
    """
    batch, length = ops.shape(token_ids)
    index = ops.arange(length, dtype="int32")[None]
    positions = ops.where(index < lengths[:, None], index, EMPTY)
    cache = model.backbone.empty_cache(batch, length + max_new_tokens)
    hidden, cache = model.backbone.walk(token_ids, positions, cache=cache, start=length * 0)
    last = ops.take_along_axis(hidden, lengths[:, None, None] - 1, axis=1)[:, 0]
    tokens = ops.full((batch, max_new_tokens), NO_TOKEN, dtype="int32")

    def choose(hidden, tokens, count, has_ended):
        """Return tokens with one more, the chosen one, and which rows have ended."""
        logits = model.logits(hidden[:, None])[:, 0]
        token = ops.cast(ops.argmax(logits, axis=-1), "int32")
        token = ops.where(has_ended, NO_TOKEN, token)
        for stop in stop_token_ids:
            has_ended = ops.logical_or(has_ended, token == stop)
        return write(tokens, token[:, None], count), token, has_ended

    def step(count, token, has_ended, tokens, *cache):
        positions = ops.where(has_ended, EMPTY, lengths + count - 1)[:, None]
        layers = len(cache) // 2
        cache = KVCache(cache[:layers], cache[layers:-1], cache[-1])
        hidden, cache = model.backbone.walk(
            ops.maximum(token, 0)[:, None], positions, cache=cache, start=length + count - 1
        )
        tokens, token, has_ended = choose(hidden[:, 0], tokens, count, has_ended)
        return count + 1, token, has_ended, tokens, *cache.keys, *cache.values, cache.positions

    def continues(count, token, has_ended, *_):
        return ops.logical_and(count < max_new_tokens, ops.logical_not(ops.all(has_ended)))

    tokens, token, has_ended = choose(last, tokens, length * 0, lengths < 0)
    state = (length * 0 + 1, token, has_ended, tokens)
    state = (*state, *cache.keys, *cache.values, cache.positions)
    return ops.while_loop(continues, step, state)[3]
