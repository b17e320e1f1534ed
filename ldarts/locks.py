"""Locks of files, by which processes take turns. The kernel releases them, also if a process is killed."""
import contextlib
import fcntl
import os
import sys
import warnings
from pathlib import Path
from typing import Iterator, TextIO


def lock(file: TextIO) -> None:
    """Lock an open file until it is closed. Raises OSError if another process has locked it.

    Some file systems (of NFS, of Lustre) have no locks: a warning says so, and the process goes on.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # another process has it
        raise
    except OSError as error:
        warnings.warn(f"{file.name}: this file system has no locks ({error.strerror}); nothing keeps a "
                      "second process out", stacklevel=3)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Within it, the file is locked; it is made and removed. Waits, and says so, for another process.

    What is done within has to hold where it was done already, and twice at once, where there are no locks.
    """
    with open(path, "w") as file:
        try:
            lock(file)
        except OSError:
            if os.environ.get("RANK", "0") == "0":
                print(f"ldarts: waiting for another process ({path})", file=sys.stderr, flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
