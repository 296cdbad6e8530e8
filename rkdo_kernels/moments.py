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

LANES = tl.constexpr(8)  # neighbouring columns that partial sums keep apart


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
def leave_out(
    e,
    first_i,
    first_j,
    exclude_a,
    exclude_b,
    EXCLUDE: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """e with zeros on the excluded diagonals; a tile that they miss is not touched."""
    i = first_i + tl.arange(0, ROWS)
    j = first_j + tl.arange(0, COLS)
    if EXCLUDE >= 1:
        if touches(first_i, ROWS, first_j, COLS, exclude_a):
            e = tl.where(on_diagonal(i, j, exclude_a), 0.0, e)
    if EXCLUDE >= 2:
        if touches(first_i, ROWS, first_j, COLS, exclude_b):
            e = tl.where(on_diagonal(i, j, exclude_b), 0.0, e)
    return e


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


@triton.jit
def fold(x, ROWS: tl.constexpr, COLS: tl.constexpr):
    """[ROWS, COLS] -> [ROWS, LANES], over columns that one thread owns."""
    return tl.sum(tl.reshape(x, [ROWS, COLS // LANES, LANES]), 1)


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
        q = load_rows(
            queries_ptr, queries_stride, first_i, n, 0, dim, ROWS, WIDTH, FULL, True, UPCAST
        )
        weights = row_polynomials(weights_ptr, first_i, n, ROWS, DEGREE, True)
        acc = tl.zeros([ROWS, WIDTH], tl.float32)
        whole = m // COLS * COLS
        for first_j in range(0, whole, COLS):
            g, _, k = gradient_tile(
                q, q, weights, queries_ptr, queries_stride, first_i, n, keys_ptr, keys_stride,
                first_j, m, dim, stripe, scale, unit, weights_ptr, exclude_a, exclude_b, True,
                DEGREE, EXCLUDE, UNIT, ROWS, COLS, WIDTH, CHUNKS, FULL, PRECISION, UPCAST, False,
            )  # fmt: skip
            acc = into(acc, g, k, GRADIENT_PRECISION)
        if whole < m:
            g, _, k = gradient_tile(
                q, q, weights, queries_ptr, queries_stride, first_i, n, keys_ptr, keys_stride,
                whole, m, dim, stripe, scale, unit, weights_ptr, exclude_a, exclude_b, True,
                DEGREE, EXCLUDE, UNIT, ROWS, COLS, WIDTH, CHUNKS, FULL, PRECISION, UPCAST, True,
            )  # fmt: skip
            acc = into(acc, g, k, GRADIENT_PRECISION)
        i = first_i + tl.arange(0, ROWS)
        store_rows(gradient_ptr, i, n, stripe, dim, acc, WIDTH)
    else:
        first_j = tl.program_id(0) * COLS
        k = load_rows(keys_ptr, keys_stride, first_j, m, 0, dim, COLS, WIDTH, FULL, True, UPCAST)
        acc = tl.zeros([COLS, WIDTH], tl.float32)
        whole = n // ROWS * ROWS
        for first_i in range(0, whole, ROWS):
            g, q, _ = gradient_tile(
                k, k, (), queries_ptr, queries_stride, first_i, n, keys_ptr, keys_stride,
                first_j, m, dim, stripe, scale, unit, weights_ptr, exclude_a, exclude_b, False,
                DEGREE, EXCLUDE, UNIT, ROWS, COLS, WIDTH, CHUNKS, FULL, PRECISION, UPCAST, False,
            )  # fmt: skip
            acc = into(acc, tl.trans(g), q, GRADIENT_PRECISION)
        if whole < n:
            g, q, _ = gradient_tile(
                k, k, (), queries_ptr, queries_stride, whole, n, keys_ptr, keys_stride,
                first_j, m, dim, stripe, scale, unit, weights_ptr, exclude_a, exclude_b, False,
                DEGREE, EXCLUDE, UNIT, ROWS, COLS, WIDTH, CHUNKS, FULL, PRECISION, UPCAST, True,
            )  # fmt: skip
            acc = into(acc, tl.trans(g), q, GRADIENT_PRECISION)
        j = first_j + tl.arange(0, COLS)
        store_rows(gradient_ptr, j, m, stripe, dim, acc, WIDTH)


@triton.jit
def gradient_tile(
    q,
    k,
    weights,
    queries_ptr,
    queries_stride,
    first_i,
    n,
    keys_ptr,
    keys_stride,
    first_j,
    m,
    dim,
    stripe,
    scale,
    unit,
    weights_ptr,
    exclude_a,
    exclude_b,
    QUERIES: tl.constexpr,
    DEGREE: tl.constexpr,
    EXCLUDE: tl.constexpr,
    UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNKS: tl.constexpr,
    FULL: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    LAST: tl.constexpr,  # some of the rows that the loop loads may be past the last
):
    """G = exp(c S) Σ_k weights_k (S / b)^k, and the operands' columns of this stripe.

    The operand that the loop runs over is loaded here. Past its last row G needs no mask: the
    weights, or the key's row in G keys, are zero.
    """
    if QUERIES:
        k = load_rows(keys_ptr, keys_stride, first_j, m, 0, dim, COLS, WIDTH, FULL, LAST, UPCAST)
    else:
        q = load_rows(
            queries_ptr, queries_stride, first_i, n, 0, dim, ROWS, WIDTH, FULL, LAST, UPCAST
        )
        weights = row_polynomials(weights_ptr, first_i, n, ROWS, DEGREE, LAST)
    u = similarity_tile(
        q, k, queries_ptr, queries_stride, first_i, n, keys_ptr, keys_stride, first_j, m, dim,
        ROWS, COLS, WIDTH, CHUNKS, FULL, PRECISION, UPCAST,
    )  # fmt: skip
    g = leave_out(tl.exp2(u * scale), first_i, first_j, exclude_a, exclude_b, EXCLUDE, ROWS, COLS)
    if not UNIT:
        u = u * unit
    polynomial = weights[DEGREE]
    for power in tl.static_range(1, DEGREE + 1):
        polynomial = polynomial * u + weights[DEGREE - power]
    g = g * polynomial
    if CHUNKS > 1 and QUERIES:
        k = load_rows(
            keys_ptr, keys_stride, first_j, m, stripe, dim, COLS, WIDTH, FULL, LAST, UPCAST
        )
    if CHUNKS > 1 and not QUERIES:
        q = load_rows(
            queries_ptr, queries_stride, first_i, n, stripe, dim, ROWS, WIDTH, FULL, LAST, UPCAST
        )
    return g, q, k


@triton.jit
def row_polynomials(
    weights_ptr, first, n, ROWS: tl.constexpr, DEGREE: tl.constexpr, MASKED: tl.constexpr
):
    """DEGREE + 1 columns of weights, [ROWS, 1] each; 0 past the last row."""
    local = tl.arange(0, ROWS)
    table_ptr = weights_ptr + tl.cast(first, tl.int64) * (DEGREE + 1)
    result = ()
    for power in tl.static_range(DEGREE + 1):
        at = table_ptr + local * (DEGREE + 1) + power
        w = tl.load(at, mask=local < n - first, other=0.0) if MASKED else tl.load(at)
        result = result + (w[:, None],)
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
