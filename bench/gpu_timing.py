"""Timing on a GPU: events, a cold L2 cache, graphs, and what the hardware's rates allow."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .cases import Work

DEVICE = "cuda"


class DeviceTimer:
    """Seconds of one call between two events, with the L2 cache full of something else."""

    def __init__(self) -> None:
        size = torch.cuda.get_device_properties(0).L2_cache_size
        self.other = torch.empty(2 * max(size, 1 << 26), dtype=torch.uint8, device=DEVICE)
        self.start = torch.cuda.Event(enable_timing=True)
        self.end = torch.cuda.Event(enable_timing=True)

    def __call__(self, step: Callable[[], Any]) -> float:
        self.other.zero_()
        self.start.record()
        step()
        self.end.record()
        torch.cuda.synchronize()
        return self.start.elapsed_time(self.end) / 1e3


def replayed(step: Callable[[], Any]) -> Callable[[], None]:
    """`step` captured in a CUDA graph; a call replays it. Raises what the capture raises."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = step()

    def replay() -> None:
        graph.replay()

    replay.kept = kept  # type: ignore[attr-defined]
    return replay


def floor_seconds(work: Work, n: int, d: int, dtype: str) -> float | None:
    """The least time for the case's products and exponentials; None for a GPU without rates."""
    from .targets import TARGETS

    major, minor = torch.cuda.get_device_capability()
    target = TARGETS.get(f"sm_{major}{minor}")
    if target is None or torch.version.hip:
        return None
    rate = target.matrix["2" if dtype != "fp32" else "tf32"] / (3 if dtype == "fp32" else 1)
    special = target.processors * target.special * target.clock
    return max(work.products * 2 * d / rate, work.exponentials / special) * n * n
