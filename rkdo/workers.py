"""The processes that prepare images: they live exactly as long as the process that started them.

A signal to the whole process group (Ctrl-C in a terminal, a cluster's SIGTERM) must not end them,
or the training process could not finish its step. A signal from the training process, which
multiprocessing sends when Python exits, must; and so must the training process's death.
"""

import functools
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch.utils.data import DataLoader, Dataset

from rkdo.errors import ProcessLost

STOPPING = {signal.SIGINT, signal.SIGTERM}
POLL = 0.5  # seconds until a worker notices that the training process is gone


class Loader(DataLoader):
    """A `DataLoader` whose workers end with the process that started them, and no sooner."""

    def __init__(self, dataset: Dataset, **settings: Any) -> None:
        obey = functools.partial(_obey, os.getpid())
        super().__init__(dataset, worker_init_fn=obey, **settings)

    def __iter__(self) -> Any:
        with _quietly():
            return super().__iter__()


@contextmanager
def _quietly() -> Iterator[None]:
    """Inside, start workers: one must not get a signal before it knows what to do with it.

    PyTorch has the end of a worker raised wherever the training process then is, which may be in
    the middle of writing a file. Without its handler `next` raises it, within five seconds.
    """
    main = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGCHLD)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {*STOPPING, signal.SIGCHLD})
    try:
        yield
    finally:
        if main:
            signal.signal(signal.SIGCHLD, handler if handler is not None else signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def none_lost() -> Iterator[None]:
    """Inside, the end of a worker that nobody asked to end is `ProcessLost`."""
    try:
        yield
    except RuntimeError as error:
        said = " ".join(str(error).split())
        if "DataLoader worker" not in said:
            raise
        raise ProcessLost(
            f"a process that prepares images has ended (out of memory?): {said}; "
            "rkdo train --resume goes on"
        ) from error


def _obey(parent: int, worker: int) -> None:
    """In a worker: hear SIGTERM from the process `parent` alone, SIGINT from nobody."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigtimedwait"):
        signal.pthread_sigmask(signal.SIG_SETMASK, {signal.SIGTERM})
    else:  # macOS cannot say who sent a signal
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
    threading.Thread(target=_watch, args=(parent,), daemon=True).start()


def _watch(parent: int) -> None:
    """SIGTERM is blocked in every thread of the worker; it is taken from the queue here."""
    waits = getattr(signal, "sigtimedwait", None)
    ended = threading.Event()
    while os.getppid() == parent:
        if waits is None:
            ended.wait(POLL)
            continue
        received = waits([signal.SIGTERM], POLL)
        if received is not None and received.si_pid == parent:
            break
    os._exit(0)
