"""Faults seeded in compiled PTX, one at a time: does executing it notice?

A fault is noticed if the execution reports a violation, or gives another result, on the launch as
it is or with a row of NaN in each input. What survives is either a hole in the checks or
equivalent: see `EQUIVALENT`.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from .machine import Execution, execute

Change = Callable[[re.Match[str]], str]


def _without(match: re.Match[str]) -> str:
    return ""


def _one_later(match: re.Match[str]) -> str:
    return match.group(1) + str(int(match.group(2)) + 1)


FAULTS: dict[str, tuple[str, Change]] = {
    "barrier removed": (r"^[ \t]*bar\.sync[^\n;]*;", _without),
    "load's mask removed": (r"@%p\d+ (ld\.global)", lambda match: match.group(1)),
    "store's mask removed": (r"@%p\d+ (st\.global)", lambda match: match.group(1)),
    "cp.async's mask removed": (
        r"(cp\.async\.c\w\.shared\.global[^;]*, 0x\w+), %r\d+;",
        lambda match: match.group(1) + ";",
    ),
    "cp.async waits for a group less": (r"(cp\.async\.wait_group\s+)(\d+)", _one_later),
    "wgmma waits for a group less": (r"(wgmma\.wait_group\.sync\.aligned )(\d+)", _one_later),
    "wgmma.fence removed": (r"wgmma\.fence\.sync\.aligned;", _without),
    "fence.proxy.async removed": (r"fence\.proxy\.async[^\n;]*;", _without),
    "shared store 16 bytes on": (
        r"(st\.shared\S* +\[ ?%r\d+ ?\+ ?)(\d+)",
        lambda match: match.group(1) + str(int(match.group(2)) + 16),
    ),
    "ldmatrix transposed": (
        r"ldmatrix\.sync\.aligned\.m8n8\.x4\.shared",
        lambda match: "ldmatrix.sync.aligned.m8n8.x4.trans.shared",
    ),
    "shuffle from twice the distance": (
        r"(shfl\.sync\.bfly\.b32\s+\S+ \S+ )(\d+)",
        lambda match: match.group(1) + str(2 * int(match.group(2))),
    ),
}

# What survives where every survivor was looked at: it changes nothing on that launch.
EQUIVALENT = {
    "barrier removed": "another barrier stands between the same accesses, or nothing was shared "
    "before it",
    "load's mask removed": "it reads entries of the tensor that meet zeros in the other operand; "
    "on rows that do not touch it is reported",
    "store's mask removed": "the masked threads hold the same value, and write it again",
    "cp.async's mask removed": "it copies entries of the tensor that are never used, or meet "
    "zeros in the other operand",
    "cp.async waits for a group less": "the last wait: nothing reads what lands, or nothing was "
    "copied",
    "wgmma waits for a group less": "a later wait stands before the first use",
    "wgmma.fence removed": "an earlier fence stands after the last use of the registers",
    "fence.proxy.async removed": "another fence lies on the path, or no wgmma reads what was "
    "stored",
    "shared store 16 bytes on": "the same zeros of the padding stand there already",
    "shuffle from twice the distance": "all lanes hold the same, such as the low half of 0.0",
}


@dataclass(frozen=True)
class Launch:
    """A launch as `machine.execute` is given it; its tensors as they are before it."""

    ptx: str
    kernel: str
    grid: tuple[int, int, int]
    warps: int
    shared: int
    arguments: list[tuple[str, Any]]
    shared_limit: int


@dataclass(frozen=True)
class Fault:
    kind: str
    line: int  # of the PTX
    ptx: str


@dataclass
class Row:
    """What became of a kind's faults."""

    seeded: int = 0
    reported: int = 0
    other_result: int = 0
    survived: list[tuple[str, Fault]] = field(default_factory=list)  # kernel, fault


def seeded(ptx: str, right: Execution, most: int, seed: int = 0) -> Iterator[Fault]:
    """At most so many faults of each kind, at places drawn by the seed.

    Only where the execution came along, and masks only where some lane was masked: elsewhere the
    launch is the same with the fault.
    """
    draw = random.Random(seed)
    for kind, (pattern, change) in FAULTS.items():
        lines = right.masked if "mask" in kind else right.reached
        found = []
        for match in re.finditer(pattern, ptx, re.M):
            line = ptx.count("\n", 0, match.end()) + 1
            if line in lines:
                found.append((match, line))
        for match, line in draw.sample(found, min(most, len(found))):
            yield Fault(kind, line, ptx[: match.start()] + change(match) + ptx[match.end() :])


