"""Calls whose kernels are compiled for a target and executed, and what they did that a GPU forbids.

with executed("sm_90") as violated:
    rkdo_loss(queries, keys, backend="triton").backward()
violated()                                          # the first violation as a miss, or None
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from .cases import EXECUTED
from .yardstick import Miss


@contextmanager
def executed(backend: str) -> Iterator[Callable[[], Miss | None]]:
    """Within, kernels run as the target has them; other backends run as they are."""
    if backend not in EXECUTED:
        yield lambda: None
        return
    from ..compiled.execute.capture import executing
    from ..compiled.execute.compile import default_cache

    with executing(backend, default_cache()) as done:

        def first() -> Miss | None:
            found = [violation for execution in done for violation in execution.violations]
            return Miss(f"violation: {found[0].kind}", str(found[0])) if found else None

        yield first


def called(backend: str) -> str:
    """The `backend` of a public call."""
    return "triton" if backend in EXECUTED else backend
