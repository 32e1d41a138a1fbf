"""Greedy text until a stop string."""

import pytest
from common import LINES, one_layer_preset

from keras_vaultgemma import VaultGemmaCausalLM
from keras_vaultgemma.evaluation.generation import generate_until

pytestmark = pytest.mark.first_backend


@pytest.fixture(scope="module")
def model():
    model = VaultGemmaCausalLM.from_preset(one_layer_preset())
    model.compile(sampler="top_k")
    return model


def test_texts_end_before_their_first_stop_string_and_a_killed_call_resumes(
    model, tmp_path, monkeypatch
):
    long, short = {"until": [], "max_gen_toks": 12}, {"until": " ", "max_new_tokens": 4}
    stops = {"until": ["e", "a", ""], "max_gen_toks": 12, "do_sample": False, "temperature": 0.0}
    requests = [(line, options) for options in (long, stops, short) for line in LINES]
    sampler = model.sampler
    found = generate_until(model, requests, 64, "keep_bos", tmp_path, verbose=False)
    assert model.sampler is sampler
    greedy = VaultGemmaCausalLM(model.backbone, model.preprocessor)
    texts = greedy.generate(LINES, max_new_tokens=12, strip_prompt=True)
    assert found[: len(LINES)] == texts
    expected = [text.split("e")[0].split("a")[0] for text in texts]
    assert found[len(LINES) : 2 * len(LINES)] == expected
    monkeypatch.setattr(type(model), "generate", None)  # all parts are stored
    assert generate_until(model, requests, 64, "keep_bos", tmp_path, verbose=False) == found


@pytest.mark.parametrize("truncation", ["lm_eval", "keep_bos"])
def test_long_prompts_are_cut(model, truncation):
    options = {"until": [], "max_gen_toks": 4}
    found = generate_until(model, [(LINES[0], options)], 16, truncation, verbose=False)
    row = [2, *model.preprocessor.tokenizer.tokenize([LINES[0]])[0]]
    kept = row[-12:] if truncation == "lm_eval" else [2, *row[-11:]]
    greedy = VaultGemmaCausalLM(model.backbone, model.preprocessor)
    ids = greedy.generate([kept], max_new_tokens=4, strip_prompt=True)
    assert found == model.preprocessor.detokenize(ids)


def test_requests_that_cannot_be_met_are_errors(model):
    for options, message in (
        ({"until": ["."], "do_sample": True}, "Requests must be greedy, with do_sample=False"),
        ({"until": ["."], "max_gen_toks": 32}, "for 1 to 31 new tokens, because the model has 32"),
    ):
        with pytest.raises(ValueError, match=message):
            generate_until(model, [("Once", options)], 32, "keep_bos")
    assert generate_until(model, [], 32, "keep_bos") == []
