"""Measures the contenders of a problem: accuracy first, then time side by side, then memory.

Times are of forward and backward on leaves. The contenders take turns, in an order that reverses
every round, so that a machine that slows down slows all of them. pytest-benchmark's fixture runs
one contender to its end before the next; its statistics are used, its loop cannot be.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Container, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from pytest_benchmark.stats import Stats
from torch import Tensor

from . import accuracy, memory
from .apart import Died, stream
from .cases import Case, named
from .contenders import Contender, Loss, Unavailable
from .gpu.device import current
from .gpu.timing import DeviceTimer, floor_seconds, replayed
from .record import Result

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SAMPLE = 5e-3  # seconds a CPU sample lasts at least
NO_MEMORY = (  # as PyTorch and CUDA's libraries put it where they have no class for it
    "out of memory", "not enough memory", "can't allocate memory", "alloc_failed",
)  # fmt: skip
BRIEF = 0.1  # seconds: a shorter call runs once untimed first, so that caches are its own


@dataclass(frozen=True)
class Effort:
    """How long to measure a problem."""

    seconds: float = 8.0  # a contender
    rounds: int = 40  # at most
    least: int = 5  # at least, whatever it takes
    memory: bool = True


QUICK = Effort(seconds=1.5, rounds=15, least=3)


@dataclass
class Entrant:
    contender: Contender
    step: Callable[[], Any]  # forward and backward
    result: Result
    samples: Stats
    repeats: int = 1
    brief: bool = False
    variant: int | None = None
    failure: dict[str, Any] | None = None  # on the way


def measure(
    case: Case,
    n: int,
    d: int,
    dtype: str,
    device: str,
    effort: Effort,
    about: dict[str, Any],
    skip: frozenset[str] = frozenset(),
    apart: bool = False,
) -> Iterator[Result]:
    """One result a contender: those that cannot run first. `apart`: the times are a new process's,
    which finds the case by its name."""
    what = n, d, dtype, device, effort, about
    if apart:
        kept = frozenset(x.name for x in case.contenders)
        timed = stream(timed_in_child, case.name, kept, *what, skip)
    else:
        timed = times(case, *what, skip)
    contenders = {x.name: x for x in case.contenders if enters(x, device, skip)}
    interruption = None
    try:
        for found, variant in timed:
            contender = contenders.pop(found.contender)
            wanted = device == "cpu" and effort.memory and found.status in ("ok", "wrong")
            if wanted and contender.judged and not interruption:
                try:
                    peak = memory.apart(case, contender, variant, n, d, dtype)
                    found = replace(found, peak_bytes=peak)
                except KeyboardInterrupt as stop:  # the times are there: they are kept
                    interruption = stop
                except Died as death:  # and so they are
                    found = replace(found, detail=f"{found.detail} no peak: {death}".strip())
                except Exception as error:
                    found = replace(
                        found, p20=None, p50=None, p80=None, samples=0, **failure(error)
                    )
            yield found
    except Died as death:
        left = tuple(contenders.values())
        if len(case.contenders) == 1:
            found = Result(case.name, case.contenders[0].name, n, d, dtype, "ok", **about)
            yield from (replace(found, **failure(death)) for _ in left)
        elif not interruption:  # which of them it was, each tells alone
            for contender in left:
                alone = replace(case, contenders=(contender,))
                yield from measure(alone, *what, skip, apart=True)
    if interruption:
        raise interruption


def timed_in_child(
    name: str, kept: frozenset[str], *what: Any
) -> Iterator[tuple[Result, int | None]]:
    case = named(name)
    return times(
        replace(case, contenders=tuple(x for x in case.contenders if x.name in kept)), *what
    )


def enters(contender: Contender, device: str, skip: Container[str]) -> bool:
    on_gpu = device == "cuda"
    return contender.name not in skip and contender.graph <= on_gpu <= contender.judged


def times(
    case: Case,
    n: int,
    d: int,
    dtype: str,
    device: str,
    effort: Effort,
    about: dict[str, Any],
    skip: Container[str],
) -> Iterator[tuple[Result, int | None]]:
    """The contenders' results, but for a CPU's memory, each with the variant that was fastest."""
    place = str(current().place()) if device == "cuda" else device
    inputs = case.inputs(n, d, DTYPES[dtype], place)
    entrants = []
    known: dict[Any, Any] = {}  # truth and eager's error, by what they are of
    for contender in case.contenders:
        if not enters(contender, device, skip):
            continue
        found = Result(case.name, contender.name, n, d, dtype, "ok", **about)
        broken = None
        try:
            entrants.append(enter(contender, inputs, found, known))
        except Exception as error:
            broken = failure(error)
        release(device)  # not in the handler, whose error keeps what the contender held
        if broken:
            yield replace(found, **broken), None
    if not entrants:
        return
    take_turns(entrants, device, effort)
    floor = floor_of(case, n, d, dtype, device, entrants)
    for entrant in entrants:
        found = replace(entrant.result, floor=floor)
        if entrant.failure:
            yield replace(found, **entrant.failure), None
            continue
        found = replace(found, **percentiles(entrant.samples))
        try:
            if device == "cuda":
                found = replace(found, **seen_from_the_host(entrant))
        except Exception as error:
            found = replace(entrant.result, floor=floor, **failure(error))
        yield found, entrant.variant


def seen_from_the_host(entrant: Entrant) -> dict[str, Any]:
    """Of a GPU's contender; a graph's memory was taken when it was captured."""
    peak = None if entrant.contender.graph else current().peak(entrant.step)
    return {"wall": wall_time(entrant.step), "peak_bytes": peak}


def failure(error: Exception) -> dict[str, Any]:
    """Out of memory is a result, and so is everything else that keeps a contender from running."""
    text = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
    if isinstance(error, Died):
        return {"status": "oom" if error.killed else "failed", "detail": text}
    if isinstance(error, Unavailable):
        return {"status": "unavailable", "detail": text}
    starved = isinstance(error, (torch.OutOfMemoryError, MemoryError))
    if starved or any(words in str(error).lower() for words in NO_MEMORY):
        return {"status": "oom", "detail": "out of memory"}
    if type(error).__module__.startswith(("torch._inductor", "torch._dynamo")):
        return {"status": "unavailable", "detail": f"torch.compile: {text[:160]}"}
    return {"status": "failed", "detail": f"{type(error).__name__}: {text[:160]}"}


def enter(
    contender: Contender,
    inputs: dict[str, Tensor],
    result: Result,
    known: dict[Any, Any],
) -> Entrant:
    """Warm, judged, and with its best variant; raises what the contender raises."""
    queries = inputs["queries"]
    n, device = len(queries), queries.device
    variant, detail = None, ""
    if contender.variants:
        variant = best_variant(contender, inputs)
        detail = f"chunk {variant}"
    loss = build(contender, n, device, variant)
    found = accuracy.evaluate(loss, inputs)
    result = replace(result, detail=detail)
    if contender.judged:
        about = (contender.rows, contender.symmetric, contender.pooled)
        if about not in known:
            true = accuracy.truth(contender, inputs, torch.float64)
            known[about] = true, accuracy.eager_in(contender, inputs)
        true, eager = known[about]
        worse = accuracy.on_draws(contender, inputs, true)
        errors = accuracy.judge(found, eager, true, contender.in_float32, worse)
        wrong = not errors.limit_used <= 1
        result = replace(
            result,
            status="wrong" if wrong else "ok",
            detail=f"{errors.limit_used:.3g} × the limit" if wrong else detail,
            value_error=errors.value,
            gradient_error=errors.gradient,
            limit_used=errors.limit_used,
        )
    step: Callable[[], Any] = partial(forward_and_backward, loss, inputs)
    if contender.graph:
        step = replayed(step)
    return Entrant(contender, step, result, Stats(), variant=variant)


def build(contender: Contender, n: int, device: torch.device, variant: int | None) -> Loss:
    make: Callable[..., Loss] = contender.make
    return make(n, device) if variant is None else make(n, device, variant=variant)


def best_variant(contender: Contender, inputs: dict[str, Tensor]) -> int:
    """The fastest, tried from the largest on until they get much slower: the rest would too."""
    queries = inputs["queries"]
    fitting = [x for x in contender.variants if x < len(queries)] or contender.variants[:1]
    times: dict[int, float] = {}
    for variant in sorted(fitting, reverse=True):
        loss = build(contender, len(queries), queries.device, variant)
        step = partial(forward_and_backward, loss, inputs)
        try:
            step()
            times[variant] = min(seconds(step, queries.device.type) for _ in range(2))
        except Exception as error:
            if failure(error)["status"] != "oom":
                raise
        if times and times.get(variant, 0.0) > 1.5 * min(times.values()):
            break
    if not times:
        raise torch.OutOfMemoryError("out of memory with every chunk")
    return min(times, key=lambda variant: times[variant])


def forward_and_backward(loss: Loss, inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
    leaves = inputs["queries"], inputs["keys"]
    return torch.autograd.grad(loss(*leaves), leaves)


def seconds(step: Callable[[], Any], device: str, repeats: int = 1) -> float:
    if device == "cuda":
        current().synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        step()
    if device == "cuda":
        current().synchronize()
    return (time.perf_counter() - start) / repeats


def take_turns(entrants: list[Entrant], device: str, effort: Effort) -> None:
    """Fills every entrant's samples; what fails on the way drops out."""
    timer = DeviceTimer() if device == "cuda" else None
    for entrant in entrants:
        try:
            once = seconds(entrant.step, device)
        except Exception as error:
            entrant.failure = failure(error)
            continue
        entrant.brief = once < BRIEF
        entrant.repeats = 1 if timer else max(1, round(SAMPLE / max(once, 1e-7)))
    deadline = time.monotonic() + effort.seconds * len(entrants)
    for turn in range(effort.rounds):
        if turn >= effort.least and time.monotonic() > deadline:
            break
        for entrant in entrants[:: -1 if turn % 2 else 1]:
            if entrant.failure:
                continue
            try:
                if timer:
                    taken = timer(entrant.step)
                else:
                    if entrant.brief:
                        entrant.step()
                    taken = seconds(entrant.step, device, entrant.repeats)
                entrant.samples.update(taken)
            except Exception as error:
                entrant.failure = failure(error)


def percentiles(samples: Stats) -> dict[str, Any]:
    times = samples.sorted_data
    cuts = statistics.quantiles(times, n=5, method="inclusive") if len(times) > 1 else times * 4
    p20, _, _, p80 = cuts
    return {"p20": p20, "p50": samples.median, "p80": p80, "samples": samples.rounds}


def floor_of(
    case: Case, n: int, d: int, dtype: str, device: str, entrants: list[Entrant]
) -> float | None:
    """On a CPU what the bare products took beside the others, on a GPU what its rates give."""
    if device == "cuda":
        return floor_seconds(case.work, n, d, dtype)
    for entrant in entrants:
        if not entrant.contender.judged and entrant.samples:
            return float(entrant.samples.median)
    return None


def wall_time(step: Callable[[], Any]) -> float:
    once = seconds(step, "cuda")
    return seconds(step, "cuda", max(1, min(50, round(0.05 / max(once, 1e-6)))))


def release(device: str) -> None:
    if device == "cuda":
        gc.collect()
        with suppress(RuntimeError):  # a broken device: the next contender says so
            current().empty_cache()
