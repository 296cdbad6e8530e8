"""Timing on a GPU: events, a cold L2 cache, graphs, and what the rates of the device allow."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..cases import Work
from .device import current

RATES: dict[str, float] = {}  # as measured on this device, see rates.py; empty: a table's


class DeviceTimer:
    """Seconds of one call between two events, with the L2 cache full of something else."""

    def __init__(self) -> None:
        device = current()
        size = 2 * max(device.properties().l2_bytes, 1 << 16 if device.rehearsal else 1 << 26)
        self.other = torch.empty(size, dtype=torch.uint8, device=device.place())
        self.start, self.end = device.event(), device.event()

    def __call__(self, step: Callable[[], Any]) -> float:
        self.other.zero_()
        self.start.record()
        step()
        self.end.record()
        current().synchronize()
        return self.start.elapsed_time(self.end) / 1e3


def best_of(step: Callable[[], Any], rounds: int, calls: int) -> float:
    """Seconds a call, of `calls` that follow one another, in the best of `rounds`."""
    device = current()
    start, end = device.event(), device.event()
    step()
    best = float("inf")
    for _ in range(rounds):
        start.record()
        for _ in range(calls):
            step()
        end.record()
        device.synchronize()
        best = min(best, start.elapsed_time(end) / 1e3 / calls)
    return best


def replayed(step: Callable[[], Any]) -> Callable[[], None]:
    """`step` captured in a CUDA graph; a call replays it. Raises what the capture raises."""
    return current().captured(step)[0]


def floor_seconds(work: Work, n: int, d: int, dtype: str) -> float | None:
    """The least time for the case's products and exponentials: by the rates measured on this
    device, by a table's if there are none; None for a GPU that the table does not have."""
    kind, passes = ("tf32", 3) if dtype == "fp32" else ("bf16", 1)
    if kind in RATES and "exp" in RATES:
        matrix, special = RATES[kind], RATES["exp"]
    else:
        from ..targets import TARGETS

        major, minor = current().properties().capability
        target = TARGETS.get(f"sm_{major}{minor}")
        if target is None or torch.version.hip:
            return None
        matrix = target.matrix["tf32" if dtype == "fp32" else "2"]
        special = target.processors * target.special * target.clock
    return max(work.products * 2 * d * passes / matrix, work.exponentials / special) * n * n
