"""Kernels: the dense response field's loss, gradient and update, in one walk over the block.

The functions at the end are field_tiles.py's; the snapshots' kernels are in field_snapshot.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .field_gradient import _dense_keys
from .field_rows import (
    GAIN,
    INVERSE,
    KEEP,
    PEAK,
    VALUES,
    WEIGHT,
    _dense_rows,
    _row_masses,
    entries,
    own_columns,
    row_positions,
    touched,
)
from .field_snapshot import snapshot_gradient, snapshot_pass
from .needs import BOTH, Needs, rooms
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
    store_rows,
)
from .softmax_sums import softmax_sums

__all__ = ["dense_gradient", "dense_pass", "snapshot_gradient", "snapshot_pass"]


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
    mass_ptr,  # [3, R]        in, fp64
    noise_ptr,  # [R + B]      in, int32
    scale_ptr,  # []           in, c
    loss_ptr,  # [R]           out, fp64
    gradient_ptr,  # [R, D]    out
    queries_stride,
    keys_stride,
    matrix_stride,
    n,
    m,
    dim,
    LOSS: tl.constexpr,
    UPDATE: tl.constexpr,
    GRADIENT: tl.constexpr,
    NOISE: tl.constexpr,  # round by chance
    BY_ROW: tl.constexpr,
    BY_COL: tl.constexpr,
    BY_OWN: tl.constexpr,  # a row's own column is given, else it is its number
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
    """One program per block of rows and, of a gradient alone, stripe of WIDTH columns:

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
    sums = (tl.zeros([ROWS, COLS], tl.float32), tl.zeros([ROWS, LANES], tl.float32))
    acc = tl.zeros([ROWS, WIDTH], tl.float32)
    stripe = tl.program_id(1) * WIDTH
    whole, first, last = touched(own, m, ROWS, COLS)
    for turn in range(0, whole - (last - first)):
        at = (turn + tl.where(turn >= first, last - first, 0)) * COLS
        sums, acc = walk_tile(
            sums, acc, rows, moves, q, scale, queries_ptr, queries_stride, first_i, n, keys_ptr,
            keys_stride, at, m, dim, stripe, matrix_ptr, matrix_stride, cols_ptr, noise_ptr, LOSS,
            UPDATE, GRADIENT, NOISE, BY_COL, ROWS, COLS, WIDTH, CHUNKS, FULL, PRECISION,
            GRADIENT_PRECISION, UPCAST, False,
        )  # fmt: skip
    left = last - first + tl.where(whole * COLS < m, 1, 0)
    for turn in tl.range(0, left, num_stages=1, disable_licm=True):
        at = tl.where(turn < last - first, first + turn, whole) * COLS
        sums, acc = walk_tile(
            sums, acc, rows, moves, q, scale, queries_ptr, queries_stride, first_i, n, keys_ptr,
            keys_stride, at, m, dim, stripe, matrix_ptr, matrix_stride, cols_ptr, noise_ptr, LOSS,
            UPDATE, GRADIENT, NOISE, BY_COL, ROWS, COLS, WIDTH, CHUNKS, FULL, PRECISION,
            GRADIENT_PRECISION, UPCAST, True,
        )  # fmt: skip
    if GRADIENT:
        acc *= block_values(table_ptr + WEIGHT * n, 1, first_i, n, ROWS, 1, True)
        store_rows(gradient_ptr, i, n, stripe, dim, acc, WIDTH)
    mass = tl.load(mass_ptr + i, mask=i < n, other=0.0)
    if LOSS:
        total = tl.load(mass_ptr + 2 * n + i, mask=i < n, other=1.0)  # of e
        excess = tl.where(mass > 0, mass * tl.sum(inverse, 1).to(tl.float64), total)  # of p
        kl = LN2 * tl.sum(sums[0], 1).to(tl.float64) / excess - tl.log(excess / total)
        tl.store(loss_ptr + i, tl.where(mass > 0, kl, 0.0 * total), mask=i < n)
    if UPDATE:
        others = tl.sum(sums[1], 1).to(tl.float64)
        after = tl.load(mass_ptr + n + i, mask=i < n, other=0.0)
        left_over = tl.maximum(after - others, 0.0).to(tl.float32)
        tl.store(diagonal_ptr + row, left_over, mask=moves)
        before = tl.load(row_sum_ptr + row, mask=moves, other=0.0)
        sum_now = before + (others + left_over.to(tl.float64) - mass)
        tl.store(row_sum_ptr + row, sum_now, mask=moves)


