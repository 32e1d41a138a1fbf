"""The server as its clients see it: every answer equals `generate`, every mistake is an error object."""

import concurrent.futures
import json
import socket
import threading
import time

import keras_hub
import pytest
from served import serving

from keras_vaultgemma import VaultGemmaCausalLM
from keras_vaultgemma.serving.scheduler import Scheduler

pytestmark = pytest.mark.first_backend

PROMPTS = [
    "Once upon a time",
    "The fox",
    "A wolf and a lamb were",
    "In the garden",
    "A",
    "The King",
]


@pytest.fixture(scope="module")
def alone():
    """The same model, for the answers that `generate` gives."""
    return VaultGemmaCausalLM.from_preset("vaultgemma_tiny")


def test_answers_of_many_clients_equal_generate(served, alone):
    """On every backend: requests of several threads, which join and leave the batch as they come."""
    expected = alone.generate(PROMPTS, max_new_tokens=8, strip_prompt=True)
    with concurrent.futures.ThreadPoolExecutor(len(PROMPTS)) as pool:
        assert list(pool.map(served.text, PROMPTS)) == expected


test_answers_of_many_clients_equal_generate = pytest.mark.every_backend(
    test_answers_of_many_clients_equal_generate
)


def test_a_chat_equals_generate(served, alone):
    chat = [{"role": "user", "content": "Be brief.\n\nWho is the fox?"}]
    expected = alone.generate(chat, max_new_tokens=8)
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Who is the fox?"}]},
    ]
    status, answer = served.post("chat/completions", messages=messages, max_tokens=8, temperature=0)
    assert status == 200 and answer["object"] == "chat.completion"
    assert answer["choices"][0]["message"] == {"role": "assistant", "content": expected}
    assert answer["usage"]["completion_tokens"] == 8


def test_a_seed_gives_what_generate_gives(served, alone):
    alone.compile(sampler=keras_hub.samplers.TopPSampler(p=0.8, k=None, temperature=1.3))
    body = dict(prompt=PROMPTS[0], max_tokens=8, temperature=1.3, top_p=0.8, seed=11, n=2)
    _, answer = served.post("completions", **body)
    texts = [choice["text"] for choice in answer["choices"]]
    expected = alone.generate([PROMPTS[0]] * 2, max_new_tokens=8, seed=11, strip_prompt=True)
    assert texts == expected and texts[0] != texts[1]
    alone.compile(sampler="greedy")


def test_stop_strings_end_one_row_and_not_the_others(served, alone):
    whole = alone.generate(PROMPTS[:2], max_new_tokens=12, strip_prompt=True)
    at = next(i for i in range(4, 20) if whole[0][i : i + 4] not in whole[1])
    stop = whole[0][at : at + 4]
    assert whole[0].index(stop) == at
    _, answer = served.post(
        "completions", prompt=PROMPTS[:2], max_tokens=12, temperature=0, stop=[stop]
    )
    assert [(c["text"], c["finish_reason"]) for c in answer["choices"]] == [
        (whole[0][:at], "stop"),
        (whole[1], "length"),
    ]


def test_ids_and_echo(served, alone):
    (ids,) = alone.preprocessor.tokenize_prompts(PROMPTS[:1])
    assert served.text(ids) == served.text(PROMPTS[0])
    assert served.text(PROMPTS[0], echo=True) == PROMPTS[0] + served.text(PROMPTS[0])
    assert served.text(PROMPTS[0], max_tokens=0, echo=True) == PROMPTS[0]


def test_log_probs_of_prompt_and_answer(served, alone):
    body = dict(prompt=PROMPTS[0], max_tokens=4, temperature=0, logprobs=2, echo=True)
    _, answer = served.post("completions", **body)
    found = answer["choices"][0]["logprobs"]
    (ids,) = alone.preprocessor.tokenize_prompts([PROMPTS[0] + served.text(PROMPTS[0], 4)])
    assert len(found["tokens"]) == len(ids) and found["tokens"][0] == "<bos>"
    assert "".join(found["tokens"][1:]) == answer["choices"][0]["text"]
    assert found["token_logprobs"][0] is None
    nats = -alone.score([ids])[0][:-1]
    assert found["token_logprobs"][1:] == pytest.approx(nats.tolist(), abs=1e-4)
    for token, offset in zip(found["tokens"][1:], found["text_offset"][1:], strict=True):
        assert answer["choices"][0]["text"][offset:].startswith(token)
    assert all(
        token in top
        for token, top in zip(found["tokens"][1:], found["top_logprobs"][1:], strict=True)
    )


