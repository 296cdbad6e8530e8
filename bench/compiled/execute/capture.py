"""Public calls on CPU tensors with their kernels compiled for a target and executed.

    with executing("sm_90", default_cache()) as done:
        rkdo_loss(queries, keys).backward()         # done: one Execution a launch
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ...targets import TARGETS
from ..launches import Launch, launches_for
from .compile import program
from .machine import Execution, execute


@contextmanager
def executing(target: str, cache: Path) -> Iterator[list[Execution]]:
    done: list[Execution] = []

    def receive(launch: Launch) -> None:
        found = program(launch, target, cache)
        done.append(
            execute(
                found.ptx,
                found.name,
                launch.grid,
                found.warps,
                found.shared,
                list(launch.arguments),
                TARGETS[target].shared_limit,
            )
        )

    with launches_for(target, receive):
        yield done
