"""The processes that train together: one, or as many as torchrun starts."""

import os
import re
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from rkdo.errors import ProcessLost, TrainingError, UserError
from rkdo.interrupt import by_default, held

POLL = 0.5  # seconds until a rank notices that torchrun is gone
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
        outcome: list = [_outcome(action) if self.first else None]
        dist.broadcast_object_list(outcome, src=0, device=self.device)
        return _result(outcome[0])

    def together(self, action: Callable[[], T]) -> T:
        """What `action` returns on this rank, if it raises no UserError on any; else the first."""
        if self.size == 1:
            return action()
        mine = _outcome(action)
        failed: list[UserError | None] = [None] * self.size
        dist.all_gather_object(failed, mine if isinstance(mine, UserError) else None)
        for rank, error in enumerate(failed):
            if error is not None:
                if rank:
                    error.args = (f"rank {rank}: {error}",)
                return _result(error)
        return _result(mine)


def average_gradients(encoder: nn.Module, ranks: Ranks) -> nn.Module:
    """`encoder`, with gradients that are the means over ranks, added up in the order of ranks.

    A collective's own order follows a gradient's place in its bucket, and DistributedDataParallel
    makes new buckets after its first step: of more than two ranks, a run that was resumed would
    have other last bits.
    """
    parallel = DistributedDataParallel(encoder, broadcast_buffers=False)
    if ranks.size > 2:  # a sum of two has one order
        parallel.register_comm_hook(ranks, _in_rank_order)
    return parallel


def _in_rank_order(ranks: Ranks, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    mine = bucket.buffer()
    everyones = [torch.empty_like(mine) for _ in range(ranks.size)]

    def add_up(gathered: Any) -> Tensor:
        total = everyones[0]
        for other in everyones[1:]:
            total += other
        return total.div_(ranks.size)

    return dist.all_gather(everyones, mine, async_op=True).get_future().then(add_up)


def _outcome(action: Callable[[], T]) -> T | UserError:
    try:
        return action()
    except UserError as error:
        return error


def _result(outcome: Any) -> Any:
    if isinstance(outcome, UserError):
        outcome.everywhere = True
        raise outcome
    return outcome


def find_device(device: str) -> torch.device:
    """`device` is auto, cpu or cuda."""
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: this machine has no usable GPU; pass --device cpu")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(device)


@contextmanager
def joined_ranks(device: str) -> Iterator[Ranks]:
    """This process's place among torchrun's, or alone; `device` is auto, cpu or cuda.

    Raises:
        ProcessLost: another rank ended before this one. The error that ended it is its own to say.
    """
    if not dist.is_torchelastic_launched():
        yield Ranks(0, 1, find_device(device))
        return
    rank = int(os.environ["RANK"])
    _end_with_parent()
    try:
        ranks = _join(device)
        yield ranks
    except (UserError, TrainingError) as error:
        if rank and not error.everywhere and not isinstance(error, ProcessLost):
            error.args = (f"rank {rank}: {error}",)
            error.alone = True
        raise
    except RuntimeError as error:
        if not _is_broken(error):
            raise
        raise ProcessLost(
            "another process of the run has ended; rkdo train --resume goes on"
        ) from error
    else:
        dist.destroy_process_group()  # after an error others wait in a collective, maybe for ever


def _join(device: str) -> Ranks:
    here = find_device(device)
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
    with by_default():  # nothing is lost yet, and no Python runs while ranks wait to meet
        dist.init_process_group(backend, timeout=timedelta(hours=4))
    return Ranks(dist.get_rank(), dist.get_world_size(), here)


def _is_broken(error: RuntimeError) -> bool:
    """Whether a collective failed because of another rank, not because of what it was given."""
    if isinstance(error, dist.DistError):
        return True
    return re.search("gloo|nccl|closed by peer|connection reset", str(error), re.I) is not None


def _end_with_parent() -> None:
    """Ask this process to stop, as SIGTERM does, when the one that started it is gone."""
    parent, never = os.getppid(), threading.Event()

    def watch() -> None:
        while os.getppid() == parent:
            never.wait(POLL)
        os.kill(os.getpid(), signal.SIGTERM)

    with held():
        threading.Thread(target=watch, daemon=True).start()
