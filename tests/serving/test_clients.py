"""Clients that others wrote: the official one of OpenAI, and lm-evaluation-harness."""

import numpy as np
import openai
import pytest

from keras_vaultgemma import VaultGemmaCausalLM, convert

pytestmark = pytest.mark.first_backend

CHAT = [{"role": "user", "content": "Tell me of the fox."}]


@pytest.fixture(scope="module")
def alone():
    return VaultGemmaCausalLM.from_preset("vaultgemma_tiny")


@pytest.fixture(scope="module")
def client(served):
    with openai.OpenAI(base_url=served.url, api_key="any", max_retries=0) as client:
        yield client


def test_completions(client, served, alone):
    assert [model.id for model in client.models.list()] == [served.models.base]
    options = dict(model="vaultgemma_tiny", max_tokens=8, temperature=0)
    answer = client.completions.create(prompt=["The fox", "The crow"], logprobs=3, **options)
    texts = [choice.text for choice in answer.choices]
    assert texts == alone.generate(["The fox", "The crow"], max_new_tokens=8, strip_prompt=True)
    assert [len(top) for top in answer.choices[0].logprobs.top_logprobs] == [3] * 8
    assert answer.usage.completion_tokens == 16
    pieces = client.completions.create(prompt="The fox", stream=True, **options)
    assert "".join(piece.choices[0].text for piece in pieces) == texts[0]


def test_chats(client, alone):
    expected = alone.generate(CHAT, max_new_tokens=8)
    options = dict(model="vaultgemma_tiny", messages=CHAT, max_completion_tokens=8, temperature=0)
    answer = client.chat.completions.create(logprobs=True, top_logprobs=2, **options)
    assert answer.choices[0].message.content == expected
    content = answer.choices[0].logprobs.content
    assert b"".join(bytes(token.bytes) for token in content).decode() == expected
    assert all(token.top_logprobs[0].logprob == token.logprob for token in content)
    stream = client.chat.completions.create(
        stream=True, stream_options={"include_usage": True}, **options
    )
    *chunks, usage = stream
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected
    assert (usage.usage.prompt_tokens, usage.usage.completion_tokens) == (
        answer.usage.prompt_tokens,
        8,
    )


def test_errors_have_the_clients_types(client):
    options = dict(model="vaultgemma_tiny", prompt="a")
    with pytest.raises(openai.BadRequestError, match="from 0 to 2") as caught:
        client.completions.create(temperature=9, **options)
    assert caught.value.param == "temperature"
    with pytest.raises(openai.NotFoundError, match="There is no model 'gpt-4'") as caught:
        client.completions.create(model="gpt-4", prompt="a")
    assert caught.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(max_tokens=999, **options)
    assert caught.value.code == "context_length_exceeded"


def test_lm_evaluation_harness(served, alone, tmp_path):
    pytest.importorskip("tenacity")  # of lm-eval[api]
    completions = pytest.importorskip("lm_eval.models.openai_completions")
    from lm_eval.api.instance import Instance

    convert("vaultgemma_tiny", tmp_path / "hf", to="hf")
    model = completions.LocalCompletionsAPI(
        base_url=f"{served.url}/completions",
        model="vaultgemma_tiny",
        tokenizer=str(tmp_path / "hf"),
        num_concurrent=4,
        batch_size=2,
        max_length=256,
        add_bos_token=True,
    )
    pairs = [("The fox said", " no"), ("Once upon a", " time"), ("Once upon a", " fox and a crow")]
    found = model.loglikelihood([Instance("loglikelihood", {}, pair, 0) for pair in pairs])
    for (context, continuation), (log_prob, is_greedy) in zip(pairs, found, strict=True):
        (prompt,), (ids,) = (
            alone.preprocessor.tokenize_prompts([text])
            for text in (context, context + continuation)
        )
        start = len(prompt) - 1
        nats = alone.score([ids])[0][start:-1]
        assert log_prob == pytest.approx(-nats.sum(), abs=1e-3)
        best = alone.score([ids], scoring_mode="logits")[0].argmax(axis=1)
        assert is_greedy == np.array_equal(best[start:-1], ids[start + 1 :])
    options = {"until": ["."], "max_gen_toks": 20}
    requests = [
        Instance("generate_until", {}, (context, dict(options)), 0) for context, _ in pairs[:2]
    ]
    assert model.generate_until(requests) == [
        alone.generate(context, max_new_tokens=20, stop=".", strip_prompt=True)
        for context, _ in pairs[:2]
    ]
