"""Kernels: the snapshot field's mixture of past softmaxes, tile by tile, and its normalisers."""

from __future__ import annotations

import triton
import triton.language as tl

from .primitives import LANES, LOG2E, TINY, block_values, fold, load_rows, walk
from .softmax_sums import LEFT_OUT, LOWEST

# Of every row, float32: q = f exp(c (S − PEAK)), 1 / f, and WEIGHT = ∂L/∂loss c f; then of every s
# a triple, with w_s q^(s) / f = share 2^(scale (S^(s) − peak)).
PEAK, INVERSE, WEIGHT, PASTS = (tl.constexpr(at) for at in range(4))


@triton.jit
def _past_sums(
    past_queries_ptr,  # [K, R, D]  in
    past_keys_ptr,  # [K, B, D]     in
    scales_ptr,  # [R, K]           in, c_s
    visits_ptr,  # [B]              in, int64
    peak_ptr,  # [splits, K, R]     out
    mass_ptr,  # [splits, K, R]     out
    n,
    m,
    dim,
    steps,  # K
    span,  # columns that a split walks over
    SPLIT: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNKS: tl.constexpr,
    FULL: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """One program per block of rows, past visit s and split, over columns with more than s visits:

    peak = max_j S^(s),  mass = Σ_j exp(c_s (S^(s) − peak))
    """
    first_i = tl.program_id(0) * ROWS
    s = tl.program_id(1).to(tl.int64)
    past_queries_ptr += s * n * dim
    past_keys_ptr += s * m * dim
    scale = block_values(scales_ptr + s, steps, first_i, n, ROWS, 1, True) * LOG2E
    peak = tl.full([ROWS], LOWEST, tl.float32)
    mass = tl.zeros([ROWS, LANES], tl.float32)
    start, _, stop = walk(span, m, SPLIT, COLS)
    for first_j in range(start, stop, COLS):
        x = product(
            past_queries_ptr, dim, first_i, n, past_keys_ptr, dim, first_j, m, dim, ROWS, COLS,
            WIDTH, CHUNKS, FULL, PRECISION, UPCAST,
        )  # fmt: skip
        visited = block_values(visits_ptr, 1, first_j, m, COLS, 0, True) > s
        x = tl.where(visited, x, LEFT_OUT)
        risen = tl.maximum(peak, tl.max(x, 1))
        shrink = tl.exp2((peak - risen)[:, None] * scale)
        e = tl.where(visited, tl.exp2((x - risen[:, None]) * scale), 0.0)
        mass = shrink * mass + fold(e, ROWS, COLS)
        peak = risen
    i = first_i + tl.arange(0, ROWS)
    if SPLIT:
        s += tl.program_id(2) * tl.cast(steps, tl.int64)
    tl.store(peak_ptr + s * n + i, peak, mask=i < n)
    tl.store(mass_ptr + s * n + i, tl.sum(mass, 1), mask=i < n)


@triton.jit
def _snapshot_rows(
    peak_ptr,  # [R]                 in, max_j S_ij
    sum_ptr,  # [R]                  in, Σ_j exp(c (S_ij − peak_i))
    past_peak_ptr,  # [splits, K, R]  in
    past_sum_ptr,  # [splits, K, R]   in
    weights_ptr,  # [R, K]           in, w_s
    scales_ptr,  # [R, K]            in, c_s
    prior_ptr,  # [R, L]             in
    loss_weights_ptr,  # [R]         in, ∂L/∂loss, for WEIGHTED
    scale_ptr,  # []                 in, c
    table_ptr,  # [PASTS + 3 K, R]   out
    known_ptr,  # [R]                out, 1 where a row has a target, else 0
    n,
    entries,  # L
    splits,
    HISTORY: tl.constexpr,  # K
    WEIGHTED: tl.constexpr,
    COUNT: tl.constexpr,
):
    """One program per COUNT rows: what the walks need of each, in float64."""
    i = tl.program_id(0) * COUNT + tl.arange(0, COUNT)
    there = i < n
    scale = tl.load(scale_ptr).to(tl.float32)
    f = 1 / tl.load(sum_ptr + i, mask=there, other=1.0).to(tl.float64)
    out = table_ptr + i
    tl.store(out + PEAK * n, tl.load(peak_ptr + i, mask=there), mask=there)
    tl.store(out + INVERSE * n, (1 / f).to(tl.float32), mask=there)
    sum_of_weights = tl.zeros([COUNT], tl.float64)
    for s in tl.static_range(HISTORY):
        w = tl.load(weights_ptr + i.to(tl.int64) * HISTORY + s, mask=there, other=0.0)
        c = tl.load(scales_ptr + i.to(tl.int64) * HISTORY + s, mask=there, other=0.0) * LOG2E
        counts = there & (w > 0)  # else there may be no such visit
        peak = tl.where(counts, LOWEST, 0.0)
        for part in range(splits):
            at = (part * HISTORY + s) * tl.cast(n, tl.int64) + i
            peak = tl.maximum(peak, tl.load(past_peak_ptr + at, mask=counts, other=0.0))
        total = tl.where(counts, 0.0, 1.0).to(tl.float64)
        for part in range(splits):
            at = (part * HISTORY + s) * tl.cast(n, tl.int64) + i
            fall = tl.load(past_peak_ptr + at, mask=counts, other=0.0) - peak
            its_sum = tl.load(past_sum_ptr + at, mask=counts, other=0.0)
            total += (tl.exp2(fall * c) * its_sum).to(tl.float64)
        past = out + (PASTS + 3 * s) * n
        tl.store(past, c, mask=there)
        tl.store(past + n, peak, mask=there)
        tl.store(past + 2 * n, (w.to(tl.float64) / total / f).to(tl.float32), mask=there)
        sum_of_weights += w.to(tl.float64)
    for entry in range(entries):
        at = prior_ptr + i.to(tl.int64) * entries + entry
        sum_of_weights += tl.load(at, mask=there, other=0.0).to(tl.float64)
    known = tl.where(sum_of_weights > 0, 1.0, 0.0)
    weight = scale.to(tl.float64) * f * known
    if WEIGHTED:
        weight *= tl.load(loss_weights_ptr + i, mask=there, other=0.0).to(tl.float64)
    tl.store(out + WEIGHT * n, weight.to(tl.float32), mask=there)
    tl.store(known_ptr + i, known.to(tl.float32), mask=there)


@triton.jit
def mixture(
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
    past,
    prior,
    LABELS: tl.constexpr,
    HISTORY: tl.constexpr,
    PAST_UPCAST: tl.constexpr,
    UNROLL: tl.constexpr,  # what a walk does not change of every visit stays in shared memory
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNKS: tl.constexpr,
    FULL: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """log2 e and p, [ROWS, COLS]."""
    table_ptr, visits_ptr = past[2], past[3]
    prior_ptr, prior_cols_ptr, row_labels_ptr, col_labels_ptr, entries = prior
    visits = block_values(visits_ptr, 1, first_j, m, COLS, 0, True)
    p = tl.zeros([ROWS, COLS], tl.float32) + TINY
    if UNROLL:
        for s in tl.static_range(HISTORY):
            p += visit(
                past, s, visits, first_i, n, first_j, m, dim, PAST_UPCAST, ROWS, COLS, WIDTH,
                CHUNKS, FULL, PRECISION,
            )  # fmt: skip
    else:
        for s in tl.range(HISTORY, num_stages=1, disable_licm=True):
            p += visit(
                past, s, visits, first_i, n, first_j, m, dim, PAST_UPCAST, ROWS, COLS, WIDTH,
                CHUNKS, FULL, PRECISION,
            )  # fmt: skip
    inverse = block_values(table_ptr + INVERSE * n, 1, first_i, n, ROWS, 1, True)
    if LABELS:
        mine = block_values(row_labels_ptr, 1, first_i, n, ROWS, 1, True)
        theirs = block_values(col_labels_ptr, 1, first_j, m, COLS, 0, True)
        weight = block_values(prior_ptr, 1, first_i, n, ROWS, 1, True)
        p += tl.where(mine == theirs, weight * inverse, 0.0)
    else:
        j = (first_j + tl.arange(0, COLS))[None, :]
        for entry in range(entries):
            col = block_values(prior_cols_ptr + entry, entries, first_i, n, ROWS, 1, True)
            share = block_values(prior_ptr + entry, entries, first_i, n, ROWS, 1, True) * inverse
            p += tl.where(j == col, share, 0.0)
    s = product(
        queries_ptr, queries_stride, first_i, n, keys_ptr, keys_stride, first_j, m, dim, ROWS, COLS,
        WIDTH, CHUNKS, FULL, PRECISION, UPCAST,
    )  # fmt: skip
    return (s - block_values(table_ptr + PEAK * n, 1, first_i, n, ROWS, 1, True)) * scale, p


@triton.jit
def visit(
    past,
    s,
    visits,
    first_i,
    n,
    first_j,
    m,
    dim,
    PAST_UPCAST: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNKS: tl.constexpr,
    FULL: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """w_s q^(s) / f, [ROWS, COLS]."""
    past_queries_ptr, past_keys_ptr, table_ptr, _ = past
    turn = tl.full([], 0, tl.int64) + s
    x = product(
        past_queries_ptr + turn * n * dim, dim, first_i, n, past_keys_ptr + turn * m * dim, dim,
        first_j, m, dim, ROWS, COLS, WIDTH, CHUNKS, FULL, PRECISION, PAST_UPCAST,
    )  # fmt: skip
    at = table_ptr + (PASTS + 3 * s) * n
    c = block_values(at, 1, first_i, n, ROWS, 1, True)
    peak = block_values(at + n, 1, first_i, n, ROWS, 1, True)
    share = block_values(at + 2 * n, 1, first_i, n, ROWS, 1, True)
    x = tl.where((visits > s) & (share != 0), (x - peak) * c, LEFT_OUT)
    return share * tl.exp2(x)


@triton.jit
def product(
    queries_ptr,
    queries_stride,
    first_i,
    n,
    keys_ptr,
    keys_stride,
    first_j,
    m,
    dim,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNKS: tl.constexpr,
    FULL: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):  # [ROWS, COLS], fp32
    """queries keysᵀ."""
    s = tl.zeros([ROWS, COLS], tl.float32)
    for chunk in range(CHUNKS):
        at = chunk * WIDTH
        q = load_rows(
            queries_ptr, queries_stride, first_i, n, at, dim, ROWS, WIDTH, FULL, True, UPCAST
        )
        k = load_rows(keys_ptr, keys_stride, first_j, m, at, dim, COLS, WIDTH, FULL, True, UPCAST)
        s = tl.dot(q, tl.trans(k), s, input_precision=PRECISION)
    return s
