"""Kernels: the gradient of the row moments of the similarity softmax."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from . import gradient_stripes, launch, parts
from .levels import column_total, level_tables
from .needs import BOTH, Needs, rooms
from .parts import at_partners, store_part
from .primitives import (
    LOG2E,
    block_values,
    into,
    leave_out,
    load_rows,
    row_polynomials,
    similarity_tile,
)


@triton.jit
def _moments_bwd(
    queries_ptr,  # [N, D]               in
    keys_ptr,  # [M, D]                  in
    scale_ptr,  # []                     in, c
    weights_ptr,  # [N, DEGREE + 1]      in, fp32
    at_positive_ptr,  # [N]              in, fp32, ∂L/∂S at (i, i + exclude_a)
    levels_ptr,  # [N]                   in, bf16: see levels.py
    sums_ptr,  # [parts, 2, D]           in, fp32: of the keys, or of level_i queries_i
    gradient_ptr,  # [N or M, D]         out, fp32; a part a split, where they are split
    queries_stride,
    keys_stride,
    n,
    m,
    dim,
    unit,  # 1 / b
    exclude_a,
    exclude_b,
    span,  # rows of the other operand that a split walks over
    parts,  # of the sums
    QUERIES: tl.constexpr,  # the gradient to the queries, else to the keys
    DEGREE: tl.constexpr,
    EXCLUDE: tl.constexpr,
    POSITIVE: tl.constexpr,
    LEVEL: tl.constexpr,  # whether rows have one
    UNIT: tl.constexpr,
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
    STEPS: tl.constexpr,  # tiles a pass through the loop
):
    """One program per block of queries, or of keys, stripe of WIDTH columns, and split:

    ∂L/∂queries = G keys or ∂L/∂keys = Gᵀ queries,  G_ij = exp(c S_ij) Σ_k weights_ik (S_ij / b)^k
    """
    scale = tl.load(scale_ptr).to(tl.float32) * LOG2E
    stripe = tl.program_id(1) * WIDTH
    if DENSE:
        queries_stride = WIDTH
        keys_stride = WIDTH
    if QUERIES:
        first_i = tl.program_id(0) * ROWS
        q = load_rows(
            queries_ptr, queries_stride, first_i, n, 0, dim, ROWS, WIDTH, FULL, True, UPCAST
        )
        weights = row_polynomials(weights_ptr, first_i, n, ROWS, DEGREE, True)
        level = 0.0
        if LEVEL:
            level = block_values(levels_ptr, 1, first_i, n, ROWS, 1, True).to(tl.float32)
        acc = tl.zeros([ROWS, WIDTH], tl.float32)
        start, clear, passes, a, a_passes, b, b_passes, stop = itinerary(
            span, m, first_i + exclude_a, first_i + exclude_b, EXCLUDE, SPLIT, ROWS, COLS * STEPS
        )
        for turn in range(clear):
            first = start + clear_pass(turn, a, a_passes, b, b_passes, EXCLUDE) * (COLS * STEPS)
            for step in tl.static_range(STEPS):
                g, _, k = gradient_tile(
                    q, q, weights, level, queries_ptr, queries_stride, first_i, n, keys_ptr,
                    keys_stride, first + step * COLS, m, dim, stripe, scale, unit, weights_ptr,
                    levels_ptr, exclude_a, exclude_b, True, DEGREE, 0, LEVEL, UNIT, ROWS, COLS,
                    WIDTH, CHUNKS, FULL, PRECISION, UPCAST, False,
                )  # fmt: skip
                acc = into(acc, g, k, GRADIENT_PRECISION)
        left = other_tiles(start, passes, a_passes, b_passes, stop, COLS, STEPS)
        for turn in tl.range(left, num_stages=1, disable_licm=True):
            first_j = start + COLS * other_tile(turn, passes, a, a_passes, b, b_passes, STEPS)
            g, _, k = gradient_tile(
                q, q, weights, level, queries_ptr, queries_stride, first_i, n, keys_ptr,
                keys_stride, first_j, m, dim, stripe, scale, unit, weights_ptr, levels_ptr,
                exclude_a, exclude_b, True, DEGREE, EXCLUDE, LEVEL, UNIT, ROWS, COLS, WIDTH, CHUNKS,
                FULL, PRECISION, UPCAST, True,
            )  # fmt: skip
            acc = into(acc, g, k, GRADIENT_PRECISION)
        if DEGREE == 0 and not LEVEL:
            acc *= weights[0]
        if LEVEL:
            acc += level * column_total(sums_ptr, parts, stripe, dim, False, WIDTH, SPLIT)
        i = first_i + tl.arange(0, ROWS)
        if POSITIVE:
            acc += at_partners(
                at_positive_ptr, i, n, keys_ptr, keys_stride, i + exclude_a, m, stripe, dim, WIDTH,
                SPLIT,
            )  # fmt: skip
        store_part(gradient_ptr, i, n, stripe, dim, acc, WIDTH, SPLIT)
    else:
        first_j = tl.program_id(0) * COLS
        k = tl.trans(load_transposed(keys_ptr, keys_stride, first_j, m, dim, COLS, WIDTH, UPCAST))
        acc = tl.zeros([COLS, WIDTH], tl.float32)
        start, clear, passes, a, a_passes, b, b_passes, stop = itinerary(
            span, n, first_j - exclude_a, first_j - exclude_b, EXCLUDE, SPLIT, COLS, ROWS * STEPS
        )
        for turn in range(clear):
            first = start + clear_pass(turn, a, a_passes, b, b_passes, EXCLUDE) * (ROWS * STEPS)
            for step in tl.static_range(STEPS):
                g, q, _ = gradient_tile(
                    k, k, (), 0.0, queries_ptr, queries_stride, first + step * ROWS, n, keys_ptr,
                    keys_stride, first_j, m, dim, stripe, scale, unit, weights_ptr, levels_ptr,
                    exclude_a, exclude_b, False, DEGREE, 0, LEVEL, UNIT, ROWS, COLS, WIDTH, CHUNKS,
                    FULL, PRECISION, UPCAST, False,
                )  # fmt: skip
                acc = into(acc, tl.trans(g), q, GRADIENT_PRECISION)
        left = other_tiles(start, passes, a_passes, b_passes, stop, ROWS, STEPS)
        for turn in tl.range(left, num_stages=1, disable_licm=True):
            first_i = start + ROWS * other_tile(turn, passes, a, a_passes, b, b_passes, STEPS)
            g, q, _ = gradient_tile(
                k, k, (), 0.0, queries_ptr, queries_stride, first_i, n, keys_ptr, keys_stride,
                first_j, m, dim, stripe, scale, unit, weights_ptr, levels_ptr, exclude_a, exclude_b,
                False, DEGREE, EXCLUDE, LEVEL, UNIT, ROWS, COLS, WIDTH, CHUNKS, FULL, PRECISION,
                UPCAST, True,
            )  # fmt: skip
            acc = into(acc, tl.trans(g), q, GRADIENT_PRECISION)
        if LEVEL:
            acc += column_total(sums_ptr, parts, stripe, dim, True, WIDTH, SPLIT)
        j = first_j + tl.arange(0, COLS)
        if POSITIVE:
            i = j - exclude_a
            acc += at_partners(
                at_positive_ptr, i, n, queries_ptr, queries_stride, i, n, stripe, dim, WIDTH, SPLIT
            )
        store_part(gradient_ptr, j, m, stripe, dim, acc, WIDTH, SPLIT)


@triton.jit
def load_transposed(
    x_ptr, stride, first, n, dim, COUNT: tl.constexpr, WIDTH: tl.constexpr, UPCAST: tl.constexpr
):  # [WIDTH, COUNT]
    """The first columns of rows first .. first + COUNT; zero past the ends.

    Loaded so, the transpose of what the whole loop needs stays in shared memory: one that is
    transposed afterwards waits in registers, and every pass stores it anew.
    """
    local = tl.arange(0, COUNT)
    d = tl.arange(0, WIDTH)
    at = x_ptr + tl.cast(first, tl.int64) * stride
    at = at + local.to(tl.int64)[None, :] * stride + d[:, None]
    x = tl.load(at, mask=(local < n - first)[None, :] & (d < dim)[:, None], other=0.0)
    return x.to(tl.float32) if UPCAST else x


@triton.jit
def itinerary(
    span,
    count,  # rows of the operand that is walked over
    at_a,  # where among them the excluded diagonals meet the first of this program's own rows
    at_b,
    EXCLUDE: tl.constexpr,
    SPLIT: tl.constexpr,
    OWN: tl.constexpr,
    STEP: tl.constexpr,  # rows a pass
):
    """Which passes over the other operand's rows start .. stop meet no diagonal.

    Returns start, the number of such passes, that of all whole ones, where the passes with a
    diagonal begin and how many they are, for one diagonal and for the other, and stop.
    """
    start = 0
    stop = count
    if SPLIT:
        start = tl.program_id(2) * span
        stop = tl.minimum(start + span, count)
    passes = (stop - start) // STEP
    a, a_end, b, b_end = 0, 0, 0, 0
    if EXCLUDE == 1:
        a, a_end = meeting(at_a - start, passes, OWN, STEP)
    if EXCLUDE == 2:
        a, a_end = meeting(tl.minimum(at_a, at_b) - start, passes, OWN, STEP)
        b, b_end = meeting(tl.maximum(at_a, at_b) - start, passes, OWN, STEP)
        b = tl.maximum(a_end, b)
        b_end = tl.maximum(b, b_end)
    return start, passes - (a_end - a) - (b_end - b), passes, a, a_end - a, b, b_end - b, stop


@triton.jit
def meeting(at, passes, OWN: tl.constexpr, STEP: tl.constexpr):
    """The first pass that rows at .. at + OWN lie in, and the one after the last."""
    first = tl.maximum(at, 0) // STEP
    end = (tl.maximum(at + OWN, 0) + (STEP - 1)) // STEP
    return tl.minimum(first, passes), tl.minimum(end, passes)


@triton.jit
def clear_pass(turn, a, a_passes, b, b_passes, EXCLUDE: tl.constexpr):
    """The pass to take at this turn of those that meet no diagonal."""
    if EXCLUDE >= 1:
        turn += tl.where(turn >= a, a_passes, 0)
    if EXCLUDE >= 2:
        turn += tl.where(turn >= b, b_passes, 0)
    return turn


@triton.jit
def other_tiles(start, passes, a_passes, b_passes, stop, COUNT: tl.constexpr, STEPS: tl.constexpr):
    """How many tiles of COUNT rows are left: those with a diagonal, and after the last pass."""
    rest = stop - start - passes * (COUNT * STEPS)
    return (a_passes + b_passes) * STEPS + (rest + (COUNT - 1)) // COUNT


@triton.jit
def other_tile(turn, passes, a, a_passes, b, b_passes, STEPS: tl.constexpr):
    """The tile to take at this turn of those."""
    after_b = turn - (a_passes + b_passes) * STEPS
    tile = tl.where(turn < a_passes * STEPS, a * STEPS + turn, (b - a_passes) * STEPS + turn)
    return tl.where(after_b < 0, tile, passes * STEPS + after_b)


@triton.jit
def gradient_tile(
    q,
    k,
    weights,
    level,
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
    unit,
    weights_ptr,
    levels_ptr,
    exclude_a,
    exclude_b,
    QUERIES: tl.constexpr,
    DEGREE: tl.constexpr,
    EXCLUDE: tl.constexpr,
    LEVEL: tl.constexpr,
    UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNKS: tl.constexpr,
    FULL: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    LAST: tl.constexpr,  # some of the rows that the loop loads may be past the last
):
    """G = exp(c S) Σ_k weights_k (S / b)^k less its rows' level, and the operands' columns of this
    stripe.

    The operand that the loop runs over is loaded here. Past its last row G needs no mask: the
    weights, or the key's row in G keys, are zero. Degree 0 without levels leaves the weights of
    G keys to the end. The diagonals come last: a branch holds up everything that is computed before
    it.
    """
    if QUERIES:
        k = load_rows(keys_ptr, keys_stride, first_j, m, 0, dim, COLS, WIDTH, FULL, LAST, UPCAST)
    else:
        q = load_rows(
            queries_ptr, queries_stride, first_i, n, 0, dim, ROWS, WIDTH, FULL, LAST, UPCAST
        )
        weights = row_polynomials(weights_ptr, first_i, n, ROWS, DEGREE, LAST)
        if LEVEL:
            level = block_values(levels_ptr, 1, first_i, n, ROWS, 1, LAST).to(tl.float32)
    u = similarity_tile(
        q, k, queries_ptr, queries_stride, first_i, n, keys_ptr, keys_stride, first_j, m, dim,
        ROWS, COLS, WIDTH, CHUNKS, FULL, PRECISION, UPCAST,
    )  # fmt: skip
    g = tl.exp2(u * scale)
    if DEGREE > 0 or not QUERIES or LEVEL:
        if not UNIT:
            u = u * unit
        polynomial = weights[DEGREE]
        for power in tl.static_range(1, DEGREE + 1):
            polynomial = polynomial * u + weights[DEGREE - power]
        g = g * polynomial
    g = leave_out(g, first_i, first_j, exclude_a, exclude_b, EXCLUDE, ROWS, COLS)
    if LEVEL:
        g -= level
    if CHUNKS > 1 and QUERIES:
        k = load_rows(
            keys_ptr, keys_stride, first_j, m, stripe, dim, COLS, WIDTH, FULL, LAST, UPCAST
        )
    if CHUNKS > 1 and not QUERIES:
        q = load_rows(
            queries_ptr, queries_stride, first_i, n, stripe, dim, ROWS, WIDTH, FULL, LAST, UPCAST
        )
    return g, q, k


def moments_backward(
    queries: Tensor,
    keys: Tensor,
    scale: Tensor,
    bound: float,
    weights: Tensor,
    exclude: list[int],
    at_positive: Tensor | None = None,
    needs: Needs = BOTH,
    level: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    if gradient_stripes.pays(queries):
        return gradient_stripes.moments_backward(
            queries, keys, scale, bound, weights, exclude, at_positive, needs, level
        )
    queries, keys = launch.rows_contiguous(queries), launch.rows_contiguous(keys)
    weights, dims = weights.contiguous(), launch.dims(queries)
    n, m, dim = queries.shape[0], keys.shape[0], queries.shape[1]
    degree, dense = weights.shape[1] - 1, queries.stride(0) == keys.stride(0) == dims["WIDTH"]
    paired = weights if at_positive is None else at_positive.contiguous()
    results = rooms(queries, keys, needs)
    for gradient, to_queries, need in zip(results, (True, False), needs, strict=True):
        if not need:
            continue
        config = launch.config("moments_dq" if to_queries else "moments_dk", queries)
        config = launch.limited(config, queries.dtype, dims["WIDTH"], degree, dense)
        walked = m if to_queries else n
        grid, out, span = parts.shared(gradient, config, dims["CHUNKS"], to_queries, walked)
        levels, sums = level_tables(queries, keys, level, to_queries)
        _moments_bwd[grid](
            queries, keys, scale, weights, paired, levels, sums, out, queries.stride(0),
            keys.stride(0), n, m, dim, 1 / bound, *launch.excluded(exclude), span, len(sums),
            QUERIES=to_queries, DEGREE=degree, EXCLUDE=len(exclude),
            POSITIVE=at_positive is not None, LEVEL=level is not None, UNIT=bound == 1,
            SPLIT=grid[2] > 1, DENSE=dense, **dims,
            GRADIENT_PRECISION=launch.gradient_precision(queries), ROWS=config.rows,
            COLS=config.cols, STEPS=config.steps, **config.options,
        )  # fmt: skip
        parts.add(out, gradient)
    return results
