"""Prompt-lookup speculative decoding: what a text repeats is read many tokens at a time.

Where the last few tokens have stood in the text before, what followed them there is a good guess of what follows now
(Saxena, 2023, github.com/apoorvumang/prompt-lookup-decoding). The model reads the guess in one pass, which costs little
more than reading one token since the time goes into reading weights, and keeps as much of it as it would have chosen
itself. The tokens are those of greedy decoding (Leviathan et al., 2023, arXiv:2211.17192), up to ties within rounding.

The rows of a batch are decoded one after another: they would accept guesses of different lengths.
"""

import numpy as np
from keras import ops

from keras_vaultgemma import backend
from keras_vaultgemma.generation import sampling
from keras_vaultgemma.generation.generator import Generator
from keras_vaultgemma.generation.state import Generated
from keras_vaultgemma.layers.kv_cache import EMPTY

DRAFT = 7
"""Tokens guessed at once. With the last token known that is a pass of 8 rows."""

LONGEST_MATCH = 3
"""Tokens that have to repeat, at most; then fewer are tried."""


class PromptLookup:
    """As `generation.Generator`, for greedy decoding.

    Args:
        model: as for `generation.Generator`.
        sampler: must be greedy.
        run_eagerly: as for `generation.Generator`.

    Raises:
        ValueError: for another sampler.
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
        self._check = self._generator.compile(self._read_and_choose, donate=(2,))

    def generate(self, rows, limits, stop_token_ids=(), settings=None, ends=None):
        """As `generation.Generator.generate`."""
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

    def stream(self, rows, limits, stop_token_ids=(), settings=None, length=None):
        """As `generation.Generator.stream`, for one row; yields as many tokens as were accepted at once.

        Raises:
            ValueError: for settings: they would change what greedy decoding chooses.
        """
        if settings is not None and settings.adjusts:
            raise ValueError(
                "`prompt_lookup` follows greedy decoding, without `repetition_penalty`, `min_p` or `logit_bias`. "
                f"Received: {settings}"
            )
        (row,), (limit,) = rows, limits
        if limit <= 0:
            return
        hidden, cache, slot = self._generator.prefill([row], limit)
        token, log_prob = self._choose(hidden[:, None])
        new, log_probs = (
            ops.convert_to_numpy(token)[0].tolist(),
            ops.convert_to_numpy(log_prob)[0].tolist(),
        )
        text, left = list(row), limit
        while True:
            stop = next((i for i, token in enumerate(new) if token in stop_token_ids), None)
            kept = min(left, len(new) if stop is None else stop + 1)
            yield [new[:kept]], [log_probs[:kept]]
            text, left = text + new[:kept], left - kept
            if stop is not None or left == 0:
                return
            # At the end of the cache one by one: with room for guesses it could be four times as large.
            fits = slot + 1 + DRAFT <= cache.positions.shape[1]
            guess = draft(text, min(DRAFT, left - 1)) if fits else []
            # One token or the whole length: two programs, whatever was guessed.
            length = DRAFT + 1 if guess else 1
            read = np.zeros((1, length), "int32")
            read[0, : 1 + len(guess)] = [text[-1], *guess]
            positions = len(text) - 1 + np.arange(length, dtype="int32")[None]
            positions[0, 1 + len(guess) :] = EMPTY
            read, positions, start = map(
                backend.as_argument, (read, positions, np.asarray(slot, "int32"))
            )
            tokens, found, cache = self._check(read, positions, cache, start)
            new = ops.convert_to_numpy(tokens)[0].tolist()
            agreed = next((i for i, token in enumerate(guess) if token != new[i]), len(guess))
            new, log_probs = (
                new[: agreed + 1],
                ops.convert_to_numpy(found)[0, : agreed + 1].tolist(),
            )
            # Slots of guesses that were refused are written again before a query comes to their positions.
            slot += agreed + 1

    def _read_and_choose(self, token_ids, positions, cache, start):
        states, cache = self._model.backbone.walk(token_ids, positions, cache=cache, start=start)
        return *self._most_likely(states), cache

    def _most_likely(self, states):
        """The most likely next token after each hidden state [B, T, D], and its log-probability: [B, T] each."""
        logits = self._model.logits(states)
        tokens = ops.cast(ops.argmax(logits, axis=-1), "int32")
        chosen = ops.take_along_axis(logits, tokens[:, :, None], axis=2)[:, :, 0]
        return tokens, chosen - ops.logsumexp(logits, axis=-1)


def draft(text, length):
    """At most `length` ids that followed the latest earlier place where the last ids of `text` stood; [] if none."""
    if length <= 0:
        return []
    array = np.asarray(text)
    for match in range(min(LONGEST_MATCH, len(text) - 1), 0, -1):
        windows = np.lib.stride_tricks.sliding_window_view(array[:-1], match)
        places = np.flatnonzero((windows == array[-match:]).all(axis=1))
        if places.size:
            return text[places[-1] + match : places[-1] + match + length]
    return []
