"""Kernel: the recursion's loss and both gradients of a small batch, in one launch of one program.

Up to 128 rows and keys all of S is one tile. The program that formed it has every row's moments,
so that the rows' coefficients and the gradient need no launch of their own.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .checks import SLACK
from .parts import at_partners
from .primitives import (
    LOG2E,
    into,
    leave_out,
    load_rows,
    rounded,
    row_polynomials,
    store_rows,
)
from .recursion_rows import PASTS, recursion_rows, repeat


@triton.jit
def _single_launch(
    queries_ptr,  # [N, D]              in
    keys_ptr,  # [M, D]                 in
    table_ptr,  # see quadrature.table  in, fp64
    loss_ptr,  # [N]                    out, fp64
    d_queries_ptr,  # [N, D]            out, fp32
    d_keys_ptr,  # [M, D]               out, fp32
    s_ptr,  # [N, M] in whole tiles     room, fp32: S, then G
    room_ptr,  # [2 DEGREE + 4 + 4 (depth + 1), N], fp64: what passes between threads
    queries_stride,
    keys_stride,
    n,
    m,
    dim,
    unit,  # 1 / b
    longest,  # square of what a query's length times a key's may be
    exclude_a,  # key i + exclude_a is row i's positive
    exclude_b,
    depth,
    DEGREE: tl.constexpr,
    EXCLUDE: tl.constexpr,  # how many of the two count
    DETACH: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNKS: tl.constexpr,
    FULL: tl.constexpr,
    PRECISION: tl.constexpr,
    GRADIENT_PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    MOST: tl.constexpr,  # rows
):
    """The loss by row, and ∂L/∂queries = G keys and ∂L/∂keys = Gᵀ queries of L = Σ_i loss_i.

        M_ik = Σ_j e_ij u_ij^k;  loss, w, at_positive = recursion_rows(M)
        G_ij = e_ij Σ_k w_ik u_ij^k

    with e = exp(c S) off the excluded diagonals, u = S / b, and at_positive_i for the positive.
    A row that may pass the bound has a NaN loss, and makes the gradients NaN.
    """
    moments_ptr = room_ptr
    weights_ptr = moments_ptr + n * (DEGREE + 1)
    at_positive_ptr = weights_ptr + n * (DEGREE + 1)
    squares_ptr = at_positive_ptr + n
    pasts_ptr = squares_ptr + n
    scale_ptr = table_ptr + (DEGREE + 1) * (DEGREE + depth + 2) + depth + 2
    scale = tl.load(scale_ptr).to(tl.float32) * LOG2E
    pitch = (m + (COLS - 1)) // COLS * COLS

    key_square = 0.0
    for first_i in range(0, n, ROWS):
        moments = repeat(tl.zeros([ROWS], tl.float32), DEGREE + 1)
        row_squares = tl.zeros([ROWS], tl.float32)
        for first_j in range(0, m, COLS):
            s = tl.zeros([ROWS, COLS], tl.float32)
            row_squares = tl.zeros([ROWS], tl.float32)
            key_squares = tl.zeros([COLS], tl.float32)
            for start in range(0, dim, WIDTH):
                q = load_rows(
                    queries_ptr, queries_stride, first_i, n, start, dim, ROWS, WIDTH, FULL, True,
                    UPCAST,
                )  # fmt: skip
                k = load_rows(
                    keys_ptr, keys_stride, first_j, m, start, dim, COLS, WIDTH, FULL, True, UPCAST
                )
                s = tl.dot(q, tl.trans(k), s, input_precision=PRECISION)
                row_squares += squares(q)
                key_squares += squares(k)
            key_square = tl.maximum(key_square, tl.max(key_squares))
            tl.store(s_ptr + entries(first_i, first_j, pitch, 1, ROWS, COLS), s)
            e = weigh(s, first_i, first_j, m, scale, exclude_a, exclude_b, EXCLUDE, ROWS, COLS)
            added = ()
            for power in tl.static_range(DEGREE + 1):
                added = added + (moments[power] + tl.sum(e, 1),)
                e = e * (s * unit)
            moments = added
        i = first_i + tl.arange(0, ROWS)
        for power in tl.static_range(DEGREE + 1):
            tl.store(moments_ptr + i * (DEGREE + 1) + power, moments[power], mask=i < n)
        tl.store(squares_ptr + i, row_squares, mask=i < n)

    tl.debug_barrier()  # from here on threads read what others have stored
    recursion_rows(
        queries_ptr, keys_ptr, table_ptr, moments_ptr, loss_ptr, weights_ptr, at_positive_ptr,
        pasts_ptr, queries_stride, keys_stride, 0, n, m, dim, exclude_a, 1, depth, DEGREE, DETACH,
        MOST,
    )  # fmt: skip
    tl.debug_barrier()

    row = tl.arange(0, MOST)
    square = tl.load(squares_ptr + row, mask=row < n, other=0.0)
    product = key_square * square
    unknown = (product != product) & (square == square)  # 0 · ∞: of squares that float32 has not
    passes = (row < n) & ((product > longest) | unknown)
    tl.store(loss_ptr + row, float("nan"), mask=passes)
    valid = tl.where(tl.max(passes.to(tl.int32)) > 0, float("nan"), 1.0)
    for first_i in range(0, n, ROWS):
        weights = row_polynomials(weights_ptr, first_i, n, ROWS, DEGREE, True)
        for first_j in range(0, m, COLS):
            at = entries(first_i, first_j, pitch, 1, ROWS, COLS)
            s = tl.load(s_ptr + at)
            u = s * unit
            g = tl.zeros([ROWS, COLS], tl.float32)
            for back in tl.static_range(DEGREE + 1):
                g = g * u + weights[DEGREE - back].to(tl.float32)
            e = weigh(s, first_i, first_j, m, scale, exclude_a, exclude_b, EXCLUDE, ROWS, COLS)
            tl.store(s_ptr + at, g * (e * valid))

    tl.debug_barrier()
    gradient_rows(
        s_ptr, pitch, 1, at_positive_ptr, 0, n, keys_ptr, keys_stride, exclude_a, m, d_queries_ptr,
        n, dim, WIDTH, FULL, GRADIENT_PRECISION, UPCAST, ROWS, COLS,
    )  # fmt: skip
    gradient_rows(
        s_ptr, 1, pitch, at_positive_ptr, -exclude_a, n, queries_ptr, queries_stride, -exclude_a, n,
        d_keys_ptr, m, dim, WIDTH, FULL, GRADIENT_PRECISION, UPCAST, COLS, ROWS,
    )  # fmt: skip


@triton.jit
def gradient_rows(
    g_ptr,
    own_stride,
    other_stride,
    at_positive_ptr,
    to_pair,  # own row + to_pair is a row of at_positive
    n,
    x_ptr,  # [count, dim]
    x_stride,
    to_partner,  # and own row + to_partner its partner in x
    count,
    gradient_ptr,  # [own_count, dim]
    own_count,
    dim,
    WIDTH: tl.constexpr,
    FULL: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    OWN: tl.constexpr,
    OTHER: tl.constexpr,
):
    """G x, G of own rows, and the positives' share in fp32.

    Half precision would round G, whose products' sums cancel where rows lie near one direction:
    what its bfloat16 leaves is a second G.
    """
    PASSES: tl.constexpr = 1 if x_ptr.dtype.element_ty == tl.float32 else 2
    for start in range(0, dim, WIDTH):
        for first in range(0, own_count, OWN):
            acc = tl.zeros([OWN, WIDTH], tl.float32)
            tiles = (count + (OTHER - 1)) // OTHER
            for turn in range(tiles * PASSES):
                other = turn % tiles * OTHER
                g = tl.load(g_ptr + entries(first, other, own_stride, other_stride, OWN, OTHER))
                if PASSES == 2:
                    high = g.to(tl.bfloat16).to(tl.float32)
                    g = tl.where(turn < tiles, high, g - high)
                x = load_rows(
                    x_ptr, x_stride, other, count, start, dim, OTHER, WIDTH, FULL, True, UPCAST
                )
                acc = into(acc, g, x, PRECISION)
            own = first + tl.arange(0, OWN)
            acc += at_partners(
                at_positive_ptr, own + to_pair, n, x_ptr, x_stride, own + to_partner, count, start,
                dim, WIDTH, False,
            )  # fmt: skip
            store_rows(gradient_ptr, own, own_count, start, dim, acc, WIDTH)


@triton.jit
def entries(first, other, stride, other_stride, OWN: tl.constexpr, OTHER: tl.constexpr):
    """Where a tile's entries lie in the room for S."""
    own = first + tl.arange(0, OWN)
    return own[:, None] * stride + (other + tl.arange(0, OTHER))[None, :] * other_stride


