"""Results that follow from a call's settings alone: computed once, constants to the compiler."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, wraps
from numbers import Integral, Real
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
    cached = lru_cache(maxsize=1024)(function)

    @wraps(function)
    def constant(*args: Any) -> R:
        return cached(*args)

    # What torch.compiler.assume_constant_result does, without its import of the whole compiler.
    constant._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return constant
