"""Send a server many requests of all kinds, some of whose clients go, and check each answer.

    python tools/benchmark/serving_soak.py [--backend jax] [--requests 2000] [--clients 16]

Greedy texts must equal those of `generate`. Sampled texts with a seed, streams, stop strings and
several answers must equal what the server answers to the same request alone. In the end no row may
be left. Exits with 1 if an answer is lost or differs.
"""

import argparse
import collections
import http.client
import json
import random
import sys
import threading
import time

import serving

DISCONNECTING = 0.2
"""Part of the requests whose client goes before the answer is complete."""


def bodies(clients, requests, tokens):
    """Return a list of pairs of a request and whether it is greedy text as `generate` gives it."""
    prompts = [serving.prompt_of(i, j) for i in range(clients) for j in range(requests)]
    found = []
    for number, prompt in enumerate(prompts):
        body = dict(model="tiny", prompt=prompt, max_tokens=tokens, temperature=0)
        found.append((body, True))
        found.append(({**body, "temperature": 0.9, "top_p": 0.9, "seed": number}, False))
        found.append(({**body, "max_tokens": 5 + number, "stream": True}, False))
        found.append(({**body, "stop": [" the"], "logprobs": 2}, False))
        found.append(({**body, "prompt": [prompt, "The"], "n": 2, "max_tokens": 6}, False))
    return found


def send(port, body):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
    headers = {"Content-Type": "application/json"}
    connection.request("POST", "/v1/completions", json.dumps(body), headers)
    return connection


def texts(connection, body):
    """Return the texts of an answer."""
    data = connection.getresponse().read().decode()
    if body.get("stream"):
        events = [event.removeprefix("data: ") for event in data.split("\n\n") if event]
        assert events[-1] == "[DONE]", events[-1]
        return ["".join(json.loads(event)["choices"][0]["text"] for event in events[:-1])]
    return [choice["text"] for choice in json.loads(data)["choices"]]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backend", default="jax")
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=24)
    options = parser.parse_args()
    work = (8, 2, options.tokens)
    counts, lock, numbers = collections.Counter(), threading.Lock(), iter(range(options.requests))
    with serving.running(options.backend, "tiny", *work) as (port, expected):
        known = []
        for body, is_greedy in bodies(*work):
            answer = texts(send(port, body), body)
            counts["differs from generate"] += is_greedy and answer != [expected[body["prompt"]]]
            known.append((body, answer))

        def client(seed):
            generator = random.Random(seed)
            while True:
                with lock:
                    if next(numbers, None) is None:
                        return
                body, answer = generator.choice(known)
                try:
                    connection = send(port, body)
                    if generator.random() < DISCONNECTING:
                        time.sleep(generator.random() * 0.3)
                        connection.close()
                        outcome = "disconnected"
                    else:
                        is_equal = texts(connection, body) == answer
                        outcome = "equal" if is_equal else "differs"
                except Exception as error:
                    outcome = f"lost: {type(error).__name__}: {error}"
                with lock:
                    counts[outcome] += 1

        start = time.perf_counter()
        threads = [threading.Thread(target=client, args=(i,)) for i in range(options.clients)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        seconds = time.perf_counter() - start
        time.sleep(2)
        connection = http.client.HTTPConnection("127.0.0.1", port)
        connection.request("GET", "/health")
        health = json.loads(connection.getresponse().read())
    found = {name: count for name, count in counts.items() if count}
    print(f"{options.requests} requests in {seconds:.0f} s: {found}; then {health}")
    is_sound = set(found) <= {"equal", "disconnected"}
    is_sound &= health == {"status": "ok", "decoding": 0, "waiting": 0}
    return int(not is_sound)


if __name__ == "__main__":
    sys.exit(main())
