"""What the C library does with memory that was freed."""

import ctypes
import functools

from keras_vaultgemma.backend.selection import NAME

M_MMAP_THRESHOLD = -3
THRESHOLD = 2**20

LONG_COMPILATION = 1.0
"""Seconds of one stage of a compilation from which on what it leaves behind is worth returning."""


def return_freed_memory():
    """Have freed blocks of a megabyte or more go back to the system at once; for the whole process, once and for all.

    glibc otherwise takes blocks of up to 32 MB from its heap as soon as one such was freed, and layers' intermediate
    values then leave gaps there that the next ones do not fit into: a gigabyte on PyTorch at VaultGemma 1B's size.
    Does nothing with another C library.
    """
    try:
        ctypes.CDLL("libc.so.6").mallopt(M_MMAP_THRESHOLD, THRESHOLD)
    except (OSError, AttributeError):
        return


@functools.cache
def return_memory_of_compilations():
    """Have what long compilations freed go back to the system before their programs run; for the whole process (JAX).

    glibc would keep it in its heap: 0.4 GB for a private step of VaultGemma 1B with all weights, which then come on top
    of what the step itself takes. Does nothing with another C library.
    """
    if NAME != "jax":
        return
    import jax

    jax.monitoring.register_event_duration_secs_listener(_after_stage)


def _after_stage(event, seconds, **details):
    if seconds >= LONG_COMPILATION:
        _trim_heap()


def _trim_heap():
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    except (OSError, AttributeError):
        return