def execution_of(launch: Launch, ptx: str) -> tuple[Execution, list[torch.Tensor]]:
    """The execution of another text, on copies of the tensors, and what they hold after it."""
    storages: dict[int, torch.UntypedStorage] = {}
    arguments = []
    for kind, value in launch.arguments:
        if isinstance(value, torch.Tensor):
            own = value.untyped_storage()
            copy = storages.setdefault(own.data_ptr(), own.clone())
            place = value.storage_offset(), value.size(), value.stride()
            value = torch.empty(0, dtype=value.dtype).set_(copy, *place)
        arguments.append((kind, value))
    done = execute(
        ptx, launch.kernel, launch.grid, launch.warps, launch.shared, arguments,
        launch.shared_limit,
    )  # fmt: skip
    after = [torch.empty(0, dtype=torch.uint8).set_(storage) for storage in storages.values()]
    return done, after


def with_nan_rows(launch: Launch) -> Launch:
    """The launch with a row of NaN in each of the matrices that it reads and does not change.

    What a mask keeps out is then not harmless: 0 · NaN is no 0.
    """
    arguments = []
    _, results = execution_of(launch, launch.ptx)
    changed = {
        old.untyped_storage().data_ptr()
        for old, new in zip(storages_of(launch), results, strict=True)
        if not torch.equal(old, new)
    }
    copies: dict[int, torch.UntypedStorage] = {}
    for kind, value in launch.arguments:
        if isinstance(value, torch.Tensor):
            own = value.untyped_storage()
            copy = copies.setdefault(own.data_ptr(), own.clone())
            place = value.storage_offset(), value.size(), value.stride()
            is_changed = own.data_ptr() in changed
            value = torch.empty(0, dtype=value.dtype).set_(copy, *place)
            if not is_changed and value.is_floating_point() and value.dim() == 2:
                value[len(value) // 2] = torch.nan
        arguments.append((kind, value))
    return replace(launch, arguments=arguments)


def apart(launch: Launch) -> Launch:
    """The launch with its views of one storage in storages of their own, so that bounds are exact;
    itself where the kernel reaches from one view into another, as the parts of a split do."""
    places: dict[object, torch.Tensor] = {}
    arguments = []
    for kind, value in launch.arguments:
        if isinstance(value, torch.Tensor):
            place = value.data_ptr(), value.size(), value.stride(), value.dtype
            own = torch.empty_strided(value.size(), value.stride(), dtype=value.dtype)
            value = places.setdefault(place, own.copy_(value))
        arguments.append((kind, value))
    alone = replace(launch, arguments=arguments)
    before, _ = execution_of(launch, launch.ptx)
    after, _ = execution_of(alone, launch.ptx)
    kinds = [{violation.kind for violation in done.violations} for done in (before, after)]
    return alone if kinds[1] <= kinds[0] else launch


def storages_of(launch: Launch) -> list[torch.Tensor]:
    """What its tensors stand in, as bytes, each once."""
    storages = {
        value.untyped_storage().data_ptr(): value.untyped_storage()
        for _, value in launch.arguments
        if isinstance(value, torch.Tensor)
    }
    return [torch.empty(0, dtype=torch.uint8).set_(storage) for storage in storages.values()]


def same(some: list[torch.Tensor], others: list[torch.Tensor]) -> bool:
    """Bit by bit: they are bytes."""
    return all(map(torch.equal, some, others))


def examine(launches: Iterable[Launch], most: int, seed: int = 0) -> dict[str, Row]:
    """Seeds at most so many faults of each kind in every launch: kind → what became of them."""
    rows = {kind: Row() for kind in FAULTS}
    for launch in map(apart, launches):
        right, results = execution_of(launch, launch.ptx)
        known = {violation.kind for violation in right.violations}
        hostile = with_nan_rows(launch)
        hostile_right, hostile_results = execution_of(hostile, launch.ptx)
        known |= {violation.kind for violation in hostile_right.violations}
        for fault in seeded(launch.ptx, right, most, seed):
            row = rows[fault.kind]
            row.seeded += 1
            done, others = execution_of(launch, fault.ptx)
            if {violation.kind for violation in done.violations} - known:
                row.reported += 1
            elif not (
                same(results, others) and same(hostile_results, execution_of(hostile, fault.ptx)[1])
            ):
                row.other_result += 1
            else:
                row.survived.append((launch.kernel, fault))
    return rows


def table(rows: dict[str, Row]) -> str:
    head = f"{'fault':34}{'seeded':>8}{'reported':>10}{'other result':>14}{'survived':>10}"
    lines = [
        f"{kind:34}{row.seeded:8}{row.reported:10}{row.other_result:14}{len(row.survived):10}"
        for kind, row in rows.items()
        if row.seeded
    ]
    survivors = []
    for kind, row in rows.items():
        survivors += [f"survived: {kind}: {name}, line {x.line}" for name, x in row.survived]
        if row.survived and kind in EQUIVALENT:
            survivors.append(f"  is equivalent where {EQUIVALENT[kind]}")
    return "\n".join([head, *lines, *survivors])
