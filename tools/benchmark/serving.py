"""Measure the throughput of the server with one client and with several.

    python tools/benchmark/serving.py [--backends jax torch tensorflow] [--sizes tiny 113m]
        [--clients 8] [--requests 6] [--tokens 64] [--json FILE]

Each client sends one request after the other, of greedy text with a prompt of its own, over a
connection of its own. The server runs in a process of its own. Times are of a second round, because
the first one compiles. Rounds with one client and with several alternate, because the speed of
shared machines changes from minute to minute; the best of each counts. Every answer is compared
with that of `generate` for the prompt alone. Exits with 1 if one differs.

"tiny" is the bundled preset. "113m" has random weights: 12 layers of width 768.
"""

import argparse
import contextlib
import http.client
import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
ROUNDS = 3
SIZES = {
    "tiny": None,
    "113m": dict(
        num_layers=12,
        num_query_heads=12,
        num_key_value_heads=12,
        hidden_dim=768,
        intermediate_dim=3072,
        head_dim=64,
        layer_types=["full_attention"] * 12,
        query_pre_attn_scalar=64,
    ),
}
WORDS = ["fox", "crow", "hare", "king", "wolf", "lamb", "sun", "wind"]


def model_of(size):
    """Return a model of one of `SIZES` with the bundled vocabulary."""
    from keras_vaultgemma import VaultGemmaBackbone, VaultGemmaCausalLM

    model = VaultGemmaCausalLM.from_preset("vaultgemma_tiny")
    if SIZES[size] is None:
        return model
    config = {**model.backbone.get_config(), **SIZES[size], "name": size}
    return VaultGemmaCausalLM(VaultGemmaBackbone.from_config(config), model.preprocessor)


def prompt_of(client, request):
    return f"Once upon a time the {WORDS[client % len(WORDS)]} said to number {request}:"


def worker(size, clients, requests, tokens):
    """Serve a model in this process, and print its port, then the answers of `generate`."""
    import uvicorn

    from keras_vaultgemma.serving import models, options, scheduler, server, warm_up

    model = model_of(size)
    served = models.Models(model, size, {})
    choices = options.ServeOptions(max_rows=clients)
    jobs = scheduler.Scheduler(served, choices.max_rows, choices.max_queue)
    warm_up.warm_up(jobs.batch)
    prompts = [prompt_of(i, j) for i in range(clients) for j in range(requests)]
    expected = {
        prompt: model.generate(prompt, max_new_tokens=tokens, strip_prompt=True)
        for prompt in prompts
    }
    with socket.create_server((choices.host, 0)) as listener:
        print(json.dumps([listener.getsockname()[1], expected]), flush=True)
        uvicorn.Server(server.config(served, jobs, choices)).run(sockets=[listener])


def ask(connection, size, prompt, tokens):
    body = dict(model=size, prompt=prompt, temperature=0, max_tokens=tokens)
    connection.request(
        "POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"}
    )
    answer = json.loads(connection.getresponse().read())
    return answer["choices"][0]["text"], answer["usage"]["completion_tokens"]


def round_of(port, size, clients, requests, tokens):
    """Return the seconds and tokens of all clients together, and their answers."""
    answers, counts = {}, []

    def client(i):
        connection = http.client.HTTPConnection("127.0.0.1", port)
        for j in range(requests):
            prompt = prompt_of(i, j)
            answers[prompt], count = ask(connection, size, prompt, tokens)
            counts.append(count)

    threads = [threading.Thread(target=client, args=(i,)) for i in range(clients)]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return time.perf_counter() - start, sum(counts), answers


@contextlib.contextmanager
def running(backend, size, clients, requests, tokens):
    """Context of a server in another process: its port, and the answers of `generate`."""
    command = [sys.executable, __file__, "--worker", size, "--clients", str(clients)]
    command += ["--requests", str(requests), "--tokens", str(tokens)]
    env = {**os.environ, "KERAS_BACKEND": backend, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) as server:
        try:
            yield json.loads(server.stdout.readline())
        finally:
            server.terminate()


def measure(backend, size, clients, requests, tokens):
    """Return the figures of one backend and size."""
    with running(backend, size, clients, requests, tokens) as (port, expected):
        speeds, differing = {1: [], clients: []}, 0
        for number in range(ROUNDS + 1):
            for count in speeds:
                seconds, total, answers = round_of(port, size, count, requests, tokens)
                differing += sum(expected[prompt] != text for prompt, text in answers.items())
                if number:
                    speeds[count].append(total / seconds)
    one, several = max(speeds[1]), max(speeds[clients])
    return dict(
        backend=backend,
        size=size,
        one=one,
        several=several,
        ratio=several / one,
        ratios=[b / a for a, b in zip(speeds[1], speeds[clients], strict=True)],
        differing=differing,
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backends", nargs="+", default=["jax", "torch", "tensorflow"])
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=SIZES)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--requests", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    work = (options.clients, options.requests, options.tokens)
    if options.worker:
        worker(options.worker, *work)
        return 0
    print(f"| backend | model | tokens/s, 1 client | tokens/s, {options.clients} | ratio |")
    print("|---|---|---|---|---|")
    results = []
    for size in options.sizes:
        for backend in options.backends:
            found = measure(backend, size, *work)
            results.append(found)
            print(
                f"| {backend} | {size} | {found['one']:.0f} | {found['several']:.0f} "
                f"| {found['ratio']:.2f} |",
                flush=True,
            )
            if found["differing"]:
                print(f"{found['differing']} answers differ from those of `generate`")
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))
    return int(any(found["differing"] for found in results))


if __name__ == "__main__":
    sys.exit(main())