@triton.jit
def weigh(
    s,
    first_i,
    first_j,
    m,
    scale,
    exclude_a,
    exclude_b,
    EXCLUDE: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """e = exp(c S), zero where a key is left out or past the last."""
    e = leave_out(tl.exp2(s * scale), first_i, first_j, exclude_a, exclude_b, EXCLUDE, ROWS, COLS)
    return tl.where((first_j + tl.arange(0, COLS) < m)[None, :], e, 0.0)


@triton.jit
def squares(x):  # [COUNT, WIDTH] -> [COUNT]
    x = x.to(tl.float32)
    return tl.sum(rounded(x, x), 1)


def recursion_moments(
    queries: Tensor,  # [N, D], N and M at most launch.SINGLE
    keys: Tensor,  # [M, D]
    scales: list[float],  # c_t for t = 0..depth
    alpha: float,
    bound: float,
    degree: int,
    exclude: list[int],
    detach_target: bool,
    table: Tensor,  # see quadrature.table
) -> tuple[Tensor, Tensor, Tensor]:  # [N] fp64, [N, D] fp32, [M, D] fp32
    """The loss, and the gradient of its sum to queries and keys."""
    queries, keys = launch.rows_contiguous(queries), launch.rows_contiguous(keys)
    (n, dim), m = queries.shape, keys.shape[0]
    config = launch.config("single_launch", queries)
    loss = queries.new_empty(n, dtype=torch.float64)
    room = queries.new_empty((2 * degree + 4 + PASTS * len(scales)) * n, dtype=torch.float64)
    tiles = triton.cdiv(n, config.rows) * triton.cdiv(m, config.cols)
    s = queries.new_empty(tiles * config.rows * config.cols, dtype=torch.float32)
    d_queries = queries.new_empty(n, dim, dtype=torch.float32)
    d_keys = keys.new_empty(m, dim, dtype=torch.float32)
    _single_launch[(1,)](
        queries, keys, table, loss, d_queries, d_keys, s, room, queries.stride(0), keys.stride(0),
        n, m, dim, 1 / bound, (SLACK * bound) ** 2, *launch.excluded(exclude),
        len(scales) - 1, DEGREE=degree, EXCLUDE=len(exclude), DETACH=detach_target,
        **launch.dims(queries, config.width),
        GRADIENT_PRECISION=launch.gradient_precision(queries), ROWS=config.rows, COLS=config.cols,
        MOST=launch.SINGLE, **config.options,
    )  # fmt: skip
    return loss, d_queries, d_keys
