"""The loop that the direct path's gradients share: tiles of S become tiles of G, G a product."""

import triton
import triton.language as tl

from .primitives import into, load_rows, similarity_tile, store_rows


@triton.jit
def gradient_loop(
    queries_ptr,  # [N, D]          in
    keys_ptr,  # [M, D]             in
    gradient_ptr,  # [N or M, D]    out
    queries_stride,
    keys_stride,
    n,
    m,
    dim,
    tables,  # a tuple: whatever the three functions read
    ROW_VALUES: tl.constexpr,  # (tables, first_i, n, ROWS, MASKED): what the rows of a tile need
    KEY_VALUES: tl.constexpr,  # (tables, first_j, m, COLS, MASKED): what its columns need
    TILE: tl.constexpr,  # (s, tables, rows, keys, first_i, first_j, m, ROWS, COLS, LAST): G
    QUERIES: tl.constexpr,  # the gradient to the queries, else to the keys
    BETWEEN: tl.constexpr,  # S enters by differences zq − zk
    WIDTH: tl.constexpr,
    CHUNKS: tl.constexpr,
    FULL: tl.constexpr,
    PRECISION: tl.constexpr,
    GRADIENT_PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """One program per block of queries or of keys and stripe of WIDTH: G keys or Gᵀ queries.

    If BETWEEN, Σ_j G_ij (zk_j − zq_i) or Σ_i G_ij (zq_i − zk_j). Past the last row of the operand
    that the loop walks over, G has to be finite; past the last row, zero.
    """
    OWN: tl.constexpr = ROWS if QUERIES else COLS
    OTHER: tl.constexpr = COLS if QUERIES else ROWS
    stripe = tl.program_id(1) * WIDTH
    first = tl.program_id(0) * OWN
    if QUERIES:
        own_ptr, own_stride, n_own, n_other = queries_ptr, queries_stride, n, m
        values = ROW_VALUES(tables, first, n, ROWS, True)
    else:
        own_ptr, own_stride, n_own, n_other = keys_ptr, keys_stride, m, n
        values = KEY_VALUES(tables, first, m, COLS, True)
    own = load_rows(own_ptr, own_stride, first, n_own, 0, dim, OWN, WIDTH, FULL, True, UPCAST)
    acc = tl.zeros([OWN, WIDTH], tl.float32)
    sums = tl.zeros([ROWS, COLS], tl.float32)  # of G, entry by entry
    whole = n_other // OTHER * OTHER
    for start in range(0, whole, OTHER):
        acc, sums = add_gradient(
            acc, sums, own, values, first, start, queries_ptr, keys_ptr, queries_stride,
            keys_stride, n, m, dim, stripe, tables, ROW_VALUES, KEY_VALUES, TILE, QUERIES, BETWEEN,
            WIDTH, CHUNKS, FULL, PRECISION, GRADIENT_PRECISION, UPCAST, ROWS, COLS, False,
        )  # fmt: skip
    if whole < n_other:
        acc, sums = add_gradient(
            acc, sums, own, values, first, whole, queries_ptr, keys_ptr, queries_stride,
            keys_stride, n, m, dim, stripe, tables, ROW_VALUES, KEY_VALUES, TILE, QUERIES, BETWEEN,
            WIDTH, CHUNKS, FULL, PRECISION, GRADIENT_PRECISION, UPCAST, ROWS, COLS, True,
        )  # fmt: skip
    if BETWEEN:
        if CHUNKS > 1:
            own = load_rows(
                own_ptr, own_stride, first, n_own, stripe, dim, OWN, WIDTH, FULL, True, UPCAST
            )
        acc -= own.to(tl.float32) * tl.sum(sums, 1 if QUERIES else 0)[:, None]
    store_rows(gradient_ptr, first + tl.arange(0, OWN), n_own, stripe, dim, acc, WIDTH)


@triton.jit
def add_gradient(
    acc,  # [OWN, WIDTH]
    sums,  # [ROWS, COLS]
    own,  # [OWN, WIDTH], the kept operand's first columns
    values,  # of the kept operand
    first,
    start,
    queries_ptr,
    keys_ptr,
    queries_stride,
    keys_stride,
    n,
    m,
    dim,
    stripe,
    tables,
    ROW_VALUES: tl.constexpr,
    KEY_VALUES: tl.constexpr,
    TILE: tl.constexpr,
    QUERIES: tl.constexpr,
    BETWEEN: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNKS: tl.constexpr,
    FULL: tl.constexpr,
    PRECISION: tl.constexpr,
    GRADIENT_PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    LAST: tl.constexpr,  # some of the rows that the loop loads may be past the last
):
    """acc and sums with the tile of rows first and start of the kept and the other operand."""
    if QUERIES:
        q, first_i, rows = own, first, values
        k = load_rows(keys_ptr, keys_stride, start, m, 0, dim, COLS, WIDTH, FULL, LAST, UPCAST)
        first_j, keys = start, KEY_VALUES(tables, start, m, COLS, LAST)
    else:
        k, first_j, keys = own, first, values
        q = load_rows(
            queries_ptr, queries_stride, start, n, 0, dim, ROWS, WIDTH, FULL, LAST, UPCAST
        )
        first_i, rows = start, ROW_VALUES(tables, start, n, ROWS, LAST)
    s = similarity_tile(
        q, k, queries_ptr, queries_stride, first_i, n, keys_ptr, keys_stride, first_j, m, dim,
        ROWS, COLS, WIDTH, CHUNKS, FULL, PRECISION, UPCAST,
    )  # fmt: skip
    g = TILE(s, tables, rows, keys, first_i, first_j, m, ROWS, COLS, LAST and QUERIES)
    if BETWEEN:
        sums += g
    if QUERIES:
        if CHUNKS > 1:
            k = load_rows(
                keys_ptr, keys_stride, start, m, stripe, dim, COLS, WIDTH, FULL, LAST, UPCAST
            )
        acc = into(acc, g, k, GRADIENT_PRECISION)
    else:
        if CHUNKS > 1:
            q = load_rows(
                queries_ptr, queries_stride, start, n, stripe, dim, ROWS, WIDTH, FULL, LAST, UPCAST
            )
        acc = into(acc, tl.trans(g), q, GRADIENT_PRECISION)
    return acc, sums
