"""Kernels: row moments of the similarity softmax, and their gradient."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .primitives import (
    LOG2E,
    into,
    load_rows,
    on_diagonal,
    similarity_tile,
    store_rows,
    touches,
)


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
    q = load_rows(queries_ptr, queries_stride, i, n, 0, dim, WIDTH, FULL, UPCAST)
    sums = ()
    for _ in tl.static_range(DEGREE + 1):
        sums = sums + (tl.zeros([ROWS], tl.float32),)
    for first_j in range(0, m, COLS):
        j = first_j + tl.arange(0, COLS)
        k = load_rows(keys_ptr, keys_stride, j, m, 0, dim, WIDTH, FULL, UPCAST)
        u = similarity_tile(
            q, k, queries_ptr, queries_stride, i, n, keys_ptr, keys_stride, j, m, dim,
            WIDTH, CHUNKS, FULL, PRECISION, UPCAST,
        )  # fmt: skip
        e = tl.exp2(u * scale)
        if first_j + COLS > m:
            e = tl.where((j < m)[None, :], e, 0.0)
        if EXCLUDE >= 1:
            if touches(first_i, ROWS, first_j, COLS, exclude_a):
                e = tl.where(on_diagonal(i, j, exclude_a), 0.0, e)
        if EXCLUDE >= 2:
            if touches(first_i, ROWS, first_j, COLS, exclude_b):
                e = tl.where(on_diagonal(i, j, exclude_b), 0.0, e)
        if not UNIT:
            u = u * unit
        sums = add_powers(sums, e, u, DEGREE)
    out = moments_ptr + i.to(tl.int64) * (DEGREE + 1)
    for power in tl.static_range(DEGREE + 1):
        tl.store(out + power, sums[power], mask=i < n)


@triton.jit
def add_powers(sums, e, u, DEGREE: tl.constexpr):
    """sums_k + Σ_j e u^k: even powers by u², odd ones in the addition itself."""
    result = (sums[0] + tl.sum(e, 1),)
    square = u * u
    for power in tl.static_range(1, DEGREE + 1):
        if power % 2 == 1:
            result = result + (sums[power] + tl.sum(e * u, 1),)
        elif power == DEGREE:
            result = result + (sums[power] + tl.sum(e * square, 1),)
        else:
            e = e * square
            result = result + (sums[power] + tl.sum(e, 1),)
    return result


@triton.jit
def _moments_bwd(
    queries_ptr,  # [N, D]               in
    keys_ptr,  # [M, D]                  in
    scale_ptr,  # []                     in, c
    weights_ptr,  # [N, DEGREE + 1]      in, fp32
    gradient_ptr,  # [N or M, D]         out
    queries_stride,
    keys_stride,
    n,
    m,
    dim,
    unit,  # 1 / b
    exclude_a,
    exclude_b,
    QUERIES: tl.constexpr,  # the gradient to the queries, else to the keys
    DEGREE: tl.constexpr,
    EXCLUDE: tl.constexpr,
    UNIT: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNKS: tl.constexpr,
    FULL: tl.constexpr,
    PRECISION: tl.constexpr,
    GRADIENT_PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """One program per block of queries, or of keys, and stripe of WIDTH columns:

    ∂L/∂queries = G keys or ∂L/∂keys = Gᵀ queries,  G_ij = exp(c S_ij) Σ_k weights_ik (S_ij / b)^k
    """
    scale = tl.load(scale_ptr).to(tl.float32) * LOG2E
    stripe = tl.program_id(1) * WIDTH
    if QUERIES:
        first_i = tl.program_id(0) * ROWS
        i = first_i + tl.arange(0, ROWS)
        q = load_rows(queries_ptr, queries_stride, i, n, 0, dim, WIDTH, FULL, UPCAST)
        weights = row_polynomials(weights_ptr, i, n, DEGREE)
        acc = tl.zeros([ROWS, WIDTH], tl.float32)
        for first_j in range(0, m, COLS):
            j = first_j + tl.arange(0, COLS)
            k = load_rows(keys_ptr, keys_stride, j, m, 0, dim, WIDTH, FULL, UPCAST)
            u = similarity_tile(
                q, k, queries_ptr, queries_stride, i, n, keys_ptr, keys_stride, j, m, dim,
                WIDTH, CHUNKS, FULL, PRECISION, UPCAST,
            )  # fmt: skip
            g = gradient_tile(
                u, scale, unit, weights, first_i, i, first_j, j, exclude_a, exclude_b,
                DEGREE, EXCLUDE, UNIT, ROWS, COLS,
            )  # fmt: skip
            if CHUNKS > 1:
                k = load_rows(keys_ptr, keys_stride, j, m, stripe, dim, WIDTH, FULL, UPCAST)
            acc = into(acc, g, k, GRADIENT_PRECISION)
        store_rows(gradient_ptr, i, n, stripe, dim, acc, WIDTH)
    else:
        first_j = tl.program_id(0) * COLS
        j = first_j + tl.arange(0, COLS)
        k = load_rows(keys_ptr, keys_stride, j, m, 0, dim, WIDTH, FULL, UPCAST)
        acc = tl.zeros([COLS, WIDTH], tl.float32)
        for first_i in range(0, n, ROWS):
            i = first_i + tl.arange(0, ROWS)
            q = load_rows(queries_ptr, queries_stride, i, n, 0, dim, WIDTH, FULL, UPCAST)
            weights = row_polynomials(weights_ptr, i, n, DEGREE)
            u = similarity_tile(
                q, k, queries_ptr, queries_stride, i, n, keys_ptr, keys_stride, j, m, dim,
                WIDTH, CHUNKS, FULL, PRECISION, UPCAST,
            )  # fmt: skip
            g = gradient_tile(
                u, scale, unit, weights, first_i, i, first_j, j, exclude_a, exclude_b,
                DEGREE, EXCLUDE, UNIT, ROWS, COLS,
            )  # fmt: skip
            if CHUNKS > 1:
                q = load_rows(queries_ptr, queries_stride, i, n, stripe, dim, WIDTH, FULL, UPCAST)
            acc = into(acc, tl.trans(g), q, GRADIENT_PRECISION)
        store_rows(gradient_ptr, j, m, stripe, dim, acc, WIDTH)


@triton.jit
def row_polynomials(weights_ptr, i, n, DEGREE: tl.constexpr):
    """DEGREE + 1 columns of weights, [ROWS, 1] each; 0 past the last row, whose G is then 0."""
    result = ()
    for power in tl.static_range(DEGREE + 1):
        at = weights_ptr + i.to(tl.int64) * (DEGREE + 1) + power
        result = result + (tl.load(at, mask=i < n, other=0.0)[:, None],)
    return result


@triton.jit
def gradient_tile(
    u,
    scale,
    unit,
    weights,
    first_i,
    i,
    first_j,
    j,
    exclude_a,
    exclude_b,
    DEGREE: tl.constexpr,
    EXCLUDE: tl.constexpr,
    UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """exp(c S) Σ_k weights_k (S / b)^k.  A key past the last needs no mask: its row is zero."""
    e = tl.exp2(u * scale)
    if EXCLUDE >= 1:
        if touches(first_i, ROWS, first_j, COLS, exclude_a):
            e = tl.where(on_diagonal(i, j, exclude_a), 0.0, e)
    if EXCLUDE >= 2:
        if touches(first_i, ROWS, first_j, COLS, exclude_b):
            e = tl.where(on_diagonal(i, j, exclude_b), 0.0, e)
    if not UNIT:
        u = u * unit
    if DEGREE == 0:
        return e * weights[0]
    else:
        polynomial = weights[DEGREE] * u + weights[DEGREE - 1]
        for power in tl.static_range(2, DEGREE + 1):
            polynomial = polynomial * u + weights[DEGREE - power]
        return e * polynomial


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


def moments_backward(
    queries: Tensor, keys: Tensor, scale: Tensor, bound: float, weights: Tensor, exclude: list[int]
) -> tuple[Tensor, Tensor]:
    queries, keys = launch.rows_contiguous(queries), launch.rows_contiguous(keys)
    weights, m, dim = weights.contiguous(), keys.shape[0], queries.shape[1]
    config, dims = launch.config("moments_bwd", queries), launch.dims(queries)
    results = queries.new_empty(queries.shape), keys.new_empty(keys.shape)
    for gradient, to_queries in zip(results, (True, False), strict=True):
        block = config.rows if to_queries else config.cols
        _moments_bwd[(triton.cdiv(len(gradient), block), dims["CHUNKS"])](
            queries, keys, scale, weights, gradient, queries.stride(0), keys.stride(0),
            queries.shape[0], m, dim, 1 / bound, *launch.excluded(exclude), QUERIES=to_queries,
            DEGREE=weights.shape[1] - 1, EXCLUDE=len(exclude), UNIT=bound == 1, **dims,
            GRADIENT_PRECISION=launch.gradient_precision(queries), ROWS=config.rows,
            COLS=config.cols, **config.options,
        )  # fmt: skip
    return results
