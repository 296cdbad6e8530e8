"""A stand-in for a GPU, whose tensors are a CPU's: the whole command can be rehearsed anywhere.

It is the Device of device.py with everything that torch.cuda does replaced, and can be told to
break while a check runs: see `fail` and `through`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd import DeviceType

from ..contenders import Loss
from .device import Device, Properties

NAME = "rehearsal, no GPU"


class Moment:
    """An event: a CPU has done what was asked of it when it is recorded."""

    def record(self) -> None:
        self.at = time.perf_counter()

    def elapsed_time(self, end: Moment) -> float:  # milliseconds
        return 1e3 * (end.at - self.at)


class Stream:
    def wait_stream(self, other: Stream) -> None:
        pass


class StandIn(Device):
    rehearsal = True
    profiled = DeviceType.CPU

    def __init__(self, gpus: int = 1, gone: str = "") -> None:
        self.gpus = gpus
        self.gone = gone  # a file: no process finds the device once it is there
        self.lost = False
        self.fault = ""
        self.calls = 0

    def place(self, index: int = 0) -> torch.device:
        return torch.device("cpu")

    def count(self) -> int:
        return self.gpus

    def current_index(self) -> int:
        return 0

    def properties(self) -> Properties:
        return Properties(NAME, (9, 0), 4, 1 << 16, 1 << 30)

    def synchronize(self) -> None:
        if self.lost or (self.gone and Path(self.gone).exists()):
            raise RuntimeError("CUDA error: the device is lost, as this rehearsal was told")

    def empty_cache(self) -> None:
        pass

    def event(self) -> Moment:
        return Moment()

    def stream(self) -> Stream:
        return Stream()

    def current_stream(self) -> Stream:
        return Stream()

    def on(self, stream: Any) -> AbstractContextManager[Any]:
        return nullcontext()

    def captured(self, step: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        """Computed anew into the same tensors."""
        kept = step()

        def replay() -> None:
            found = step()
            for old, new in zip(tensors(kept), tensors(found), strict=True):
                old.copy_(new)

        return replay, kept

    def compiled(self, loss: Callable[..., Any]) -> Callable[..., Any]:
        return torch.compile(loss, backend="eager", fullgraph=True)

    @contextmanager
    def refusing_to_wait(self) -> Iterator[None]:
        """Raises as CUDA's does, where a tensor is read."""
        read = Tensor.item

        def item(x: Tensor) -> Any:
            raise RuntimeError("called a synchronizing CUDA operation")

        Tensor.item = item  # type: ignore[method-assign]
        try:
            yield
        finally:
            Tensor.item = read  # type: ignore[method-assign]

    def peak(self, step: Callable[[], Any]) -> int:
        return sum(x.nbytes for x in tensors(step()))

    def through(self, loss: Loss) -> Loss:
        def spoiled(queries: Tensor, keys: Tensor) -> Tensor:
            self.calls += 1
            scale = {"wrong": 1.01, "unsteady": 1 + 1e-3 * self.calls}.get(self.fault, 1.0)
            return scale * loss(queries, keys)

        return spoiled

    def fail(self, fault: str) -> None:
        """From here on, as `fault` says."""
        self.fault = fault
        if fault == "crash":
            os.abort()
        elif fault == "hang":
            time.sleep(3600)
        elif fault == "error":
            raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore")
        elif fault == "broken":  # for this process
            self.lost = True
            self.synchronize()
        elif fault == "lost":  # for every process
            Path(self.gone).touch()
            self.synchronize()


def tensors(found: Any) -> list[Tensor]:
    if isinstance(found, Tensor):
        return [found]
    return [x for x in found if isinstance(x, Tensor)]
