"""One call, executed and held to the yardstick.

    error ≤ 2 · (eager's error) + one ulp of the largest true entry

by name, errors and magnitudes being maxima over the tensor, eager being reference.py in the call's
dtype. What is float32 whatever comes in, the value and a field's entries, is held to eager in
float32 on the same numbers; gradients of half precision likewise, to float32's own error rounded
once.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from ...calls import DTYPES, AnyCall, Outcome

FLOAT64_ROUNDING = 1e-12  # of the truth, relative: sums over rows and exponents up to 1/τ = 100


@dataclass(frozen=True)
class Score:
    """Relative to the largest true entry."""

    error: float
    allowed: float

    @property
    def passed(self) -> bool:
        return self.error <= self.allowed  # NaN is no number to compare with


@dataclass(frozen=True)
class Judged:
    """A call on a target, as processes hand it to one another."""

    call: str  # its label
    target: str
    kernels: tuple[str, ...] = ()  # by launch
    scores: dict[str, Score] = field(default_factory=dict)
    violations: tuple[str, ...] = ()
    failure: str = ""
    seconds: float = 0.0  # of executing
    instructions: int = 0  # of warps

    @property
    def passed(self) -> bool:
        fine = all(score.passed for score in self.scores.values())
        return fine and bool(self.scores) and not self.violations and not self.failure


def judge(call: AnyCall, target: str, label: str, cache: Path) -> Judged:
    from .capture import executing

    try:
        with executing(target, cache) as done:
            found = call.ours()
    except Exception as error:  # the compiler's or the interpreter's: it belongs into the table
        while error.__cause__ is not None and isinstance(error.__cause__, Exception):
            error = error.__cause__
        return Judged(label, target, failure=f"{type(error).__name__}: {str(error)[:200]}")
    return Judged(
        label,
        target,
        tuple(x.kernel for x in done),
        scored(call, found),
        tuple(str(v) for x in done for v in x.violations),
        seconds=sum(x.seconds for x in done),
        instructions=sum(x.instructions for x in done),
    )


def scored(call: AnyCall, found: Outcome) -> dict[str, Score]:
    dtype = DTYPES[call.dtype]
    true, beside = call.eager(torch.float64), call.eager(torch.float32)
    if set(found) != set(true):
        raise ValueError(f"results are {', '.join(found)}, want {', '.join(true)}")
    scores = {}
    for name, exact in true.items():
        held = beside[name]
        rounded = found[name].dtype == dtype  # a gradient, which is rounded to the inputs' dtype
        unit = torch.finfo(dtype if rounded else torch.float32)
        size = largest(exact)
        if not size:
            size = 1.0  # an error of what is zero counts as it is
        eager = largest(held.double() - exact) / size
        allowed = 2 * (eager if eager < float("inf") else 0.0) + unit.eps + FLOAT64_ROUNDING
        allowed += unit.smallest_normal * unit.eps / size  # the least step, of small numbers
        scores[name] = Score(largest(found[name].double() - exact) / size, allowed)
    return scores


def largest(x: Tensor) -> float:
    return float(x.abs().max())
