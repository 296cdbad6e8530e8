"""Kernels: row moments of the similarity softmax, and their gradient."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .primitives import LOG2E, into, load_rows, on_diagonal, similarity_tile, touches


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
        updated = (sums[0] + tl.sum(e, 1),)
        for power in tl.static_range(1, DEGREE + 1):
            e = e * u
            updated = updated + (sums[power] + tl.sum(e, 1),)
        sums = updated
    out = moments_ptr + i.to(tl.int64) * (DEGREE + 1)
    for power in tl.static_range(DEGREE + 1):
        tl.store(out + power, sums[power], mask=i < n)


@triton.jit
def _moments_bwd(
    own_ptr,  # [OWN, D]                     in, the operand that gets the gradient
    other_ptr,  # [OTHER, D]                 in
    scale_ptr,  # []                         in, c
    weights_ptr,  # [N, DEGREE + 1]          in, fp32
    gradient_ptr,  # [OWN, D]                out
    own_stride,
    other_stride,
    n_own,
    n_other,
    dim,
    unit,  # 1 / b
    exclude_a,  # other row own + exclude
    exclude_b,
    BY_OWN: tl.constexpr,  # own are the queries, whose rows have the weights
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
    """One program per block of own rows and stripe of WIDTH columns:

    ∂L/∂own = Σ_other G other,  G_ij = ∂L/∂S_ij = exp(c S_ij) Σ_k weights_ik (S_ij / b)^k
    """
    first_i = tl.program_id(0) * ROWS
    i = first_i + tl.arange(0, ROWS)
    scale = tl.load(scale_ptr).to(tl.float32) * LOG2E
    own = load_rows(own_ptr, own_stride, i, n_own, 0, dim, WIDTH, FULL, UPCAST)
    w_own = ()
    if BY_OWN:
        for power in tl.static_range(DEGREE + 1):
            at = weights_ptr + i.to(tl.int64) * (DEGREE + 1) + power
            w_own = w_own + (tl.load(at, mask=i < n_own, other=0.0)[:, None],)
    acc = tl.zeros([ROWS, WIDTH], tl.float32)
    for first_j in range(0, n_other, COLS):
        j = first_j + tl.arange(0, COLS)
        other = load_rows(other_ptr, other_stride, j, n_other, 0, dim, WIDTH, FULL, UPCAST)
        u = similarity_tile(
            own, other, own_ptr, own_stride, i, n_own, other_ptr, other_stride, j, n_other, dim,
            WIDTH, CHUNKS, FULL, PRECISION, UPCAST,
        )  # fmt: skip
        g = tl.exp2(u * scale)
        if EXCLUDE >= 1:
            if touches(first_i, ROWS, first_j, COLS, exclude_a):
                g = tl.where(on_diagonal(i, j, exclude_a), 0.0, g)
        if EXCLUDE >= 2:
            if touches(first_i, ROWS, first_j, COLS, exclude_b):
                g = tl.where(on_diagonal(i, j, exclude_b), 0.0, g)
        if not UNIT:
            u = u * unit
        if BY_OWN:
            w = w_own
        else:
            w = ()
            for power in tl.static_range(DEGREE + 1):
                at = weights_ptr + j.to(tl.int64) * (DEGREE + 1) + power
                w = w + (tl.load(at, mask=j < n_other, other=0.0)[None, :],)
        if DEGREE == 0:
            g = g * w[0]
        else:
            polynomial = w[DEGREE] * u + w[DEGREE - 1]
            for power in tl.static_range(2, DEGREE + 1):
                polynomial = polynomial * u + w[DEGREE - power]
            g = g * polynomial
        if CHUNKS > 1:  # rows past the end are loaded as zero: nothing to mask in g
            start = tl.program_id(1) * WIDTH
            other = load_rows(other_ptr, other_stride, j, n_other, start, dim, WIDTH, FULL, UPCAST)
        acc = into(acc, g, other, UPCAST, GRADIENT_PRECISION)
    d = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    out = gradient_ptr + i.to(tl.int64)[:, None] * dim + d[None, :]
    tl.store(
        out, acc.to(gradient_ptr.dtype.element_ty), mask=(i < n_own)[:, None] & (d < dim)[None, :]
    )


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
    weights = weights.contiguous()
    results = []
    for own, other, by_own in ((queries, keys, True), (keys, queries, False)):
        n, dim = own.shape
        gradient = own.new_empty(n, dim)
        config = launch.config("moments_bwd", own)
        dims = launch.dims(own)
        _moments_bwd[(triton.cdiv(n, config.rows), dims["CHUNKS"])](
            own, other, scale, weights, gradient, own.stride(0), other.stride(0), n, other.shape[0],
            dim, 1 / bound, *launch.excluded(exclude, by_own), BY_OWN=by_own,
            DEGREE=weights.shape[1] - 1, EXCLUDE=len(exclude), UNIT=bound == 1, **dims,
            GRADIENT_PRECISION=launch.gradient_precision(own), ROWS=config.rows, COLS=config.cols,
            **config.options,
        )  # fmt: skip
        results.append(gradient)
    return results[0], results[1]
