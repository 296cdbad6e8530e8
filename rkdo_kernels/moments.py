"""Kernels: row moments of the similarity softmax, and in the same launch the loss made of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch, quadrature, single_launch
from .needs import Needs
from .primitives import LANES, LOG2E, column_groups, leave_out, load_rows, similarity_tile, walk
from .recursion_rows import PASTS, _recursion_rows, recursion_rows


@triton.jit
def _moments_fwd(
    queries_ptr,  # [N, D]           in
    keys_ptr,  # [M, D]              in
    scale_ptr,  # []                 in, c
    moments_ptr,  # [N, DEGREE + 1]  out, fp32; a part a split
    table_ptr,  # for LOSS: see recursion_rows.py
    loss_ptr,
    weights_ptr,
    at_positive_ptr,
    pasts_ptr,
    queries_stride,
    keys_stride,
    n,
    m,
    dim,
    unit,  # 1 / b
    exclude_a,  # key i + exclude is left out of row i
    exclude_b,
    span,  # keys that a split walks over
    depth,  # for LOSS
    DEGREE: tl.constexpr,
    EXCLUDE: tl.constexpr,  # how many of the two count
    UNIT: tl.constexpr,  # b = 1
    SPLIT: tl.constexpr,
    DENSE: tl.constexpr,  # rows of WIDTH that follow one another
    LOSS: tl.constexpr,  # go on to the loss, whose positive is key i + exclude_a
    DETACH: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNKS: tl.constexpr,
    FULL: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    STEPS: tl.constexpr,  # tiles a pass through the loop
):
    """One program per block of rows i and split:  M_ik = Σ_j exp(c S_ij) (S_ij / b)^k."""
    if DENSE:
        queries_stride = WIDTH
        keys_stride = WIDTH
    first_i = tl.program_id(0) * ROWS
    i = first_i + tl.arange(0, ROWS)
    scale = tl.load(scale_ptr).to(tl.float32) * LOG2E
    q = load_rows(queries_ptr, queries_stride, first_i, n, 0, dim, ROWS, WIDTH, FULL, True, UPCAST)
    partial = ()  # sums over j of one residue each: their own sum waits for the end of the loop
    for _ in tl.static_range(DEGREE + 1):
        partial = partial + (tl.zeros([ROWS, LANES], tl.float32),)
    start, whole, stop = walk(span, m, SPLIT, COLS * STEPS)
    for first in range(start, whole, COLS * STEPS):
        for step in tl.static_range(STEPS):
            e, u = weight_tile(
                q, queries_ptr, queries_stride, first_i, n, keys_ptr, keys_stride,
                first + step * COLS, m, dim, scale, exclude_a, exclude_b, EXCLUDE, ROWS, COLS,
                WIDTH, CHUNKS, FULL, PRECISION, UPCAST, False,
            )  # fmt: skip
            partial = add_powers(partial, e, u if UNIT else u * unit, DEGREE, ROWS, COLS)
    for first_j in tl.range(whole, stop, COLS, num_stages=1):
        e, u = weight_tile(
            q, queries_ptr, queries_stride, first_i, n, keys_ptr, keys_stride, first_j, m, dim,
            scale, exclude_a, exclude_b, EXCLUDE, ROWS, COLS, WIDTH, CHUNKS, FULL, PRECISION,
            UPCAST, True,
        )  # fmt: skip
        partial = add_powers(partial, e, u if UNIT else u * unit, DEGREE, ROWS, COLS)
    out = moments_ptr + i.to(tl.int64) * (DEGREE + 1)
    if SPLIT:
        out += tl.program_id(2) * tl.cast(n, tl.int64) * (DEGREE + 1)
    for power in tl.static_range(DEGREE + 1):
        tl.store(out + power, tl.sum(partial[power], 1), mask=i < n)
    if LOSS:
        tl.debug_barrier()  # from here on threads read moments that others have stored
        recursion_rows(
            queries_ptr, keys_ptr, table_ptr, moments_ptr, loss_ptr, weights_ptr, at_positive_ptr,
            pasts_ptr, queries_stride, keys_stride, first_i, n, m, dim, exclude_a, 1, depth,
            DEGREE, DETACH, ROWS,
        )  # fmt: skip


@triton.jit
def weight_tile(
    q,
    queries_ptr,
    queries_stride,
    first_i,
    n,
    keys_ptr,
    keys_stride,
    first_j,
    m,
    dim,
    scale,
    exclude_a,
    exclude_b,
    EXCLUDE: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNKS: tl.constexpr,
    FULL: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    LAST: tl.constexpr,  # some keys may be past the last
):
    """exp(c S), zero where a key is left out or past the last, and S."""
    k = load_rows(keys_ptr, keys_stride, first_j, m, 0, dim, COLS, WIDTH, FULL, LAST, UPCAST)
    s = similarity_tile(
        q, k, queries_ptr, queries_stride, first_i, n, keys_ptr, keys_stride, first_j, m, dim,
        ROWS, COLS, WIDTH, CHUNKS, FULL, PRECISION, UPCAST,
    )  # fmt: skip
    e = leave_out(tl.exp2(s * scale), first_i, first_j, exclude_a, exclude_b, EXCLUDE, ROWS, COLS)
    if LAST:
        e = tl.where((first_j + tl.arange(0, COLS) < m)[None, :], e, 0.0)
    return e, s


@triton.jit
def add_powers(partial, e, u, DEGREE: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """partial_k + Σ e u^k: even powers by u², odd ones with their addition."""
    es = column_groups(e, ROWS, COLS)
    us = column_groups(u, ROWS, COLS)
    for group in tl.static_range(COLS // LANES):
        partial = add_group(partial, es[group], us[group], DEGREE)
    return partial


@triton.jit
def add_group(partial, e, u, DEGREE: tl.constexpr):
    square = u * u
    result = (partial[0] + e,)
    for power in tl.static_range(1, DEGREE + 1):
        if power % 2 == 1:
            result = result + (partial[power] + e * u,)
        elif power == DEGREE:
            result = result + (partial[power] + e * square,)
        else:
            e = e * square
            result = result + (partial[power] + e,)
    return result


def moments(
    queries: Tensor, keys: Tensor, scale: Tensor, bound: float, degree: int, exclude: list[int]
) -> Tensor:  # [N, degree + 1]
    parts = launch_moments(queries, keys, scale, bound, degree, exclude, None)
    return parts[0] if len(parts) == 1 else parts.sum(0, dtype=torch.float64)


def recursion_moments(
    queries: Tensor,
    keys: Tensor,
    scales: list[float],
    alpha: float,
    bound: float,
    degree: int,
    exclude: list[int],
    detach_target: bool,
    needs: Needs,
    table: Tensor,  # see quadrature.table
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # [N], [N, degree + 1], [N], [0], [0]
    """For a small batch the gradient, if one is needed, instead of what it follows from; see
    tiled.py's."""
    if any(needs):
        loss, *gradients = single_launch.recursion_moments(
            queries, keys, scales, alpha, bound, degree, exclude, detach_target, table
        )
        gradients = [
            g if need else g.new_empty(0) for g, need in zip(gradients, needs, strict=True)
        ]
        nothing = loss.new_empty(0)
        return loss, nothing, nothing.clone(), *gradients
    loss = queries.new_empty(len(queries), dtype=torch.float64)
    at_positive = torch.empty_like(loss)
    weights = loss.new_empty(len(queries), degree + 1)
    pasts = loss.new_empty(len(scales) * PASTS * len(queries))
    rows = Rows(table, loss, weights, at_positive, pasts, len(scales) - 1, detach_target)
    scale = quadrature.scale(table, degree, rows.depth)
    parts = launch_moments(queries, keys, scale, bound, degree, exclude, rows)
    if len(parts) > 1:
        queries, keys = launch.rows_contiguous(queries), launch.rows_contiguous(keys)
        _recursion_rows[(triton.cdiv(len(queries), 32),)](
            queries, keys, table, parts, loss, weights, at_positive, pasts, queries.stride(0),
            keys.stride(0), len(queries), len(keys), queries.shape[1], exclude[0], len(parts),
            rows.depth, DEGREE=degree, DETACH=detach_target, COUNT=32, num_warps=1,
            enable_fp_fusion=True,
        )  # fmt: skip
    nothing = queries.new_empty(0, dtype=torch.float32)
    return loss, weights, at_positive, nothing, nothing.clone()


