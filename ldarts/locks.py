"""A lock between processes, as a file. The kernel unlocks it, also when a process is killed."""
import contextlib
import fcntl
import os
import platform
import sys
import warnings
from pathlib import Path
from typing import Iterator

from .errors import InputError


@contextlib.contextmanager
def locked(path: Path, wait: bool = True) -> Iterator[None]:
    """Within it this process has the lock. wait: wait for another process that has it, else raise InputError.

    Some file systems (of NFS, of Lustre) have no locks: a warning says so, and the process goes on.
    """
    with open(path, "a+") as file:
        os.register_at_fork(after_in_child=file.close)  # or a worker would keep the lock of a killed process
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:  # PermissionError: on some NFS file systems
            file.seek(0)
            what = path.with_suffix("") if wait else path.parent  # what is made, or the folder of a run
            used = f"{what} is in use by {file.read(100).strip() or 'another process'}"
            if not wait:
                raise InputError(f"{used}: wait until it ends, or stop it") from error
            if os.environ.get("RANK", "0") == "0":
                print(f"ldarts: waiting: {used}", file=sys.stderr, flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            warnings.warn(f"ldarts: a file system here has no locks ({error.strerror}); nothing keeps a "
                          "second process out of a run, or from compiling and downloading the same")
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}\n")
        file.flush()
        try:
            yield
        finally:
            if wait:  # nobody reads it any more
                path.unlink(missing_ok=True)
