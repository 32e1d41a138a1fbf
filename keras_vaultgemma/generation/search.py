"""Generation with samplers that run their own loop, such as beam and contrastive search.

keras-hub's contract for them: slots and positions are equal, every row is processed again from the
end of the shortest prompt, and each combination of lengths is compiled. This is correct and slower
than `generator.py`.
"""

import functools

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
        """Continue each row of ids, like `Generator.generate`, without calling `ends`.

        Raises:
            ValueError: If `settings` are not the defaults, because the sampler cannot apply them.
        """
        if settings != Settings():
            raise ValueError(
                "`seed`, `repetition_penalty`, `min_p` and `logit_bias` need a sampler that "
                f"chooses one token at a time. Received: {settings} with "
                f"{type(self.sampler).__name__}"
            )
        if max(limits) <= 0:
            return Generated([[] for _ in rows], None, ["length"] * len(rows))
        total = max(len(row) + limit for row, limit in zip(rows, limits, strict=True))
        token_ids, mask = pad_rows(rows, total)
        stop_token_ids = tuple(sorted(stop_token_ids))
        if stop_token_ids not in self._searches:
            search = functools.partial(self._search, stop_token_ids=stop_token_ids or None)
            if not self._run_eagerly:
                search = backend.compile_function(search, self.variables)
            self._searches[stop_token_ids] = search
        seeds = [ops.convert_to_tensor(v) for v in self.sampler.variables]
        arrays = (np.asarray(x, "int32") for x in (token_ids, mask, min(map(len, rows))))
        tokens, seeds = self._searches[stop_token_ids](*map(backend.as_argument, arrays), seeds)
        for variable, value in zip(self.sampler.variables, seeds, strict=True):
            variable.assign(value)
        tokens = ops.convert_to_numpy(tokens).tolist()
        generated = [
            cut_after_stop(found[len(row) : len(row) + limit], stop_token_ids)
            for found, row, limit in zip(tokens, rows, limits, strict=True)
        ]
        reasons = ["stop" if row and row[-1] in stop_token_ids else "length" for row in generated]
        return Generated(generated, None, reasons)

    def stream(self, rows, limits, stop_token_ids=(), settings=Settings(), interval=None):  # noqa: B008
        """Yield all tokens at once, because a search may revise them until its end."""
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
        return tokens, seeds


def cut_after_stop(row, stop_token_ids):
    """Return a row of ids up to and including the first stop id."""
    for i, token in enumerate(row):
        if token in stop_token_ids:
            return row[: i + 1]
    return row
