"""A batch of samples as the response field takes it: arguments checked, ranks gathered."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from . import checks, launch, ops
from .distributed import gather_keys
from .needs import once_only
from .once import no_transforms
from .problem import out_of_autocast

Index = Tensor | slice


@dataclass(frozen=True)
class Batch:
    queries: Tensor  # [R, D], of the rows that this rank holds
    keys: Tensor  # [B, D], of all ranks
    index: Tensor  # [B] int64, the samples
    start: int | None  # of consecutive samples on one rank, of which all rows are held
    rows: Tensor  # [R] int64, of the state
    own: Tensor  # [R] int64, where among the B they are
    scale: Tensor  # [], 1 / τ; NaN if the index is bad, which leaves the field as it is
    backend: str
    ranks: int
    rank: int

    def rows_and_cols(self) -> tuple[Tensor | None, Tensor | None, Tensor | None, int]:
        """rows, cols, own and start as the operators take them."""
        if self.start is not None:
            return None, None, None, self.start
        return self.rows, self.index, self.own, 0

    @property
    def detached(self) -> tuple[Tensor, Tensor]:
        return self.queries.detach(), self.keys.detach()


def make_batch(
    queries: Tensor,  # [B, D]
    keys: Tensor,  # [B, D]
    index: Index,  # [B]
    n: int,
    device: torch.device,
    temperature: float | Tensor,
    backend: str,
    group: Any = None,
) -> Batch:
    checks.choice("backend", backend, ("auto", "triton", "tiled"))
    no_transforms(queries, keys, temperature)
    checks.temperature(temperature)
    if isinstance(temperature, Tensor) and temperature.requires_grad:
        raise ValueError("temperature must not require a gradient: the field has none for it")
    queries, keys = out_of_autocast(queries, keys)
    checks.embeddings(queries, keys)
    checks.as_many("ResponseField", queries, keys)
    if queries.device != device:
        raise ValueError(f"queries are on {queries.device}, the field on {device}: want one device")
    backend = launch.backend_for(backend, queries)
    index = index_of(index, queries.shape[0], n, device)
    if isinstance(temperature, Tensor):
        scale = 1 / temperature.to(device, ops.row_dtype(queries)).reshape(())
        scale = torch.where((scale > 0) & torch.isfinite(scale), scale, float("nan"))
    else:
        scale = torch.full((), 1 / temperature, dtype=ops.row_dtype(queries), device=device)
    ranks, rank = ranks_of(group)
    if ranks == 1:
        index, start, fault = settle(index, n, device)
        rows, own = index, torch.arange(index.shape[0], device=device)
    else:
        # In float32, or ranks' parts of a key's gradient would be rounded before they are added up.
        wide = ops.product_dtype(keys)
        queries, keys = (gather_keys(x.to(wide), group)[0] for x in (queries, keys))
        index, _, fault = settle(gather_keys(index.to(device), group)[0], n, device)
        start, (first, last) = None, held(n, ranks, rank)
        own = ((index >= first) & (index < last)).nonzero()[:, 0]
        rows, queries = index[own] - first, queries[own]
    if fault is not None:
        scale = torch.where(fault, float("nan"), scale)
    return Batch(queries, keys, index, start, rows, own, scale, backend, ranks, rank)


def index_of(index: Index, size: int, n: int, device: torch.device) -> Tensor:  # [B] int64
    """Checks what can be checked without reading it."""
    no_transforms(index)
    if isinstance(index, slice):
        start, stop = index.start or 0, n if index.stop is None else index.stop
        if index.step not in (None, 1) or not 0 <= start < stop <= n:
            raise ValueError(f"index must be a slice of consecutive samples of {n}, got {index}")
        index = torch.arange(start, stop, device="cpu")
    if not isinstance(index, Tensor):
        raise TypeError(f"index must be a torch.Tensor or a slice, got {type(index).__name__}")
    if index.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"index must be int64 or int32, got {checks.dtype_name(index)}")
    if list(index.shape) != [size]:
        raise ValueError(f"index must have {size} samples, got shape {list(index.shape)}")
    if index.device != device and index.device.type != "cpu":
        raise ValueError(f"index is on {index.device}, the field on {device}: want one device")
    return index.long().contiguous()


def settle(
    index: Tensor, n: int, device: torch.device
) -> tuple[Tensor, int | None, Tensor | None]:  # [B], the first of consecutive ones, [] bool
    """Holds samples to [0, n), each once. On a CPU what is wrong raises; elsewhere, where reading
    would wait for the device, the last result says so, and the samples are some that there are."""
    if index.device.type == "cpu" and not torch.compiler.is_compiling():
        outside = (index < 0) | (index >= n)
        if bool(outside.any()):
            raise ValueError(f"index must be in [0, {n}), got {int(index[outside][0])}")
        ordered = index.sort().values
        twice = ordered[1:] == ordered[:-1]
        if bool(twice.any()):
            raise ValueError(f"index must not repeat a sample, got {int(ordered[1:][twice][0])}")
        start = int(index[0])
        follows = torch.arange(start, start + len(index), device="cpu")
        if torch.equal(index, follows):  # made there: no copy, which a CUDA graph cannot capture
            return torch.arange(start, start + len(index), device=device), start, None
        return index.to(device, non_blocking=True), None, None
    index = index.to(device)
    ordered = index.sort().values
    fault = (ordered[0] < 0) | (ordered[-1] >= n) | (ordered[1:] == ordered[:-1]).any()
    return index.clamp(0, n - 1), None, fault


def ranks_of(group: Any) -> tuple[int, int]:
    """How many there are, and which this is."""
    if group is None:
        return 1, 0
    return dist.get_world_size(group), dist.get_rank(group)


def held(n: int, ranks: int, rank: int) -> tuple[int, int]:
    """The samples whose rows a rank holds, as evenly as n allows."""
    return rank * n // ranks, (rank + 1) * n // ranks


# ---- autograd ------------------------------------------------------------------------------------


class Given(torch.autograd.Function):
    """A loss whose gradient, but for `factor`, has been formed beside it."""

    @staticmethod
    def forward(
        ctx: Any,
        queries: Tensor,  # [R, D]
        keys: Tensor,  # [B, D]
        loss: Tensor,  # []
        d_queries: Tensor,  # [R, D]
        d_keys: Tensor,  # [B, D]
        factor: float,
    ) -> Tensor:
        ctx.factor = factor
        ctx.save_for_backward(queries, keys, d_queries, d_keys)
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor) -> Any:  # type: ignore[override]
        queries, keys, *gradients = ctx.saved_tensors
        results = [g * (ctx.factor * d_loss).to(g.dtype) for g in gradients]
        needs = ctx.needs_input_grad[:2]
        return *once_only(needs, results, queries, keys), None, None, None, None


class Exchange(torch.autograd.Function):
    """Losses of the rows that ranks hold -> losses of the samples that this rank brought."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, own: Tensor, size: int, group: Any) -> Tensor:
        ranks, rank = ranks_of(group)
        ctx.own, ctx.group = own, group
        every = loss.new_zeros(size).index_copy_(0, own, loss)
        dist.all_reduce(every, group=group)
        return every.chunk(ranks)[rank].clone()

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor) -> Any:  # type: ignore[override]
        return gather_keys(d_loss, ctx.group)[0][ctx.own], None, None, None
