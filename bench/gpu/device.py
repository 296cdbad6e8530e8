"""The GPU as this command sees it: all that it asks of one, so that a stand-in can take its place.

`current()` is the device that this process measures on: a CUDA one, or, in a rehearsal, the
stand-in of stand_in.py, whose tensors are a CPU's.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile


@dataclass(frozen=True)
class Properties:
    name: str
    capability: tuple[int, int]
    processors: int
    l2_bytes: int
    memory_bytes: int


@dataclass(frozen=True)
class Profile:
    """Of one call, the mean of several."""

    launches: float
    kernels: dict[str, float]  # seconds that each took on the device, by its name


class Device:
    """A CUDA device, by torch.cuda."""

    rehearsal = False
    profiled = DeviceType.CUDA

    def place(self, index: int = 0) -> torch.device:
        return torch.device("cuda", index)

    def count(self) -> int:
        return torch.cuda.device_count()

    def current_index(self) -> int:
        return torch.cuda.current_device()

    def properties(self) -> Properties:
        found = torch.cuda.get_device_properties(0)
        return Properties(
            found.name,
            torch.cuda.get_device_capability(0),
            found.multi_processor_count,
            found.L2_cache_size,
            found.total_memory,
        )

    def through(self, loss: Any) -> Any:
        """A loss of ours, on its way to a check: here a rehearsal's faults come in."""
        return loss

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def empty_cache(self) -> None:
        torch.cuda.empty_cache()

    def event(self) -> Any:
        return torch.cuda.Event(enable_timing=True)

    def stream(self) -> Any:
        return torch.cuda.Stream()

    def current_stream(self) -> Any:
        return torch.cuda.current_stream()

    def on(self, stream: Any) -> AbstractContextManager[Any]:
        return torch.cuda.stream(stream)

    def captured(self, step: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        """What replays `step`, and the tensors that each replay writes. Raises what the capture
        raises. `step` runs three times before, as PyTorch asks for, on a stream of its own."""
        side = self.stream()
        side.wait_stream(self.current_stream())
        with self.on(side):
            for _ in range(3):
                step()
        self.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            kept = step()
        return graph.replay, kept

    def compiled(self, loss: Callable[..., Any]) -> Callable[..., Any]:
        """By torch.compile, in CUDA graphs."""
        return torch.compile(loss, mode="reduce-overhead", fullgraph=True)

    @contextmanager
    def refusing_to_wait(self) -> Iterator[None]:
        """Where the host would wait for the device, PyTorch raises."""
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def peak(self, step: Callable[[], Any]) -> int:
        """Bytes that the allocator held at most during `step`, above what it held before."""
        self.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        kept = step()
        self.synchronize()
        del kept
        return torch.cuda.max_memory_allocated() - before

    def profile(self, step: Callable[[], Any], calls: int = 10) -> Profile:
        """`step` has run before."""
        os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # it tells of itself on stderr
        activities = [ProfilerActivity.CPU]
        if self.profiled == DeviceType.CUDA:
            activities.append(ProfilerActivity.CUDA)
        self.synchronize()
        with profile(activities=activities) as seen:
            for _ in range(calls):
                step()
            self.synchronize()
        kernels: dict[str, float] = {}
        launches = 0
        for event in seen.events() or ():
            if event.device_type == self.profiled and not event.name.startswith("Activity Buffer"):
                launches += 1
                taken = event.time_range.elapsed_us() / 1e6 / calls
                kernels[event.name] = kernels.get(event.name, 0.0) + taken
        return Profile(launches / calls, kernels)


CURRENT: list[Device] = [Device()]


def current() -> Device:
    return CURRENT[-1]


def use(device: Device) -> None:
    """For the rest of this process."""
    CURRENT[:] = [device]
