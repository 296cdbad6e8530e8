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
from .parts import at_partners, partners
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


@triton.jit
def _add_shares(
    gradient_ptr,  # [N or M, D]  in and out, fp32
    x_ptr,  # [M or N, D]         in, the other operand
    at_positive_ptr,  # [N]       in, fp32, ∂L/∂S at (i, i + offset)
    levels_ptr,  # [N]            in, bf16
    sums_ptr,  # [parts, 2, D]    in, fp32
    x_stride,
    n,
    m,
    dim,
    offset,
    parts,
    QUERIES: tl.constexpr,  # the gradient is the queries', else the keys'
    POSITIVE: tl.constexpr,
    LEVEL: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """One program per block of rows and WIDTH columns: what the positives add, and the levels."""
    own = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    start = tl.program_id(1) * WIDTH
    d = start + tl.arange(0, WIDTH)
    if QUERIES:
        i, partner, n_own, n_other = own, own + offset, n, m
    else:
        i, partner, n_own, n_other = own - offset, own - offset, m, n
    added = tl.zeros([ROWS, WIDTH], tl.float32)
    if LEVEL:
        total = column_total(sums_ptr, parts, start, dim, not QUERIES, WIDTH, False)
        if QUERIES:
            total *= tl.load(levels_ptr + own, mask=own < n, other=0.0).to(tl.float32)[:, None]
        added += total
    if POSITIVE:
        added += at_partners(
            at_positive_ptr, i, n, x_ptr, x_stride, partner, n_other, start, dim, WIDTH, False
        )
    at = gradient_ptr + own.to(tl.int64)[:, None] * dim + d[None, :]
    mask = (own < n_own)[:, None] & (d < dim)[None, :]
    tl.store(at, tl.load(at, mask=mask, other=0.0) + added, mask=mask)


@triton.jit
def _add_means(
    gradient_ptr,  # [N, D]       in and out, fp32
    keys_ptr,  # [M, D]           in
    query_weights_ptr,  # [N]     in, fp32, w
    key_weights_ptr,  # [M]       in, fp32, v
    means_ptr,  # [N]             in, fp32
    sums_ptr,  # [parts, 2, D]    in, fp32: of the keys, and of v_j keys_j
    keys_stride,
    n,
    m,
    dim,
    exclude_a,
    exclude_b,
    parts,
    EXCLUDE: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """One program per block of rows and WIDTH columns: mean_i Σ_j (w_i + v_j) k_j is added, without
    the keys i + exclude."""
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    start = tl.program_id(1) * WIDTH
    w = tl.load(query_weights_ptr + i, mask=i < n, other=0.0)[:, None]
    share = w * column_total(sums_ptr, parts, start, dim, False, WIDTH, False)
    share += column_total(sums_ptr, parts, start, dim, True, WIDTH, False)
    if EXCLUDE >= 1:
        share -= weighted_keys(
            w, i, n, key_weights_ptr, keys_ptr, keys_stride, i + exclude_a, m, start, dim, WIDTH
        )
    if EXCLUDE >= 2:
        share -= weighted_keys(
            w, i, n, key_weights_ptr, keys_ptr, keys_stride, i + exclude_b, m, start, dim, WIDTH
        )
    share *= tl.load(means_ptr + i, mask=i < n, other=0.0)[:, None]
    d = start + tl.arange(0, WIDTH)
    at = gradient_ptr + i.to(tl.int64)[:, None] * dim + d[None, :]
    mask = (i < n)[:, None] & (d < dim)[None, :]
    tl.store(at, tl.load(at, mask=mask, other=0.0) + share, mask=mask)


@triton.jit
def weighted_keys(
    w, i, n, key_weights_ptr, keys_ptr, keys_stride, j, m, start, dim, WIDTH: tl.constexpr
):  # [ROWS, WIDTH], fp32
    """(w_i + v_j) k_j; 0 without a pair."""
    here = (i < n) & (j >= 0) & (j < m)
    v = tl.load(key_weights_ptr + j, mask=here, other=0.0)[:, None]
    return (w + v) * partners(keys_ptr, keys_stride, j, here, start, dim, WIDTH)


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


def add_shares(
    gradient: Tensor,
    to_queries: bool,
    queries: Tensor,
    keys: Tensor,
    exclude: list[int],
    at_positive: Tensor | None,
    level: Tensor | None,
) -> None:
    x = keys if to_queries else queries
    levels, sums = level_tables(queries, keys, level, to_queries)
    paired = sums if at_positive is None else at_positive.contiguous()
    _add_shares[(triton.cdiv(len(gradient), ROWS), triton.cdiv(x.shape[1], WIDTH))](
        gradient, x, paired, levels, sums, x.stride(0), len(queries), *keys.shape,
        launch.excluded(exclude)[0], len(sums), QUERIES=to_queries,
        POSITIVE=at_positive is not None, LEVEL=level is not None, ROWS=ROWS, WIDTH=WIDTH,
        num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip


def add_means(
    gradient: Tensor,  # [N, D] fp32
    keys: Tensor,
    query_weights: Tensor,
    key_weights: Tensor,
    means: Tensor,
    exclude: list[int],
) -> None:
    """What `_both_sums_bwd` left out of a gradient."""
    sums = column_sums(keys, key_weights)
    (n, dim), m = gradient.shape, keys.shape[0]
    _add_means[(triton.cdiv(n, ROWS), triton.cdiv(dim, WIDTH))](
        gradient, keys, query_weights, key_weights, means, sums, keys.stride(0), n, m, dim,
        *launch.excluded(exclude), len(sums), EXCLUDE=len(exclude), ROWS=ROWS, WIDTH=WIDTH,
        num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
