"""Half precision: a row's level, which is not rounded with its gradient.

For its product with the keys, or the queries, G = ∂L/∂S is rounded. Where all rows lie near one
direction these products' sums cancel, and the roundings do not. So what is rounded is what G
differs from a number near its row's mean, and the rest is one vector's multiple:

    Σ_j G_ij k_j = Σ_j (G_ij − level_i) k_j + level_i Σ_j k_j
    Σ_i G_ij q_i = Σ_i (G_ij − level_i) q_i + Σ_i level_i q_i

Any number will do for a level that is the same on both sides. It is bfloat16: where an entry is
left out, −level is part of the product, and must not be rounded there.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .primitives import block_values, load_rows

PARTS = 64  # of a column's sum, at most
ROWS, WIDTH = 32, 64  # of a tile


@triton.jit
def _column_sums(
    x_ptr,  # [N, D]            in
    weights_ptr,  # [N]         in
    sums_ptr,  # [parts, 2, D]  out, fp32
    stride,
    n,
    dim,
    span,  # rows of a part
    WEIGHTED: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """One program per part and WIDTH columns: Σ_i x_i and, if WEIGHTED, Σ_i weights_i x_i."""
    start = tl.program_id(0) * span
    stop = tl.minimum(start + span, n)
    column = tl.program_id(1) * WIDTH
    plain = tl.zeros([ROWS, WIDTH], tl.float32)
    weighted = tl.zeros([ROWS, WIDTH], tl.float32)
    for first in range(start, stop, ROWS):
        x = load_rows(x_ptr, stride, first, stop, column, dim, ROWS, WIDTH, False, True, True)
        plain += x
        if WEIGHTED:
            w = block_values(weights_ptr, 1, first, stop, ROWS, 1, True).to(tl.float32)
            weighted += w * x
    d = column + tl.arange(0, WIDTH)
    at = sums_ptr + tl.program_id(0) * (2 * dim) + d
    tl.store(at, tl.sum(plain, 0), mask=d < dim)
    if WEIGHTED:
        tl.store(at + dim, tl.sum(weighted, 0), mask=d < dim)


@triton.jit
def column_total(
    sums_ptr,  # [parts, 2, D], see _column_sums
    parts,
    start,
    dim,
    WEIGHTED: tl.constexpr,
    WIDTH: tl.constexpr,
    SPLIT: tl.constexpr,
):  # [1, WIDTH]
    """The sum of all rows, columns start .. start + WIDTH. The first split has it."""
    if SPLIT:
        parts = tl.where(tl.program_id(2) == 0, parts, 0)
    d = start + tl.arange(0, WIDTH)
    at = sums_ptr + d + (dim if WEIGHTED else 0)
    total = tl.zeros([WIDTH], tl.float32)
    for part in range(parts):
        total += tl.load(at + part * (2 * dim), mask=d < dim, other=0.0)
    return total[None, :]


def column_sums(x: Tensor, weights: Tensor | None) -> Tensor:  # [parts, 2, D] fp32
    """Sums of the rows of x, and of these times their weights, if there are any, in parts."""
    n, dim = x.shape
    span = launch.span(n, ROWS, PARTS)
    sums = x.new_empty(triton.cdiv(n, span), 2, dim, dtype=torch.float32)
    _column_sums[(len(sums), triton.cdiv(dim, WIDTH))](
        x, x if weights is None else weights, sums, x.stride(0), n, dim, span,
        WEIGHTED=weights is not None, ROWS=ROWS, WIDTH=WIDTH, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    return sums


def level_tables(
    queries: Tensor, keys: Tensor, level: Tensor | None, to_queries: bool
) -> tuple[Tensor, Tensor]:  # [N], [parts, 2, D]
    """A kernel's levels, and the sums for one of its gradients; not read where there are none."""
    if level is None:
        return queries, keys
    level = level.contiguous()
    return level, column_sums(keys, None) if to_queries else column_sums(queries, level)
