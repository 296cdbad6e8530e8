"""Public calls on CPU tensors with their kernels compiled for a target and executed.

with executing("sm_90", default_cache()) as done:
    rkdo_loss(queries, keys).backward()         # done: one Execution a launch
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import triton

from ...targets import TARGETS
from .. import launches
from . import faults
from .compile import program
from .machine import COPY_UNSEEN, Execution, execute

# What a release of Triton leaves out whatever the kernel says, and its users' GPUs bear.
LEFT_OUT = {COPY_UNSEEN} if triton.__version__.startswith("3.6.") else set()


@contextmanager
def executing(target: str, cache: Path) -> Iterator[list[Execution]]:
    done: list[Execution] = []

    def receive(launch: launches.Launch) -> None:
        done.append(run(as_executed(launch, target, cache)))

    with launches.launches_for(target, receive):
        yield done


@contextmanager
def seeding(target: str, cache: Path, most: int) -> Iterator[dict[str, faults.Row]]:
    """The same, and every program is first executed with faults: at most so many of each kind."""
    rows = {kind: faults.Row() for kind in faults.FAULTS}
    seen: set[str] = set()

    def receive(launch: launches.Launch) -> None:
        given = as_executed(launch, target, cache)
        if launch.compiled_from not in seen:
            seen.add(launch.compiled_from)
            add(rows, faults.examine([given], most))
        run(given)

    with launches.launches_for(target, receive):
        yield rows


def add(rows: dict[str, faults.Row], others: dict[str, faults.Row]) -> None:
    for kind, row in others.items():
        mine = rows[kind]
        mine.seeded += row.seeded
        mine.reported += row.reported
        mine.other_result += row.other_result
        mine.survived += row.survived


def as_executed(launch: launches.Launch, target: str, cache: Path) -> faults.Launch:
    found = program(launch, target, cache)
    return faults.Launch(
        found.ptx,
        found.name,
        launch.grid,
        found.warps,
        found.shared,
        list(launch.arguments),
        TARGETS[target].shared_limit,
    )


def run(given: faults.Launch) -> Execution:
    done = execute(
        given.ptx, given.kernel, given.grid, given.warps, given.shared, given.arguments,
        given.shared_limit,
    )  # fmt: skip
    done.violations = [x for x in done.violations if x.kind not in LEFT_OUT]
    return done
