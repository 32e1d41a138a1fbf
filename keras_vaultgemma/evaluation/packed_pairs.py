"""Packed rows of contexts and their continuations, in which each context stands once. NumPy only.

A row is a list of groups. A group is a context, which is a segment of the row, and several
continuations of it, which are branches of the segment: all of them attend to the context and none
to another. Rows have a few lengths and batches a few sizes, so that few functions are compiled.
"""

import bisect
import itertools
from typing import NamedTuple

import numpy as np

from keras_vaultgemma.layers.kv_cache import EMPTY

BATCH_TOKENS = 2048
"""Most tokens of a batch, unless one row is longer. Each batch reads all weights, which takes as
long as 24 tokens."""

ROW_LENGTHS = (32, 64, 128, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096)
"""Lengths of rows, in tokens. Longer ones are multiples of the last."""

MAX_LENGTHS = 6
"""Most row lengths of one call, each with full batches and a smaller last one: 12 compiled
functions."""

SHORT_ROW = 256
"""Capacity of a row of short groups. The cost of attention grows with the length of rows."""


class Batch(NamedTuple):
    """Rows of one length that are computed together.

    Attributes:
        arrays: tuple of int32 arrays, the arguments of `VaultGemmaCausalLM.score_branches`.
        pairs: list of `(pair, start, end)`: the index of a pair and the range of its targets.
    """

    arrays: tuple
    pairs: list


class _Group(NamedTuple):
    """A context and some of its continuations, as ids, with the index of each pair."""

    context: tuple
    branches: list
    size: int


def pack_pairs(pairs):
    """Pack pairs of ids into batches, the longest first.

    Args:
        pairs: list of `(context, continuation)`, non-empty tuples of ids.

    Returns:
        List of `Batch`.
    """
    by_length = {}
    for row in _fill_rows(_groups(pairs)):
        length = _row_length(sum(group.size for group in row))
        by_length.setdefault(length, []).append(row)
    _merge_lengths(by_length)
    batches = []
    for length in sorted(by_length, reverse=True):
        count, rows = max(1, BATCH_TOKENS // length), by_length[length]
        batches += [_batch(rows[i : i + count], length, count) for i in range(0, len(rows), count)]
    return batches


def _merge_lengths(by_length):
    """Pad rows to another length while there are too many lengths, as few tokens as possible."""
    while len(by_length) > MAX_LENGTHS:
        lengths = sorted(by_length)
        pairs = itertools.pairwise(lengths)
        short, long = min(pairs, key=lambda pair: len(by_length[pair[0]]) * (pair[1] - pair[0]))
        by_length[long] += by_length.pop(short)


def ideal_tokens(pairs):
    """Return the number of tokens without padding if each context is computed once.

    A continuation's last token is predicted only, and not computed.
    """
    contexts = {context for context, _ in pairs}
    return sum(map(len, contexts)) + sum(len(continuation) - 1 for _, continuation in pairs)


def computed_tokens(batches):
    """Return the number of tokens in the rows of batches, padding included."""
    return sum(batch.arrays[0].size for batch in batches)


def _groups(pairs):
    """Return `_Group`s: one for each context, or several where its continuations are long."""
    by_context = {}
    for i, (context, continuation) in enumerate(pairs):
        by_context.setdefault(context, []).append((i, continuation))
    groups = []
    for context, branches in by_context.items():
        # Repeating a short context costs little, and a long row costs more than its tokens.
        limit = max(SHORT_ROW, 4 * len(context))
        size, members = len(context), []
        for i, continuation in branches:
            if members and size + len(continuation) > limit:
                groups.append(_Group(context, members, size))
                size, members = len(context), []
            members.append((i, continuation))
            size += len(continuation)
        groups.append(_Group(context, members, size))
    return groups


def _fill_rows(groups):
    """Put each group, the longest first, into the row in which it leaves the least space."""
    rows, spaces = [], []  # spaces: sorted list of (free tokens, index of the row)
    for group in sorted(groups, key=lambda group: -group.size):
        place = bisect.bisect_left(spaces, (group.size, -1))
        if place < len(spaces):
            free, index = spaces.pop(place)
        else:
            free, index = max(SHORT_ROW, _row_length(group.size)), len(rows)
            rows.append([])
        rows[index].append(group)
        bisect.insort(spaces, (free - group.size, index))
    return rows


def _row_length(tokens):
    longest = ROW_LENGTHS[-1]
    if tokens > longest:
        return -(-tokens // longest) * longest
    return ROW_LENGTHS[bisect.bisect_left(ROW_LENGTHS, tokens)]


def _batch(rows, length, most):
    """Return the `Batch` of at most `most` rows, padded to a power of two or to `most` rows."""
    shape = min(most, 1 << (len(rows) - 1).bit_length()), length
    token_ids, segments, branches = (np.zeros(shape, "int32") for _ in range(3))
    positions = np.full(shape, EMPTY, "int32")
    sources, targets = np.full(token_ids.size, -1, "int32"), np.zeros(token_ids.size, "int32")
    pairs, count = [], 0

    def write(row, start, ids, position, segment, branch):
        part = slice(start, start + len(ids))
        token_ids[row, part], positions[row, part] = ids, position + np.arange(len(ids))
        segments[row, part], branches[row, part] = segment, branch
        return part.stop

    for row, groups in enumerate(rows):
        slot = 0
        for segment, group in enumerate(groups, 1):
            size = len(group.context)
            slot = write(row, slot, group.context, 0, segment, 0)
            last = row * length + slot - 1
            for branch, (pair, continuation) in enumerate(group.branches, 1):
                end, first = count + len(continuation), row * length + slot
                slot = write(row, slot, continuation[:-1], size, segment, branch)
                sources[count:end] = [last, *range(first, row * length + slot)]
                targets[count:end] = continuation
                pairs.append((pair, count, end))
                count = end
    return Batch((token_ids, positions, segments, branches, sources, targets), pairs)