@triton.jit
def walk_tile(
    sums,  # of p log2(p / e), [ROWS, COLS], and of what is stored, [ROWS, LANES], in parts
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
    divergence, others = sums
    if LOSS:
        divergence += p * (log2(p, PRECISION) - x)
    if GRADIENT:
        if CHUNKS > 1:
            k = load_rows(
                keys_ptr, keys_stride, first_j, m, stripe, dim, COLS, WIDTH, FULL, EDGE, UPCAST
            )
        acc = into(acc, e - p, k, GRADIENT_PRECISION)
    if UPDATE:
        new = stored * keep + e * gain
        if EDGE:
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
    return (divergence, others), acc


def dense_pass(
    queries: Tensor,
    keys: Tensor,
    matrix: Tensor,
    diagonal: Tensor,
    row_sum: Tensor,
    rows: Tensor | None,
    cols: Tensor | None,
    own: Tensor | None,
    start: int,
    scale: Tensor,
    alpha: Tensor | None,
    clock: Tensor,
    needs: Needs,
) -> tuple[Tensor, Tensor, Tensor]:  # [R] float64, [R, D], [B, D]
    n = len(matrix)
    whole = rows is None and cols is None and start == 0 and len(queries) == len(keys) == n
    run = Dense(queries, keys, matrix, diagonal, rows, cols, own, start, scale)
    run.prepare(row_sum, whole=whole, alpha=alpha, clock=clock)
    loss = queries.new_empty(len(queries), dtype=torch.float64)
    d_queries, d_keys = rooms(queries, keys, needs, torch.float32)
    if needs[1]:
        run.keys_gradient(d_keys)  # before the block changes
    if needs[0] and run.dims["CHUNKS"] == 1:
        run.walk(loss=loss, update=alpha is not None, gradient=d_queries)
    else:
        if needs[0]:
            run.walk(gradient=d_queries)
        run.walk(loss=loss, update=alpha is not None)
    return loss, d_queries, d_keys


def dense_gradient(
    queries: Tensor,
    keys: Tensor,
    matrix: Tensor,
    diagonal: Tensor,
    rows: Tensor | None,
    cols: Tensor | None,
    own: Tensor | None,
    start: int,
    scale: Tensor,
    weights: Tensor,
    needs: Needs = BOTH,
) -> tuple[Tensor, Tensor]:  # [R, D], [B, D]
    run = Dense(queries, keys, matrix, diagonal, rows, cols, own, start, scale)
    run.prepare(None, weights=weights.contiguous())
    d_queries, d_keys = rooms(queries, keys, needs, torch.float32)
    if needs[0]:
        run.walk(gradient=d_queries)
    if needs[1]:
        run.keys_gradient(d_keys)
    return d_queries, d_keys


class Dense:
    """Launches over one block of the field, and the tables that they share."""

    def __init__(
        self,
        queries: Tensor,
        keys: Tensor,
        matrix: Tensor,
        diagonal: Tensor,
        rows: Tensor | None,
        cols: Tensor | None,
        own: Tensor | None,
        start: int,
        scale: Tensor,
    ) -> None:
        if matrix.dtype not in (torch.float32, torch.bfloat16):
            raise TypeError(f"backend='triton' takes no field of {matrix.dtype}")
        self.queries, self.keys = launch.rows_contiguous(queries), launch.rows_contiguous(keys)
        self.scale, self.start, self.own, self.cols = scale, start, own, cols
        self.rows, self.diagonal, self.matrix = rows, diagonal, matrix
        if rows is None:
            self.matrix, self.diagonal = matrix[start:], diagonal[start:]
        if cols is None:
            self.matrix = self.matrix[:, start:]
        self.row_sum, self.alpha, self.clock = diagonal, scale, scale
        self.n, self.dim = queries.shape
        self.m = len(keys)
        self.noise = matrix.dtype == torch.bfloat16
        self.gathered = "" if rows is None else "_gathered"
        self.index = {"BY_ROW": rows is not None, "BY_COL": cols is not None}
        self.dims = launch.dims(queries)
        dense = self.queries.stride(0) == self.keys.stride(0) == self.dims["WIDTH"]
        self.layout = {
            **self.index, "BY_OWN": own is not None, "DENSE": dense,
            "GRADIENT_PRECISION": launch.gradient_precision(queries),
        }  # fmt: skip
        self.table = queries.new_empty(VALUES, self.n, dtype=torch.float32)
        self.mass = queries.new_empty(3, self.n, dtype=torch.float64)
        self.keys_of_noise = queries.new_empty(self.n + self.m, dtype=torch.int32)

    def indices(self, *given: Tensor | None) -> list[Tensor]:
        """A tensor that nobody reads for one that is not given."""
        return [self.table if x is None else x for x in given]

    def prepare(
        self,
        row_sum: Tensor | None,
        *,
        whole: bool = False,
        weights: Tensor | None = None,
        alpha: Tensor | None = None,
        clock: Tensor | None = None,
    ) -> None:
        """The tables."""
        queries, n, m = self.queries, self.n, self.m
        peak, mass, _, total = softmax_sums(queries, self.keys, self.scale.view(1), False, [])
        masses = peak
        if not whole:
            masses = queries.new_empty(n, dtype=torch.float32)
            config = launch.config("field_masses", queries)
            _row_masses[(triton.cdiv(n, config.rows),)](
                self.matrix, *self.indices(self.rows, self.cols), masses, self.matrix.stride(0), n,
                m, **self.index, ROWS=config.rows, COLS=config.cols, **config.options,
            )  # fmt: skip
        if row_sum is not None:
            self.row_sum = row_sum if self.rows is not None else row_sum[self.start :]
        _dense_rows[(triton.cdiv(max(n, m), 128),)](
            peak, mass, total, masses, self.diagonal, self.row_sum,
            *self.indices(weights, self.rows, self.cols, self.own), self.scale,
            *self.indices(alpha, clock), self.table, self.mass, self.keys_of_noise, n, m,
            self.start, WHOLE=whole, WEIGHTED=weights is not None, UPDATE=alpha is not None,
            NOISE=alpha is not None and self.noise, **self.index, BY_OWN=self.own is not None,
            COUNT=128, num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip

    def walk(
        self, *, loss: Tensor | None = None, update: bool = False, gradient: Tensor | None = None
    ) -> None:
        config = launch.config(f"field_walk{self.gathered}", self.queries)
        stripes = 1 if gradient is None else self.dims["CHUNKS"]
        _dense_walk[(triton.cdiv(self.n, config.rows), stripes)](
            self.queries, self.keys, self.matrix, self.diagonal, self.row_sum,
            *self.indices(self.rows, self.cols, self.own), self.table, self.mass,
            self.keys_of_noise, self.scale, *self.indices(loss, gradient), self.queries.stride(0),
            self.keys.stride(0), self.matrix.stride(0), self.n, self.m, self.dim,
            LOSS=loss is not None, UPDATE=update, GRADIENT=gradient is not None,
            NOISE=update and self.noise, **self.layout, **self.dims, ROWS=config.rows,
            COLS=config.cols, **config.options,
        )  # fmt: skip

    def keys_gradient(self, gradient: Tensor) -> None:
        config = launch.config(f"field_keys{self.gathered}", self.queries)
        _dense_keys[(triton.cdiv(self.m, config.cols), self.dims["CHUNKS"])](
            self.queries, self.keys, self.matrix, self.diagonal,
            *self.indices(self.rows, self.cols, self.own), self.table, self.scale, gradient,
            self.queries.stride(0), self.keys.stride(0), self.matrix.stride(0), self.n, self.m,
            self.dim, **self.layout, **self.dims, ROWS=config.rows, COLS=config.cols,
            **config.options,
        )  # fmt: skip
