"""Which gradients of a pair are wanted: for embeddings that take none, none is formed."""

from __future__ import annotations

from collections.abc import Sequence

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
    """Uninitialised; of no entries where no gradient is wanted."""
    d_queries, d_keys = (
        x.new_empty(x.shape if need else (0,), dtype=dtype)
        for x, need in zip((queries, keys), needs, strict=True)
    )
    return d_queries, d_keys


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
