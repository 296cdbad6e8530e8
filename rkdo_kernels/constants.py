"""Results that follow from a call's settings alone: computed once, constants to the compiler."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, wraps
from typing import Any, TypeVar

import torch

R = TypeVar("R")


def static(value: Any) -> Any:
    """A number that torch.compile may have made symbolic, as the constant it is in this call."""
    if torch.compiler.is_compiling() and isinstance(value, int | float):
        from torch.fx.experimental.symbolic_shapes import guard_scalar

        return guard_scalar(value)
    return value


def host_constant(function: Callable[..., R]) -> Callable[..., R]:
    """Cached by the arguments; torch.compile calls it while tracing and keeps what it returns."""
    cached = lru_cache(maxsize=1024)(function)

    @wraps(function)
    def constant(*args: Any) -> R:
        return cached(*args)

    # What torch.compiler.assume_constant_result does, without its import of the whole compiler.
    constant._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return constant
