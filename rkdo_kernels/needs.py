"""Which gradients of a pair are wanted: for embeddings that take none, none is formed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .once import once

Needs = Sequence[bool]  # to the queries, to the keys
BOTH, NEITHER = (True, True), (False, False)


def needed(queries: Tensor, keys: Tensor) -> list[bool]:
    """What autograd will ask for."""
    on = torch.is_grad_enabled()
    return [on and queries.requires_grad, on and keys.requires_grad]


def rooms(
    queries: Tensor, keys: Tensor, needs: Needs, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:  # [N, D], [M, D]
    """Uninitialised, float32 or float64 if no dtype is given; of no entries where no gradient is
    wanted."""
    dtype = dtype or torch.promote_types(queries.dtype, torch.float32)
    d_queries, d_keys = (
        x.new_empty(x.shape if need else (0,), dtype=dtype)
        for x, need in zip((queries, keys), needs, strict=True)
    )
    return d_queries, d_keys


def asked(ctx: Any, leading: int) -> list[bool]:
    """The gradients that an operator's backward pass must form: its first two inputs are queries
    and keys; two stand-ins for them come after the `leading` inputs."""
    needs = ctx.needs_input_grad
    return [need or stands for need, stands in zip(needs[:2], stood(ctx, leading), strict=True)]


def stood(ctx: Any, leading: int) -> list[bool]:
    """Which stand-ins take a gradient. PyTorch leaves out those at the end that are not given."""
    return [*ctx.needs_input_grad[leading:], False, False][:2]


def handed(ctx: Any, leading: int, gradients: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    """An operator's results: gradients to the stand-ins where these are given."""
    needs, there = ctx.needs_input_grad, stood(ctx, leading)
    here = [need and not stands for need, stands in zip(needs[:2], there, strict=True)]
    between = [None] * (leading - 2)
    return (*only(here, gradients), *between, *only(there, gradients))[: len(needs)]


def only(needs: Needs, gradients: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    """Gradients as autograd takes them."""
    return tuple(g if need else None for g, need in zip(gradients, needs, strict=True))


def once_only(
    needs: Needs, gradients: Sequence[Tensor], queries: Tensor, keys: Tensor, *others: Tensor
) -> tuple[Tensor | None, ...]:
    """The same in dtypes of the pair, with an error for second derivatives through any input."""
    every = (
        once(g, queries, keys, *others).to(x.dtype)
        for g, x in zip(gradients, (queries, keys), strict=True)
    )
    return only(needs, tuple(every))
