"""A checkpoint's tensors, read by a second thread while the first builds the model that takes them."""

import collections
import contextlib
import gc
from concurrent.futures import ThreadPoolExecutor

LIMIT = 2**26
"""Bytes in the file that are read before they are asked for."""


@contextlib.contextmanager
def read_ahead(values):
    """While a model is built: the same values, read in their order before they are asked for; no garbage collection.

    Building 26 layers takes Keras half a second on TensorFlow, which reading need not wait for. Nor need the garbage
    collector look three times, 0.2 s, at all that the backends have imported.

    Args:
        values: `{path: StoredTensor}`, in the order in which the model asks for them (any other works, and gains
            nothing), or None.

    Yields:
        `{path: value with shape and read(dtype)}`, or None for None. `read` is for one thread, and raises what that of
        the `StoredTensor` does.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        if values is None:
            yield None
            return
        queue = _Queue(values.values())
        try:
            yield {path: _Value(queue, stored) for path, stored in values.items()}
        finally:
            queue.close()
    finally:
        if was_enabled:
            gc.enable()


class _Queue:
    """Tensors to come, and the readings that were begun."""

    def __init__(self, tensors):
        self._tensors = collections.deque(tensors)
        self._begun = {}
        self._thread = ThreadPoolExecutor(1)

    def read(self, tensor, dtype):
        """What `tensor.read(dtype)` returns."""
        future, begun_as = self._begun.pop(tensor, (None, None))
        if future is None and tensor in self._tensors:
            self._tensors.remove(tensor)
        if begun_as != dtype:  # not begun at all, or of a layer with a policy of its own
            future = self._thread.submit(tensor.read, dtype)
        room = LIMIT - sum(other.nbytes for other in self._begun)
        while self._tensors and self._tensors[0].nbytes <= room:
            other = self._tensors.popleft()
            room -= other.nbytes
            self._begun[other] = self._thread.submit(other.read, dtype), dtype
        return future.result()

    def close(self):
        self._thread.shutdown(cancel_futures=True)


class _Value:
    """One of the tensors, as an initial value of a variable."""

    def __init__(self, queue, tensor):
        self._queue, self._tensor, self.shape = queue, tensor, tensor.shape

    def read(self, dtype):
        return self._queue.read(self._tensor, dtype)
