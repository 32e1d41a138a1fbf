"""Generation with samplers that run their own loop, such as contrastive search.

keras-hub's contract for them: slots and positions are equal, every row is processed again from the
end of the shortest prompt, all rows end at one length, and each combination of lengths is compiled.
So that a prompt gets the same text in every batch, they are called for one row after another.
"""

import functools

import keras
import keras_hub
import numpy as np
from keras import ops

from keras_vaultgemma import backend
from keras_vaultgemma.data.token_ids import pad_rows
from keras_vaultgemma.generation.state import Generated, Settings
from keras_vaultgemma.generation.validation import check_finite
from keras_vaultgemma.layers import kv_cache
from keras_vaultgemma.layers.attention import segment_positions

LENGTH_BLOCK = 16
"""Rows are padded to a multiple of this length, because each length compiles a function."""

STOP_CHECK_INTERVAL = 32
"""Number of tokens between two calls of a function that ends a row, before each of which the text
is processed again."""


class SearchGenerator:
    """Counterpart of `generator.Generator` for a sampler that overrides `__call__`.

    Args:
        model, run_eagerly: as for `generator.Generator`.
        sampler: `keras_hub.samplers.Sampler`.

    Raises:
        ValueError: If `sampler` is a `SpeculativeSampler`, which needs a second model.
    """

    def __init__(self, model, sampler, run_eagerly=False):
        if isinstance(sampler, keras_hub.samplers.SpeculativeSampler):
            raise ValueError(
                "`sampler` must be one that needs no draft model. Received: a SpeculativeSampler"
            )
        self.model = model
        self.sampler = sampler
        self.variables = list(model.variables)
        self._run_eagerly = run_eagerly
        self._searches = {}

    def generate(self, rows, limits, stop_token_ids=(), settings=Settings(), ends=None):  # noqa: B008
        """Continue each row of ids, like `Generator.generate`.

        Raises:
            ValueError: If `settings` are not the defaults, because the sampler cannot apply them.
        """
        if settings != Settings():
            raise ValueError(
                "`seed`, `repetition_penalty`, `min_p` and `logit_bias` need a sampler that "
                f"chooses one token at a time. Received: {settings} with "
                f"{type(self.sampler).__name__}"
            )
        stop_token_ids = tuple(sorted(stop_token_ids))
        ends_row = (lambda i, row: False) if ends is None else ends
        interval = max(limits) if ends is None else STOP_CHECK_INTERVAL
        tokens, reasons = [], []
        for i, (row, limit) in enumerate(zip(rows, limits, strict=True)):
            new, stops = [], False
            while len(new) < limit and not stops and not (new and ends_row(i, new)):
                count = min(interval, limit - len(new))
                new += self._continue([*row, *new], count, stop_token_ids, i)
                stops = new[-1] in stop_token_ids
            tokens.append(new)
            reasons.append("stop" if stops else "length")
        return Generated(tokens, None, reasons)

    def _continue(self, row, count, stop_token_ids, number):
        """Return up to `count` new tokens of one row, up to and including a stop id."""
        length = -(-(len(row) + count) // LENGTH_BLOCK) * LENGTH_BLOCK
        # keras-hub looks for stop ids in the padding, too.
        size = self.model.backbone.vocabulary_size
        pad_id = next((i for i in range(size) if i not in stop_token_ids), 0)
        arrays = (*pad_rows([row], length, pad_id), len(row))
        if stop_token_ids not in self._searches:
            search = functools.partial(self._search, stop_token_ids=stop_token_ids or None)
            if not self._run_eagerly:
                search = backend.compile_function(search, self.variables)
            self._searches[stop_token_ids] = search
        with backend.in_32_bits():
            tokens, is_finite, seeds = self._searches[stop_token_ids](
                *(backend.as_argument(np.asarray(x, "int32")) for x in arrays),
                [ops.convert_to_tensor(v) for v in self.sampler.variables],
            )
        check_finite(0.0 if bool(is_finite) else np.nan, f"prompt {number}")
        for variable, value in zip(self.sampler.variables, seeds, strict=True):
            variable.assign(value)
        found = ops.convert_to_numpy(tokens)[0, len(row) :].tolist()
        return cut_after_stop(found[:count], stop_token_ids)

    def _search(self, token_ids, padding_mask, index, seeds, stop_token_ids):
        backbone, variables = self.model.backbone, self.sampler.variables
        mask = ops.cast(padding_mask, "bool")
        cache = backbone.empty_cache(*token_ids.shape)
        hidden_states, cache = backbone.walk(
            token_ids, segment_positions(padding_mask), cache=cache, start=0
        )
        last = ops.take(hidden_states, index - 1, axis=1)
        # Logits may be -inf, for ids that are never chosen.
        is_finite = ops.all(ops.isfinite(ops.logsumexp(self.model.logits(last[:, None]), axis=-1)))

        def next_logits(prompt, cache, index):
            token = ops.take(prompt, index - 1, axis=1)[:, None]
            cache = kv_cache.merge_heads(cache)
            states, cache = backbone.walk(
                token, ops.zeros_like(token) + index - 1, cache=cache, start=index - 1
            )
            return self.model.logits(states)[:, 0], states[:, 0], kv_cache.split_heads(cache)

        # On JAX the values of the model's variables are in the outer scope, which this one hides.
        model_state = [(v, ops.convert_to_tensor(v)) for v in self.variables]
        with keras.StatelessScope(
            state_mapping=[*zip(variables, seeds, strict=True), *model_state]
        ) as scope:
            tokens = self.sampler(
                next=next_logits,
                prompt=token_ids,
                cache=kv_cache.split_heads(cache),
                index=index,
                mask=mask,
                stop_token_ids=stop_token_ids,
                hidden_states=hidden_states,
                model=self.model,
            )
            seeds = [scope.get_current_value(v) for v in variables]
        return tokens, is_finite, seeds


def cut_after_stop(row, stop_token_ids):
    """Return a row of ids up to and including the first stop id."""
    for i, token in enumerate(row):
        if token in stop_token_ids:
            return row[: i + 1]
    return row
