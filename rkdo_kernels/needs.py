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


def asked(ctx: Any, stand_ins: int) -> list[bool]:
    """The gradients that a backward pass must form, to queries and keys, the first two inputs, or
    to their stand-ins, the two from `stand_ins` on."""
    here, there = _needs(ctx, stand_ins)
    return [a or b for a, b in zip(here, there, strict=True)]


def handed(
    ctx: Any, gradients: Sequence[Tensor], stand_ins: int
) -> tuple[Tensor | None, ...]:  # one an input
    """Gradients as autograd takes them: to the stand-ins where these are given."""
    here, there = _needs(ctx, stand_ins)
    here = [need and not stands for need, stands in zip(here, there, strict=True)]
    between = [None] * (stand_ins - 2)
    every = *only(here, gradients), *between, *only(there, gradients)
    return every[: len(ctx.needs_input_grad)]


def _needs(ctx: Any, stand_ins: int) -> tuple[list[bool], list[bool]]:
    """A custom operator's last inputs are missing where they are None by default."""
    needs = [*ctx.needs_input_grad, False, False][: stand_ins + 2]
    return needs[:2], needs[stand_ins:]


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
