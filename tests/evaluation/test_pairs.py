"""Log-probabilities of continuations, next to each pair scored alone by the obvious formula."""

import numpy as np
import pytest
from common import LINES, count_compilations, one_layer_preset

from keras_vaultgemma import VaultGemmaCausalLM
from keras_vaultgemma.data.token_ids import pad_rows
from keras_vaultgemma.evaluation import packed_pairs, score_pairs
from keras_vaultgemma.evaluation.pairs import encode_pairs

PAIRS = [
    ("Once upon a", " time there was a wolf"),
    ("Once upon a", " table"),
    ("Once upon a", " time"),
    ("", "The Hare was once boasting"),
    ("Question: who slept?\nAnswer: ", "the hare"),
    (" \n", "A Crow"),
    (LINES[0], " " + LINES[1]),
    (LINES[0], LINES[2]),
    ("한국 ", "𒀀𒁀"),
    ("Once upon a", " time"),
]


@pytest.fixture(scope="module")
def model():
    return VaultGemmaCausalLM.from_preset(one_layer_preset())


def alone(model, pairs):
    """Log-probability of each continuation and whether it is greedy, from the logits of a row for each pair of ids."""
    rows = [[*context, *continuation] for context, continuation in pairs]
    token_ids, padding_mask = pad_rows(rows, max(map(len, rows)))
    x = {"token_ids": token_ids, "padding_mask": padding_mask}
    log_probs, is_greedy = [], []
    logits = np.asarray(model.score(x, scoring_mode="logits")).astype("float64")
    for (context, continuation), row in zip(pairs, logits, strict=True):
        row = row[len(context) - 1 :][: len(continuation)]
        chosen = row[np.arange(len(continuation)), continuation]
        log_probs.append((chosen - np.log(np.exp(row).sum(-1))).sum())
        is_greedy.append(list(row.argmax(-1)) == list(continuation))
    return log_probs, is_greedy


@pytest.mark.first_backend
def test_encoding_follows_the_harness(model):
    tokenizer = model.preprocessor.tokenizer

    def encode(text):
        return [2, *tokenizer.tokenize([text])[0]]

    for (context, continuation), found in zip(PAIRS, encode_pairs(tokenizer, PAIRS), strict=True):
        spaces = len(context) - len(context.rstrip())
        kept, moved = context[: len(context) - spaces], context[len(context) - spaces :]
        whole, first = encode(kept + moved + continuation), encode(kept)
        assert found == (tuple(first), tuple(whole[len(first) :]))


def test_pairs_of_shared_and_other_contexts_are_scored_as_if_alone(model):
    with count_compilations() as compilations:
        found = score_pairs(model, PAIRS, verbose=False)
    assert compilations.count is None or compilations.count <= 12
    log_probs, is_greedy = alone(model, encode_pairs(model.preprocessor.tokenizer, PAIRS))
    np.testing.assert_allclose(found.log_probs, log_probs, rtol=1e-5)
    assert found.is_greedy.tolist() == is_greedy
    assert found.characters.tolist() == [len(text) for _, text in PAIRS]
    assert found.bytes.tolist() == [len(text.encode()) for _, text in PAIRS]
    assert found.truncated == 0


@pytest.mark.first_backend
def test_greedy_text_is_greedy(model):
    context = "Once upon a"
    text = model.generate(context, max_new_tokens=4, strip_prompt=True)
    found = score_pairs(model, [(context, text), (context, " zebra")], verbose=False)
    assert found.is_greedy.tolist() == [True, False]


@pytest.mark.first_backend
@pytest.mark.parametrize("truncation", ["lm_eval", "keep_bos"])
def test_long_contexts_are_cut(model, truncation):
    length = 16
    pairs = [(LINES[0], " the wolf"), ("Once upon", " a time")]
    found = score_pairs(model, pairs, truncation=truncation, max_length=length, verbose=False)
    (context, continuation), (second, rest) = encode_pairs(model.preprocessor.tokenizer, pairs)
    size = length + 1 - len(continuation)
    kept = context[-size:] if truncation == "lm_eval" else (2, *context[-size + 1 :])
    expected, _ = alone(model, [(kept, continuation), (second, rest)])
    np.testing.assert_allclose(found.log_probs, expected, rtol=1e-5)
    assert found.tokens_cut.tolist() == [len(context) - size, 0]
    assert found.truncated == 1


@pytest.mark.first_backend
def test_a_killed_call_resumes(model, tmp_path, monkeypatch):
    monkeypatch.setattr(packed_pairs, "BATCH_TOKENS", 256)
    pairs = [(line[i:], text) for line in LINES for i in range(8) for text in (" a", " wolf")]
    expected = score_pairs(model, pairs, verbose=False).log_probs
    score, calls = type(model).score_branches, []

    def fail_late(self, *arrays):
        calls.append(arrays)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return score(self, *arrays)

    monkeypatch.setattr(type(model), "score_branches", fail_late)
    with pytest.raises(KeyboardInterrupt):
        score_pairs(model, pairs, checkpoint=tmp_path, verbose=False)
    found = score_pairs(model, pairs, checkpoint=tmp_path, verbose=False).log_probs
    np.testing.assert_array_equal(found, expected)
    assert len(calls) > 4  # the batch that failed is the only one that was computed twice
    assert len({tuple(x.tobytes() for x in arrays) for arrays in calls}) == len(calls) - 1
    calls.clear()
    score_pairs(model, pairs, checkpoint=tmp_path, verbose=False)
    assert not calls


@pytest.mark.first_backend
def test_errors(model):
    with pytest.raises(ValueError, match="must have from 1 to max_length=512 tokens .*Received: 0"):
        score_pairs(model, [("Once", "")])
    with pytest.raises(ValueError, match="to max_length=4 tokens .* tokens in pair 1"):
        score_pairs(model, [("A", " b"), ("A", LINES[0])], max_length=4)
    with pytest.raises(ValueError, match="`truncation` must be one of 'keep_bos', 'lm_eval'"):
        score_pairs(model, PAIRS, truncation="left")
    with pytest.raises(
        ValueError, match="`pairs` must be pairs .* Received: \\('A', None\\) as pair"
    ):
        score_pairs(model, [("A", None)])
    with pytest.raises(ValueError, match="`model` must have a preprocessor"):
        score_pairs(VaultGemmaCausalLM(model.backbone), PAIRS)
    with pytest.raises(ValueError, match="surrogate"):
        score_pairs(model, [("A", "\udcff")])
    assert len(score_pairs(model, []).log_probs) == 0
