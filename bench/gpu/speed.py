"""Speed: what is measured, each kernel's own time beside what its machine code predicts."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from statistics import median
from typing import Any

from ..cases import CASES, Case
from ..measure import DTYPES, Effort, build, forward_and_backward, measure
from ..record import Result, environment
from .device import current
from .outcome import NotApplicable, Outcome
from .sizes import Sizes

EFFORT = Effort(seconds=0.5, rounds=30, least=5)
REHEARSED = Effort(seconds=0.02, rounds=2, least=2)
SLOW = frozenset({"compiled"})  # half a minute of compiling a shape
NONE = frozenset[str]()
CALLS = 20  # of which the host's time is the median
# Most telling first: tier, case, dtype, (N, d), what is left out, seconds a shape.
PLAN: tuple[tuple[int, str, str, tuple[tuple[int, int], ...], frozenset[str], float], ...] = (
    (1, "rkdo_loss", "bf16", ((64, 64), (4096, 64), (65536, 64)), SLOW, 8),
    (1, "clip", "bf16", ((65536, 512),), SLOW, 15),
    (1, "rkdo_loss", "bf16", ((65536, 512),), SLOW, 12),
    (1, "field_dense_bf16", "bf16", ((16384, 64),), SLOW, 8),
    (1, "depth", "bf16", ((16384, 64),), SLOW, 8),
    (2, "rkdo_loss", "fp32", ((64, 64), (4096, 64), (65536, 64)), SLOW, 10),
    (2, "info_nce", "bf16", ((65536, 64), (4096, 64)), SLOW, 10),
    (2, "clip", "bf16", ((4096, 512),), SLOW, 8),
    (2, "rkdo_direct", "bf16", ((4096, 64), (65536, 64)), SLOW, 10),
    (2, "icon_student", "bf16", ((4096, 64), (65536, 64)), SLOW, 10),
    (2, "depth", "bf16", ((2048, 64),), SLOW, 6),
    (2, "field_snapshot", "bf16", ((1024, 64), (4096, 64)), SLOW, 8),
    (3, "rkdo_loss", "bf16", ((16384, 64), (1024, 64), (256, 64), (4096, 512), (16384, 512)),
     SLOW, 8),
    (3, "field_dense_bf16", "bf16", ((4096, 64), (65536, 64)), SLOW, 8),
    (3, "field_dense", "fp32", ((16384, 64),), SLOW, 8),
    (3, "icon_gaussian", "bf16", ((4096, 64), (65536, 64)), SLOW, 8),
    (3, "nt_xent", "bf16", ((4096, 64), (65536, 64)), SLOW, 10),
    (3, "info_nce", "fp32", ((16384, 64), (65536, 64)), SLOW, 10),
    (3, "info_nce", "bf16", ((16384, 64),), SLOW, 8),
    (4, "rkdo_loss", "fp32", ((16384, 64), (4096, 512), (65536, 512)), SLOW, 12),
    (4, "rkdo_direct", "fp32", ((4096, 64), (65536, 64)), SLOW, 12),
    (4, "rkdo_direct", "bf16", ((16384, 64),), SLOW, 8),
    (4, "clip", "fp32", ((65536, 512),), SLOW, 20),
)  # fmt: skip


@dataclass(frozen=True)
class Problem:
    case: str
    n: int
    d: int
    dtype: str
    skip: frozenset[str]
    tier: int
    cost: float

    @property
    def label(self) -> str:
        return f"{self.case}, {self.dtype}, {self.n}×{self.d}"

    @property
    def profiled(self) -> bool:
        return any(x.name == "ours" for x in known(self.case).contenders)

    @property
    def kernels(self) -> tuple[str, str, int]:
        """What its kernels are compiled for."""
        return self.case, self.dtype, 512 if self.d == 512 else 64


def known(name: str) -> Case:
    (case,) = (x for x in CASES if x.name == name)
    return case


def problems(sizes: Sizes) -> list[Problem]:
    found = {}
    for tier, case, dtype, shapes, skip, cost in PLAN:
        if tier > sizes.tiers:
            continue
        for n, d in shapes:
            problem = Problem(case, max(8, n // sizes.scale), min(d, sizes.widest), dtype, skip,
                              tier, cost)  # fmt: skip
            found.setdefault((case, dtype, problem.n, problem.d), problem)
    return list(found.values())


def measured(problem: Problem) -> Iterator[Result | Outcome]:
    """Every contender's result, then whether ours were right. A rehearsal's results say that they
    are."""
    device = current()
    about = environment("cuda") | {"rehearsal": device.rehearsal}
    case, ours = known(problem.case), []
    if device.rehearsal:
        case = replace(case, contenders=tuple(map(spoiled, case.contenders)))
    for result in measure(
        case, problem.n, problem.d, problem.dtype, "cuda",
        REHEARSED if device.rehearsal else EFFORT, about, problem.skip,
    ):  # fmt: skip
        yield result
        if result.contender.startswith("ours"):
            ours.append(result)
    bad = [x for x in ours if x.status in ("wrong", "failed")]
    detail = "; ".join(f"{x.contender}: {x.status} {x.detail}" for x in bad)
    times = ", ".join(f"{x.contender} {x.p50 * 1e6:.4g} µs" for x in ours if x.p50)
    yield Outcome(bool(ours) and not bad, detail or times or "no result of ours")


def spoiled(contender: Any) -> Any:
    """Where a rehearsal's faults come in."""
    if not contender.name.startswith("ours"):
        return contender
    return replace(contender, make=lambda n, device: current().through(contender.make(n, device)))


def profiled(problem: Problem) -> Outcome:
    """Host time, launches and each kernel's own time, of one call."""
    device = current()
    (ours,) = (x for x in known(problem.case).contenders if x.name == "ours")
    place = device.place()
    inputs = known(problem.case).inputs(problem.n, problem.d, DTYPES[problem.dtype], str(place))
    loss = device.through(build(ours, problem.n, place, None))
    step = partial(forward_and_backward, loss, inputs)
    for _ in range(3):
        step()
    host = []
    for _ in range(2 if device.rehearsal else CALLS):
        device.synchronize()
        start = time.perf_counter()
        step()
        host.append(time.perf_counter() - start)
    profile = device.profile(step, 1 if device.rehearsal else 10)
    if not profile.kernels:
        raise NotApplicable("the profiler saw no kernel: is CUPTI there?")
    figures = {"host": median(host), "launches": profile.launches}
    figures |= {f"kernel {name}": taken for name, taken in profile.kernels.items()}
    own = sum(profile.kernels.values())
    longest = sorted(profile.kernels.items(), key=lambda x: -x[1])[:6]
    parts = ", ".join(f"{name[:60]} {1e6 * taken:.3g} µs" for name, taken in longest)
    detail = (
        f"host {1e6 * figures['host']:.3g} µs, {profile.launches:.0f} launches, "
        f"{1e6 * own:.3g} µs in kernels: {parts}"
    )
    return Outcome(True, detail, figures)
