"""Errors that a client is told of, as OpenAI's JSON objects."""


class RequestError(Exception):
    """An error in the form of OpenAI's interface.

    Args:
        status: int. Status code of HTTP.
        message: string. A sentence for the user.
        param: string. Field of the request that is wrong. Defaults to None.
        code: string. Word by which a program tells the error. Defaults to None.
    """

    def __init__(self, status, message, param=None, code=None):
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    @property
    def body(self):
        """The JSON object."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        error = dict(message=str(self), type=kind, param=self.param, code=self.code)
        return {"error": error}


def unavailable(message, code="overloaded"):
    """Return the error of a server that has more to do than it may take on."""
    return RequestError(503, message, code=code)
