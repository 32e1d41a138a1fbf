"""Prompt-lookup speculative decoding.

Where the last few tokens occur earlier in the text, the tokens that followed them there are drafted
(Saxena, 2023, https://github.com/apoorvumang/prompt-lookup-decoding). The model verifies the draft
in one forward pass, which costs little more than one token because reading the weights dominates,
and accepts as many tokens as greedy decoding would have chosen. The result equals greedy decoding
(Leviathan et al., 2023, https://arxiv.org/abs/2211.17192) up to ties within rounding.

The rows of a batch are decoded one after another, because they accept drafts of different lengths.
"""

import numpy as np
from keras import ops

from keras_vaultgemma import backend
from keras_vaultgemma.generation import sampling
from keras_vaultgemma.generation.generator import Generator
from keras_vaultgemma.generation.state import Generated
from keras_vaultgemma.generation.validation import check_finite
from keras_vaultgemma.layers.kv_cache import EMPTY

DRAFT_LENGTH = 7
"""Number of drafted tokens. With the last chosen token, a forward pass has 8."""

MAX_MATCH_LENGTH = 3
"""Number of last tokens that are looked up in the text first; then fewer are."""


class PromptLookup:
    """Counterpart of `generator.Generator` that drafts tokens from the text.

    Args:
        model, run_eagerly: as for `generator.Generator`.
        sampler: `keras_hub.samplers.GreedySampler`.

    Raises:
        ValueError: If `sampler` is not greedy.
    """

    def __init__(self, model, sampler, run_eagerly=False):
        rule = sampling.rule_of(sampler)
        if rule is None or rule.kind != "greedy":
            raise ValueError(
                f"`prompt_lookup` needs `sampler` to be greedy. Received: {type(sampler).__name__}"
            )
        self._generator = Generator(model, sampler, run_eagerly)
        self.variables = self._generator.variables
        self._model = model
        self._choose = self._generator.compile(self._most_likely)
        self._verify = self._generator.compile(self._read_and_choose, donate=(2,))

    def generate(self, rows, limits, stop_token_ids=(), settings=None, ends=None):
        """Continue each row of ids, like `Generator.generate`."""
        results = []
        for i, (row, limit) in enumerate(zip(rows, limits, strict=True)):
            tokens, log_probs = [], []
            for (new,), (probs,) in self.stream([row], [limit], stop_token_ids, settings):
                tokens += new
                log_probs += probs
                if ends is not None and ends(i, tokens):
                    break
            results.append((tokens, log_probs))
        reasons = [
            "stop" if tokens and tokens[-1] in stop_token_ids else "length" for tokens, _ in results
        ]
        return Generated(
            [tokens for tokens, _ in results], [probs for _, probs in results], reasons
        )

    def stream(self, rows, limits, stop_token_ids=(), settings=None, interval=None):
        """Iterate over the new tokens of one row, as many at a time as were accepted.

        Raises:
            ValueError: If `settings` adjust probabilities, which greedy decoding does not have.
        """
        if settings is not None and settings.adjusts:
            raise ValueError(
                "`prompt_lookup` needs greedy decoding without `repetition_penalty`, `min_p` or "
                f"`logit_bias`. Received: {settings}"
            )
        (row,), (limit,) = rows, limits
        if limit <= 0:
            return
        hidden, cache, slot = self._generator.prefill([row], limit)
        tokens, log_probs = map(_first_row, self._choose(hidden[:, None]))
        text, remaining = list(row), limit
        while True:
            stop = next((i for i, token in enumerate(tokens) if token in stop_token_ids), None)
            count = min(remaining, len(tokens) if stop is None else stop + 1)
            check_finite(log_probs[:count])
            yield [tokens[:count]], [log_probs[:count]]
            text, remaining = text + tokens[:count], remaining - count
            if stop is not None or remaining == 0:
                return
            # No drafts at the end of the cache, because capacity for them could cost a four times
            # larger one.
            fits = slot + 1 + DRAFT_LENGTH <= cache.positions.shape[1]
            drafted = draft(text, min(DRAFT_LENGTH, remaining - 1)) if fits else []
            inputs = _padded_inputs([text[-1], *drafted], len(text) - 1)
            *found, cache = self._verify(*map(_int, inputs), cache, _int(slot))
            tokens, log_probs = map(_first_row, found)
            accepted = next(
                (i for i, token in enumerate(drafted) if token != tokens[i]), len(drafted)
            )
            tokens, log_probs = tokens[: accepted + 1], log_probs[: accepted + 1]
            # Slots of rejected tokens are overwritten before any query attends to their positions.
            slot += accepted + 1

    def _read_and_choose(self, token_ids, positions, cache, start):
        states, cache = self._model.backbone.walk(token_ids, positions, cache=cache, start=start)
        return *self._most_likely(states), cache

    def _most_likely(self, states):
        """Return the most likely token after each of states [B, T, D], and its log-probability."""
        logits = self._model.logits(states)
        tokens = ops.cast(ops.argmax(logits, axis=-1), "int32")
        chosen = ops.take_along_axis(logits, tokens[:, :, None], axis=2)[:, :, 0]
        return tokens, chosen - ops.logsumexp(logits, axis=-1)


def _padded_inputs(token_ids, start):
    """Return ids and positions [1, T] of one token, or of a draft padded to its full length.

    Two lengths for all drafts, because each length compiles a function.
    """
    length = DRAFT_LENGTH + 1 if len(token_ids) > 1 else 1
    padded, positions = np.zeros((1, length)), np.full((1, length), EMPTY)
    padded[0, : len(token_ids)] = token_ids
    positions[0, : len(token_ids)] = start + np.arange(len(token_ids))
    return padded, positions


def draft(text, length):
    """Return the ids that followed the latest earlier occurrence of the last ids of a text.

    Args:
        text: non-empty list of ids.
        length: int. Maximum number of drafted ids.

    Returns:
        List of ids, empty if the last id does not occur earlier.
    """
    if length <= 0:
        return []
    array = np.asarray(text)
    for count in range(min(MAX_MATCH_LENGTH, len(text) - 1), 0, -1):
        windows = np.lib.stride_tricks.sliding_window_view(array[:-1], count)
        starts = np.flatnonzero((windows == array[-count:]).all(axis=1))
        if starts.size:
            return text[starts[-1] + count : starts[-1] + count + length]
    return []


def _first_row(tensor):
    return ops.convert_to_numpy(tensor)[0].tolist()


def _int(x):
    return backend.as_argument(np.asarray(x, "int32"))
