import keras
import keras_hub
import numpy as np
import pytest
import reference
from common import random_backbone, to_numpy

from keras_vaultgemma import VaultGemmaCausalLM, generation
from keras_vaultgemma.generation import Generator, cache_slots, chunk_lengths, cut_after_stop

ROWS = [[2, 17, 5, 99], [2, 4], [2, *range(30, 55)], [9]]
SLIDING = dict(layer_types=["sliding_attention", "full_attention"], sliding_window_size=5, num_layers=2)


def sampler(name, **kwargs):
    return keras_hub.samplers.get({"class_name": name, "config": kwargs})


@pytest.fixture(params=[dict(num_layers=2), SLIDING])
def backbone(request):
    return random_backbone(num_key_value_heads=2, **request.param)


def test_greedy_equals_the_naive_loop(backbone):
    model = VaultGemmaCausalLM(backbone)
    expected = [reference.greedy(backbone, row, 12) for row in ROWS]
    generator = Generator(model, keras_hub.samplers.GreedySampler())
    assert generator.generate(ROWS, [12] * 4) == expected
    assert [generator.generate([row], [12])[0] for row in ROWS] == expected


def test_eager_equals_compiled(model):
    greedy = keras_hub.samplers.GreedySampler()
    expected = Generator(model, greedy).generate(ROWS[:2], [5, 5])
    assert Generator(model, greedy, run_eagerly=True).generate(ROWS[:2], [5, 5]) == expected


def test_rows_stop_at_their_own_limit(model):
    generator = Generator(model, keras_hub.samplers.GreedySampler())
    full = generator.generate(ROWS, [8] * 4)
    assert generator.generate(ROWS, [0, 8, 3, 1]) == [full[0][:0], full[1], full[2][:3], full[3][:1]]
    assert generator.generate(ROWS, [0] * 4) == [[]] * 4


def test_rows_stop_at_a_stop_id_and_the_others_go_on(model):
    generator = Generator(model, keras_hub.samplers.GreedySampler())
    full = generator.generate(ROWS, [12] * 4)
    stop = full[2][4]
    expected = [cut_after_stop(row, [stop]) for row in full]
    assert len(expected[2]) <= 5
    assert generator.generate(ROWS, [12] * 4, [stop]) == expected
    assert generator.generate(ROWS, [12] * 4, [127, stop, 126]) == [cut_after_stop(r, [127, stop, 126]) for r in full]


def test_more_stop_ids_than_one_block(model):
    generator = Generator(model, keras_hub.samplers.GreedySampler())
    full = generator.generate(ROWS[:1], [6])[0]
    others = [i for i in range(128) if i not in full][:9]
    assert generator.generate(ROWS[:1], [6], [*others, full[3]])[0] == cut_after_stop(full, [full[3]])


def test_a_prompt_longer_than_a_chunk(backbone, monkeypatch):
    monkeypatch.setattr(generation, "CHUNKS", (8, 4))
    model = VaultGemmaCausalLM(backbone)
    rows = [list(range(2, 23)), [5, 6]]
    found = Generator(model, keras_hub.samplers.GreedySampler()).generate(rows, [4, 4])
    assert found == [reference.greedy(backbone, row, 4) for row in rows]


@pytest.mark.parametrize("name, config", [("random", {}), ("top_k", dict(k=4)), ("top_p", dict(p=0.7))])
def test_a_seed_repeats_and_the_next_call_goes_on(model, name, config):
    def generator(seed):
        return Generator(model, sampler(name, seed=seed, **config))

    first, second = generator(1), generator(1)
    a, b = first.generate(ROWS, [10] * 4), first.generate(ROWS, [10] * 4)
    assert a != b
    assert [second.generate(ROWS, [10] * 4) for _ in range(2)] == [a, b]
    assert generator(2).generate(ROWS, [10] * 4) != a


