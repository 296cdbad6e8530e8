"""Kernels: the recursion over depth, p_t and q_t for every key, and its gradient."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch, parts
from .gradient_loop import gradient_loop
from .levels import level_tables
from .needs import BOTH, Needs, rooms
from .primitives import (
    LANES,
    LOG2E,
    block_values,
    fold,
    leave_out,
    load_rows,
    scalars,
    similarity_tile,
    walk,
)

TINY = tl.constexpr(1.1754943508222875e-38)


@triton.jit
def _recursion_fwd(
    queries_ptr,  # [N, D]             in
    keys_ptr,  # [M, D]                in
    scales_ptr,  # [DEPTH + 1]         in, c_t
    steeper_ptr,  # [DEPTH + 1]        in, c_t − c_0
    peak_ptr,  # [N]                   in
    share_ptr,  # [N]                  in, 1 / mass of q_0
    lighter_ptr,  # [N, DEPTH + 1]     in, log mass_t − log mass_0
    loss_ptr,  # [N]                   out; the three of a split follow one another
    pull_ptr,  # [N, DEPTH]            out
    slope_ptr,  # [N, DEPTH + 1]       out
    queries_stride,
    keys_stride,
    n,
    m,
    dim,
    alpha,
    positive_offset,
    span,  # keys that a split walks over
    DEPTH: tl.constexpr,
    DETACH: tl.constexpr,
    SPLIT: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNKS: tl.constexpr,
    FULL: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """One program per block of rows i and split: sums over the keys that are not the positive.

    With e_t = q_t / q_0, r_t = p_t / q_0 = (1 − α) r_{t−1} + α e_{t−1}, w_t = log r_t − log e_t and
    b_t = w_t + (1 − α) b_{t+1}, x = S − peak:
    loss = Σ_t Σ_j p_t w_t,  pull_t = α Σ_j q_t b_{t+1},
    slope_t = Σ_j x (q_t − p_t + α q_t b_{t+1})
    """
    first_i = tl.program_id(0) * ROWS
    q = load_rows(queries_ptr, queries_stride, first_i, n, 0, dim, ROWS, WIDTH, FULL, True, UPCAST)
    c_0 = tl.load(scales_ptr)
    steeper = scalars(steeper_ptr, DEPTH + 1)
    rows = ratio_values(peak_ptr, share_ptr, lighter_ptr, first_i, n, DEPTH, ROWS, 1, True)
    loss = tl.zeros([ROWS, LANES], tl.float32)
    pull = ()
    slope = (tl.zeros([ROWS, LANES], tl.float32),)
    for _ in tl.static_range(DEPTH):
        pull = pull + (tl.zeros([ROWS, LANES], tl.float32),)
        slope = slope + (tl.zeros([ROWS, LANES], tl.float32),)
    start, whole, stop = walk(span, m, SPLIT, COLS)
    for first_j in range(start, whole, COLS):
        loss, pull, slope = add_rows(
            loss, pull, slope, q, rows, c_0, steeper, queries_ptr, queries_stride, first_i, n,
            keys_ptr, keys_stride, first_j, m, dim, alpha, positive_offset, DEPTH, DETACH, ROWS,
            COLS, WIDTH, CHUNKS, FULL, PRECISION, UPCAST, False,
        )  # fmt: skip
    if whole < stop:
        loss, pull, slope = add_rows(
            loss, pull, slope, q, rows, c_0, steeper, queries_ptr, queries_stride, first_i, n,
            keys_ptr, keys_stride, whole, m, dim, alpha, positive_offset, DEPTH, DETACH, ROWS,
            COLS, WIDTH, CHUNKS, FULL, PRECISION, UPCAST, True,
        )  # fmt: skip
    i = first_i + tl.arange(0, ROWS)
    table = i.to(tl.int64) * (DEPTH + 1)
    if SPLIT:
        part = tl.program_id(2) * tl.cast(n, tl.int64) * (2 * DEPTH + 2)
        loss_ptr += part
        pull_ptr += part
        slope_ptr += part
    tl.store(loss_ptr + i, tl.sum(loss, 1), mask=i < n)
    tl.store(slope_ptr + table + DEPTH, tl.sum(slope[DEPTH], 1), mask=i < n)
    for t in tl.static_range(DEPTH):
        tl.store(pull_ptr + i.to(tl.int64) * DEPTH + t, alpha * tl.sum(pull[t], 1), mask=i < n)
        tl.store(slope_ptr + table + t, tl.sum(slope[t], 1), mask=i < n)


@triton.jit
def add_rows(
    loss,  # [ROWS, LANES]: partial sums
    pull,  # without its factor α
    slope,
    q,
    rows,
    c_0,
    steeper,
    queries_ptr,
    queries_stride,
    first_i,
    n,
    keys_ptr,
    keys_stride,
    first_j,
    m,
    dim,
    alpha,
    positive_offset,
    DEPTH: tl.constexpr,
    DETACH: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNKS: tl.constexpr,
    FULL: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    LAST: tl.constexpr,  # some keys may be past the last
):
    """The sums with a tile more. An entry that does not count has q_0 = 0, and x = −1, as e of 0 is
    infinite where the peak's rounding times c_t passes float32's exponents."""
    peak, share, lighter = rows
    k = load_rows(keys_ptr, keys_stride, first_j, m, 0, dim, COLS, WIDTH, FULL, LAST, UPCAST)
    s = similarity_tile(
        q, k, queries_ptr, queries_stride, first_i, n, keys_ptr, keys_stride, first_j, m, dim,
        ROWS, COLS, WIDTH, CHUNKS, FULL, PRECISION, UPCAST,
    )  # fmt: skip
    x = leave_out(s - peak, first_i, first_j, positive_offset, 0, 1, ROWS, COLS, -1.0)
    if LAST:
        there = (first_j + tl.arange(0, COLS) < m)[None, :]
        x = tl.where(there, x, -1.0)
    q_0 = leave_out(
        tl.exp2(x * (c_0 * LOG2E)) * share, first_i, first_j, positive_offset, 0, 1, ROWS, COLS
    )
    if LAST:
        q_0 = tl.where(there, q_0, 0.0)
    pushed = x * q_0
    lifted = alpha * x
    # e_0 = 1 and r_1 = α wherever the key is
    r = alpha
    log_r = tl.log(tl.maximum(alpha, TINY))
    q_t = (q_0,)
    w = ()
    new_slope = (slope[0],)
    for t in tl.static_range(1, DEPTH + 1):
        log_e = x * steeper[t] - lighter[t]
        e = tl.exp2(log_e * LOG2E)
        w = w + (log_r - log_e,)
        loss += fold(q_0 * r * w[t - 1], ROWS, COLS)
        new_slope = new_slope + (slope[t] + fold(pushed * (e - r), ROWS, COLS),)
        if t < DEPTH:
            q_t = q_t + (q_0 * e,)
            r = (1 - alpha) * r + alpha * e
            log_r = tl.log(tl.maximum(r, TINY))
    slope = new_slope
    if not DETACH:
        b = w[DEPTH - 1]
        new_pull = ()
        new_slope = (slope[DEPTH],)
        for step in tl.static_range(1, DEPTH + 1):
            through = q_t[DEPTH - step] * b
            new_pull = (pull[DEPTH - step] + fold(through, ROWS, COLS),) + new_pull
            new_slope = (slope[DEPTH - step] + fold(through * lifted, ROWS, COLS),) + new_slope
            if step < DEPTH:
                b = w[DEPTH - 1 - step] + (1 - alpha) * b
        pull = new_pull
        slope = new_slope
    return loss, pull, slope


@triton.jit
def ratio_values(
    peak_ptr,
    share_ptr,
    lighter_ptr,
    first_i,
    n,
    DEPTH: tl.constexpr,
    ROWS: tl.constexpr,
    AXIS: tl.constexpr,
    MASKED: tl.constexpr,
):
    """peak, share and lighter_t for all t."""
    lighter = ()
    for t in tl.static_range(DEPTH + 1):
        lighter = lighter + (
            block_values(lighter_ptr + t, DEPTH + 1, first_i, n, ROWS, AXIS, MASKED),
        )
    peak = block_values(peak_ptr, 1, first_i, n, ROWS, AXIS, MASKED)
    return peak, block_values(share_ptr, 1, first_i, n, ROWS, AXIS, MASKED), lighter


@triton.jit
def _recursion_bwd(
    queries_ptr,  # [N, D]            in
    keys_ptr,  # [M, D]               in
    scales_ptr,  # [DEPTH + 1]        in
    steeper_ptr,  # [DEPTH + 1]       in
    peak_ptr,  # [N]                  in
    share_ptr,  # [N]                 in
    lighter_ptr,  # [N, DEPTH + 1]    in
    pull_ptr,  # [N, DEPTH]           in
    weights_ptr,  # [N]               in, ∂L/∂loss
    at_positive_ptr,  # [N]           in, ∂L/∂S_ij at the positive
    levels_ptr,  # [N]                in, bf16: see levels.py
    sums_ptr,  # [parts, 2, D]        in, fp32
    gradient_ptr,  # [N or M, D]      out, fp32; a part a split, where they are split
    queries_stride,
    keys_stride,
    n,
    m,
    dim,
    alpha,
    positive_offset,
    span,  # rows of the other operand that a split walks over
    parts,  # of the sums
    QUERIES: tl.constexpr,  # the gradient to the queries, else to the keys
    DEPTH: tl.constexpr,
    DETACH: tl.constexpr,
    LEVEL: tl.constexpr,  # whether rows have one
    SPLIT: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNKS: tl.constexpr,
    FULL: tl.constexpr,
    PRECISION: tl.constexpr,
    GRADIENT_PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """G as in `gradient_tile`."""
    gradient_loop(
        queries_ptr, keys_ptr, gradient_ptr, queries_stride, keys_stride, n, m, dim, span,
        (
            peak_ptr, share_ptr, lighter_ptr, pull_ptr, weights_ptr,
            scalars(scales_ptr, DEPTH + 1), scalars(steeper_ptr, DEPTH + 1), alpha, positive_offset,
            DETACH,
        ),
        row_values, key_values, gradient_tile, at_positive_ptr, positive_offset, levels_ptr,
        sums_ptr, parts, True, LEVEL, QUERIES, False, SPLIT, WIDTH, CHUNKS, FULL, PRECISION,
        GRADIENT_PRECISION, UPCAST, ROWS, COLS,
    )  # fmt: skip


@triton.jit
def row_values(tables, first_i, n, ROWS: tl.constexpr, AXIS: tl.constexpr, MASKED: tl.constexpr):
    """What `gradient_tile` needs of its rows; weights belong to share already."""
    peak_ptr, share_ptr, lighter_ptr, pull_ptr, weights_ptr, c, _, _, _, _ = tables
    DEPTH: tl.constexpr = len(c) - 1
    DETACH: tl.constexpr = tables[9]
    peak, share, lighter = ratio_values(
        peak_ptr, share_ptr, lighter_ptr, first_i, n, DEPTH, ROWS, AXIS, MASKED
    )
    weights = block_values(weights_ptr, 1, first_i, n, ROWS, AXIS, MASKED)
    pull = ()
    if not DETACH:
        for t in tl.static_range(DEPTH):
            pull = pull + (
                block_values(pull_ptr + t, DEPTH, first_i, n, ROWS, AXIS, MASKED) * c[t],
            )
    return peak, share * weights, lighter, pull


@triton.jit
def key_values(tables, first_j, m, COLS: tl.constexpr, AXIS: tl.constexpr, MASKED: tl.constexpr):
    """Keys need none."""
    return ()


@triton.jit
def gradient_tile(
    s,
    tables,
    rows,
    keys,
    first,
    start,
    n_other,
    SIGN: tl.constexpr,
    OWN: tl.constexpr,
    OTHER: tl.constexpr,
    LAST: tl.constexpr,
):
    """weights · q_0 (Σ_{t>0} c_t (e_t − r_t) + w_t y_t − Σ_{t<depth} c_t e_t pull_t),
    y_t = (1 − α) y_{t−1} + α c_{t−1} e_{t−1}; 0 at the positive, which is added in float32.
    """
    _, _, _, _, _, c, steeper, alpha, positive_offset, _ = tables
    DEPTH: tl.constexpr = len(c) - 1
    DETACH: tl.constexpr = tables[9]
    peak, share, lighter, pull = rows
    x = s - peak
    # e_0 = 1, r_1 = α and y_1 = α c_0 wherever the key is
    r = alpha
    log_r = tl.log(tl.maximum(alpha, TINY))
    y = alpha * c[0]
    g = tl.zeros_like(x)
    if not DETACH:
        g -= pull[0]
    for t in tl.static_range(1, DEPTH + 1):
        log_e = x * steeper[t] - lighter[t]
        e = tl.exp2(log_e * LOG2E)
        g += c[t] * (e - r)
        if not DETACH:
            g += y * (log_r - log_e)
        if t < DEPTH:
            r = (1 - alpha) * r + alpha * e
            if not DETACH:
                log_r = tl.log(tl.maximum(r, TINY))
                g -= e * pull[t]
                y = (1 - alpha) * y + (alpha * c[t]) * e
    g = tl.exp2(x * (c[0] * LOG2E)) * share * g
    if LAST:  # of a row of zeros e may be infinite
        g = tl.where((start + tl.arange(0, OTHER) < n_other)[None, :], g, 0.0)
    return leave_out(g, first, start, SIGN * positive_offset, 0, 1, OWN, OTHER)


def recursion(
    queries: Tensor,
    keys: Tensor,
    scales: Tensor,
    alpha: float,
    positive_offset: int,
    detach_target: bool,
    peak: Tensor,
    log_mass: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # [N], [N, depth], [N, T]
    queries, keys = launch.rows_contiguous(queries), launch.rows_contiguous(keys)
    (n, dim), m = queries.shape, keys.shape[0]
    depth = len(scales) - 1
    config = launch.config("recursion", queries)
    sums = queries.new_empty((2 * depth + 2) * n, dtype=torch.float32)
    blocks = triton.cdiv(n, config.rows)
    splits, span = launch.split(blocks, m, config.cols, config.warps, sums, launch.CROWDED)
    out = parts.room(sums, splits)

    def tables(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        loss, pull, slope = x.split([n, n * depth, n * (depth + 1)])
        return loss, pull.view(n, depth), slope.view(n, depth + 1)

    _recursion_fwd[(blocks, 1, splits)](
        queries, keys, *row_tables(scales, peak, log_mass), *tables(out.view(-1)[: len(sums)]),
        queries.stride(0), keys.stride(0), n, m, dim, in_float32(alpha), positive_offset, span,
        DEPTH=depth,
        DETACH=detach_target, SPLIT=splits > 1, **launch.dims(queries, config.width),
        ROWS=config.rows, COLS=config.cols, **config.options,
    )  # fmt: skip
    parts.add(out, sums)
    return tables(sums)


def recursion_backward(
    queries: Tensor,
    keys: Tensor,
    scales: Tensor,
    alpha: float,
    positive_offset: int,
    detach_target: bool,
    peak: Tensor,
    log_mass: Tensor,
    pull: Tensor,
    weights: Tensor,
    at_positive: Tensor,
    needs: Needs = BOTH,
    level: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    queries, keys = launch.rows_contiguous(queries), launch.rows_contiguous(keys)
    tables = row_tables(scales, peak, log_mass)
    rows = pull.contiguous(), weights.contiguous(), (at_positive * weights).contiguous()
    results = rooms(queries, keys, needs)
    for gradient, to_queries, need in zip(results, (True, False), needs, strict=True):
        if not need:
            continue
        config = launch.config("recursion_dq" if to_queries else "recursion_dk", queries)
        dims, walked = launch.dims(queries, config.width), keys if to_queries else queries
        grid, out, span = parts.shared(
            gradient, config, dims["CHUNKS"], to_queries, len(walked), launch.CROWDED
        )
        levels, sums = level_tables(queries, keys, level, to_queries)
        _recursion_bwd[grid](
            queries, keys, *tables, *rows, levels, sums, out, queries.stride(0), keys.stride(0),
            queries.shape[0], keys.shape[0], queries.shape[1], in_float32(alpha), positive_offset,
            span, len(sums), QUERIES=to_queries, DEPTH=len(scales) - 1, DETACH=detach_target,
            LEVEL=level is not None, SPLIT=grid[2] > 1, **dims,
            GRADIENT_PRECISION=launch.gradient_precision(queries), ROWS=config.rows,
            COLS=config.cols, **config.options,
        )  # fmt: skip
        parts.add(out, gradient)
    return results


def row_tables(scales: Tensor, peak: Tensor, log_mass: Tensor) -> tuple[Tensor, ...]:
    """c_t, c_t − c_0, peak, 1 / mass_0, log mass_t − log mass_0: subtracted before rounding."""
    share = torch.exp(-log_mass[:, 0])
    tables = (scales, scales - scales[0], peak, share, log_mass - log_mass[:, :1])
    return tuple(x.float().contiguous() for x in tables)


def in_float32(alpha: float) -> float:
    """0 for less than float32's normal numbers, which Triton would make a float64."""
    return alpha if alpha >= torch.finfo(torch.float32).tiny else 0.0
