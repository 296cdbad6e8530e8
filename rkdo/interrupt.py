"""Stopping on SIGTERM and Ctrl-C: at once where nothing is lost, else after the current step."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from rkdo.errors import Stopped

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """`signum` is the signal that asked to stop, 0 as long as none did."""

    def __init__(self) -> None:
        self.signum = 0
        self._deferred = False

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Inside, a signal is only noted in `signum`; elsewhere it raises `Stopped`."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False

    @contextmanager
    def immediate(self) -> Iterator[None]:
        """Inside, within `deferred`, a signal raises `Stopped` after all."""
        self._deferred = False
        try:
            if self.signum:
                raise Stopped(self.signum)
            yield
        finally:
            self._deferred = True

    def _receive(self, signum: int, frame: FrameType | None) -> None:
        if self.signum:  # torchrun passes on the Ctrl-C that the terminal has already sent
            return
        self.signum = signum
        if not self._deferred:
            raise Stopped(signum)


@contextmanager
def listening() -> Iterator[StopRequest]:
    """A `StopRequest` that SIGTERM and SIGINT reach, in the main thread only."""
    stop = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.signal(number, stop._receive) for number in SIGNALS}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def held() -> Iterator[None]:
    """Inside, signals wait. Where threads are started, an exception in between would leave one that
    Python has half forgotten, and whose own end is a traceback."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def by_default() -> Iterator[None]:
    """Inside, signals do what they do to any program: end it, even if it waits in a library."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, signal.SIG_DFL) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