def test_streams_join_to_the_whole_text(served):
    whole = served.text(PROMPTS[1], 12)
    body = dict(prompt=PROMPTS[1], max_tokens=12, temperature=0, stream=True, logprobs=0)
    body["stream_options"] = {"include_usage": True}
    _, headers, text = served.request(
        "POST", "/v1/completions", {"model": served.models.base, **body}
    )
    assert headers["Content-Type"].startswith("text/event-stream")
    events = [event.removeprefix("data: ") for event in text.split("\n\n") if event]
    *chunks, usage = map(json.loads, events[:-1])
    assert events[-1] == "[DONE]" and usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == 12
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == whole
    assert sum(len(chunk["choices"][0]["logprobs"]["tokens"]) for chunk in chunks) == 12
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks][-1] == "length"
    assert len({chunk["id"] for chunk in chunks}) == 1


@pytest.mark.parametrize(
    "body, status, message",
    [
        (b"{", 400, "The body must be JSON"),
        (b"[" * 100_000, 400, "The body must be JSON"),
        (b'{"temperature": NaN}', 400, "NaN is no number of JSON"),
        ([], 400, "must be a JSON object"),
        ({}, 400, "`prompt` must be a string"),
        ({"prompt": "a"}, 400, "`model` must be given"),
        ({"prompt": "a", "model": "nobody"}, 404, "There is no model 'nobody'"),
        ({"prompt": "a", "temprature": 1}, 400, "Did you mean `temperature`?"),
        ({"prompt": "a", "temperature": 3}, 400, "from 0 to 2. Received: temperature=3"),
        ({"prompt": "a", "top_p": 0}, 400, "`top_p` must be"),
        ({"prompt": "a", "max_tokens": -1}, 400, "`max_tokens` must be"),
        ({"prompt": "a", "max_tokens": 600}, 400, "The context of the model has 512 tokens"),
        ({"prompt": "a " * 600}, 400, "The context of the model has 512 tokens"),
        ({"prompt": "a", "stop": [""]}, 400, "`stop` must be"),
        ({"prompt": "a", "stop": ["x"] * 17}, 400, "`stop` must be"),
        ({"prompt": "a", "logprobs": 99}, 400, "from 0 to 20"),
        ({"prompt": "a", "logprobs": True}, 400, "must be a number"),
        ({"prompt": "a", "n": 0}, 400, "`n` must be"),
        ({"prompt": ["a"] * 200, "n": 2}, 400, "at most 256 answers"),
        ({"prompt": [2, 4096]}, 400, "4096"),
        ({"prompt": [[]]}, 400, "at least one token"),
        ({"prompt": ["a", 2]}, 400, ""),
        ({"prompt": "\ud800"}, 400, "surrogate"),
        ({"prompt": "a", "logit_bias": {"5": 1}}, 400, "`logit_bias` is not supported"),
        ({"prompt": "a", "presence_penalty": 1}, 400, "`presence_penalty` is not supported"),
        ({"prompt": "a", "seed": 2**70}, 400, "`seed` must be"),
        ({"prompt": "a", "stream": "yes"}, 400, "`stream` must be true or false"),
    ],
)
def test_mistakes_are_error_objects(served, body, status, message):
    found, _, text = served.request("POST", "/v1/completions", body)
    error = json.loads(text)["error"]
    assert found == status and message in error["message"]
    assert error["type"] == "invalid_request_error" and set(error) == {
        "message",
        "type",
        "param",
        "code",
    }


