"""The way of pieces from the thread that decodes to a client, until it has all of them or goes."""

import asyncio

from starlette.responses import Response

from keras_vaultgemma.serving.errors import RequestError


class Exchange:
    """Pieces of one request's answers, from the thread that decodes to the event loop.

    It is created in the event loop.

    Args:
        seconds: float. Time in which the answers must be complete.
    """

    def __init__(self, seconds):
        self._seconds = seconds
        self._loop = asyncio.get_running_loop()
        self._end = self._loop.time() + seconds
        self._queue = asyncio.Queue()

    def deliver(self, i, piece):
        """Add a `Piece` of answer i, or the exception that ended it. Any thread may call it."""
        try:
            self._loop.call_soon_threadsafe(self._queue.put_nowait, (i, piece))
        except RuntimeError:
            # The event loop has ended, and with it the client's connection.
            return

    async def pieces(self, count):
        """Iterate over pairs `(i, piece)` until `count` answers are complete.

        Raises:
            RequestError: If an answer failed, or the time is over.
        """
        while count:
            try:
                async with asyncio.timeout_at(self._end):
                    i, piece = await self._queue.get()
            except TimeoutError:
                message = f"The answer took longer than {self._seconds:g} s"
                raise RequestError(504, message, code="timeout") from None
            if isinstance(piece, RequestError):
                raise piece
            if isinstance(piece, Exception):
                raise RequestError(500, str(piece))
            count -= piece.finish_reason is not None
            yield i, piece

    async def collect(self, count):
        """Return a list of the pieces of `count` answers that are not streamed."""
        found = [None] * count
        async for i, piece in self.pieces(count):
            found[i] = piece
        return found


async def until_disconnect(receive, work, seconds=None):
    """Return the result of a coroutine, or None if the client disconnects or time ends before that.

    Args:
        receive: ASGI's function of the request, whose body has been read.
        work: coroutine. It is cancelled if the client disconnects.
        seconds: float. Defaults to None, for no limit.
    """
    tasks = asyncio.ensure_future(work), asyncio.ensure_future(_disconnect(receive))
    try:
        await asyncio.wait(tasks, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        return tasks[0].result() if tasks[0].done() else None
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _disconnect(receive):
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """A response of server-sent events, which ends when the client goes.

    Args:
        events: asynchronous iterator of strings.
        seconds: float. Time after which the response ends, even if the client does not read it.
        on_end: function that is called at the end, whatever the reason.
    """

    media_type = "text/event-stream"

    def __init__(self, events, seconds, on_end):
        self._events, self._seconds, self._on_end = events, seconds, on_end
        self.status_code, self.background = 200, None
        self.init_headers({"Cache-Control": "no-store", "X-Accel-Buffering": "no"})

    async def __call__(self, scope, receive, send):
        try:
            await until_disconnect(receive, self._send(send), self._seconds)
        finally:
            self._on_end()

    async def _send(self, send):
        start = {"type": "http.response.start", "status": self.status_code}
        await send({**start, "headers": self.raw_headers})
        async for event in self._events:
            body = f"data: {event}\n\n".encode()
            await send({"type": "http.response.body", "body": body, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
