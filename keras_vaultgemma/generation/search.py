"""Samplers that drive a loop of their own, such as beam and contrastive search, under keras-hub's contract.

Slot and position are the same here, every row is read again from the end of the shortest prompt, and a program is
compiled for each combination of lengths: slower than generation.py, and right.
"""

import keras
import keras_hub
import numpy as np
from keras import ops

from keras_vaultgemma import backend
from keras_vaultgemma.data.token_ids import pad_rows
from keras_vaultgemma.generation.state import Generated, Settings
from keras_vaultgemma.layers import kv_cache
from keras_vaultgemma.layers.attention import segment_positions


class SearchGenerator:
    """As `generation.Generator`, for a sampler that overrides `__call__`.

    Args:
        model, sampler, run_eagerly: as for `generation.Generator`.

    Raises:
        ValueError: for `SpeculativeSampler`, which needs a second model.
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
        """As `generation.Generator.generate`; `ends` is not asked.

        Raises:
            ValueError: for settings, which such a sampler does not know.
        """
        if settings != Settings():
            raise ValueError(
                "`seed`, `repetition_penalty`, `min_p` and `logit_bias` need a sampler that chooses one token at a "
                f"time. Received: {settings} with {type(self.sampler).__name__}"
            )
        if max(limits) <= 0:
            return Generated([[] for _ in rows], None, ["length"] * len(rows))
        total = max(len(row) + limit for row, limit in zip(rows, limits, strict=True))
        token_ids, mask = pad_rows(rows, total)
        stop_token_ids = tuple(sorted(stop_token_ids))
        if stop_token_ids not in self._searches:

            def search(*args):
                return self._search(*args, stop_token_ids or None)

            self._searches[stop_token_ids] = (
                search if self._run_eagerly else backend.compile_function(search, self.variables)
            )
        seeds = [ops.convert_to_tensor(v) for v in self.sampler.variables]
        arrays = (np.asarray(x, "int32") for x in (token_ids, mask, min(map(len, rows))))
        tokens, seeds = self._searches[stop_token_ids](*map(backend.as_argument, arrays), seeds)
        for variable, value in zip(self.sampler.variables, seeds, strict=True):
            variable.assign(value)
        generated = [
            cut_after_stop(tokens[len(row) : len(row) + limit], stop_token_ids)
            for tokens, row, limit in zip(
                ops.convert_to_numpy(tokens).tolist(), rows, limits, strict=True
            )
        ]
        reasons = ["stop" if row and row[-1] in stop_token_ids else "length" for row in generated]
        return Generated(generated, None, reasons)

    def stream(self, rows, limits, stop_token_ids=(), settings=Settings(), length=None):  # noqa: B008
        """As `generation.Generator.stream`, all at once at the end: a search may change its mind until then."""
        yield self.generate(rows, limits, stop_token_ids, settings).tokens, None

    def _search(self, token_ids, padding_mask, index, seeds, stop_token_ids):
        backbone, variables = self.model.backbone, self.sampler.variables
        mask = ops.cast(padding_mask, "bool")
        cache = backbone.empty_cache(*token_ids.shape)
        hidden_states, cache = backbone.walk(
            token_ids, segment_positions(padding_mask), cache=cache, start=0
        )

        def next_logits(prompt, cache, index):
            token = ops.slice(prompt, (0, index - 1), (prompt.shape[0], 1))
            cache = kv_cache.merge_heads(cache)
            states, cache = backbone.walk(
                token, ops.zeros_like(token) + index - 1, cache=cache, start=index - 1
            )
            return self.model.logits(states)[:, 0], states[:, 0], kv_cache.split_heads(cache)

        # On JAX the outer scope holds the model's variables, and an inner scope hides it.
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
        return tokens, seeds


def cut_after_stop(row, stop_token_ids):
    """A row of ids up to and with the first stop id."""
    for i, token in enumerate(row):
        if token in stop_token_ids:
            return row[: i + 1]
    return row