@dataclass
class Rows:
    """Where the loss goes, if the moments are not all that is wanted."""

    table: Tensor
    loss: Tensor
    weights: Tensor
    at_positive: Tensor
    pasts: Tensor
    depth: int
    detach_target: bool


def launch_moments(
    queries: Tensor,
    keys: Tensor,
    scale: Tensor,
    bound: float,
    degree: int,
    exclude: list[int],
    rows: Rows | None,
) -> Tensor:  # [splits, N, degree + 1] fp32
    """With the loss where no splits leave it to a second launch."""
    queries, keys = launch.rows_contiguous(queries), launch.rows_contiguous(keys)
    (n, dim), m = queries.shape, keys.shape[0]
    config = launch.config("moments_fwd" if degree else "logsumexp", queries)
    dims = launch.dims(queries)
    blocks = triton.cdiv(n, config.rows)
    one = queries.new_empty(n, degree + 1, dtype=torch.float32)
    step = config.cols * config.steps
    splits, span = launch.split(blocks, m, step, config.warps, one)
    parts = one[None] if splits == 1 else one.new_empty(splits, n, degree + 1)
    loss = rows is not None and splits == 1
    out = [one] * 5
    if rows is not None:
        out = [rows.table, rows.loss, rows.weights, rows.at_positive, rows.pasts]
    _moments_fwd[(blocks, 1, splits)](
        queries, keys, scale, parts, *out, queries.stride(0), keys.stride(0), n, m, dim, 1 / bound,
        *launch.excluded(exclude), span, rows.depth if rows else 0, DEGREE=degree,
        EXCLUDE=len(exclude), UNIT=bound == 1, SPLIT=splits > 1,
        DENSE=queries.stride(0) == keys.stride(0) == dims["WIDTH"], LOSS=loss,
        DETACH=rows is not None and loss and rows.detach_target, **dims, ROWS=config.rows,
        COLS=config.cols, STEPS=config.steps, **config.options,
    )  # fmt: skip
    return parts
