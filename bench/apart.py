"""Work in a process of its own: a fork of one that has run nothing, so that what others left behind
(the C library's heap, which halved one time of what allocates N² numbers and added half to another;
caches; pools of threads; a GPU that an illegal access has broken) neither helps nor hurts."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from multiprocessing import forkserver, resource_tracker
from multiprocessing.process import BaseProcess
from typing import Any

import torch
import torch._inductor.config as inductor

ENDS_IN = 10  # seconds a process that has sent everything has to end in


class Died(Exception):
    """The process ended before its work did. Killed, it most likely took too much memory."""

    def __init__(self, code: int | None) -> None:
        super().__init__(f"the process that measures ended with status {code}")
        self.killed = code == -signal.SIGKILL


class Apart:
    """`work(*arguments)` under way; what it yields passes through pickle and `pipe`."""

    def __init__(self, work: Callable[..., Iterable[Any]], *arguments: Any) -> None:
        context = multiprocessing.get_context("forkserver")
        self.pipe, theirs = context.Pipe(duplex=False)
        self.child = context.Process(
            target=child_main, args=(theirs, torch.get_num_threads(), work, arguments), daemon=True
        )
        try:
            start(self.child)
        except BaseException:
            self.close()
            raise
        finally:
            theirs.close()

    def receive(self) -> Any:
        """The next that it yields, waited for; raises EOFError at its end, Died if it crashed."""
        try:
            return self.pipe.recv()
        except EOFError:
            self.child.join(ENDS_IN)
            if self.child.exitcode != 0:
                raise Died(self.child.exitcode) from None
            raise

    def close(self) -> None:
        """Ends it, whatever it does."""
        if self.child.pid:
            self.child.kill()
        self.pipe.close()


def stream(work: Callable[..., Iterable[Any]], *arguments: Any) -> Iterator[Any]:
    """What `work(*arguments)` yields in a process of its own, as it comes."""
    process = Apart(work, *arguments)
    try:
        while True:
            try:
                found = process.receive()
            except EOFError:
                return
            yield found
    finally:
        process.close()


def start(child: BaseProcess) -> None:
    """Deaf to Ctrl-C while it does, as the server stays: that is for this process, which ends the
    others, and so has to know of them."""
    forkserver.set_forkserver_preload(["bench.apart"])
    resource_tracker.ensure_running()  # undoes the mask when it starts, so before
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        forkserver.ensure_running()
        child.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def child_main(
    pipe: Any, threads: int, work: Callable[..., Iterable[Any]], arguments: tuple[Any, ...]
) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    inductor.compile_threads = 1  # its pool of processes would outlive this one
    for found in work(*arguments):
        pipe.send(found)
    pipe.close()


def end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
