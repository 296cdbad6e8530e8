"""Kernels: what the walks over the dense field need to know of each row first; their addresses."""

from __future__ import annotations

import triton
import triton.language as tl

from .primitives import LANES, fold, walk

TINY32 = tl.constexpr(2.0**-126)
# Of every row, float32: q = f exp(c (S − PEAK)), p̂ = f INVERSE P, next P = KEEP P + GAIN q / f, and
# WEIGHT = ∂L/∂loss c f. KEEP is −1 where the row stays as it is.
PEAK, INVERSE, KEEP, GAIN, WEIGHT = (tl.constexpr(at) for at in range(5))
VALUES = 5


@triton.jit
def _row_masses(
    matrix_ptr,  # [n, m]      in, from the batch's first row and column where no index is given
    rows_ptr,  # [R]           in, int64
    cols_ptr,  # [B]           in, int64
    masses_ptr,  # [splits, R] out
    matrix_stride,
    n_rows,
    n_cols,
    span,  # columns that a split walks over
    BY_ROW: tl.constexpr,  # rows are given by index
    BY_COL: tl.constexpr,
    SPLIT: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """One program per block of rows and split:  Σ_j P_ij, without the diagonal, which the matrix
    has as 0."""
    first_i = tl.program_id(0) * ROWS
    row = row_positions(rows_ptr, first_i, n_rows, BY_ROW, ROWS)
    total = tl.zeros([ROWS, LANES], tl.float32)
    start, _, stop = walk(span, n_cols, SPLIT, COLS)
    for first_j in range(start, stop, COLS):
        at = entries(matrix_ptr, matrix_stride, row, cols_ptr, first_j, n_cols, BY_COL, COLS)
        there = (first_j + tl.arange(0, COLS) < n_cols)[None, :]
        total += fold(tl.load(at, mask=there, other=0.0).to(tl.float32), ROWS, COLS)
    i = first_i + tl.arange(0, ROWS)
    if SPLIT:
        masses_ptr += tl.program_id(2) * tl.cast(n_rows, tl.int64)
    tl.store(masses_ptr + i, tl.sum(total, 1), mask=i < n_rows)


@triton.jit
def _dense_rows(
    peak_ptr,  # [R]           in, max_j S_ij
    sum_ptr,  # [R]            in, Σ_j exp(c (S_ij − peak_i))
    total_ptr,  # [R]          in, Σ_j S_ij
    masses_ptr,  # [splits, R] in, unless WHOLE
    diagonal_ptr,  # [n]       in, from the batch's first row where no index is given; and so is
    row_sum_ptr,  # [n]        in, fp64
    weights_ptr,  # [R]        in, ∂L/∂loss, for WEIGHTED
    rows_ptr,  # [R]           in, int64
    cols_ptr,  # [B]           in, int64
    own_ptr,  # [R]            in, int64
    scale_ptr,  # []           in, c
    alpha_ptr,  # []           in, for UPDATE
    clock_ptr,  # [2]          in, int64, for NOISE
    table_ptr,  # [VALUES, R]  out
    mass_ptr,  # [2, R]        out, fp64: m_i and 1 / f
    noise_ptr,  # [R + B]      out, int32, for NOISE: keys of rows and of columns
    n_rows,
    n_cols,
    start,
    splits,
    WHOLE: tl.constexpr,  # the batch is all of the field, and row_sum the mass
    WEIGHTED: tl.constexpr,
    UPDATE: tl.constexpr,
    NOISE: tl.constexpr,
    BY_ROW: tl.constexpr,
    BY_COL: tl.constexpr,
    BY_OWN: tl.constexpr,
    COUNT: tl.constexpr,
):
    """One program per COUNT rows and as many columns: what the walks need of each, in float64."""
    i = tl.program_id(0) * COUNT + tl.arange(0, COUNT)
    there = i < n_rows
    row = i.to(tl.int64)
    if BY_ROW:
        row = tl.load(rows_ptr + i, mask=there, other=0)
    scale = tl.load(scale_ptr).to(tl.float32)
    total = tl.load(sum_ptr + i, mask=there, other=1.0).to(tl.float64)
    f = 1 / total
    if WHOLE:
        mass = tl.load(row_sum_ptr + row, mask=there, other=1.0)
    else:
        mass = tl.load(diagonal_ptr + row, mask=there, other=1.0).to(tl.float64)
        for s in range(splits):
            at = masses_ptr + s * tl.cast(n_rows, tl.int64) + i
            mass += tl.load(at, mask=there, other=0.0).to(tl.float64)
    mass = tl.where(mass >= TINY32, mass, 0.0)
    inverse = tl.where(mass > 0, 1 / tl.where(mass > 0, mass, 1.0), 0.0)
    weight = scale.to(tl.float64) * f * tl.where(mass > 0, 1.0, 0.0)
    if WEIGHTED:
        weight *= tl.load(weights_ptr + i, mask=there, other=0.0).to(tl.float64)
    out = table_ptr + i
    tl.store(out + PEAK * n_rows, tl.load(peak_ptr + i, mask=there), mask=there)
    tl.store(out + INVERSE * n_rows, (inverse / f).to(tl.float32), mask=there)
    tl.store(out + WEIGHT * n_rows, weight.to(tl.float32), mask=there)
    tl.store(mass_ptr + i, mass, mask=there)
    tl.store(mass_ptr + n_rows + i, total, mask=there)
    if UPDATE:
        alpha = tl.load(alpha_ptr).to(tl.float64)
        share = 1 / tl.load(row_sum_ptr + row, mask=there, other=1.0)
        all_of_s = tl.load(total_ptr + i, mask=there, other=0.0)
        moves = (mass > 0) & (f < float("inf")) & (tl.abs(all_of_s) < float("inf"))
        keep = tl.where(moves, (1 - alpha) * share, -1.0)
        tl.store(out + KEEP * n_rows, keep.to(tl.float32), mask=there)
        gain = tl.where(moves, alpha * mass * share * f, 0.0)
        tl.store(out + GAIN * n_rows, gain.to(tl.float32), mask=there)
    if NOISE:
        seed = tl.load(clock_ptr)
        updates = mixed(tl.load(clock_ptr + 1).to(tl.uint32))
        own = tl.load(own_ptr + i, mask=there, other=0) if BY_OWN else i.to(tl.int64)
        sample = tl.load(cols_ptr + own, mask=there, other=0) if BY_COL else own + start
        key = mixed(sample.to(tl.uint32) ^ mixed(mixed(seed.to(tl.uint32)) ^ updates)) | 1
        tl.store(noise_ptr + i, key.to(tl.int32, bitcast=True), mask=there)
        there = i < n_cols
        col = i.to(tl.int64) + start
        if BY_COL:
            col = tl.load(cols_ptr + i, mask=there, other=0)
        key = mixed(col.to(tl.uint32) ^ mixed(mixed((seed + 1).to(tl.uint32)) ^ updates))
        tl.store(noise_ptr + n_rows + i, key.to(tl.int32, bitcast=True), mask=there)


@triton.jit
def mixed(x):
    """A permutation of uint32; see rounding.mix."""
    for _ in tl.static_range(2):
        x = (x ^ (x >> 16)) * 0x45D9F3B
    return x ^ (x >> 16)


@triton.jit
def row_positions(rows_ptr, first_i, n, BY_ROW: tl.constexpr, ROWS: tl.constexpr):
    """Rows first_i .. first_i + ROWS of the batch in the matrix, int64; past the end the last."""
    i = tl.minimum(first_i + tl.arange(0, ROWS), n - 1)
    if BY_ROW:
        return tl.load(rows_ptr + i)
    else:
        return i.to(tl.int64)


@triton.jit
def own_columns(own_ptr, first_i, n, BY_OWN: tl.constexpr, ROWS: tl.constexpr):
    """int32 [ROWS, 1]; −1 past the last row."""
    i = first_i + tl.arange(0, ROWS)
    own = i
    if BY_OWN:
        own = tl.load(own_ptr + i, mask=i < n, other=-1).to(tl.int32)
    return tl.where(i < n, own, -1)[:, None]


@triton.jit
def touched(own, m, ROWS: tl.constexpr, COLS: tl.constexpr):
    """How many tiles of columns are whole; the first of them with a row's own column, and the end
    of these."""
    whole = m // COLS
    lowest = tl.min(tl.where(own < 0, m, own))
    first = tl.minimum(lowest // COLS, whole)
    return whole, first, tl.maximum(first, tl.minimum(tl.max(own) // COLS + 1, whole))


@triton.jit
def own_share(whole, first, last, count, span, STEP: tl.constexpr, SPLIT: tl.constexpr):
    """Of `whole` tiles of STEP, of which first .. last are touched, those that this split walks
    over: its first, the end of them, the touched ones' first and end, and how many are cut off."""
    begin, end = 0, whole
    cut = tl.where(whole * STEP < count, 1, 0)
    if SPLIT:
        begin = tl.minimum(tl.program_id(2) * (span // STEP), whole)
        stop = (tl.program_id(2) + 1) * (span // STEP)
        end = tl.minimum(stop, whole)
        cut = tl.where((tl.program_id(2) * span <= whole * STEP) & (whole < stop), cut, 0)
        first = tl.minimum(tl.maximum(first, begin), end)
        last = tl.minimum(tl.maximum(last, first), end)
    return begin, end, first, last, cut


@triton.jit
def entries(
    matrix_ptr, stride, row, cols_ptr, first_j, m, BY_COL: tl.constexpr, COLS: tl.constexpr
):
    """Pointers to [ROWS, COLS] entries."""
    j = first_j + tl.arange(0, COLS)
    if BY_COL:
        j = tl.load(cols_ptr + j, mask=j < m, other=0)
    return matrix_ptr + row[:, None] * stride + j[None, :]
