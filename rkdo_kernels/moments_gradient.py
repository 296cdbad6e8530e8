"""Kernels: the gradient of the row moments of the similarity softmax."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .primitives import LOG2E, into, leave_out, load_rows, similarity_tile, store_rows


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
