"""Signals that stop a run."""
import contextlib
import signal


class Signals:
    """SIGTERM, SIGINT and SIGUSR1 ask the run to stop after the step; a second SIGINT stops it at once.

    received: the number of the last signal, 0 for none. Python lets only the main thread set handlers; in
    another one the run goes on without. put_back gives a program around the run its own handlers again.
    """

    STATUS = {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGUSR1: 0}

    def __init__(self):
        self.received, self.before = 0, {}
        with contextlib.suppress(ValueError):  # not the main thread
            for number in self.STATUS:
                self.before[number] = signal.signal(number, self._handle)

    def put_back(self) -> None:
        for number, handler in self.before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: it was not Python's

    def _handle(self, number: int, frame) -> None:
        if number == self.received == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number
