"""Kernel: the dense field's gradient to the keys, which wants rows in every program."""

from __future__ import annotations

import triton
import triton.language as tl

from .field_rows import INVERSE, PEAK, WEIGHT, entries, own_columns, own_share, row_positions
from .moments_gradient import load_transposed
from .parts import store_part
from .primitives import LOG2E, block_values, into, load_rows, similarity_tile


@triton.jit
def _dense_keys(
    queries_ptr,  # [R, D]     in
    keys_ptr,  # [B, D]        in
    matrix_ptr,  # [n, m]      in; as in _dense_walk
    diagonal_ptr,  # [n]       in
    rows_ptr,  # [R]           in, int64
    cols_ptr,  # [B]           in, int64
    own_ptr,  # [R]            in, int64
    table_ptr,  # [VALUES, R]  in
    scale_ptr,  # []           in, c
    gradient_ptr,  # [B, D]    out; a part a split, where they are split
    queries_stride,
    keys_stride,
    matrix_stride,
    n,
    m,
    dim,
    span,  # rows that a split walks over
    BY_ROW: tl.constexpr,
    BY_COL: tl.constexpr,
    BY_OWN: tl.constexpr,
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
):
    """∂L/∂keys_j = Σ_i WEIGHT_i (e − p)_ij zq_i:  a program per block of keys, stripe and split."""
    if DENSE:
        queries_stride = WIDTH
        keys_stride = WIDTH
    first_j = tl.program_id(0) * COLS
    stripe = tl.program_id(1) * WIDTH
    scale = tl.load(scale_ptr).to(tl.float32) * LOG2E
    k = tl.trans(load_transposed(keys_ptr, keys_stride, first_j, m, dim, COLS, WIDTH, UPCAST))
    acc = tl.zeros([COLS, WIDTH], tl.float32)
    whole = n // ROWS
    first, last = 0, whole
    if not BY_OWN:
        first = tl.minimum(first_j // ROWS, whole)
        last = tl.minimum((first_j + COLS + ROWS - 1) // ROWS, whole)
    begin, end, first, last, cut = own_share(whole, first, last, n, span, ROWS, SPLIT)
    for turn in range(begin, end - (last - first)):
        at = (turn + tl.where(turn >= first, last - first, 0)) * ROWS
        acc = add_keys(
            acc, k, scale, queries_ptr, queries_stride, at, n, keys_ptr, keys_stride, first_j, m,
            dim, stripe, matrix_ptr, matrix_stride, diagonal_ptr, rows_ptr, cols_ptr, own_ptr,
            table_ptr, BY_ROW, BY_COL, BY_OWN, ROWS, COLS, WIDTH, CHUNKS, FULL, PRECISION,
            GRADIENT_PRECISION, UPCAST, False,
        )  # fmt: skip
    for turn in tl.range(0, last - first + cut, num_stages=1, disable_licm=True):
        at = tl.where(turn < last - first, first + turn, whole) * ROWS
        acc = add_keys(
            acc, k, scale, queries_ptr, queries_stride, at, n, keys_ptr, keys_stride, first_j, m,
            dim, stripe, matrix_ptr, matrix_stride, diagonal_ptr, rows_ptr, cols_ptr, own_ptr,
            table_ptr, BY_ROW, BY_COL, BY_OWN, ROWS, COLS, WIDTH, CHUNKS, FULL, PRECISION,
            GRADIENT_PRECISION, UPCAST, True,
        )  # fmt: skip
    store_part(gradient_ptr, first_j + tl.arange(0, COLS), m, stripe, dim, acc, WIDTH, SPLIT)


@triton.jit
def add_keys(
    acc,  # [COLS, WIDTH]
    k,
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
    diagonal_ptr,
    rows_ptr,
    cols_ptr,
    own_ptr,
    table_ptr,
    BY_ROW: tl.constexpr,
    BY_COL: tl.constexpr,
    BY_OWN: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNKS: tl.constexpr,
    FULL: tl.constexpr,
    PRECISION: tl.constexpr,
    GRADIENT_PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    EDGE: tl.constexpr,  # rows may be past the last, or have their own column here
):
    """acc with a block of rows more; a row past the last has WEIGHT 0."""
    q = load_rows(queries_ptr, queries_stride, first_i, n, 0, dim, ROWS, WIDTH, FULL, EDGE, UPCAST)
    row = row_positions(rows_ptr, first_i, n, BY_ROW, ROWS)
    at = entries(matrix_ptr, matrix_stride, row, cols_ptr, first_j, m, BY_COL, COLS)
    j = first_j + tl.arange(0, COLS)
    stored = tl.load(at, mask=(j < m)[None, :], other=0.0).to(tl.float32)
    s = similarity_tile(
        q, k, queries_ptr, queries_stride, first_i, n, keys_ptr, keys_stride, first_j, m, dim,
        ROWS, COLS, WIDTH, CHUNKS, FULL, PRECISION, UPCAST,
    )  # fmt: skip
    peak = block_values(table_ptr + PEAK * n, 1, first_i, n, ROWS, 1, EDGE)
    inverse = block_values(table_ptr + INVERSE * n, 1, first_i, n, ROWS, 1, EDGE)
    weight = block_values(table_ptr + WEIGHT * n, 1, first_i, n, ROWS, 1, EDGE)
    if EDGE:
        own = own_columns(own_ptr, first_i, n, BY_OWN, ROWS)
        at_own = tl.load(diagonal_ptr + row).to(tl.float32)[:, None]
        stored = tl.where(j[None, :] == own, at_own, stored)
    g = weight * (tl.exp2((s - peak) * scale) - stored * inverse)
    if CHUNKS > 1:
        q = load_rows(
            queries_ptr, queries_stride, first_i, n, stripe, dim, ROWS, WIDTH, FULL, EDGE, UPCAST
        )
    return into(acc, tl.trans(g), q, GRADIENT_PRECISION)
