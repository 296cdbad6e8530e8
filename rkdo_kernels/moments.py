"""Kernel: row moments of the similarity softmax."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .primitives import LANES, LOG2E, fold, leave_out, load_rows, similarity_tile


@triton.jit
def _moments_fwd(
    queries_ptr,  # [N, D]           in
    keys_ptr,  # [M, D]              in
    scale_ptr,  # []                 in, c
    moments_ptr,  # [N, DEGREE + 1]  out, fp32
    queries_stride,
    keys_stride,
    n,
    m,
    dim,
    unit,  # 1 / b
    exclude_a,  # key i + exclude is left out of row i
    exclude_b,
    DEGREE: tl.constexpr,
    EXCLUDE: tl.constexpr,  # how many of the two count
    UNIT: tl.constexpr,  # b = 1
    WIDTH: tl.constexpr,
    CHUNKS: tl.constexpr,
    FULL: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """One program per block of rows i:  M_ik = Σ_j exp(c S_ij) (S_ij / b)^k."""
    first_i = tl.program_id(0) * ROWS
    i = first_i + tl.arange(0, ROWS)
    scale = tl.load(scale_ptr).to(tl.float32) * LOG2E
    q = load_rows(queries_ptr, queries_stride, first_i, n, 0, dim, ROWS, WIDTH, FULL, True, UPCAST)
    partial = ()  # sums over j of one residue each: their own sum waits for the end of the loop
    for _ in tl.static_range(DEGREE + 1):
        partial = partial + (tl.zeros([ROWS, LANES], tl.float32),)
    whole = m // COLS * COLS
    for first_j in range(0, whole, COLS):
        e, u = weight_tile(
            q, queries_ptr, queries_stride, first_i, n, keys_ptr, keys_stride, first_j, m, dim,
            scale, exclude_a, exclude_b, EXCLUDE, ROWS, COLS, WIDTH, CHUNKS, FULL, PRECISION,
            UPCAST, False,
        )  # fmt: skip
        partial = add_powers(partial, e, u if UNIT else u * unit, DEGREE, ROWS, COLS)
    if whole < m:
        e, u = weight_tile(
            q, queries_ptr, queries_stride, first_i, n, keys_ptr, keys_stride, whole, m, dim,
            scale, exclude_a, exclude_b, EXCLUDE, ROWS, COLS, WIDTH, CHUNKS, FULL, PRECISION,
            UPCAST, True,
        )  # fmt: skip
        partial = add_powers(partial, e, u if UNIT else u * unit, DEGREE, ROWS, COLS)
    out = moments_ptr + i.to(tl.int64) * (DEGREE + 1)
    for power in tl.static_range(DEGREE + 1):
        tl.store(out + power, tl.sum(partial[power], 1), mask=i < n)


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
    """partial_k + e u^k: even powers by u², odd ones with their addition."""
    square = u * u
    result = (partial[0] + fold(e, ROWS, COLS),)
    for power in tl.static_range(1, DEGREE + 1):
        if power % 2 == 1:
            result = result + (partial[power] + fold(e * u, ROWS, COLS),)
        elif power == DEGREE:
            result = result + (partial[power] + fold(e * square, ROWS, COLS),)
        else:
            e = e * square
            result = result + (partial[power] + fold(e, ROWS, COLS),)
    return result


def moments(
    queries: Tensor, keys: Tensor, scale: Tensor, bound: float, degree: int, exclude: list[int]
) -> Tensor:  # [N, degree + 1] fp32
    queries, keys = launch.rows_contiguous(queries), launch.rows_contiguous(keys)
    n, dim = queries.shape
    result = queries.new_empty(n, degree + 1, dtype=torch.float32)
    config = launch.config("moments_fwd", queries)
    _moments_fwd[(triton.cdiv(n, config.rows),)](
        queries, keys, scale, result, queries.stride(0), keys.stride(0), n, keys.shape[0], dim,
        1 / bound, *launch.excluded(exclude), DEGREE=degree, EXCLUDE=len(exclude), UNIT=bound == 1,
        **launch.dims(queries), ROWS=config.rows, COLS=config.cols, **config.options,
    )  # fmt: skip
    return result
