"""What every request has to pass before it is read: host, origin, key, size and time."""

import asyncio
import hmac
import ipaddress
import json
import socket

from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse

from keras_vaultgemma.serving.errors import RequestError

OPEN_PATHS = ("/", "/page.js", "/health")
"""Paths that need no key. They tell nothing about the models or other clients."""


class Guard:
    """ASGI middleware that rejects requests of strangers.

    A page in a browser of this machine can send requests here, too. It is kept out in two ways: the
    header `Host` must be an address or a known name, so that no other name can be made to point
    here (DNS rebinding); and the header `Origin`, which browsers send, must be this server's own or
    one of `origins`.

    Args:
        app: ASGI application.
        hosts: names besides addresses and "localhost" that `Host` may have.
        origins: origins of other pages that may send requests, such as "https://example.com".
        api_key: string that `Authorization: Bearer ...` must have, or None.
    """

    def __init__(self, app, hosts=(), origins=(), api_key=None):
        self._app = app
        self._hosts = {host.lower() for host in (*hosts, "localhost", socket.gethostname())}
        self._origins, self._api_key = set(origins), api_key

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            self._check(scope["method"], scope["path"], Headers(scope=scope))
        except RequestError as error:
            await error_response(error)(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _check(self, method, path, headers):
        host = headers.get("host", "")
        if not self._is_known(host):
            raise RequestError(403, f"The host {host[:100]!r} is not allowed", code="host")
        origin = headers.get("origin")
        own = (f"http://{host}", f"https://{host}")
        if origin is not None and origin not in own and origin not in self._origins:
            raise RequestError(403, "Pages of other origins are not allowed", code="origin")
        if self._api_key is None or path in OPEN_PATHS or method == "OPTIONS":
            return
        scheme, _, key = headers.get("authorization", "").partition(" ")
        # In constant time, so that the key cannot be guessed letter by letter.
        is_right = hmac.compare_digest(key.strip().encode(), self._api_key.encode())
        if scheme.lower() != "bearer" or not is_right:
            raise RequestError(401, "The API key is wrong or missing", code="invalid_api_key")

    def _is_known(self, host):
        name = host.rsplit(":", 1)[0] if not host.endswith("]") else host
        name = name.strip("[]").lower()
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return name in self._hosts
        return True


async def read_json(request, max_bytes, seconds):
    """Return the JSON value in the body of a request.

    Raises:
        RequestError: If it is no JSON, too large, or takes too long to arrive.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        # A page of another origin could send other types without asking first.
        raise RequestError(415, "The header Content-Type must be application/json")
    too_large = RequestError(413, f"The body must have at most {max_bytes} bytes")
    length = request.headers.get("content-length", "0")
    if length.isdigit() and int(length[:20]) > max_bytes:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(seconds):
            async for part in request.stream():
                body += part
                if len(body) > max_bytes:
                    raise too_large
    except TimeoutError:
        raise RequestError(408, f"The body did not arrive within {seconds} s") from None
    except ClientDisconnect:
        raise RequestError(400, "The client has gone before its request was complete") from None
    try:
        return json.loads(body, parse_constant=_reject_constant)
    except (ValueError, RecursionError) as error:
        raise RequestError(400, f"The body must be JSON: {str(error)[:200]}") from None


def error_response(error):
    """Return the response of a `RequestError`."""
    headers = {"Retry-After": "1"} if error.status == 503 else {}
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(error.body, error.status, headers)


def _reject_constant(name):
    raise ValueError(f"{name} is no number of JSON")
