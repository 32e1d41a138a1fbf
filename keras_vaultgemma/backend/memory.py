"""What the C library does with memory that was freed."""

import ctypes

M_MMAP_THRESHOLD = -3
THRESHOLD = 2**20


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
