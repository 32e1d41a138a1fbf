"""Beam search with finished hypotheses.

In each step, the candidates of a row are its beams, each with one more token. Of the `num_beams`
most likely candidates, those that end (with a stop id, with a stop string, or at the row's limit)
become finished hypotheses. The `num_beams` most likely ones that do not end are the next beams. A
hypothesis is scored by its log-probability divided by its number of tokens to the power of
`length_penalty`. A row's search ends when it has `num_beams` finished hypotheses and its best beam,
scored at its present length, is not better than the worst of them. This is what transformers does
with `early_stopping=False`.

Each row has its own limit, hypotheses and end, and its beams are rows of the cache in which
`generator.py` decodes. So a prompt gets the same result in every batch.
"""

import functools
from typing import NamedTuple

import numpy as np
from keras import ops

from keras_vaultgemma import backend
from keras_vaultgemma.generation import sampling
from keras_vaultgemma.generation.generator import Generator
from keras_vaultgemma.generation.state import NO_TOKEN, Generated, Settings, pad_list
from keras_vaultgemma.generation.validation import check_finite
from keras_vaultgemma.layers.kv_cache import take_rows


class Hypothesis(NamedTuple):
    """A continuation of a prompt.

    Attributes:
        tokens: list of ids.
        log_probs: list of floats. Log-probability of each token by the model itself.
        score: float. Sum of the log-probabilities by which candidates are ranked, which are those
            after temperature and settings; of a finished hypothesis, after the length penalty.
    """

    tokens: list
    log_probs: list
    score: float


class RowSearch:
    """The search for one prompt.

    Args:
        limit: int. Maximum number of new tokens.
        num_beams: int.
        length_penalty: float.
        ends: function of a list of new tokens that returns True if they end the text.

    Attributes:
        beams: list of `Hypothesis`, best first.
        parents: list of ints. Index of the beam that each of `beams` continues.
        finished: list of finished `Hypothesis`, best first.
        is_done: bool.
    """

    def __init__(self, limit, num_beams, length_penalty, ends):
        self._limit, self._num_beams = limit, num_beams
        self._length_penalty, self._ends = length_penalty, ends
        self.beams, self.parents, self.finished = [Hypothesis([], [], 0.0)], [0], []
        self.is_done = limit <= 0

    def advance(self, scores, tokens, log_probs):
        """Continue each beam by one token.

        Args:
            scores: float32 NumPy array [beams, K]. Log-probabilities of the likeliest tokens after
                each beam, by which candidates are ranked.
            tokens: int array [beams, K]. These tokens.
            log_probs: float32 array [beams, K]. Their log-probabilities by the model itself.
        """
        count = len(self.beams)
        totals = np.array([[beam.score] for beam in self.beams], "float32") + scores[:count]
        length = len(self.beams[0].tokens) + 1
        beams, parents = [], []
        for rank, index in enumerate(np.argsort(-totals, axis=None, kind="stable")):
            if rank >= self._num_beams and (len(beams) == self._num_beams or length == self._limit):
                break
            parent, column = divmod(int(index), totals.shape[1])
            if totals[parent, column] == -np.inf:
                break
            candidate = Hypothesis(
                [*self.beams[parent].tokens, int(tokens[parent, column])],
                [*self.beams[parent].log_probs, float(log_probs[parent, column])],
                float(totals[parent, column]),
            )
            if length == self._limit or self._ends(candidate.tokens):
                if rank < self._num_beams:
                    self._finish(candidate)
            elif len(beams) < self._num_beams:
                beams.append(candidate)
                parents.append(parent)
        self.beams, self.parents = beams, parents
        self.is_done = not beams or not self._may_improve(length)

    def _finish(self, hypothesis):
        score = hypothesis.score / len(hypothesis.tokens) ** self._length_penalty
        self.finished.append(hypothesis._replace(score=score))
        self.finished.sort(key=lambda finished: -finished.score)
        del self.finished[self._num_beams :]

    def _may_improve(self, length):
        if len(self.finished) < self._num_beams:
            return True
        return self.beams[0].score / length**self._length_penalty > self.finished[-1].score


