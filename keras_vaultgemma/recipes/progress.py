"""A line on standard error that says how far a long piece of work is."""

import sys
import time

WIDTH, PAUSE = 20, 0.1
"""Characters of the bar, and seconds between two lines."""


class Progress:
    """Bytes done, of how many, and what is being worked on; silent where standard error is no terminal.

    Args:
        total: bytes of all the work.
        enabled: False for silence.

    Used as a context manager, which clears the line at the end.
    """

    def __init__(self, total, enabled=True):
        self.total = total
        self.done = 0
        self._shown = 0.0
        self._enabled = enabled and sys.stderr is not None and sys.stderr.isatty()

    def report(self, name, count):
        """`count` more bytes are done, of `name`."""
        self.done += count
        now = time.monotonic()
        if not self._enabled or now - self._shown < PAUSE:
            return
        self._shown = now
        part = min(1.0, self.done / max(1, self.total))
        bar = ("#" * round(WIDTH * part)).ljust(WIDTH, ".")
        text = f"[{bar}] {part:4.0%}  {self.done / 1e9:.2f} of {self.total / 1e9:.2f} GB  {name}"
        print(f"\r\033[K{text[:119]}", end="", file=sys.stderr, flush=True)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self._enabled:
            print("\r\033[K", end="", file=sys.stderr, flush=True)
