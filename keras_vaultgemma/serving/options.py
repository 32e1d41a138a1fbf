"""Options of a server."""

import dataclasses

from keras_vaultgemma._validation import check_integer, check_number


@dataclasses.dataclass(frozen=True)
class ServeOptions:
    """Options of a server, which `server.serve` documents.

    Raises:
        ValueError: If an option is out of its range.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None
    allow_hosts: tuple = ()
    allow_origins: tuple = ()
    max_rows: int = 8
    max_queue: int = 256
    max_body: int = 2**20
    max_connections: int = 512
    timeout: float = 600.0

    def __post_init__(self):
        check_integer("port", self.port, minimum=0, maximum=65535)
        check_integer("max_rows", self.max_rows, maximum=256)
        for name in ("max_queue", "max_body", "max_connections"):
            check_integer(name, getattr(self, name))
        check_number("timeout", self.timeout, above=0)
        if self.api_key is not None and not (self.api_key.isascii() and self.api_key.strip()):
            raise ValueError("`api_key` must be a non-empty string of ASCII characters")
