"""Kernels: softmax sums of S or of a Student-t kernel by a running maximum; their gradient."""

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
    distance_tile,
    fold,
    leave_out,
    load_rows,
    rounded,
    scalars,
    similarity_tile,
    walk,
)

# Below every x that is far from overflow: the peak's start, and lower still an entry left out. Its
# distance from a peak of 2^126 too is a number; at temperatures below 1e35 it weighs nothing.
LOWEST = tl.constexpr(-(2.0**125))
LEFT_OUT = tl.constexpr(-(2.0**126))


@triton.jit
def _softmax_sums_fwd(
    queries_ptr,  # [N, D]         in
    keys_ptr,  # [M, D]            in
    scales_ptr,  # [SCALES]        in, c_t
    peak_ptr,  # [N]               out; the four of a split follow one another
    mass_ptr,  # [N, SCALES]       out
    slope_ptr,  # [N, SCALES]      out
    total_ptr,  # [N]              out
    queries_stride,
    keys_stride,
    n,
    m,
    dim,
    exclude_a,
    exclude_b,
    span,  # keys that a split walks over
    SCALES: tl.constexpr,
    STUDENT: tl.constexpr,
    EXCLUDE: tl.constexpr,
    SPLIT: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNKS: tl.constexpr,
    FULL: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """One program per block of rows i and split, with x = S or −log(1 + ‖zq − zk‖²):

    peak = max_j x,  mass_t = Σ_j exp(c_t (x − peak)),  slope_t = ∂mass_t/∂c_t,  total = Σ_j x
    """
    first_i = tl.program_id(0) * ROWS
    q = 0.0
    if not STUDENT:
        q = load_rows(
            queries_ptr, queries_stride, first_i, n, 0, dim, ROWS, WIDTH, FULL, True, UPCAST
        )
    scales = scalars(scales_ptr, SCALES)
    peak = tl.full([ROWS], LOWEST, tl.float32)
    total = tl.zeros([ROWS, LANES], tl.float32)
    mass = ()
    slope = ()
    for _ in tl.static_range(SCALES):
        mass = mass + (tl.zeros([ROWS, LANES], tl.float32),)
        slope = slope + (tl.zeros([ROWS, LANES], tl.float32),)
    start, whole, stop = walk(span, m, SPLIT, COLS)
    for first_j in range(start, whole, COLS):
        peak, total, mass, slope = add_sums(
            peak, total, mass, slope, q, scales, exclude_a, exclude_b, queries_ptr, queries_stride,
            first_i, n, keys_ptr, keys_stride, first_j, m, dim, STUDENT, EXCLUDE, ROWS, COLS, WIDTH,
            CHUNKS, FULL, PRECISION, UPCAST, False,
        )  # fmt: skip
    if whole < stop:
        peak, total, mass, slope = add_sums(
            peak, total, mass, slope, q, scales, exclude_a, exclude_b, queries_ptr, queries_stride,
            first_i, n, keys_ptr, keys_stride, whole, m, dim, STUDENT, EXCLUDE, ROWS, COLS, WIDTH,
            CHUNKS, FULL, PRECISION, UPCAST, True,
        )  # fmt: skip
    i = first_i + tl.arange(0, ROWS)
    table = i.to(tl.int64) * SCALES
    if SPLIT:
        part = tl.program_id(2) * tl.cast(n, tl.int64) * (2 + 2 * SCALES)
        peak_ptr += part
        mass_ptr += part
        slope_ptr += part
        total_ptr += part
    tl.store(peak_ptr + i, peak, mask=i < n)
    tl.store(total_ptr + i, tl.sum(total, 1), mask=i < n)
    for t in tl.static_range(SCALES):
        tl.store(mass_ptr + table + t, tl.sum(mass[t], 1), mask=i < n)
        tl.store(slope_ptr + table + t, tl.sum(slope[t], 1), mask=i < n)


@triton.jit
def add_sums(
    peak,  # [ROWS]
    total,  # [ROWS, LANES]: partial sums
    mass,
    slope,
    q,
    scales,
    exclude_a,
    exclude_b,
    queries_ptr,
    queries_stride,
    first_i,
    n,
    keys_ptr,
    keys_stride,
    first_j,
    m,
    dim,
    STUDENT: tl.constexpr,
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
    """The sums with a tile more, all of them for the peak of both."""
    if STUDENT:
        square = distance_tile(
            queries_ptr, queries_stride, first_i, n, keys_ptr, keys_stride, first_j, m, dim,
            ROWS, COLS,
        )  # fmt: skip
        x = -log1p(square)
    else:
        k = load_rows(keys_ptr, keys_stride, first_j, m, 0, dim, COLS, WIDTH, FULL, LAST, UPCAST)
        x = similarity_tile(
            q, k, queries_ptr, queries_stride, first_i, n, keys_ptr, keys_stride, first_j, m, dim,
            ROWS, COLS, WIDTH, CHUNKS, FULL, PRECISION, UPCAST,
        )  # fmt: skip
    if LAST:
        there = (first_j + tl.arange(0, COLS) < m)[None, :]
        x = tl.where(there, x, 0.0)
    kept = leave_out(x, first_i, first_j, exclude_a, exclude_b, EXCLUDE, ROWS, COLS)
    total += fold(kept, ROWS, COLS)
    if LAST:
        x = tl.where(there, x, LEFT_OUT)
    x = leave_out(x, first_i, first_j, exclude_a, exclude_b, EXCLUDE, ROWS, COLS, LEFT_OUT)
    risen = tl.maximum(peak, tl.max(x, 1))
    fall = (peak - risen)[:, None]
    x = x - risen[:, None]
    new_mass = ()
    new_slope = ()
    for t in tl.static_range(len(scales)):
        c = scales[t] * LOG2E
        shrink = tl.exp2(fall * c)
        e = tl.exp2(x * c)
        slope_here = rounded(e, x) if STUDENT else e * x
        new_slope = new_slope + (
            shrink * (slope[t] + fall * mass[t]) + fold(slope_here, ROWS, COLS),
        )
        new_mass = new_mass + (shrink * mass[t] + fold(e, ROWS, COLS),)
    return risen, total, new_mass, new_slope


@triton.jit
def _join_sums(
    parts_ptr,  # [splits, (2 + 2 SCALES) N]  in: peak, total, mass and slope of every split
    scales_ptr,  # [SCALES]                   in, c_t
    sums_ptr,  # [(2 + 2 SCALES) N]           out, those of all keys
    n,
    splits,
    SCALES: tl.constexpr,
    COUNT: tl.constexpr,
):
    """One program per COUNT rows: every split's sums for the peak of all, in the order of s."""
    i = tl.program_id(0).to(tl.int64) * COUNT + tl.arange(0, COUNT)
    there = i < n
    size = tl.cast(n, tl.int64) * (2 + 2 * SCALES)
    table = 2 * n + i * SCALES
    scales = scalars(scales_ptr, SCALES)
    peak = tl.full([COUNT], LOWEST, tl.float32)
    total = tl.zeros([COUNT], tl.float32)
    for s in range(splits):
        of_split = parts_ptr + s * size
        peak = tl.maximum(peak, tl.load(of_split + i, mask=there, other=LOWEST))
        total += tl.load(of_split + n + i, mask=there, other=0.0)
    tl.store(sums_ptr + i, peak, mask=there)
    tl.store(sums_ptr + n + i, total, mask=there)
    for t in tl.static_range(SCALES):
        mass = tl.zeros([COUNT], tl.float32)
        slope = tl.zeros([COUNT], tl.float32)
        for s in range(splits):
            of_split = parts_ptr + s * size
            at = of_split + table + t
            fall = tl.load(of_split + i, mask=there, other=LOWEST) - peak
            shrink = tl.exp2(fall * (scales[t] * LOG2E))
            its_mass = tl.load(at, mask=there, other=0.0)
            its_slope = tl.load(at + tl.cast(n, tl.int64) * SCALES, mask=there, other=0.0)
            mass += shrink * its_mass
            slope += shrink * (its_slope + fall * its_mass)
        tl.store(sums_ptr + table + t, mass, mask=there)
        tl.store(sums_ptr + table + tl.cast(n, tl.int64) * SCALES + t, slope, mask=there)


@triton.jit
def _softmax_sums_bwd(
    queries_ptr,  # [N, D]            in
    keys_ptr,  # [M, D]               in
    scales_ptr,  # [SCALES]           in
    peak_ptr,  # [N]                  in
    weights_ptr,  # [N, SCALES]       in, ∂L/∂mass
    total_weight_ptr,  # [N]          in, ∂L/∂total
    levels_ptr,  # [N]                in, bf16: see levels.py
    sums_ptr,  # [parts, 2, D]        in, fp32
    gradient_ptr,  # [N or M, D]      out, fp32; a part a split, where they are split
    queries_stride,
    keys_stride,
    n,
    m,
    dim,
    exclude_a,
    exclude_b,
    span,  # rows of the other operand that a split walks over
    parts,  # of the sums
    QUERIES: tl.constexpr,  # the gradient to the queries, else to the keys
    SCALES: tl.constexpr,
    STUDENT: tl.constexpr,
    LEVEL: tl.constexpr,  # whether rows have one
    EXCLUDE: tl.constexpr,
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
    """For STUDENT x = −log v with v = 1 + ‖zq − zk‖², and G = 2/v ∂L/∂x weighs zk − zq."""
    gradient_loop(
        queries_ptr, keys_ptr, gradient_ptr, queries_stride, keys_stride, n, m, dim, span,
        (
            scalars(scales_ptr, SCALES), peak_ptr, total_weight_ptr, weights_ptr,
            exclude_a, exclude_b, STUDENT, EXCLUDE,
        ),
        row_values, key_values, gradient_tile, peak_ptr, 0, levels_ptr, sums_ptr, parts, False,
        LEVEL, QUERIES, STUDENT, SPLIT, WIDTH, CHUNKS, FULL, PRECISION, GRADIENT_PRECISION, UPCAST,
        ROWS, COLS,
    )  # fmt: skip


@triton.jit
def row_values(tables, first_i, n, ROWS: tl.constexpr, AXIS: tl.constexpr, MASKED: tl.constexpr):
    """peak, total_weight, and weights_t c_t for all t."""
    scales, peak_ptr, total_weight_ptr, weights_ptr, _, _, _, _ = tables
    weights = ()
    for t in tl.static_range(len(scales)):
        w = block_values(weights_ptr + t, len(scales), first_i, n, ROWS, AXIS, MASKED)
        weights = weights + (w * scales[t],)
    peak = block_values(peak_ptr, 1, first_i, n, ROWS, AXIS, MASKED)
    total_weight = block_values(total_weight_ptr, 1, first_i, n, ROWS, AXIS, MASKED)
    return peak, total_weight, weights


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
    """∂L/∂x = Σ_t weights_t c_t exp(c_t (x − peak)) + total_weight; for STUDENT that · 2 / v."""
    scales, _, _, _, exclude_a, exclude_b, _, _ = tables
    STUDENT: tl.constexpr = tables[6]
    EXCLUDE: tl.constexpr = tables[7]
    peak, g, weights = rows
    x = s
    if STUDENT:
        x = -log1p(s)
    x = x - peak
    for t in tl.static_range(len(scales)):
        g = g + weights[t] * tl.exp2(x * (scales[t] * LOG2E))
    if STUDENT:
        g = 2.0 * g / (1.0 + s)
    if LAST:
        g = tl.where((start + tl.arange(0, OTHER) < n_other)[None, :], g, 0.0)
    return leave_out(g, first, start, SIGN * exclude_a, SIGN * exclude_b, EXCLUDE, OWN, OTHER)


@triton.jit
def log1p(x):
    """With x's digits: the rounding of 1 + x cancels in log(1 + x) / ((1 + x) − 1)."""
    y = 1.0 + x
    small = x < 0.5  # ∞ − 1 and ∞ / ∞ have no place here
    return tl.where(small & (y > 1.0), tl.log(y) * (x / tl.where(y > 1.0, y - 1.0, 1.0)),
                    tl.where(small, x, tl.log(y)))  # fmt: skip


def softmax_sums(
    queries: Tensor, keys: Tensor, scales: Tensor, student: bool, exclude: list[int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # [N], [N, T], [N, T], [N]
    queries, keys = launch.rows_contiguous(queries), launch.rows_contiguous(keys)
    (n, dim), m = queries.shape, keys.shape[0]
    config = launch.config(table_name(student), queries)
    sums = queries.new_empty((2 + 2 * len(scales)) * n, dtype=torch.float32)
    blocks = triton.cdiv(n, config.rows)
    splits, span = launch.split(blocks, m, config.cols, config.warps, sums, launch.CROWDED)
    out = parts.room(sums, splits)

    def tables(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        peak, total, mass, slope = x.split([n, n, n * len(scales), n * len(scales)])
        return peak, mass.view(n, -1), slope.view(n, -1), total

    _softmax_sums_fwd[(blocks, 1, splits)](
        queries, keys, scales, *tables(out.view(-1)[: len(sums)]),
        queries.stride(0), keys.stride(0), n, m, dim, *launch.excluded(exclude), span,
        SCALES=len(scales), STUDENT=student, EXCLUDE=len(exclude), SPLIT=splits > 1,
        **launch.dims(queries, config.width), ROWS=config.rows, COLS=config.cols, **config.options,
    )  # fmt: skip
    if splits > 1:
        _join_sums[(triton.cdiv(n, 128),)](
            out, scales, sums, n, splits, SCALES=len(scales), COUNT=128, num_warps=4,
            enable_fp_fusion=True,
        )  # fmt: skip
    return tables(sums)


def softmax_sums_backward(
    queries: Tensor,
    keys: Tensor,
    scales: Tensor,
    student: bool,
    exclude: list[int],
    peak: Tensor,
    weights: Tensor,
    total_weight: Tensor,
    needs: Needs = BOTH,
    level: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    queries, keys = launch.rows_contiguous(queries), launch.rows_contiguous(keys)
    rows = peak.float().contiguous(), weights.contiguous(), total_weight.contiguous()
    results = rooms(queries, keys, needs)
    for gradient, to_queries, need in zip(results, (True, False), needs, strict=True):
        if not need:
            continue
        config = launch.config(f"{table_name(student)}_{'dq' if to_queries else 'dk'}", queries)
        dims, walked = launch.dims(queries, config.width), keys if to_queries else queries
        grid, out, span = parts.shared(
            gradient, config, dims["CHUNKS"], to_queries, len(walked), launch.CROWDED
        )
        levels, sums = level_tables(queries, keys, level, to_queries)
        _softmax_sums_bwd[grid](
            queries, keys, scales, *rows, levels, sums, out, queries.stride(0), keys.stride(0),
            queries.shape[0], keys.shape[0], queries.shape[1], *launch.excluded(exclude), span,
            len(sums), QUERIES=to_queries, SCALES=len(scales), STUDENT=student,
            LEVEL=level is not None, EXCLUDE=len(exclude), SPLIT=grid[2] > 1, **dims,
            GRADIENT_PRECISION=launch.gradient_precision(queries), ROWS=config.rows,
            COLS=config.cols, **config.options,
        )  # fmt: skip
        parts.add(out, gradient)
    return results


def table_name(student: bool) -> str:
    return "student_sums" if student else "softmax_sums"
