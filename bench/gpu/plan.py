"""Everything that there is to run, in the order of what it tells, and how much fits into M minutes.

A check's `cost` is what it takes on an H100 whose compiler has nothing cached: a guess until the
command has run on one. Checks of a stage share processes, but for those that want a new one.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from . import checks, golden, predict, rates, sanitizer, shared_cases, situations, speed
from .outcome import Outcome
from .sizes import FULL, REHEARSED, Sizes

STAGES = ("rates", "correctness", "speed", "predictions", "reruns", "sanitizer")
LANES = {  # processes at once: only where nobody looks at the clock
    "rates": 1, "correctness": 8, "speed": 1, "predictions": 8, "reruns": 4, "sanitizer": 1,
}  # fmt: skip
ALWAYS, CORE, COMMON, WIDE, ALL = range(5)  # tiers: a later one runs if there is time
RESERVE = 0.9  # of the minutes that the plan may fill: costs are guesses
START = 6.0  # seconds that a stage's first processes take to find the GPU


@dataclass(frozen=True)
class Check:
    name: str
    stage: str
    work: Callable[[], Any]  # -> Outcome, or an iterator of speed's results and then an Outcome
    tier: int
    cost: float  # seconds
    fresh: bool = False  # the first of its process
    limit: float = 150.0  # seconds that it may take

    def run(self) -> Any:
        return self.work()


def every(rehearsal: bool = False) -> list[Check]:
    """In the order in which they would run, stage by stage."""
    sizes = REHEARSED if rehearsal else FULL
    found = [*rate_checks(), *correctness(sizes), *speeds(sizes), *reruns(sizes), *sanitized(sizes)]
    found.sort(key=lambda x: (STAGES.index(x.stage), x.tier))
    if rehearsal:
        found = [replace(x, cost=0.2, limit=60.0) for x in found]
    assert len({x.name for x in found}) == len(found), "two checks have one name"
    return found


def rate_checks() -> Iterator[Check]:
    yield Check("device", "rates", rates.device, ALWAYS, 3.0)
    for name in rates.UNITS:
        yield Check(f"rate: {name}", "rates", partial(rates.check, name), ALWAYS, 1.0)


def correctness(s: Sizes) -> Iterator[Check]:
    def add(
        tier: int, cost: float, name: str, work: Callable[..., Outcome], *rest: Any, **more: Any
    ) -> Check:
        return Check(name, "correctness", partial(work, *rest), tier, cost, **more)

    at, wide = f"{s.n}×64", f"{s.n}×{s.wide}"
    for path in s.paths:
        yield add(CORE, 4, f"accuracy: {path}, bf16, {at}", checks.accurate, path, s.n, 64, "bf16")
    for path in s.compiled:
        yield add(CORE, 25, f"reduce-overhead first: {path}, bf16, {at}",
                  situations.compiled_first, path, s.n, 64, "bf16", fresh=True)  # fmt: skip
    for path in s.paths:
        yield add(CORE, 1, f"CUDA graph: {path}, fp32, {s.small}×64",
                  situations.in_a_graph, path, s.small, 64, "fp32")  # fmt: skip
        yield add(CORE, 3, f"accuracy: {path}, fp32, {s.small}×64",
                  checks.accurate, path, s.small, 64, "fp32")  # fmt: skip
        yield add(CORE, 0.5, f"host waits for nothing: {path}, bf16, {at}",
                  situations.no_waiting, path, s.n, 64)  # fmt: skip
        yield add(CORE, 0.5, f"dirty memory: {path}, bf16, {at}",
                  situations.poisoned, path, s.n, 64, "bf16")  # fmt: skip
        yield add(CORE, 0.5, f"side stream: {path}, bf16, {at}",
                  situations.side_stream, path, s.n, 64, 10)  # fmt: skip
        yield add(CORE, 1, f"second GPU: {path}, bf16, {at}",
                  situations.second_gpu, path, s.n, 64, "bf16",
                  fresh=path == s.paths[0])  # fmt: skip
    for path in s.bounded:
        yield add(CORE, 0.5, f"a row past the bound: {path}, fp32, {s.small}×64",
                  checks.bad_row, path, s.small, 64)  # fmt: skip
    yield from table_lines(s)
    for name in golden.names(s.golden):
        yield add(COMMON, 1, f"golden: {name}", golden.check, name)
    for path in s.matrix_free:
        yield add(COMMON, 1, f"memory: {path}, bf16, {s.many}×64",
                  situations.little_memory, path, s.many, 64)  # fmt: skip
    for name, quick in shared_cases.emulated(s.shared):
        yield add(COMMON if quick else WIDE, 3, f"emulator's case: {name}",
                  shared_cases.emulator_case, name)  # fmt: skip
    for name in shared_cases.fuzzed(s.fuzzed):
        yield add(COMMON if name in "01234" else WIDE, 20, f"fuzzer's cases: {name}",
                  shared_cases.fuzz_batch, name)  # fmt: skip
    for path in s.striped:
        yield add(COMMON, 3, f"stripes of ∂L/∂S: {path}, bf16, {s.striped_n}×256",
                  checks.accurate, path, s.striped_n, 256, "bf16")  # fmt: skip
    for stored in ("fp32", "bf16"):
        for n in (s.n, s.small):
            yield add(COMMON, 4, f"the field's update, {stored}, {n}×64",
                      checks.updated, stored, n)  # fmt: skip
    yield add(COMMON, 4, f"field of snapshots, {s.n} of {s.samples} × 64",
              checks.snapshots, s.n, s.samples)  # fmt: skip
    for path in s.far:
        yield add(WIDE, 6, f"N·M past 2³¹: {path}, bf16, {s.beyond}×64",
                  checks.accurate, path, s.beyond, 64, "bf16")  # fmt: skip
    for path in s.apart:
        yield add(WIDE, 3, f"offsets past 2³¹: {path}, bf16, rows {s.stride} elements apart",
                  checks.far_apart, path, s.apart_n, s.stride)  # fmt: skip
    for path in s.paths:
        yield add(WIDE, 4, f"dirty memory: {path}, fp16, {wide}",
                  situations.poisoned, path, s.n, s.wide, "fp16")  # fmt: skip
        for n, d, dtype in s.shapes:
            yield add(ALL, 3, f"accuracy: {path}, {dtype}, {n}×{d}",
                      checks.accurate, path, n, d, dtype)  # fmt: skip


def table_lines(s: Sizes) -> Iterator[Check]:
    """Every line of the launch tables, by the widths and dtypes that lead to it."""
    for d in s.dims:
        for dtype in ("bf16", "fp32", "fp16"):
            tier = CORE if (d, dtype) in s.first_lines else COMMON
            for n in (s.line_n, s.single_n):
                yield Check(f"launch tables: every loss, {dtype}, {n}×{d}", "correctness",
                            partial(checks.every_loss, s.every, n, d, dtype), tier,
                            25 if n > 128 else 8)  # fmt: skip


def reruns(s: Sizes) -> Iterator[Check]:
    for tier, n, d, dtype in ((COMMON, s.n, 64, "bf16"), (COMMON, s.n, 512, "bf16"),
                              (WIDE, s.small, 64, "fp32"), (ALL, s.many, 64, "bf16")):  # fmt: skip
        for path in s.paths if d == 64 else s.wide_paths:
            if n == s.many and path not in s.matrix_free:
                continue
            yield Check(f"{s.reruns} reruns bitwise: {path}, {dtype}, {n}×{d}", "reruns",
                        partial(situations.bitwise, path, n, d, dtype, s.reruns), tier,
                        1.5 if d == 64 else 3)  # fmt: skip
    for path in s.striped:
        yield Check(f"deterministic stripes: {path}, bf16, {s.striped_n}×512", "reruns",
                    partial(situations.stripes, path, s.striped_n, 512, s.reruns // 10),
                    COMMON, 4)  # fmt: skip


def speeds(s: Sizes) -> Iterator[Check]:
    for problem in speed.problems(s):
        yield Check(f"speed: {problem.label}", "speed", partial(speed.measured, problem),
                    problem.tier, problem.cost, limit=240)  # fmt: skip
        if problem.profiled and problem.case in s.profiled:
            yield Check(f"kernels: {problem.label}", "speed", partial(speed.profiled, problem),
                        problem.tier, 6)  # fmt: skip
    for case, dtype, width in dict.fromkeys(p.kernels for p in speed.problems(s) if p.profiled):
        if case in s.predicted:
            yield Check(f"predicted: {case}, {dtype}, d={width}", "predictions",
                        partial(predict.check, case, dtype, width), COMMON, 20)  # fmt: skip


def sanitized(s: Sizes) -> Iterator[Check]:
    for tool in sanitizer.TOOLS:
        for path in s.sanitized:
            yield Check(f"{tool}: {path}", "sanitizer", partial(sanitizer.check, tool, path),
                        WIDE, 20, limit=150)  # fmt: skip


# ---- how much of it ------------------------------------------------------------------------------


def fitting(wanted: list[Check], minutes: float) -> tuple[list[Check], list[Check]]:
    """Those that fit into so many minutes, and the others."""
    room = 60 * minutes * RESERVE
    chosen, started = set(), set()
    for check in by_worth(wanted):
        taken = check.cost / LANES[check.stage] + (0 if check.stage in started else START)
        if check.tier == ALWAYS or taken <= room:
            chosen.add(check.name)
            started.add(check.stage)
            room -= taken
    return (
        [x for x in wanted if x.name in chosen],
        [x for x in wanted if x.name not in chosen],
    )


def by_worth(wanted: list[Check]) -> list[Check]:
    """By tier; in a tier every stage has its share of any beginning."""
    whole: dict[tuple[int, str], float] = defaultdict(float)
    for check in wanted:
        whole[check.tier, check.stage] += check.cost
    spent: dict[tuple[int, str], float] = defaultdict(float)
    shares = {}
    for check in wanted:
        key = check.tier, check.stage
        spent[key] += check.cost
        shares[check.name] = spent[key] / whole[key]
    return sorted(wanted, key=lambda x: (x.tier, shares[x.name]))


def deadlines(chosen: list[Check], start: float, minutes: float) -> dict[str, float]:
    """When each stage ends: each has its part of the time, so that none eats up another's."""
    cost = {}
    for stage in STAGES:
        costs = [x.cost for x in chosen if x.stage == stage]
        cost[stage] = START + sum(costs) / LANES[stage] if costs else 0.0
    total = sum(cost.values()) or 1.0
    ends, spent = {}, 0.0
    for stage in STAGES:
        spent += cost[stage]
        ends[stage] = start + 60 * minutes * spent / total
    return ends


def named(name: str, rehearsal: bool) -> Check:
    (check,) = (x for x in every(rehearsal) if x.name == name)
    return check
