"""The processes that prepare images: they live exactly as long as the process that started them.

A signal to the whole process group (Ctrl-C in a terminal, a cluster's SIGTERM) must not end them,
or the training process could not finish its step. A signal from the training process, which
multiprocessing sends when Python exits, must; and so must the training process's death.
"""

import functools
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from rkdo.errors import ProcessLost, UserError

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


def hand_over(x: Tensor) -> Tensor:
    """A tensor that was made here. In a worker it is put into shared memory now, where an error is
    raised: the thread that would do it later only prints it, and the training process would wait
    for ever."""
    return x.share_memory_() if get_worker_info() else x


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
def workers_watched() -> Iterator[None]:
    """Inside, what happened to or in a worker is one line: PyTorch hands on whole tracebacks.

    Raises:
        ProcessLost: nobody asked it to end.
        UserError: it raised one, or had no shared memory for what it prepared.
    """
    try:
        yield
    except UserError as error:
        if str(error).startswith("Caught "):
            last = str(error).strip().splitlines()[-1]
            error.args = (re.sub(r"^[\w.]*UserError: ", "", last),)
        raise
    except (ConnectionError, EOFError, FileNotFoundError) as error:
        if getattr(error, "filename", None) is not None:  # a file of images
            raise
        raise _lost(f"it was cut off ({error})") from error
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        if re.search(r"unable to .*</torch_", str(error)):
            raise UserError(
                "--workers needs more shared memory (/dev/shm) than there is: give the machine or "
                f"container more, or pass fewer workers ({lines[-1]})"
            ) from error
        if not re.search("DataLoader worker .*(exited unexpectedly|killed by signal)", str(error)):
            raise
        raise _lost(lines[0]) from error


def _lost(said: str) -> ProcessLost:
    return ProcessLost(
        f"a process that prepares images has ended (out of memory?): {said}; "
        "rkdo train --resume goes on"
    )


def _obey(parent: int, worker: int) -> None:
    """In a worker: hear SIGTERM from the process `parent` alone, SIGINT from nobody."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigtimedwait"):
        signal.pthread_sigmask(signal.SIG_SETMASK, {signal.SIGTERM})
    else:  # macOS cannot say who sent a signal
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
    threading.Thread(target=_watch, args=(parent,), daemon=True).start()
    sys.excepthook = functools.partial(_report, parent)


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


def _report(parent: int, *error: Any) -> None:
    """Print an error, if it is not that the parent was killed while it was being served."""
    time.sleep(POLL)
    if os.getppid() == parent:
        sys.__excepthook__(*error)
