"""The processes that train together: one, or as many as torchrun starts."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from rkdo.errors import UserError

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    rank: int
    size: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this rank is the one that writes and speaks."""
        return self.rank == 0

    def mean(self, value: Tensor) -> float:  # [] -> the mean over ranks, the same on each
        if self.size == 1:
            return value.item()
        value = value.detach().clone()
        dist.all_reduce(value)
        return value.item() / self.size

    def largest(self, value: int) -> int:
        """The largest of all ranks' values, the same on each."""
        if self.size == 1:
            return value
        held = torch.tensor(value, device=self.device)
        dist.all_reduce(held, op=dist.ReduceOp.MAX)
        return int(held)

    def gather(self, value: T) -> list[T] | None:
        """All ranks' values in their order, on the first; None on the others."""
        gathered: list[Any] | None = [None] * self.size if self.first else None
        dist.gather_object(value, gathered, dst=0)
        return gathered

    def on_first(self, action: Callable[[], T]) -> T:
        """What `action` returns, or the UserError it raises, on rank 0; handed to every rank."""
        if self.size == 1:
            return action()
        outcome: list = [None]
        if self.first:
            try:
                outcome = [action()]
            except UserError as error:
                outcome = [error]
        dist.broadcast_object_list(outcome, src=0, device=self.device)
        if isinstance(outcome[0], UserError):
            raise outcome[0]
        return outcome[0]


def find_device(device: str) -> torch.device:
    """`device` is auto, cpu or cuda."""
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: this machine has no usable GPU; pass --device cpu")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(device)


@contextmanager
def joined_ranks(device: str) -> Iterator[Ranks]:
    """This process's place among torchrun's, or alone; `device` is auto, cpu or cuda."""
    here = find_device(device)
    if not dist.is_torchelastic_launched():
        yield Ranks(0, 1, here)
        return
    if here.type == "cuda":
        local, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local >= count:
            raise UserError(
                f"--nproc-per-node must be at most the number of GPUs, {count}, got {local + 1} "
                "or more; pass --device cpu to train on the CPU"
            )
        here = torch.device("cuda", local)
        torch.cuda.set_device(here)
    # The other ranks wait while rank 0 evaluates.
    backend = "nccl" if here.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(hours=4))
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size(), here)
    finally:
        dist.destroy_process_group()
