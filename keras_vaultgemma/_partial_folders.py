"""Hidden folders in which files are written before they are moved to their target.

Each is locked (`flock`, if the system and the file system have it) as long as its process writes to
it, so that the next process knows which ones a killed process has left.
"""

import contextlib
import hashlib
import importlib
import os
import re
import shutil
import signal
import threading
import time
import uuid

# Windows has no `fcntl`.
fcntl = importlib.import_module("fcntl") if os.name == "posix" else None

PARTIAL = re.compile(r"\.saving-[0-9a-f]{32}")
"""Names of the folders."""

ATTEMPTS = 5
"""Number of times that a folder is created, in case another process just deletes it."""


@contextlib.contextmanager
def partial_folder(parent, target=None):
    """Create an empty hidden folder, and delete it at the end of the block.

    SIGTERM and SIGHUP end the block like an exception. Folders of killed processes in `parent` are
    deleted first.

    Args:
        parent: `pathlib.Path`. Created if it does not exist.
        target: string. Name of a target that one process at a time may write to. Defaults to None,
            for no such limit.

    Yields:
        `pathlib.Path` of the folder.

    Raises:
        FileExistsError: If another process writes to `target`.
        OSError: If the folder cannot be created.
    """
    with _exit_on_signals():
        folder, lock = _create(parent, target)
        try:
            for path in folder.iterdir():  # Left by a killed process with the same target.
                shutil.rmtree(path)
            _delete_abandoned(parent)
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            if lock is not None:
                os.close(lock)


@contextlib.contextmanager
def _exit_on_signals():
    """Raise SystemExit in the block on SIGTERM and SIGHUP, where they would end the process."""

    def leave(number, frame):
        raise SystemExit(128 + number)

    earlier = {}
    if threading.current_thread() is threading.main_thread():
        for name in ("SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)  # Windows has no SIGHUP.
            if number is not None and signal.getsignal(number) is signal.SIG_DFL:
                earlier[number] = signal.signal(number, leave)
    try:
        yield
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)


def _create(parent, target):
    """Return a new folder, and a descriptor that holds its lock; None if there are no locks."""
    if fcntl is not None:
        for _ in range(ATTEMPTS):
            name = uuid.uuid4().hex
            if target is not None:
                name = hashlib.sha256(os.fsencode(target)).hexdigest()[:32]
            folder = parent / f".saving-{name}"
            folder.mkdir(parents=True, exist_ok=True)
            try:
                return folder, _lock(folder)
            except (BlockingIOError, FileNotFoundError):
                time.sleep(0.05)
            except OSError:  # The file system has no locks.
                with contextlib.suppress(OSError):
                    folder.rmdir()
                break
        else:
            raise FileExistsError
    folder = parent / f".saving-{uuid.uuid4().hex}"
    folder.mkdir(parents=True)
    return folder, None


def _lock(folder):
    """Return a descriptor that holds the lock of a folder until it is closed.

    Raises:
        BlockingIOError: If another descriptor holds it.
        FileNotFoundError: If the folder was deleted.
        OSError: If the file system has no locks.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Another process may have deleted it, and created it again, before it was locked.
        if not os.path.samestat(os.fstat(descriptor), os.stat(folder)):
            raise FileNotFoundError
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _delete_abandoned(parent):
    """Delete the folders of killed processes, whose locks the system has released."""
    for folder in parent.glob(".saving-*") if fcntl is not None else ():
        if not PARTIAL.fullmatch(folder.name) or folder.is_symlink():
            continue
        with contextlib.suppress(OSError):
            lock = _lock(folder)
            try:
                # Another subfolder has replaced files. They may be the only copies if the process
                # was killed between two moves.
                if {path.name for path in folder.iterdir()} <= {"new"}:
                    shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(lock)
