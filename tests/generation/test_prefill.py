import itertools

import keras_hub
import numpy as np
import pytest
import reference
from common import random_backbone, to_numpy

from keras_vaultgemma import VaultGemmaCausalLM, backend
from keras_vaultgemma.generation import prefill
from keras_vaultgemma.generation.generator import Generator
from keras_vaultgemma.generation.prefill import (
    Prefill,
    cache_slots,
    chunk_lengths,
    pack_prompts,
    prefill_cost,
)

SLIDING = dict(
    layer_types=["sliding_attention", "full_attention"], sliding_window_size=5, num_layers=2
)


@pytest.fixture(params=[pytest.param(dict(num_layers=2), marks=pytest.mark.first_backend), SLIDING])
def backbone(request):
    return random_backbone(num_key_value_heads=2, **request.param)


def greedy(backbone, rows, count):
    model = VaultGemmaCausalLM(backbone)
    return (
        Generator(model, keras_hub.samplers.GreedySampler())
        .generate(rows, [count] * len(rows))
        .tokens
    )


def test_a_prompt_longer_than_a_chunk(backbone, monkeypatch):
    monkeypatch.setattr(prefill, "CHUNKS", (8, 4))
    rows = [list(range(2, 23)), [5, 6]]
    assert greedy(backbone, rows, 4) == [reference.greedy(backbone, row, 4) for row in rows]


def test_packed_prompts_do_not_attend_to_each_other(backbone, monkeypatch):
    monkeypatch.setattr(prefill, "CHUNKS", (8, 4))
    monkeypatch.setattr(prefill, "CHUNK_COST", 1)
    rows = [list(range(2, 23)), [5, 6], [9], list(range(40, 50)), [5, 6]]
    assert len(pack_prompts([len(row) for row in rows], 256)) < len(rows)
    assert greedy(backbone, rows, 6) == [reference.greedy(backbone, row, 6) for row in rows]


@pytest.mark.parametrize("cost, row_count", [(0, 1), (10**6, 1), (24, 1), (None, 3)])
def test_the_cache_does_not_depend_on_the_packing(backbone, monkeypatch, cost, row_count):
    """Keys, values and positions of every token equal those of a packed row for each prompt."""
    rows = [list(range(2, 42)), [5, 6, 7], list(range(60, 70))]
    lengths = [len(row) for row in rows]

    def compile(function, **options):
        return backend.compile_function(function, list(backbone.variables), **options)

    model = VaultGemmaCausalLM(backbone)
    apart = [[i] for i in range(3)]
    monkeypatch.setattr(prefill, "pack_prompts", lambda lengths, slots: apart)
    hidden, cache, start = Prefill(model, compile)(rows, 10)
    monkeypatch.setattr(
        prefill, "pack_prompts", (lambda *_: apart) if cost is None else pack_prompts
    )
    monkeypatch.setattr(prefill, "CHUNK_COST", cost or 0)
    assert len(prefill.pack_prompts(lengths, 256)) == row_count
    other_hidden, other, other_start = Prefill(model, compile)(rows, 10)
    assert start == other_start == 40
    np.testing.assert_allclose(to_numpy(other_hidden), to_numpy(hidden), atol=1e-5)
    for i, length in enumerate(lengths):
        expected = [*range(length)] + [-1] * (256 - length)
        assert (
            to_numpy(other.positions)[i].tolist()
            == to_numpy(cache.positions)[i].tolist()
            == expected
        )
        for a, b in zip([*other.keys, *other.values], [*cache.keys, *cache.values], strict=True):
            a, b = (to_numpy(x).reshape(3, -1, *x.shape[1:])[i, :, :length] for x in (a, b))
            np.testing.assert_allclose(a, b, atol=1e-5)


def test_chunks_and_caches():
    assert [chunk_lengths(n) for n in (1, 16, 17, 33, 65, 100, 144, 145, 177, 400)] == [
        [16],
        [16],
        [16, 16],
        [64],  # three of 16 would read the weights three times
        [64, 16],
        [64, 64],
        [64, 64, 16],
        [64, 64, 16, 16],
        [64, 64, 64],
        [256, 64, 64, 16],
    ]
    # Padding costs more, the more rows there are.
    assert [chunk_lengths(n, rows=8) for n in (17, 100, 145)] == [
        [16, 16],
        [64, 16, 16, 16],
        [64, 64, 16, 16],
    ]


@pytest.mark.parametrize("rows", [1, 2, 8])
def test_chunks_are_the_cheapest(rows):
    """Of all combinations of chunks."""

    def cost(chunks):
        return sum(rows * length + prefill.CHUNK_COST for length in chunks)

    for length in (1, 15, 33, 80, 81, 129, 200, 257, 300, 450, 511):
        counts = itertools.product(*(range(-(-length // kind) + 1) for kind in prefill.CHUNKS))
        every = [
            [kind for kind, n in zip(prefill.CHUNKS, count, strict=True) for _ in range(n)]
            for count in counts
        ]
        assert cost(chunk_lengths(length, rows)) == min(
            cost(chunks) for chunks in every if sum(chunks) >= length
        )


def test_cache_slots():
    assert [cache_slots(n, 1) for n in (1, 256, 257, 1024, 1025)] == [256, 256, 1024, 1024, 4096]
    assert [cache_slots(n, 2) for n in (1, 256, 257, 1024, 1025)] == [256, 256, 512, 1024, 2048]


def test_pack_prompts():
    assert pack_prompts([16] * 4, 256) == [
        [0],
        [1],
        [2],
        [3],
    ]  # one packed row would cost the same, and a copy
    assert pack_prompts([256] * 4, 256) == [[0], [1], [2], [3]]  # there is no capacity for two
    assert pack_prompts([100, 5, 200, 90], 256) == [[2], [0, 3, 1]]
    assert pack_prompts([7], 256) == [[0]]
    ragged = np.linspace(5, 200, 8).astype(int).tolist()
    assert sorted(i for row in pack_prompts(ragged, 1024) for i in row) == list(range(8))
    assert len(pack_prompts(ragged, 1024)) == 1
    assert (prefill_cost(1, sum(ragged)), prefill_cost(8, 200)) == (832 + 4 * 24, 8 * 208 + 4 * 24)
