"""A server in a thread of the test's process, and requests to it."""

import contextlib
import http.client
import json
import socket
import threading
import time

import uvicorn

from keras_vaultgemma.serving import server
from keras_vaultgemma.serving.options import ServeOptions
from keras_vaultgemma.serving.scheduler import Scheduler


class Served:
    """A running server.

    Attributes:
        models: the `Models`.
        scheduler: the `Scheduler`.
        port: int.
        url: string. Base URL for clients of OpenAI's.
    """

    def __init__(self, models, scheduler, port):
        self.models, self.scheduler, self.port = models, scheduler, port
        self.url = f"http://127.0.0.1:{port}/v1"

    def request(self, method, path, body=None, **headers):
        """Return the status, headers and text of a response."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        with contextlib.closing(connection):
            if body is not None and not isinstance(body, bytes):
                body = json.dumps(body).encode()
            kinds = {"Content-Type": "application/json"} if body is not None else {}
            names = {name.replace("_", "-"): value for name, value in headers.items()}
            connection.request(method, path, body, {**kinds, **names})
            response = connection.getresponse()
            return response.status, response.headers, response.read().decode()

    def post(self, path, **body):
        """Return the status and the JSON object of a response."""
        body = {"model": self.models.base, **body}
        status, _, text = self.request("POST", f"/v1/{path}", body)
        return status, json.loads(text)

    def text(self, prompt, max_tokens=8, **body):
        """Return the greedy completion of a prompt."""
        status, answer = self.post(
            "completions", prompt=prompt, max_tokens=max_tokens, temperature=0, **body
        )
        assert status == 200, answer
        return answer["choices"][0]["text"]

    def wait_until_idle(self, seconds=20):
        end = time.monotonic() + seconds
        while self.scheduler.load != (0, 0):
            assert time.monotonic() < end, self.scheduler.load
            time.sleep(0.01)


@contextlib.contextmanager
def serving(models, **options):
    """Context of a `Served`."""
    options = ServeOptions(**{"max_rows": 2, **options})
    scheduler = Scheduler(models, options.max_rows, options.max_queue)
    process = uvicorn.Server(server.config(models, scheduler, options))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=process.run, kwargs=dict(sockets=[listener]))
        thread.start()
        try:
            yield Served(models, scheduler, listener.getsockname()[1])
        finally:
            process.should_exit = True
            thread.join()
