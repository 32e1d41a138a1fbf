"""Packed rows of pairs: every token once, few tokens of padding, few shapes."""

import numpy as np
import pytest

from keras_vaultgemma.evaluation.packed_pairs import computed_tokens, ideal_tokens, pack_pairs

pytestmark = pytest.mark.any_backend


def random_pairs(seed, items, choices, context, continuation):
    """Pairs whose lengths are uniform within two ranges, such as those of a benchmark."""
    rng = np.random.default_rng(seed)

    def ids(bounds):
        return tuple(rng.integers(3, 1000, rng.integers(*bounds)).tolist())

    return [
        (shared, ids(continuation))
        for shared in (ids(context) for _ in range(items))
        for _ in range(choices)
    ]


CASES = {
    "two long choices": random_pairs(0, 300, 2, (8, 40), (3, 90)),
    "sentences": [((2,), ids) for _, ids in random_pairs(1, 1000, 2, (1, 2), (5, 20))],
    "long contexts": random_pairs(2, 120, 4, (700, 1000), (5, 40)),
    "one token": random_pairs(3, 200, 2, (30, 200), (1, 2)),
    "all kinds": [
        pair
        for i, bounds in enumerate([(1, 30), (30, 300), (300, 1000), (1000, 3000)])
        for pair in random_pairs(i, 60, 3, bounds, (1, 60))
    ],
}


@pytest.mark.parametrize("name", CASES)
def test_batches_have_few_shapes_and_little_padding(name):
    pairs = CASES[name]
    batches = pack_pairs(pairs)
    assert len({tuple(x.shape for x in batch.arrays) for batch in batches}) <= 12
    assert computed_tokens(batches) <= 1.3 * ideal_tokens(pairs)
    assert sorted(i for batch in batches for i, _, _ in batch.pairs) == list(range(len(pairs)))


@pytest.mark.parametrize("name", ["two long choices", "one token", "all kinds"])
def test_what_each_source_attends_to_is_its_context_and_the_continuation_so_far(name):
    pairs = CASES[name]
    for batch in pack_pairs(pairs):
        token_ids, positions, segments, branches, sources, targets = batch.arrays
        length = token_ids.shape[1]
        for i, start, end in batch.pairs:
            context, continuation = pairs[i]
            assert tuple(targets[start:end]) == continuation
            for k in {0, len(continuation) - 1}:
                row, slot = divmod(sources[start + k], length)
                is_seen = (segments[row] == segments[row, slot]) & (
                    (branches[row] == 0) | (branches[row] == branches[row, slot])
                )
                is_seen &= (positions[row] >= 0) & (positions[row] <= positions[row, slot])
                order = np.argsort(positions[row, is_seen])
                assert tuple(token_ids[row, is_seen][order]) == context + continuation[:k]
                assert positions[row, is_seen].max() + 1 == is_seen.sum()


def test_no_pairs_are_no_batches():
    assert pack_pairs([]) == []
    assert ideal_tokens([]) == computed_tokens([]) == 0
