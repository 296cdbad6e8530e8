"""Every kernel's PTX, executed on CPU tensors and held to float64, on a machine without a GPU.

    python -m bench execute

A row is a public call on one shape and dtype: its launches are compiled for the target as they
stand, up to PTX, and executed by an interpreter that checks bounds, alignment, races and waits.
Errors are relative to the largest true entry, beside the share that they take of what the yardstick
allows. Programs are kept by the hash of all that they follow from.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import signal
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import torch

from ...calls import AnyCall
from ...errors import BenchError, Parser
from ...report import aligned
from .faults import FAULTS, Row, table
from .judge import Judged, Score, judge

TARGETS = ("sm_90", "sm_80")
HEADER = (
    "target",
    "call",
    "dtype",
    "N×M×D",
    "value",
    "to queries",
    "to keys",
    "others",
    "",
    "kernels",
)
MANY = 4  # of one call's violations that the table tells
DIED = "its process died"

Task = tuple[str, str, Path]  # target, the call's label, the programs' folder


def main(arguments: list[str]) -> int:
    parser = Parser(
        prog="python -m bench execute", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--target", action="append", metavar="NAME", help=", ".join(TARGETS))
    parser.add_argument("--kernel", action="append", metavar="NAME", help="calls that launch it")
    parser.add_argument("--case", action="append", metavar="PART", help="calls named so")
    parser.add_argument("--quick", action="store_true", help="few calls, every kernel")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes")
    parser.add_argument("--cache", type=Path, metavar="DIR", help="of compiled programs")
    parser.add_argument("--faults", type=int, default=0, metavar="N", help="seed up to N faults of "
                        "each kind in every program: which are noticed?")  # fmt: skip
    chosen = parser.parse_args(arguments)
    targets = tuple(chosen.target or TARGETS)
    for target in targets:
        if target not in TARGETS:
            raise BenchError(f"unknown target {target!r}: {', '.join(TARGETS)}")
    if chosen.jobs < 1:
        raise BenchError(f"--jobs must be at least 1, got {chosen.jobs}")
    if chosen.faults < 0:
        raise BenchError(f"--faults must be at least 0, got {chosen.faults}")
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise BenchError("TRITON_INTERPRET=1 is set: there is nothing to compile")

    from tqdm import tqdm

    from ..launches import kernel_names
    from .compile import default_cache
    from .machine import build

    every = kernel_names()
    for name in chosen.kernel or ():
        if name not in every:
            raise BenchError(f"unknown kernel {name!r}: {', '.join(sorted(every))}")
    cache = chosen.cache or default_cache()
    tasks = [
        (target, label, cache)
        for target in targets
        for label in selected(target, chosen.case or (), chosen.kernel or (), chosen.quick)
    ]
    if not tasks:
        raise BenchError("nothing to execute: no call of these names launches these kernels")
    build()  # the interpreter: once, and not by every process
    if chosen.faults:
        return seed_faults(tasks, chosen.jobs, chosen.faults)
    found: list[Judged] = []
    try:
        bar = tqdm(total=len(tasks), unit="call", file=sys.stderr)
        for judged in execute_all(tasks, chosen.jobs):
            found.append(judged)
            bar.update()
    finally:  # what there is, if stopped
        found.sort(key=lambda x: tasks.index((x.target, x.call, cache)))
        print(aligned([HEADER, *map(line, found)]))
        print("\n".join(text for judged in found for text in troubles(judged)))
        for target in targets:
            print(summary(target, [x for x in found if x.target == target], every))
    whole = not (chosen.case or chosen.kernel)
    missing = any(unseen(target, found, every) for target in targets)
    return 1 if (whole and missing) or not all(x.passed for x in found) else 0


def selected(
    target: str, parts: Sequence[str], kernels: Sequence[str], quick: bool
) -> Iterator[str]:
    """Labels of calls; which kernels a call launches is seen by launching it for nobody."""
    from ...call_list import every, label
    from ..launches import launches_for

    for call in every():
        if quick and not call.quick:
            continue
        if parts and not any(part in label(call) for part in parts):
            continue
        if kernels:
            launched: set[str] = set()
            with launches_for(target, lambda launch, seen=launched: seen.add(launch.name)):  # type: ignore[misc]
                call.ours()
            if not launched & set(kernels):
                continue
        yield label(call)


def work(target: str, label: str, cache: Path) -> Judged:
    return judge(named(label), target, label, cache)


def execute_all(
    tasks: Sequence[Task], jobs: int, work: Callable[..., Judged] = work
) -> Iterator[Judged]:
    """As they come. A process that dies costs the call that it was at: who it was is found by
    going on with one process."""
    pending = list(tasks)
    while pending:
        whole = True
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(jobs, context, initializer=settle) as pool:
            futures = {pool.submit(work, *task): task for task in pending}
            try:
                for future in as_completed(futures):
                    try:
                        answer = future.result()
                    except BrokenProcessPool:
                        whole = False
                        continue
                    pending.remove(futures[future])
                    yield answer
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        if whole:
            return
        if jobs == 1:
            target, label, _ = pending.pop(0)
            yield Judged(label, target, failure=DIED)
        jobs = 1


def seed_faults(tasks: Sequence[Task], jobs: int, most: int) -> int:
    from .capture import add

    rows = {kind: Row() for kind in FAULTS}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, context, initializer=settle) as pool:
        for found in pool.map(seeded, tasks, [most] * len(tasks)):
            add(rows, found)
    print(table(rows))
    return 0


def seeded(task: Task, most: int) -> dict[str, Row]:
    from .capture import seeding

    target, label, cache = task
    with seeding(target, cache, most) as rows:
        named(label).ours()
    return rows


def settle() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent
    warnings.filterwarnings("ignore", message="Sparse CSR tensor support")
    torch.set_num_threads(1)


def named(wanted: str) -> AnyCall:
    from ...call_list import every, label

    return next(x for x in every() if label(x) == wanted)


def line(found: Judged) -> tuple[str, ...]:
    name, dtype, shape = found.call.rsplit(", ", 2)
    shown = [cell(found.scores.get(x)) for x in ("value", "queries", "keys")]
    others = {k: v for k, v in found.scores.items() if k not in ("value", "queries", "keys")}
    misses = [f"{k} misses" for k, v in found.scores.items() if not v.passed]
    if found.violations:
        misses.append(f"{len(found.violations)} violated")
    if found.failure:
        misses.append("failed")
    launches = [f"{k}×{n}" if n > 1 else k for k, n in Counter(found.kernels).items()]
    return (
        found.target, name, dtype, shape, *shown,
        "; ".join(f"{k} {cell(v)}" for k, v in others.items()),
        "; ".join(misses) or "ok", " ".join(launches),
    )  # fmt: skip


def troubles(found: Judged) -> list[str]:
    """What does not go into the table: one line each."""
    told = [*found.violations[:MANY], *[found.failure] * bool(found.failure)]
    if len(found.violations) > MANY:
        told.append(f"and {len(found.violations) - MANY} more")
    return [f"{found.target}, {found.call}: {text}" for text in told]


def cell(score: Score | None) -> str:
    if score is None:
        return "–"
    share = score.error / score.allowed
    return f"{score.error:.1e} ({share:.0%})" if share == share else "NaN"


def unseen(target: str, found: Iterable[Judged], every: set[str]) -> set[str]:
    return every - {kernel for x in found if x.target == target for kernel in x.kernels}


def summary(target: str, found: Sequence[Judged], every: set[str]) -> str:
    without = unseen(target, found, every)
    text = f"{target}: {len(every) - len(without)} of {len(every)} kernels executed"
    if without and len(without) <= len(every) // 2:
        text += f" (not {', '.join(sorted(without))})"
    met = sum(x.passed for x in found)
    violated = sum(len(x.violations) for x in found)
    launches = sum(len(x.kernels) for x in found)
    from .capture import LEFT_OUT  # imports Triton

    not_counted = "".join(f"; not counted, as this Triton leaves it out: {x}" for x in LEFT_OUT)
    return (
        f"{text}; {met} of {len(found)} calls within the yardstick without a violation "
        f"({violated} violations); {launches} launches, "
        f"{sum(x.instructions for x in found) / 1e6:.0f} M warp instructions in "
        f"{sum(x.seconds for x in found):.1f} s{not_counted}"
    )
