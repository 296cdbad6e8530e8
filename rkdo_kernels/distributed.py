"""Global keys with gradients: every rank's loss sees the keys of all ranks."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def gather_keys(
    keys: Tensor,  # [N, D], the same shape on every rank
    group: Any = None,
) -> tuple[Tensor, int]:  # [ranks · N, D], offset of this rank's rows
    """All ranks' keys in the order of ranks, and where this rank's begin.

        all_keys, offset = gather_keys(keys)
        loss = rkdo_loss(queries, all_keys, positive_offset=offset)

    With DDP, which averages gradients, the mean over a rank's own queries trains like the mean over
    the whole batch on one rank. Without a process group it is (keys, 0).

    What a rank's loss does to half-precision keys is rounded there, as autograd has it, and then
    added up in float32. Where ranks' parts cancel, as on a collapsed batch, gather keys.float().
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size(group) == 1:
        return keys, 0
    return _Gather.apply(keys, group), dist.get_rank(group) * keys.shape[0]


class _Gather(torch.autograd.Function):
    """all_gather; backward, a rank's keys receive the sum of all ranks' gradients for them."""

    @staticmethod
    def forward(ctx: Any, keys: Tensor, group: Any) -> Tensor:
        world = dist.get_world_size(group)
        ctx.group, ctx.rows = group, keys.shape[0]
        result = keys.new_empty(world * keys.shape[0], *keys.shape[1:])
        dist.all_gather_into_tensor(result, keys.contiguous(), group=group)
        return result

    @staticmethod
    def backward(ctx: Any, d_result: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        wide = torch.promote_types(d_result.dtype, torch.float32)
        total = torch.empty_like(d_result, dtype=wide, memory_format=torch.contiguous_format)
        dist.all_reduce(total.copy_(d_result), group=ctx.group)
        start = dist.get_rank(ctx.group) * ctx.rows
        return total[start : start + ctx.rows].to(d_result.dtype), None
