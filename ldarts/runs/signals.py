"""Signals that stop a run, and the lock that keeps a second process out of its folder."""
import fcntl
import os
import platform
import signal
from pathlib import Path
from typing import TextIO

from ..errors import InputError
from .checkpoints import not_written


class Signals:
    """SIGTERM, SIGINT and SIGUSR1 ask the run to stop after the step; a second SIGINT ends the process.

    received: the number of the last signal, 0 for none
    """

    STATUS = {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGUSR1: 0}

    def __init__(self):
        self.received = 0
        for number in self.STATUS:
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame) -> None:
        if number == self.received == signal.SIGINT:
            os._exit(130)
        self.received = number


def lock(folder: Path) -> TextIO:
    """Lock the folder. The lock ends when the returned file is closed, or with this process."""
    try:
        file = open(folder / "lock", "a+")
    except OSError as error:
        raise not_written(folder / "lock", error) from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.seek(0)
        holder = file.read(100).strip() or "another process"
        raise InputError(f"{folder} is in use by {holder}: wait until it ends, or stop it") from error
    file.truncate(0)
    file.write(f"process {os.getpid()} on {platform.node()}\n")
    file.flush()
    return file