def test_sampling_follows_the_distribution(model):
    """Frequencies of the first token over many draws: within four standard deviations of its probabilities."""
    row, draws = [2, 17, 5], 2000
    found = Generator(model, sampler("random", seed=3)).generate([row] * draws, [1] * draws)
    logits = reference.logits(model.backbone, row)[-1]
    p = np.exp(logits - logits.max())
    p /= p.sum()
    counts = np.bincount([ids[0] for ids in found], minlength=len(p))
    assert (np.abs(counts - draws * p) <= 4 * np.sqrt(draws * p * (1 - p)) + 1).all()


def test_low_temperature_is_greedy(model):
    greedy = Generator(model, keras_hub.samplers.GreedySampler()).generate(ROWS, [6] * 4)
    assert Generator(model, sampler("random", seed=0, temperature=1e-4)).generate(ROWS, [6] * 4) == greedy


def test_beam_search_finds_what_a_full_search_finds(model):
    """With as many beams as the vocabulary has pieces, two steps of beam search are exhaustive."""
    row = [2, 17, 5]
    size = model.backbone.vocabulary_size

    def log_probs(rows):
        x = {"token_ids": np.array(rows), "padding_mask": np.ones_like(rows)}
        return to_numpy(keras.ops.log_softmax(model(x), axis=-1))[:, -1]

    first = log_probs([row])[0]
    second = log_probs([[*row, i] for i in range(size)])
    best = np.unravel_index(np.argmax(first[:, None] + second), (size, size))
    found = Generator(model, keras_hub.samplers.BeamSampler(num_beams=size)).generate([row], [2])
    assert found == [[int(i) for i in best]]


def test_one_beam_is_greedy_for_rows_of_different_lengths(model):
    greedy = Generator(model, keras_hub.samplers.GreedySampler()).generate(ROWS, [6, 5, 4, 3])
    assert Generator(model, keras_hub.samplers.BeamSampler(num_beams=1)).generate(ROWS, [6, 5, 4, 3]) == greedy


def test_contrastive_search_without_penalty_is_greedy(model):
    greedy = Generator(model, keras_hub.samplers.GreedySampler()).generate(ROWS[:1], [6])
    contrastive = Generator(model, keras_hub.samplers.ContrastiveSampler(k=3, alpha=0.0))
    assert contrastive.generate(ROWS[:1], [6]) == greedy
    assert contrastive.generate(ROWS[:1], [6], [greedy[0][2]]) == [cut_after_stop(greedy[0], [greedy[0][2]])]


def test_a_sampler_of_the_users_own(model):
    class Never(keras_hub.samplers.Sampler):
        """Greedy with one id forbidden."""

        def __init__(self, forbidden):
            super().__init__()
            self.forbidden = forbidden

        def get_next_token(self, probabilities):
            allowed = keras.ops.arange(probabilities.shape[-1]) != self.forbidden
            return keras.ops.argmax(keras.ops.where(allowed, probabilities, 0.0), axis=-1)

    greedy = Generator(model, keras_hub.samplers.GreedySampler()).generate(ROWS[:1], [4])[0]
    found = Generator(model, Never(greedy[0])).generate(ROWS[:1], [4])[0]
    assert greedy[0] not in found
    logits = reference.logits(model.backbone, ROWS[0])[-1]
    assert found[0] == int(np.argsort(logits)[-2])


def test_speculative_sampler_is_refused(model):
    with pytest.raises(ValueError, match="needs no draft model"):
        Generator(model, keras_hub.samplers.SpeculativeSampler())


def test_chunks_and_caches():
    assert [chunk_lengths(n) for n in (1, 16, 17, 64, 100, 400)] == [
        [16],
        [16],
        [16, 16],
        [64],
        [64, 16, 16, 16],
        [256, 64, 64, 16],
    ]
    assert [cache_slots(n) for n in (1, 64, 65, 256, 257, 1024)] == [64, 64, 256, 256, 1024, 1024]


def test_bfloat16_generates_from_a_bfloat16_cache():
    model = VaultGemmaCausalLM(random_backbone(dtype="bfloat16"))
    assert keras.backend.standardize_dtype(model.backbone.empty_cache(1, 4).keys[0].dtype) == "bfloat16"
    found = Generator(model, keras_hub.samplers.GreedySampler()).generate(ROWS, [4] * 4)
    assert [len(row) for row in found] == [4] * 4
