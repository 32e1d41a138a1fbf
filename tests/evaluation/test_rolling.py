"""Likelihood of whole texts in windows."""

import math

import pytest
from common import LINES, one_layer_preset

from keras_vaultgemma import VaultGemmaCausalLM
from keras_vaultgemma.evaluation import measure_rolling
from keras_vaultgemma.evaluation.rolling import windows_of

pytestmark = pytest.mark.first_backend


@pytest.fixture(scope="module")
def model():
    return VaultGemmaCausalLM.from_preset(one_layer_preset())


def test_windows():
    row = [10, 11, 12, 13, 14, 15, 16]
    assert windows_of(row, 2, 3, "lm_eval") == [
        ((2,), (10, 11, 12)),
        ((12,), (13, 14, 15)),
        ((13, 14, 15), (16,)),
    ]
    assert windows_of(row, 2, 3, "keep_bos") == [
        ((2,), (10, 11, 12)),
        ((2, 12), (13, 14)),
        ((2, 14), (15, 16)),
    ]
    assert windows_of([], 2, 3, "lm_eval") == []


@pytest.mark.parametrize("truncation", ["lm_eval", "keep_bos"])
@pytest.mark.parametrize("size", [1, 2, 5, 256])
def test_each_token_is_predicted_once_by_those_before_it(truncation, size):
    row = list(range(100, 117))
    windows = windows_of(row, 2, size, truncation)
    assert [i for _, predicted in windows for i in predicted] == row
    for context, predicted in windows:
        is_bos = context[0] == 2
        seen = [*context, *predicted][is_bos:]
        assert seen == list(range(seen[0], seen[0] + len(seen)))
        assert len(context) + len(predicted) <= max(size, 1 + (truncation == "keep_bos")) + 1


def test_short_texts_have_the_likelihood_of_their_rows(model):
    texts = [*LINES, "", "한국"]
    found = measure_rolling(model, texts, verbose=False)
    losses = [float(model.score([text]).sum()) if text else 0.0 for text in texts]
    assert found.log_probs == pytest.approx([-x for x in losses], rel=1e-5)
    assert found.bytes == sum(len(text.encode()) for text in texts)
    assert found.bits_per_byte == pytest.approx(sum(losses) / math.log(2) / found.bytes, rel=1e-6)
    assert found.word_perplexity == pytest.approx(math.exp(sum(losses) / found.words), rel=1e-5)
    assert found.byte_perplexity == pytest.approx(math.exp(sum(losses) / found.bytes), rel=1e-6)
    assert found.tokens == sum(len(model.preprocessor.tokenizer.tokenize([x])[0]) for x in texts)


def test_bos_counts_on_request(model):
    plain = measure_rolling(model, LINES[:1], verbose=False)
    found = measure_rolling(model, LINES[:1], score_bos=True, verbose=False)
    row = [2, 2, *model.preprocessor.tokenizer.tokenize(LINES[:1])[0]]
    assert found.log_probs[0] == pytest.approx(-float(model.score([row]).sum()), rel=1e-5)
    assert found.tokens == plain.tokens + 1


def test_texts_without_a_byte_are_an_error(model):
    with pytest.raises(ValueError, match="`texts` must have at least one byte. Received: 1 texts"):
        measure_rolling(model, [""])