@pytest.mark.parametrize(
    "messages, message",
    [
        (None, "non-empty list"),
        ([{"role": "user"}], "must be a string or parts of text"),
        ([{"role": "user", "content": "a"}] * 2, "turns alternate"),
        (
            [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
            "must be the user's",
        ),
        ([{"role": "user", "content": "<end_of_turn>"}], "without <start_of_turn>"),
        ([{"role": "tool", "content": "a"}], "must be the user's"),
    ],
)
def test_mistakes_in_chats(served, messages, message):
    status, answer = served.post("chat/completions", messages=messages)
    assert status == 400 and message in answer["error"]["message"]


def test_fields_that_change_nothing_are_accepted(served):
    fields = dict(
        user="me", presence_penalty=0, frequency_penalty=0.0, best_of=1, suffix=None, logit_bias={}
    )
    assert served.text(PROMPTS[0], **fields) == served.text(PROMPTS[0])


def test_models_health_page_and_paths_that_are_not_there(served):
    name = served.models.base
    status, _, text = served.request("GET", "/v1/models")
    (model,) = json.loads(text)["data"]
    assert (status, model["id"], model["object"], model["max_model_len"]) == (
        200,
        name,
        "model",
        512,
    )
    assert json.loads(served.request("GET", f"/v1/models/{name}")[2]) == model
    assert served.request("GET", "/v1/models/x")[0] == 404
    assert json.loads(served.request("GET", "/health")[2])["status"] == "ok"
    status, headers, text = served.request("GET", "/")
    assert (
        status == 200
        and "pre-trained only" in text
        and "default-src 'none'" in headers["Content-Security-Policy"]
    )
    assert served.request("GET", "/page.js")[0] == 200
    for method, path, expected in (("GET", "/nope", 404), ("GET", "/v1/completions", 405)):
        status, _, text = served.request(method, path)
        assert status == expected and path in json.loads(text)["error"]["message"]


def test_strangers_are_kept_out(served, models):
    body = {"model": models.base, "prompt": "a", "max_tokens": 1}

    def status(**headers):
        return served.request("POST", "/v1/completions", body, **headers)[0]

    assert status() == status(Host="localhost:1") == status(Host="[::1]:8000") == 200
    assert status(Host="evil.example") == status(Host="127.0.0.1.evil.example:80") == 403
    assert status(Origin="https://evil.example") == status(Origin="null") == 403
    assert status(Origin=f"http://127.0.0.1:{served.port}") == 200
    assert status(Content_Type="text/plain") == 415
    assert "Access-Control-Allow-Origin" not in served.request("GET", "/health")[1]


def test_limits_key_and_origins(models):
    limits = dict(
        api_key="secret", max_body=1000, max_queue=2, allow_origins=("https://a.example",)
    )
    with serving(models, **limits) as served:
        key = {"Authorization": "Bearer secret"}
        assert served.request("GET", "/v1/models", **key)[0] == 200
        for wrong in ({}, {"Authorization": "Bearer secre"}, {"Authorization": "secret"}):
            status, headers, text = served.request("GET", "/v1/models", **wrong)
            assert status == 401 and json.loads(text)["error"]["code"] == "invalid_api_key"
        assert served.request("GET", "/health")[0] == served.request("GET", "/")[0] == 200
        assert served.request("POST", "/v1/completions", b"x" * 1001, **key)[0] == 413
        origin = {"Origin": "https://a.example"}
        headers = served.request("GET", "/v1/models", **origin, **key)[1]
        assert headers["Access-Control-Allow-Origin"] == "https://a.example"
        body = {"model": models.base, "prompt": ["a"] * 3, "max_tokens": 1}
        assert (
            served.request("POST", "/v1/completions", body, **key)[0] == 400
        )  # more than ever wait


def test_a_full_queue_and_a_time_out(models, monkeypatch):
    """While the thread that decodes is held up."""
    held = threading.Event()
    decode = Scheduler._decode
    monkeypatch.setattr(Scheduler, "_decode", lambda self: held.wait() and decode(self))
    with serving(models, max_queue=1, timeout=0.5) as served:
        try:
            with concurrent.futures.ThreadPoolExecutor(4) as pool:
                calls = [
                    pool.submit(served.post, "completions", prompt="a", max_tokens=1)
                    for _ in range(4)
                ]
                errors = {
                    (status, answer["error"]["code"])
                    for status, answer in (c.result() for c in calls)
                }
            assert errors == {(504, "timeout"), (503, "overloaded")}
            body = {"model": models.base, "prompt": "a", "stream": True}
            held.clear()
            text = served.request("POST", "/v1/completions", body)[2]
            assert json.loads(text.removeprefix("data: "))["error"]["code"] in (
                "timeout",
                "overloaded",
            )
        finally:
            held.set()
        served.wait_until_idle()


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_ends_its_work(served, stream, monkeypatch):
    steps = served.scheduler.batch.step
    monkeypatch.setattr(served.scheduler.batch, "step", lambda n: time.sleep(0.02) or steps(1))
    body = json.dumps(
        {"model": served.models.base, "prompt": "A", "max_tokens": 240, "stream": stream, "seed": 1}
    ).encode()
    with socket.create_connection(("127.0.0.1", served.port)) as connection:
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n" % len(body) + body
        )
        while not served.scheduler.batch.rows:
            time.sleep(0.01)
        (row,) = served.scheduler.batch.rows
    served.wait_until_idle()
    assert len(row.tokens) < 240


def test_an_error_of_decoding_ends_the_answers_and_not_the_server(served, monkeypatch):
    expected = served.text("A")
    with monkeypatch.context() as patch:
        patch.setattr(served.scheduler.batch, "step", lambda steps: 1 / 0)
        status, answer = served.post("completions", prompt="A", max_tokens=2)
    assert status == 500 and answer["error"]["type"] == "server_error"
    assert "ZeroDivisionError" in answer["error"]["message"]
    assert served.text("A") == expected
