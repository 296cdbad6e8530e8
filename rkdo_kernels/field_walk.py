"""Kernel: the dense field's loss, gradient to the queries and update, in one walk."""

from __future__ import annotations

import triton
import triton.language as tl

from .field_rows import (
    GAIN,
    INVERSE,
    KEEP,
    PEAK,
    WEIGHT,
    entries,
    own_columns,
    own_share,
    row_positions,
    touched,
)
from .parts import store_part
from .primitives import (
    LANES,
    LN2,
    LOG2E,
    TINY,
    block_values,
    fold,
    into,
    load_rows,
    log2,
    similarity_tile,
)


@triton.jit
def _dense_walk(
    queries_ptr,  # [R, D]     in
    keys_ptr,  # [B, D]        in
    matrix_ptr,  # [n, m]      in, out; from the batch's first row and column, or see BY_ROW, BY_COL
    diagonal_ptr,  # [n]       in, out; likewise
    row_sum_ptr,  # [n]        in, out, fp64; likewise
    rows_ptr,  # [R]           in, int64
    cols_ptr,  # [B]           in, int64
    own_ptr,  # [R]            in, int64
    table_ptr,  # [VALUES, R]  in
    mass_ptr,  # [2, R]        in, fp64
    noise_ptr,  # [R + B]      in, int32
    scale_ptr,  # []           in, c
    loss_ptr,  # [R]           out, fp64
    parts_ptr,  # [splits, 3, R]  out, fp64, for SPLIT: what `finish` takes
    gradient_ptr,  # [R, D]    out; a part a split, where they are split
    queries_stride,
    keys_stride,
    matrix_stride,
    n,
    m,
    dim,
    span,  # columns that a split walks over
    LOSS: tl.constexpr,
    UPDATE: tl.constexpr,
    GRADIENT: tl.constexpr,
    NOISE: tl.constexpr,  # round by chance
    BY_ROW: tl.constexpr,
    BY_COL: tl.constexpr,
    BY_OWN: tl.constexpr,  # a row's own column is given, else it is its number
    SPLIT: tl.constexpr,
    DENSE: tl.constexpr,  # rows of WIDTH that follow one another
    WIDTH: tl.constexpr,
    CHUNKS: tl.constexpr,
    FULL: tl.constexpr,
    PRECISION: tl.constexpr,
    GRADIENT_PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """One program per block of rows, split and, of a gradient alone, stripe of WIDTH columns:

    loss_i = KL(p̂_i ‖ q_i),  P ← KEEP P + GAIN q / f,  ∂loss_i/∂queries_i = c Σ_j (q − p̂)_ij zk_j

    An entry is read and written by one program, once. In units of f, which no exponent then holds:
    e = q / f, p = p̂ / f, and log(p̂ / q) = log p − log e.
    """
    if DENSE:
        queries_stride = WIDTH
        keys_stride = WIDTH
    first_i = tl.program_id(0) * ROWS
    i = first_i + tl.arange(0, ROWS)
    scale = tl.load(scale_ptr).to(tl.float32) * LOG2E
    q = load_rows(queries_ptr, queries_stride, first_i, n, 0, dim, ROWS, WIDTH, FULL, True, UPCAST)
    row = row_positions(rows_ptr, first_i, n, BY_ROW, ROWS)
    own = own_columns(own_ptr, first_i, n, BY_OWN, ROWS)
    peak = block_values(table_ptr + PEAK * n, 1, first_i, n, ROWS, 1, True)
    inverse = block_values(table_ptr + INVERSE * n, 1, first_i, n, ROWS, 1, True)
    at_own = tl.load(diagonal_ptr + row).to(tl.float32)
    keep, gain, noise = peak, peak, own
    if UPDATE:
        keep = block_values(table_ptr + KEEP * n, 1, first_i, n, ROWS, 1, True)
        gain = block_values(table_ptr + GAIN * n, 1, first_i, n, ROWS, 1, True)
        if NOISE:
            noise = block_values(noise_ptr, 1, first_i, n, ROWS, 1, True)
    rows = (peak, inverse, keep, gain, noise, own, at_own, row)
    moves = (i < n) & (tl.max(keep, 1) >= 0)
    sums = (
        tl.zeros([ROWS, COLS], tl.float32),
        tl.zeros([ROWS, LANES], tl.float32),
        tl.zeros([ROWS], tl.float32),
    )
    acc = tl.zeros([ROWS, WIDTH], tl.float32)
    stripe = tl.program_id(1) * WIDTH
    whole, first, last = touched(own, m, ROWS, COLS)
    begin, end, first, last, cut = own_share(whole, first, last, m, span, COLS, SPLIT)
    for turn in range(begin, end - (last - first)):
        at = (turn + tl.where(turn >= first, last - first, 0)) * COLS
        sums, acc = walk_tile(
            sums, acc, rows, moves, q, scale, queries_ptr, queries_stride, first_i, n, keys_ptr,
            keys_stride, at, m, dim, stripe, matrix_ptr, matrix_stride, cols_ptr, noise_ptr, LOSS,
            UPDATE, GRADIENT, NOISE, BY_COL, ROWS, COLS, WIDTH, CHUNKS, FULL, PRECISION,
            GRADIENT_PRECISION, UPCAST, False,
        )  # fmt: skip
    for turn in tl.range(0, last - first + cut, num_stages=1, disable_licm=True):
        at = tl.where(turn < last - first, first + turn, whole) * COLS
        sums, acc = walk_tile(
            sums, acc, rows, moves, q, scale, queries_ptr, queries_stride, first_i, n, keys_ptr,
            keys_stride, at, m, dim, stripe, matrix_ptr, matrix_stride, cols_ptr, noise_ptr, LOSS,
            UPDATE, GRADIENT, NOISE, BY_COL, ROWS, COLS, WIDTH, CHUNKS, FULL, PRECISION,
            GRADIENT_PRECISION, UPCAST, True,
        )  # fmt: skip
    if GRADIENT:
        acc *= block_values(table_ptr + WEIGHT * n, 1, first_i, n, ROWS, 1, True)
        store_part(gradient_ptr, i, n, stripe, dim, acc, WIDTH, SPLIT)
    if LOSS or UPDATE:
        divergence = tl.sum(sums[0], 1).to(tl.float64)
        others = tl.sum(sums[1].to(tl.float64), 1)
        next_own = sums[2].to(tl.float64)
        if SPLIT:
            part = parts_ptr + tl.program_id(2) * tl.cast(n, tl.int64) * 3 + i
            tl.store(part, divergence, mask=i < n)
            tl.store(part + n, others, mask=i < n)
            tl.store(part + 2 * n, next_own, mask=i < n)
        else:
            finish(
                divergence, others, next_own, i, row, moves, n, mass_ptr, diagonal_ptr,
                row_sum_ptr, loss_ptr, LOSS, UPDATE,
            )  # fmt: skip


@triton.jit
def finish(
    divergence,  # [COUNT] fp64, Σ_j p log2(p / e) + (e − p) / ln 2
    others,  # [COUNT] fp64, Σ_j of what is stored in the matrix
    next_own,  # [COUNT] fp64, the next diagonal: its own digits, not what the others leave of 1
    i,
    row,
    moves,
    n,
    mass_ptr,
    diagonal_ptr,
    row_sum_ptr,
    loss_ptr,
    LOSS: tl.constexpr,
    UPDATE: tl.constexpr,
):
    """The rows' losses, diagonals and sums."""
    mass = tl.load(mass_ptr + i, mask=i < n, other=0.0)
    if LOSS:
        total = tl.load(mass_ptr + n + i, mask=i < n, other=1.0)  # of e
        kl = LN2 * divergence / total
        tl.store(loss_ptr + i, tl.where(mass > 0, kl, 0.0 * total), mask=i < n)
    if UPDATE:
        tl.store(diagonal_ptr + row, next_own.to(tl.float32), mask=moves)
        before = tl.load(row_sum_ptr + row, mask=moves, other=0.0)
        tl.store(row_sum_ptr + row, before + (others + next_own - mass), mask=moves)


@triton.jit
def _dense_finish(
    parts_ptr,  # [splits, 3, R]  in, fp64
    rows_ptr,  # [R]              in, int64
    table_ptr,  # [VALUES, R]     in
    mass_ptr,  # [2, R]           in, fp64
    diagonal_ptr,  # [n]          in, out; see _dense_walk
    row_sum_ptr,  # [n]           in, out, fp64
    loss_ptr,  # [R]              out, fp64
    n,
    splits,
    LOSS: tl.constexpr,
    UPDATE: tl.constexpr,
    BY_ROW: tl.constexpr,
    COUNT: tl.constexpr,
):
    """One program per COUNT rows: what the splits of a walk have added up, in their order."""
    first_i = tl.program_id(0) * COUNT
    i = first_i + tl.arange(0, COUNT)
    divergence = tl.zeros([COUNT], tl.float64)
    others = tl.zeros([COUNT], tl.float64)
    next_own = tl.zeros([COUNT], tl.float64)
    for s in range(splits):
        part = parts_ptr + s * tl.cast(n, tl.int64) * 3 + i
        divergence += tl.load(part, mask=i < n, other=0.0)
        others += tl.load(part + n, mask=i < n, other=0.0)
        next_own += tl.load(part + 2 * n, mask=i < n, other=0.0)
    moves = i < n
    if UPDATE:
        moves = moves & (tl.load(table_ptr + KEEP * n + i, mask=i < n, other=-1.0) >= 0)
    finish(
        divergence, others, next_own, i, row_positions(rows_ptr, first_i, n, BY_ROW, COUNT),
        moves, n, mass_ptr, diagonal_ptr, row_sum_ptr, loss_ptr, LOSS, UPDATE,
    )  # fmt: skip


@triton.jit
def walk_tile(
    sums,  # of p log2(p / e) + (e − p) / ln 2, [ROWS, COLS]; in parts, of what is stored in the
    # matrix, [ROWS, LANES]; the next diagonal, [ROWS]
    acc,  # [ROWS, WIDTH]
    rows,
    moves,  # [ROWS]: rows to write
    q,
    scale,
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
    matrix_ptr,
    matrix_stride,
    cols_ptr,
    noise_ptr,
    LOSS: tl.constexpr,
    UPDATE: tl.constexpr,
    GRADIENT: tl.constexpr,
    NOISE: tl.constexpr,
    BY_COL: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNKS: tl.constexpr,
    FULL: tl.constexpr,
    PRECISION: tl.constexpr,
    GRADIENT_PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    EDGE: tl.constexpr,  # columns may be past the last, or a row's own
):
    """The sums with a tile more, which is written back."""
    peak, inverse, keep, gain, noise, own, at_own, row = rows
    k = load_rows(keys_ptr, keys_stride, first_j, m, 0, dim, COLS, WIDTH, FULL, EDGE, UPCAST)
    j = first_j + tl.arange(0, COLS)
    at = entries(matrix_ptr, matrix_stride, row, cols_ptr, first_j, m, BY_COL, COLS)
    stored = tl.load(at, mask=(j < m)[None, :], other=0.0) if EDGE else tl.load(at)
    s = similarity_tile(
        q, k, queries_ptr, queries_stride, first_i, n, keys_ptr, keys_stride, first_j, m, dim,
        ROWS, COLS, WIDTH, CHUNKS, FULL, PRECISION, UPCAST,
    )  # fmt: skip
    x = (s - peak) * scale
    e = tl.exp2(x)
    stored = stored.to(tl.float32)
    if EDGE:
        here = (j < m)[None, :]
        mine = j[None, :] == own
        e = tl.where(here, e, 0.0)
        stored = tl.where(mine & here, at_own[:, None], stored)
    p = stored * inverse + TINY
    divergence, others, next_own = sums
    if LOSS:
        # Σ e and Σ p are the same: where p is close to e, their difference takes away what
        # roundings have added to the logarithms.
        divergence += p * (log2(p, PRECISION) - x) + LOG2E * (e - p)
    if GRADIENT:
        if CHUNKS > 1:
            k = load_rows(
                keys_ptr, keys_stride, first_j, m, stripe, dim, COLS, WIDTH, FULL, EDGE, UPCAST
            )
        acc = into(acc, e - p, k, GRADIENT_PRECISION)
    if UPDATE:
        new = stored * keep + e * gain
        if EDGE:
            next_own += tl.sum(tl.where(mine & here, new, 0.0), 1)
            new = tl.where(mine, 0.0, new)
        if NOISE:
            col_noise = block_values(noise_ptr + n, 1, first_j, m, COLS, 0, EDGE)
            bits = (noise * col_noise).to(tl.uint32, bitcast=True) >> 16
            bits = (new.to(tl.uint32, bitcast=True) + bits) & 0xFFFF0000
            new = bits.to(tl.float32, bitcast=True)
        others += fold(new, ROWS, COLS)
        there = moves[:, None]
        if EDGE:
            there = there & here
        tl.store(at, new.to(matrix_ptr.dtype.element_ty), mask=there)
    return (divergence, others, next_own), acc
