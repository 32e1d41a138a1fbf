"""The web application: OpenAI's interface, a health check and a page to try it."""

import asyncio
import contextlib
import json
from importlib import resources

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from keras_vaultgemma.serving.errors import RequestError
from keras_vaultgemma.serving.exchange import EventStream, Exchange, until_disconnect
from keras_vaultgemma.serving.guard import Guard, error_response, read_json
from keras_vaultgemma.serving.jobs import jobs_of
from keras_vaultgemma.serving.requests import read_chat, read_completion
from keras_vaultgemma.serving.responses import Responses

BODY_SECONDS = 30
"""Time in which the body of a request must arrive."""

SEND_SECONDS = 10
"""Time in which a client must read what it has been sent."""

PAGE_POLICY = "default-src 'none'; script-src 'self'; connect-src 'self'; style-src 'unsafe-inline'"
"""What the page may load: nothing from elsewhere."""

CLOSED = 499
"""Status of a response that nobody receives, because the client has gone."""


class App:
    """The web application of some models.

    Args:
        models: `Models`.
        scheduler: `Scheduler`, which is started and ended with the application.
        options: `ServeOptions`.
    """

    def __init__(self, models, scheduler, options):
        self._models, self._scheduler, self._options = models, scheduler, options
        middleware = []
        if options.allow_origins:
            middleware.append(
                Middleware(
                    CORSMiddleware,
                    allow_origins=list(options.allow_origins),
                    allow_methods=["GET", "POST"],
                    allow_headers=["Authorization", "Content-Type"],
                )
            )
        guard = dict(
            hosts=(*options.allow_hosts, options.host),
            origins=options.allow_origins,
            api_key=options.api_key,
        )
        self.asgi = Starlette(
            routes=[
                Route("/", self._page),
                Route("/page.js", self._script),
                Route("/health", self._health),
                Route("/v1/models", self._list_models),
                Route("/v1/models/{name:path}", self._one_model),
                Route("/v1/completions", self._completions, methods=["POST"]),
                Route("/v1/chat/completions", self._chat, methods=["POST"]),
            ],
            middleware=[*middleware, Middleware(Guard, **guard)],
            exception_handlers={
                RequestError: _on_request_error,
                HTTPException: _on_http_error,
                Exception: _on_error,
            },
            lifespan=self._lifespan,
        )

    @contextlib.asynccontextmanager
    async def _lifespan(self, app):
        self._scheduler.start()
        yield
        await asyncio.to_thread(self._scheduler.close)

    async def _page(self, request):
        return _static("page.html", "text/html")

    async def _script(self, request):
        return _static("page.js", "text/javascript")

    async def _health(self, request):
        decoding, waiting = self._scheduler.load
        is_alive = self._scheduler.is_alive
        status = {"status": "ok" if is_alive else "down", "decoding": decoding, "waiting": waiting}
        return JSONResponse(status, 200 if is_alive else 503)

    async def _list_models(self, request):
        return JSONResponse({"object": "list", "data": [*map(self._model, self._models.names)]})

    async def _one_model(self, request):
        name = request.path_params["name"]
        self._models.check(name)
        return JSONResponse(self._model(name))

    def _model(self, name):
        return {
            "id": name,
            "object": "model",
            "created": self._models.created,
            "owned_by": "keras-vaultgemma",
            "parent": None if name == self._models.base else self._models.base,
            "max_model_len": self._models.model.backbone.max_sequence_length,
        }

    async def _completions(self, request):
        return await self._answer(request, read_completion)

    async def _chat(self, request):
        return await self._answer(request, read_chat)

    async def _answer(self, request, read):
        """Read a request, decode what it asks for, and return the response."""
        body = await read_json(request, self._options.max_body, BODY_SECONDS)
        # In a thread, because a long text takes long to tokenize.
        call = await asyncio.to_thread(read, body, self._models.model, self._options.max_queue)
        self._models.check(call.model)
        preprocessor = self._models.model.preprocessor
        exchange = Exchange(self._options.timeout)
        jobs = jobs_of(call, preprocessor, exchange.deliver)
        responses = Responses(call, preprocessor)
        self._scheduler.submit(jobs)

        def end():
            self._scheduler.cancel(jobs)

        if call.stream:
            # A little later than the pieces end, so that the client is told why.
            seconds = self._options.timeout + SEND_SECONDS
            return EventStream(_events(exchange, responses, len(jobs)), seconds, end)
        try:
            pieces = await until_disconnect(request.receive, exchange.collect(len(jobs)))
        finally:
            end()
        return (
            Response(status_code=CLOSED)
            if pieces is None
            else JSONResponse(responses.whole(pieces))
        )


async def _events(exchange, responses, count):
    """Iterate over the data of a stream's events."""
    counts = [0] * count
    try:
        for chunk in responses.first_chunks():
            yield json.dumps(chunk)
        async for i, piece in exchange.pieces(count):
            counts[i] = piece.token_count
            yield json.dumps(responses.chunk(i, piece))
        if (chunk := responses.usage_chunk(counts)) is not None:
            yield json.dumps(chunk)
    except RequestError as error:
        yield json.dumps(error.body)
        return
    yield "[DONE]"


def _static(name, media_type):
    content = resources.files("keras_vaultgemma.serving").joinpath(name).read_text("utf-8")
    headers = {"Content-Security-Policy": PAGE_POLICY, "X-Content-Type-Options": "nosniff"}
    return Response(content, media_type=media_type, headers=headers)


async def _on_request_error(request, error):
    return error_response(error)


async def _on_http_error(request, error):
    message = f"{request.method} {request.url.path[:100]}: {error.detail}"
    return error_response(RequestError(error.status_code, message))


async def _on_error(request, error):
    return error_response(RequestError(500, f"Internal error: {type(error).__name__}"))
