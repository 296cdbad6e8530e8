"""Results that follow from a call's settings alone: computed once, constants to the compiler."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial, wraps
from numbers import Integral, Real
from threading import Thread, local
from typing import Any, TypeVar

import torch

R = TypeVar("R")


def plain(value: Any) -> Any:
    """A number of NumPy's as Python's own; one that torch.compile made symbolic as a constant."""
    if isinstance(value, bool | int | float):
        if torch.compiler.is_compiling():
            from torch.fx.experimental.symbolic_shapes import guard_scalar

            return guard_scalar(value)
        return value
    if isinstance(value, Integral):
        return int(value)
    return float(value) if isinstance(value, Real) else value


def host_constant(function: Callable[..., R]) -> Callable[..., R]:
    """Cached by the arguments; torch.compile calls it while tracing and keeps what it returns."""
    cached = lru_cache(maxsize=1024)(partial(_undisturbed, function))

    @wraps(function)
    def constant(*args: Any) -> R:
        return cached(*args)

    # What torch.compiler.assume_constant_result does, without its import of the whole compiler.
    constant._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return constant


def _undisturbed(function: Callable[..., R], *args: Any) -> R:
    """What is cached outlives the first call, and must not take after it: in a thread of its own
    there are no fake tensors, no default device, no inference mode, no autocast, no transforms."""
    if getattr(_thread, "undisturbed", False):
        return function(*args)
    result: list[R] = []
    raised: list[BaseException] = []

    def run() -> None:
        _thread.undisturbed = True
        try:
            result.append(function(*args))
        except BaseException as error:
            raised.append(error)

    thread = Thread(target=run)
    thread.start()
    thread.join()
    if raised:
        raise raised[0]
    return result[0]


_thread = local()