class BeamSearch:
    """Counterpart of `generator.Generator` for a `keras_hub.samplers.BeamSampler`.

    Args:
        model, run_eagerly: as for `generator.Generator`.
        sampler: `keras_hub.samplers.BeamSampler`, of which `num_beams` and `temperature` are used.
    """

    def __init__(self, model, sampler, run_eagerly=False):
        self._generator = Generator(model, sampler, run_eagerly)
        self._model, self._run_eagerly = model, run_eagerly
        self._num_beams, self._temperature = sampler.num_beams, sampler.temperature
        self._expand = self._generator.compile(take_rows)
        self._steps = {}
        self.variables = self._generator.variables

    def generate(self, rows, limits, stop_token_ids=(), settings=Settings(), ends=None):  # noqa: B008
        """Continue each row of ids, like `Generator.generate`.

        `settings` change the probabilities by which candidates are ranked; a seed has no effect.
        """

        def ends_row(i, tokens):
            return tokens[-1] in stop_token_ids or (ends is not None and ends(i, tokens))

        penalty = 1.0 if settings.length_penalty is None else settings.length_penalty
        searches = [
            RowSearch(limit, self._num_beams, penalty, functools.partial(ends_row, i))
            for i, limit in enumerate(limits)
        ]
        if max(limits) > 0:
            self._search(searches, rows, max(limits), len(set(stop_token_ids)), settings)
        best = [search.finished[0] if search.finished else search.beams[0] for search in searches]
        reasons = [
            "stop" if found.tokens and found.tokens[-1] in stop_token_ids else "length"
            for found in best
        ]
        return Generated([f.tokens for f in best], [f.log_probs for f in best], reasons)

    def _search(self, searches, rows, capacity, stop_count, settings):
        """Advance the searches until all are done."""
        size = self._model.backbone.vocabulary_size
        # Of one beam, at most `num_beams` continuations are used and `stop_count` end.
        count = min(size, self._num_beams + stop_count)
        rank, begin = self._compiled(count, settings.adjusts)
        hidden, cache, start = self._generator.prefill(rows, capacity)
        slots = cache.positions.shape[1]
        candidates = rank(hidden, self._controls(rows, slots, settings))
        width, step = 1, begin()
        while True:
            scores, tokens, log_probs = map(ops.convert_to_numpy, candidates)
            for i, search in enumerate(searches):
                if not search.is_done:
                    part = slice(i * width, (i + 1) * width)
                    check_finite(log_probs[part][: len(search.beams)], f"prompt {i}")
                    search.advance(scores[part], tokens[part], log_probs[part])
            if all(search.is_done for search in searches):
                return
            if width == 1 < self._num_beams:
                width = self._num_beams
                cache = self._expand(cache, _int(np.repeat(np.arange(len(rows)), width)))
            beams, parents = _next_rows(searches, width)
            texts = [[*rows[i // width], *beam] for i, beam in enumerate(beams)]
            *candidates, cache = step(
                _int(parents),
                _int([text[-1] for text in texts]),
                _int([len(text) - 1 for text in texts]),
                _int(start),
                self._controls(texts, slots, settings),
                cache,
            )
            start += 1

    def _compiled(self, count, adjusts):
        """Return compiled functions of `count` candidates: the first step, and a loop's others."""
        if (count, adjusts) not in self._steps:
            compile = self._generator.compile
            rank = compile(functools.partial(self._rank, count))
            step = compile(functools.partial(self._extend, count), donate=(5,))
            begin = lambda: step  # noqa: E731
            if not self._run_eagerly:
                begin = backend.record_step(step, self.variables)
            self._steps[count, adjusts] = rank, begin
        return self._steps[count, adjusts]

    def _extend(self, count, parents, tokens, positions, slot, controls, cache):
        """Read one token of each beam, and rank the next ones.

        Args:
            count: int K.
            parents: int32 [N]. Row of the cache that each beam continues.
            tokens, positions: int32 [N]. The last token of each beam, and its position.
            slot: int32 scalar. Slot of these tokens.
            controls: as for `_rank`.
            cache: `KVCache` of N rows.

        Returns:
            Tuple of what `_rank` returns and the cache.
        """
        states, cache = self._model.backbone.walk(
            tokens[:, None], positions[:, None], cache=take_rows(cache, parents), start=slot
        )
        return *self._rank(count, states[:, 0], controls), cache

    def _rank(self, count, hidden, controls):
        """Return the most likely next tokens.

        Args:
            count: int K.
            hidden: float [N, D].
            controls: tuple of the ids of each text, int32 [N, S], and of the settings as tensors;
                empty if they adjust nothing.

        Returns:
            Tuple of [N, K] each: the log-probabilities by which they are ranked, the tokens, and
            their log-probabilities by the model itself.
        """
        logits = self._model.logits(hidden[:, None])[:, 0]
        log_probs = adjusted = backend.log_softmax(logits)
        if controls:
            seen, penalty, min_p, bias_ids, bias = controls
            logits = sampling.repetition_penalty(logits, seen, penalty)
            logits = sampling.logit_bias(logits, bias_ids, bias)
        if controls or self._temperature != 1:
            # The maximum first, because of biases of 1e30; see `sampling.probabilities`.
            logits = logits - ops.max(logits, axis=-1, keepdims=True)
            adjusted = backend.log_softmax(logits / self._temperature)
        if controls:
            probabilities = ops.exp(adjusted)
            least = min_p * ops.max(probabilities, axis=-1, keepdims=True)
            adjusted = ops.where(probabilities >= least, adjusted, -float("inf"))
        scores, tokens = backend.top_k(adjusted, count)
        return scores, tokens, ops.take_along_axis(log_probs, tokens, axis=1)

    def _controls(self, texts, slots, settings):
        if not settings.adjusts:
            return ()
        seen = np.full((len(texts), slots), NO_TOKEN)
        for i, text in enumerate(texts):
            seen[i, : len(text)] = text
        return (
            _int(seen),
            _float(settings.repetition_penalty),
            _float(settings.min_p),
            _int(pad_list(settings.logit_bias)),
            _float(pad_list(settings.logit_bias.values())),
        )


def _next_rows(searches, width):
    """Return the new tokens of each row of the next step, and the row of the cache it continues.

    Rows without a beam, which are those of finished searches and missing ones, repeat another.
    """
    rows, parents = [], []
    for i, search in enumerate(searches):
        beams = [] if search.is_done else [beam.tokens for beam in search.beams]
        missing = width - len(beams)
        rows += beams + (beams[:1] or [[0]]) * missing
        parents += [i * width + parent for parent in search.parents[: len(beams)] + [0] * missing]
    return rows, parents


def _int(x):
    return backend.as_argument(np.asarray(x, "int32"))


def _float(x):
    return backend.as_argument(np.asarray(x, "float32"))
