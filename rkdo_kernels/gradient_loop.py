"""The loop that the direct path's gradients share: tiles of S become tiles of G, G a product."""

import triton
import triton.language as tl

from .levels import column_total
from .parts import at_partners, store_part
from .primitives import (
    add_pulls,
    block_values,
    distance_tile,
    into,
    load_rows,
    similarity_tile,
    walk,
)


@triton.jit
def gradient_loop(
    queries_ptr,  # [N, D]          in
    keys_ptr,  # [M, D]             in
    gradient_ptr,  # [N or M, D]    out; a part a split, fp32, where they are split
    queries_stride,
    keys_stride,
    n,
    m,
    dim,
    span,  # rows of the other operand that a split walks over
    tables,  # a tuple: whatever the three functions read
    ROW_VALUES: tl.constexpr,  # (tables, first_i, n, ROWS, AXIS, MASKED): what rows i need
    KEY_VALUES: tl.constexpr,  # (tables, first_j, m, COLS, AXIS, MASKED): what keys j need
    TILE: tl.constexpr,  # (s, tables, rows, keys, first, start, n_other, SIGN, OWN, OTHER, LAST): G
    at_positive_ptr,  # [N]         in, G at (i, i + offset), which no tile has
    offset,
    levels_ptr,  # [N]              in, bf16: see levels.py
    sums_ptr,  # [parts, 2, D]      in, fp32: of the keys, or of level_i queries_i
    parts,
    POSITIVE: tl.constexpr,  # whether there is such
    LEVEL: tl.constexpr,  # whether rows have one; not if BETWEEN
    QUERIES: tl.constexpr,  # the gradient to the queries, else to the keys
    BETWEEN: tl.constexpr,  # s is ‖zq − zk‖², and G weighs differences
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
    """One program per block of queries or of keys, stripe of WIDTH and split: G keys or Gᵀ queries.

    If BETWEEN, Σ_j G_ij (zk_j − zq_i) or Σ_i G_ij (zq_i − zk_j). A tile is [OWN, OTHER]: to the
    keys it is one of Sᵀ, what rows need lies along its columns, and its diagonals have the
    other sign.
    """
    OWN: tl.constexpr = ROWS if QUERIES else COLS
    OTHER: tl.constexpr = COLS if QUERIES else ROWS
    stripe = tl.program_id(1) * WIDTH
    first = tl.program_id(0) * OWN
    if QUERIES:
        own_ptr, own_stride, n_own = queries_ptr, queries_stride, n
        other_ptr, other_stride, n_other = keys_ptr, keys_stride, m
        values = ROW_VALUES(tables, first, n, OWN, 1, True)
    else:
        own_ptr, own_stride, n_own = keys_ptr, keys_stride, m
        other_ptr, other_stride, n_other = queries_ptr, queries_stride, n
        values = KEY_VALUES(tables, first, m, OWN, 1, True)
    level = 0.0
    if LEVEL and QUERIES:
        level = block_values(levels_ptr, 1, first, n, OWN, 1, True).to(tl.float32)
    own = 0.0
    if not BETWEEN:
        own = load_rows(own_ptr, own_stride, first, n_own, 0, dim, OWN, WIDTH, FULL, True, UPCAST)
    acc = tl.zeros([OWN, WIDTH], tl.float32)
    begin, whole, stop = walk(span, n_other, SPLIT, OTHER)
    for start in range(begin, whole, OTHER):
        acc = add_gradient(
            acc, own, values, level, own_ptr, own_stride, first, n_own, other_ptr, other_stride,
            start, n_other, dim, stripe, tables, levels_ptr, ROW_VALUES, KEY_VALUES, TILE, LEVEL,
            QUERIES, BETWEEN, WIDTH, CHUNKS, FULL, PRECISION, GRADIENT_PRECISION, UPCAST, OWN,
            OTHER, False,
        )  # fmt: skip
    if whole < stop:
        acc = add_gradient(
            acc, own, values, level, own_ptr, own_stride, first, n_own, other_ptr, other_stride,
            whole, n_other, dim, stripe, tables, levels_ptr, ROW_VALUES, KEY_VALUES, TILE, LEVEL,
            QUERIES, BETWEEN, WIDTH, CHUNKS, FULL, PRECISION, GRADIENT_PRECISION, UPCAST, OWN,
            OTHER, True,
        )  # fmt: skip
    if LEVEL:
        total = column_total(sums_ptr, parts, stripe, dim, not QUERIES, WIDTH, SPLIT)
        acc += level * total if QUERIES else total
    own_rows = first + tl.arange(0, OWN)
    if POSITIVE:  # G's largest entry, as a rule: it would be rounded for the product
        i = own_rows if QUERIES else own_rows - offset
        partner = own_rows + offset if QUERIES else i
        acc += at_partners(
            at_positive_ptr, i, n, other_ptr, other_stride, partner, n_other, stripe, dim, WIDTH,
            SPLIT,
        )  # fmt: skip
    store_part(gradient_ptr, own_rows, n_own, stripe, dim, acc, WIDTH, SPLIT)


@triton.jit
def add_gradient(
    acc,  # [OWN, WIDTH]
    own,  # [OWN, WIDTH], the kept operand's first columns, unless BETWEEN
    values,  # of the kept operand
    level,  # [OWN, 1], of queries that are kept
    own_ptr,
    own_stride,
    first,
    n_own,
    other_ptr,
    other_stride,
    start,
    n_other,
    dim,
    stripe,
    tables,
    levels_ptr,
    ROW_VALUES: tl.constexpr,
    KEY_VALUES: tl.constexpr,
    TILE: tl.constexpr,
    LEVEL: tl.constexpr,
    QUERIES: tl.constexpr,
    BETWEEN: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNKS: tl.constexpr,
    FULL: tl.constexpr,
    PRECISION: tl.constexpr,
    GRADIENT_PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    OWN: tl.constexpr,
    OTHER: tl.constexpr,
    LAST: tl.constexpr,  # some rows of the other operand may be past the last
):
    """acc with the tile of rows first and start of the kept and the other operand."""
    if QUERIES:
        rows, keys, SIGN = values, KEY_VALUES(tables, start, n_other, OTHER, 0, LAST), 1
    else:
        rows, keys, SIGN = ROW_VALUES(tables, start, n_other, OTHER, 0, LAST), values, -1
    if BETWEEN:
        s = distance_tile(
            own_ptr, own_stride, first, n_own, other_ptr, other_stride, start, n_other, dim,
            OWN, OTHER,
        )  # fmt: skip
        g = TILE(s, tables, rows, keys, first, start, n_other, SIGN, OWN, OTHER, LAST)
        acc = add_pulls(
            acc, g, own_ptr, own_stride, first, n_own, other_ptr, other_stride, start, n_other, dim,
            stripe, WIDTH, OWN, OTHER,
        )  # fmt: skip
    else:
        other = load_rows(
            other_ptr, other_stride, start, n_other, 0, dim, OTHER, WIDTH, FULL, LAST, UPCAST
        )
        s = similarity_tile(
            own, other, own_ptr, own_stride, first, n_own, other_ptr, other_stride, start, n_other,
            dim, OWN, OTHER, WIDTH, CHUNKS, FULL, PRECISION, UPCAST,
        )  # fmt: skip
        g = TILE(s, tables, rows, keys, first, start, n_other, SIGN, OWN, OTHER, LAST)
        if LEVEL and not QUERIES:
            level = block_values(levels_ptr, 1, start, n_other, OTHER, 0, LAST).to(tl.float32)
        if LEVEL:
            g -= level
        if CHUNKS > 1:
            other = load_rows(
                other_ptr, other_stride, start, n_other, stripe, dim, OTHER, WIDTH, FULL, LAST,
                UPCAST,
            )  # fmt: skip
        acc = into(acc, g, other, GRADIENT_PRECISION)
    return acc
