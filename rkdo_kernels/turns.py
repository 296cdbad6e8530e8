"""One thread at a time: what a field does while others step it."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import wraps
from threading import RLock
from typing import Concatenate, ParamSpec, Protocol, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


class Turns:
    """A lock that a thread may take again. A copy, an unpickled one and a forked process have their
    own, which nobody holds."""

    def __init__(self) -> None:
        self._lock, self._process = RLock(), os.getpid()

    def __enter__(self) -> None:
        if self._process != os.getpid():
            self.__init__()  # type: ignore[misc]
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def __reduce__(self) -> tuple[type[Turns], tuple[()]]:
        return Turns, ()  # what copy and pickle make it from


class HasTurns(Protocol):
    @property
    def _turns(self) -> Turns: ...


S = TypeVar("S", bound=HasTurns)


def in_turn(method: Callable[Concatenate[S, P], R]) -> Callable[Concatenate[S, P], R]:
    """A method that waits until no other thread is in such a method of the object. The compiler,
    which has no locks in its graphs, traces it as it is."""

    @wraps(method)
    def waiting(self: S, *args: P.args, **kwargs: P.kwargs) -> R:
        if torch.compiler.is_compiling():
            return method(self, *args, **kwargs)
        with self._turns:
            return method(self, *args, **kwargs)

    return waiting
