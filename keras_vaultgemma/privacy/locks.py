"""Locks of files (`flock`, if the system and the file system have it), released when a file closes.

A lock belongs to an open file, so that a second one in the same process does not get it either.
"""

from pathlib import Path
from typing import IO

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


def lock(file: IO, is_waiting: bool = False) -> bool:
    """Lock an open file until it is closed.

    Args:
        file: file object.
        is_waiting: bool. Wait while another holder has the lock. Defaults to False.

    Returns:
        bool. False if another holder has the lock; True if there are no locks.
    """
    if fcntl is None:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if is_waiting else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError:
        pass  # The file system has no locks.
    return True


def is_locked(path: Path) -> bool:
    """Return True if somebody holds the lock of a file."""
    with path.open("rb") as file:
        return not lock(file)
