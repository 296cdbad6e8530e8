"""Kernels: row and column sums of exp(c S) from one pass, and their gradient."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch, parts
from .levels import add_means
from .moments import moments
from .moments_gradient import (
    clear_pass,
    itinerary,
    load_transposed,
    other_tile,
    other_tiles,
)
from .needs import BOTH, Needs
from .parts import at_partners, store_part
from .primitives import LOG2E, block_values, into, leave_out, load_rows, similarity_tile, walk

PARTS = 64  # of the column sums, float32 [PARTS, M], whatever N is: more rows, more launches


@triton.jit
def _both_sums_fwd(
    queries_ptr,  # [N, D]       in
    keys_ptr,  # [M, D]          in
    rows_ptr,  # [splits, N]     out, fp32
    cols_ptr,  # [programs, M]   out, fp32
    queries_stride,
    keys_stride,
    n,
    m,
    dim,
    scale,  # c
    exclude_a,  # key i + exclude is left out of row i
    exclude_b,
    rows_stride,  # of a split
    span,  # keys that a split walks over
    EXCLUDE: tl.constexpr,  # how many of the two count
    SPLIT: tl.constexpr,
    AGAIN: tl.constexpr,  # the column sums are added to those of earlier rows
    DENSE: tl.constexpr,  # rows of WIDTH that follow one another
    WIDTH: tl.constexpr,
    CHUNKS: tl.constexpr,
    FULL: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """One program per block of rows i and split:  Σ_j e_ij and Σ_i e_ij, e = exp(c S).

    Tiles are of Sᵀ: a matrix product spreads its rows over threads and leaves neighbours in its
    columns to one. So a key's sum over the tile is almost the thread's own and goes out tile by
    tile; a query's waits for the end of the walk.
    """
    if DENSE:
        queries_stride = WIDTH
        keys_stride = WIDTH
    scale = scale * LOG2E
    first_i = tl.program_id(0) * ROWS
    q = tl.trans(load_transposed(queries_ptr, queries_stride, first_i, n, dim, ROWS, WIDTH, UPCAST))
    partial = tl.zeros([COLS // 2, ROWS], tl.float32)
    cols_ptr += tl.program_id(0).to(tl.int64) * m
    start, whole, stop = walk(span, m, SPLIT, COLS)
    clear = tl.where(first_i + ROWS <= n, whole, start)  # up to where no tile meets an edge
    for first_j in range(start, clear, COLS):
        e = weight_tile(
            q, queries_ptr, queries_stride, first_i, n, keys_ptr, keys_stride, first_j, m, dim,
            scale, exclude_a, exclude_b, EXCLUDE, ROWS, COLS, WIDTH, CHUNKS, FULL, PRECISION,
            UPCAST, False,
        )  # fmt: skip
        partial += pairs(e, COLS, ROWS)
        add_columns(cols_ptr, first_j, m, e, COLS, AGAIN, False)
    for first_j in tl.range(clear, stop, COLS, num_stages=1):
        e = weight_tile(
            q, queries_ptr, queries_stride, first_i, n, keys_ptr, keys_stride, first_j, m, dim,
            scale, exclude_a, exclude_b, EXCLUDE, ROWS, COLS, WIDTH, CHUNKS, FULL, PRECISION,
            UPCAST, True,
        )  # fmt: skip
        partial += pairs(e, COLS, ROWS)
        add_columns(cols_ptr, first_j, m, e, COLS, AGAIN, True)
    i = first_i + tl.arange(0, ROWS)
    if SPLIT:
        rows_ptr += tl.program_id(2).to(tl.int64) * rows_stride
    tl.store(rows_ptr + i, tl.sum(partial, 0), mask=i < n)


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
    EDGE: tl.constexpr,  # some queries or keys may be past the last
):  # [COLS, ROWS]
    """exp(c Sᵀ), zero where a key is left out or either is past the last."""
    k = load_rows(keys_ptr, keys_stride, first_j, m, 0, dim, COLS, WIDTH, FULL, EDGE, UPCAST)
    s = similarity_tile(
        k, q, keys_ptr, keys_stride, first_j, m, queries_ptr, queries_stride, first_i, n, dim,
        COLS, ROWS, WIDTH, CHUNKS, FULL, PRECISION, UPCAST,
    )  # fmt: skip
    e = tl.exp2(s * scale)
    e = leave_out(e, first_j, first_i, -exclude_a, -exclude_b, EXCLUDE, COLS, ROWS)
    if EDGE:
        here = (first_j + tl.arange(0, COLS) < m)[:, None]
        e = tl.where(here & (first_i + tl.arange(0, ROWS) < n)[None, :], e, 0.0)
    return e


@triton.jit
def pairs(e, ROWS: tl.constexpr, COLS: tl.constexpr):
    """[ROWS, COLS] -> [ROWS // 2, COLS]: sums of rows that one thread owns."""
    halves = tl.sum(tl.reshape(e, [ROWS // 16, 2, 8, COLS]), 1)
    return tl.reshape(halves, [ROWS // 2, COLS])


@triton.jit
def add_columns(
    cols_ptr, first_j, m, e, COLS: tl.constexpr, AGAIN: tl.constexpr, EDGE: tl.constexpr
):
    """The keys' sums over a tile [COLS, ROWS]."""
    at = cols_ptr + first_j + tl.arange(0, COLS)
    total = tl.sum(e, 1)
    if EDGE:
        here = first_j + tl.arange(0, COLS) < m
        if AGAIN:
            total += tl.load(at, mask=here, other=0.0)
        tl.store(at, total, mask=here)
    else:
        if AGAIN:
            total += tl.load(at)
        tl.store(at, total)


@triton.jit
def _both_sums_bwd(
    queries_ptr,  # [N, D]             in
    keys_ptr,  # [M, D]                in
    query_weights_ptr,  # [N]          in, fp32, w
    key_weights_ptr,  # [M]            in, fp32, v
    at_positive_ptr,  # [queries]      in, fp32, ∂L/∂S at (i, i + exclude_a)
    means_ptr,  # [N]                  in, fp32, a number near the mean of a row of e
    gradient_ptr,  # [N, D]            out, fp32; a part a split, where they are split
    queries_stride,
    keys_stride,
    n,
    m,
    dim,
    scale,  # c
    exclude_a,
    exclude_b,
    span,  # keys that a split walks over
    BY_KEY: tl.constexpr,  # at_positive has an entry a key, [M]
    EXCLUDE: tl.constexpr,
    POSITIVE: tl.constexpr,
    LEVEL: tl.constexpr,  # whether there are means: see levels.py
    SPLIT: tl.constexpr,
    DENSE: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNKS: tl.constexpr,
    FULL: tl.constexpr,
    PRECISION: tl.constexpr,
    GRADIENT_PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    STEPS: tl.constexpr,  # tiles a pass through the loop
):
    """One program per block of queries, stripe of WIDTH columns, and split:

    ∂L/∂queries = G keys,  G_ij = exp(c S_ij) (w_i + v_j)

    For the keys' gradient queries and keys change places. With levels G_ij is only
    (e_ij − mean_i) (w_i + v_j), and `add_means` adds what is missing.
    """
    scale = scale * LOG2E
    stripe = tl.program_id(1) * WIDTH
    if DENSE:
        queries_stride = WIDTH
        keys_stride = WIDTH
    first_i = tl.program_id(0) * ROWS
    q = load_rows(queries_ptr, queries_stride, first_i, n, 0, dim, ROWS, WIDTH, FULL, True, UPCAST)
    w = block_values(query_weights_ptr, 1, first_i, n, ROWS, 1, True)
    mean = 0.0
    if LEVEL:
        mean = block_values(means_ptr, 1, first_i, n, ROWS, 1, True)
    acc = tl.zeros([ROWS, WIDTH], tl.float32)
    start, clear, passes, a, a_passes, b, b_passes, stop = itinerary(
        span, m, first_i + exclude_a, first_i + exclude_b, EXCLUDE, SPLIT, ROWS, COLS * STEPS
    )
    for turn in range(clear):
        first = start + clear_pass(turn, a, a_passes, b, b_passes, EXCLUDE) * (COLS * STEPS)
        for step in tl.static_range(STEPS):
            g, k = gradient_tile(
                q, w, mean, queries_ptr, queries_stride, first_i, n, keys_ptr, keys_stride,
                first + step * COLS, m, dim, stripe, scale, key_weights_ptr, exclude_a, exclude_b,
                0, LEVEL, ROWS, COLS, WIDTH, CHUNKS, FULL, PRECISION, UPCAST, False,
            )  # fmt: skip
            acc = into(acc, g, k, GRADIENT_PRECISION)
    left = other_tiles(start, passes, a_passes, b_passes, stop, COLS, STEPS)
    for turn in tl.range(left, num_stages=1, disable_licm=True):
        first_j = start + COLS * other_tile(turn, passes, a, a_passes, b, b_passes, STEPS)
        g, k = gradient_tile(
            q, w, mean, queries_ptr, queries_stride, first_i, n, keys_ptr, keys_stride, first_j, m,
            dim, stripe, scale, key_weights_ptr, exclude_a, exclude_b, EXCLUDE, LEVEL, ROWS, COLS,
            WIDTH, CHUNKS, FULL, PRECISION, UPCAST, True,
        )  # fmt: skip
        acc = into(acc, g, k, GRADIENT_PRECISION)
    i = first_i + tl.arange(0, ROWS)
    if POSITIVE:
        j = i + exclude_a
        acc += at_partners(
            at_positive_ptr, j if BY_KEY else i, m if BY_KEY else n, keys_ptr, keys_stride, j, m,
            stripe, dim, WIDTH, SPLIT,
        )  # fmt: skip
    store_part(gradient_ptr, i, n, stripe, dim, acc, WIDTH, SPLIT)


@triton.jit
def gradient_tile(
    q,
    w,
    mean,
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
    key_weights_ptr,
    exclude_a,
    exclude_b,
    EXCLUDE: tl.constexpr,
    LEVEL: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNKS: tl.constexpr,
    FULL: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    LAST: tl.constexpr,  # some keys may be past the last: zeros, so that G there counts nothing
):
    """G = (exp(c S) − mean) (w + v), and the keys' columns of this stripe."""
    k = load_rows(keys_ptr, keys_stride, first_j, m, 0, dim, COLS, WIDTH, FULL, LAST, UPCAST)
    v = block_values(key_weights_ptr, 1, first_j, m, COLS, 0, LAST)
    s = similarity_tile(
        q, k, queries_ptr, queries_stride, first_i, n, keys_ptr, keys_stride, first_j, m, dim,
        ROWS, COLS, WIDTH, CHUNKS, FULL, PRECISION, UPCAST,
    )  # fmt: skip
    e = tl.exp2(s * scale)
    if LEVEL:
        e -= mean
    g = e * (w + v)
    g = leave_out(g, first_i, first_j, exclude_a, exclude_b, EXCLUDE, ROWS, COLS)
    if CHUNKS > 1:
        k = load_rows(
            keys_ptr, keys_stride, first_j, m, stripe, dim, COLS, WIDTH, FULL, LAST, UPCAST
        )
    return g, k


def both_sums(
    queries: Tensor, keys: Tensor, scale: float, exclude: list[int]
) -> tuple[Tensor, Tensor]:  # [N], [M]
    queries, keys = launch.rows_contiguous(queries), launch.rows_contiguous(keys)
    (n, dim), m = queries.shape, keys.shape[0]
    config = launch.config("both_sums", queries)
    dims = launch.dims(queries, config.width)
    dense = queries.stride(0) == keys.stride(0) == dims["WIDTH"]
    config = launch.limited(config, queries.dtype, dims["WIDTH"], 0, dense)
    taken = min(PARTS * config.rows, n)  # rows a launch
    programs = triton.cdiv(taken, config.rows)
    cols = queries.new_empty(programs, m, dtype=torch.float32)
    fit = 12 if config.registers else 16
    splits, span = launch.split(programs, m, config.cols, config.warps, cols, fit)
    rows = cols.new_empty(splits, n)
    for first in range(0, n, taken):
        block = queries[first : first + taken]
        diagonals = [diagonal + first for diagonal in exclude]
        _both_sums_fwd[(triton.cdiv(len(block), config.rows), 1, splits)](
            block, keys, rows[:, first:], cols, queries.stride(0), keys.stride(0), len(block), m,
            dim, scale, *launch.excluded(diagonals), n, span, EXCLUDE=len(exclude),
            SPLIT=splits > 1, AGAIN=first > 0,
            DENSE=dense, **dims, ROWS=config.rows, COLS=config.cols, **config.options,
        )  # fmt: skip
    return rows.sum(0, dtype=torch.float64), cols.sum(0, dtype=torch.float64)


def both_sums_backward(
    queries: Tensor,
    keys: Tensor,
    scale: float,
    row_weights: Tensor,
    col_weights: Tensor,
    exclude: list[int],
    at_positive: Tensor | None,
    needs: Needs = BOTH,
    row_means: Tensor | None = None,
    col_means: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # [N, D], [M, D]
    mirrored = [-diagonal for diagonal in exclude]
    d_queries, d_keys = queries.new_empty(0), keys.new_empty(0)
    if needs[0]:
        d_queries = gradient(
            queries, keys, scale, row_weights, col_weights, exclude, at_positive, False, row_means
        )
    if needs[1]:
        d_keys = gradient(
            keys, queries, scale, col_weights, row_weights, mirrored, at_positive, True, col_means
        )
    return d_queries, d_keys


def self_sums(images: Tensor, scale: float) -> Tensor:  # [N, D] -> [N]
    c = torch.full((), scale, dtype=torch.float64, device=images.device)
    return moments(images, images, c, 1.0, 0, [0])[:, 0]


def self_sums_backward(
    images: Tensor, scale: float, weights: Tensor, means: Tensor | None = None
) -> Tensor:  # [N, D]
    return gradient(images, images, scale, weights, weights, [0], None, False, means)


def gradient(
    queries: Tensor,
    keys: Tensor,
    scale: float,
    query_weights: Tensor,
    key_weights: Tensor,
    exclude: list[int],
    at_positive: Tensor | None,
    by_key: bool,
    means: Tensor | None,
) -> Tensor:  # [N, D], to the queries
    queries, keys = launch.rows_contiguous(queries), launch.rows_contiguous(keys)
    query_weights, key_weights = query_weights.contiguous(), key_weights.contiguous()
    means = None if means is None else means.contiguous()
    (n, dim), m = queries.shape, keys.shape[0]
    config = launch.config("both_sums_bwd", queries)
    dims = launch.dims(queries, config.width)
    dense = queries.stride(0) == keys.stride(0) == dims["WIDTH"]
    config = launch.limited(config, queries.dtype, dims["WIDTH"], 0, dense)
    paired = query_weights if at_positive is None else at_positive.contiguous()
    result = queries.new_empty(queries.shape, dtype=torch.float32)
    blocks, step = triton.cdiv(n, config.rows), config.cols * config.steps
    splits, span = launch.split(blocks * dims["CHUNKS"], m, step, config.warps, result)
    out = parts.room(result, splits)
    _both_sums_bwd[(blocks, dims["CHUNKS"], splits)](
        queries, keys, query_weights, key_weights, paired, paired if means is None else means, out,
        queries.stride(0), keys.stride(0), n, m, dim, scale, *launch.excluded(exclude), span,
        BY_KEY=by_key, EXCLUDE=len(exclude), POSITIVE=at_positive is not None,
        LEVEL=means is not None, SPLIT=splits > 1, DENSE=dense, **dims,
        GRADIENT_PRECISION=launch.gradient_precision(queries), ROWS=config.rows, COLS=config.cols,
        STEPS=config.steps, **config.options,
    )  # fmt: skip
    parts.add(out, result)
    if means is not None:
        add_means(result, keys, query_weights, key_weights, means, exclude)
    return result
