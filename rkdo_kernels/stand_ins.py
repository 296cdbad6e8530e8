"""Where gradients to half-precision inputs are added up: in float32, to be rounded once.

autograd hands every tensor its gradients in the tensor's own dtype: each contribution to a bfloat16
tensor is rounded by itself, and where contributions cancel nothing right is left. So the parts of a
loss hand theirs to a stand-in: float32, of the tensor's shape, with a single zero for its memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

StandIns = tuple[Tensor | None, Tensor | None]  # for queries, for keys; None: not needed


def stand_in(x: Tensor) -> Tensor | None:  # of x's shape, float32
    """For a half-precision tensor that takes a gradient."""
    half = x.dtype in (torch.bfloat16, torch.float16)
    return _Entry.apply(x) if half and x.requires_grad and torch.is_grad_enabled() else None


def joined(
    first: Tensor | None, second: Tensor | None, sizes: Sequence[int]
) -> Tensor | None:  # [sizes[0] + sizes[1], D]
    """The stand-in for cat(first, second), of which one may need no gradient."""
    if first is None and second is None:
        return None
    return _Joined.apply(first, second, sizes)


class Wide(torch.autograd.Function):
    """x in float32, with its gradient to the stand-in."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, to_x: Tensor | None) -> Tensor:
        return x.float()

    @staticmethod
    def backward(ctx: Any, d_x: Tensor) -> Any:  # type: ignore[override]
        return None, d_x


class _Entry(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.dtype = x.dtype
        return x.new_zeros((), dtype=torch.float32).expand(x.shape)

    @staticmethod
    def backward(ctx: Any, d_x: Tensor) -> Any:  # type: ignore[override]
        return d_x.to(ctx.dtype)


class _Joined(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, first: Tensor | None, second: Tensor | None, sizes: Any) -> Tensor:
        some = first if first is not None else second
        assert some is not None
        ctx.sizes, ctx.there = sizes, (first is not None, second is not None)
        return some.new_zeros(()).expand(sum(sizes), some.shape[1])

    @staticmethod
    def backward(ctx: Any, d_both: Tensor) -> Any:  # type: ignore[override]
        parts = d_both.split(list(ctx.sizes))
        return *(x if there else None for x, there in zip(parts, ctx.there, strict=True)), None
