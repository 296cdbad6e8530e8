"""Kernels: the snapshot field's loss and gradient, its mixture of past softmaxes tile by tile.

Normalisers of all softmaxes come first, then a walk over the block with K + 1 products a tile. The
functions at the end are field_tiles.py's.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
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
    store_rows,
)
from .softmax_sums import LEFT_OUT, LOWEST, softmax_sums

# Of every row, float32: q = f exp(c (S − PEAK)), 1 / f, and WEIGHT = ∂L/∂loss c f; then of every s
# a triple, with w_s q^(s) / f = share 2^(scale (S^(s) − peak)).
PEAK, INVERSE, WEIGHT, PASTS = (tl.constexpr(at) for at in range(4))


@triton.jit
def _past_sums(
    past_queries_ptr,  # [K, R, D]  in
    past_keys_ptr,  # [K, B, D]     in
    scales_ptr,  # [R, K]           in, c_s
    visits_ptr,  # [B]              in, int64
    peak_ptr,  # [K, R]             out
    mass_ptr,  # [K, R]             out
    n,
    m,
    dim,
    steps,  # K
    WIDTH: tl.constexpr,
    CHUNKS: tl.constexpr,
    FULL: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """One program per block of rows and past visit s, over columns with more than s visits:

    peak = max_j S^(s),  mass = Σ_j exp(c_s (S^(s) − peak))
    """
    first_i = tl.program_id(0) * ROWS
    s = tl.program_id(1).to(tl.int64)
    past_queries_ptr += s * n * dim
    past_keys_ptr += s * m * dim
    scale = block_values(scales_ptr + s, steps, first_i, n, ROWS, 1, True) * LOG2E
    peak = tl.full([ROWS], LOWEST, tl.float32)
    mass = tl.zeros([ROWS, LANES], tl.float32)
    for first_j in range(0, m, COLS):
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
    tl.store(peak_ptr + s * n + i, peak, mask=i < n)
    tl.store(mass_ptr + s * n + i, tl.sum(mass, 1), mask=i < n)


@triton.jit
def _snapshot_rows(
    peak_ptr,  # [R]                 in, max_j S_ij
    sum_ptr,  # [R]                  in, Σ_j exp(c (S_ij − peak_i))
    past_peak_ptr,  # [K, R]         in
    past_sum_ptr,  # [K, R]          in
    weights_ptr,  # [R, K]           in, w_s
    scales_ptr,  # [R, K]            in, c_s
    prior_ptr,  # [R, L]             in
    loss_weights_ptr,  # [R]         in, ∂L/∂loss, for WEIGHTED
    scale_ptr,  # []                 in, c
    table_ptr,  # [PASTS + 3 K, R]   out
    known_ptr,  # [R]                out, 1 where a row has a target, else 0
    n,
    entries,  # L
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
        total = tl.load(past_sum_ptr + s * n + i, mask=counts, other=1.0).to(tl.float64)
        past = out + (PASTS + 3 * s) * n
        tl.store(past, c, mask=there)
        peak = tl.load(past_peak_ptr + s * n + i, mask=counts, other=0.0)
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
def _snapshot_walk(
    queries_ptr,  # [R, D]          in
    keys_ptr,  # [B, D]             in
    past_queries_ptr,  # [K, R, D]  in
    past_keys_ptr,  # [K, B, D]     in
    table_ptr,  # [PASTS + 3 K, R]  in
    known_ptr,  # [R]               in
    visits_ptr,  # [B]              in, int64
    prior_ptr,  # [R, L]            in
    prior_cols_ptr,  # [R, L]       in, int64, unless LABELS
    row_labels_ptr,  # [R]          in, int64, for LABELS
    col_labels_ptr,  # [B]          in, int64, for LABELS
    scale_ptr,  # []                in, c
    loss_ptr,  # [R]                out, fp64
    gradient_ptr,  # [R or B, D]    out
    queries_stride,
    keys_stride,
    n,
    m,
    dim,
    entries,  # L
    QUERIES: tl.constexpr,  # the gradient to the queries, else to the keys
    LOSS: tl.constexpr,
    GRADIENT: tl.constexpr,
    LABELS: tl.constexpr,
    HISTORY: tl.constexpr,  # K
    PAST_UPCAST: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNKS: tl.constexpr,
    FULL: tl.constexpr,
    PRECISION: tl.constexpr,
    GRADIENT_PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """One program per block of rows, or of keys, and stripe of WIDTH columns of the gradient:

    loss_i = KL(p_i ‖ q_i),  ∂L/∂queries = G keys or ∂L/∂keys = Gᵀ queries,  G = weight c (q − p)

    In units of f, as in field.py: e = q / f, p = (Σ_s w_s q^(s) + p⁰) / f.
    """
    stripe = tl.program_id(1) * WIDTH
    scale = tl.load(scale_ptr).to(tl.float32) * LOG2E
    past = (past_queries_ptr, past_keys_ptr, table_ptr, visits_ptr)
    prior = (prior_ptr, prior_cols_ptr, row_labels_ptr, col_labels_ptr, entries)
    if QUERIES:
        first_i = tl.program_id(0) * ROWS
        i = first_i + tl.arange(0, ROWS)
        acc = tl.zeros([ROWS, WIDTH], tl.float32)
        total = tl.zeros([ROWS, LANES], tl.float32)  # of e, in parts, and of p
        excess = tl.zeros([ROWS, LANES], tl.float32)
        divergence = tl.zeros([ROWS, LANES], tl.float32)
        for first_j in tl.range(0, m, COLS, num_stages=1, disable_licm=True):
            x, p = mixture(
                queries_ptr, queries_stride, first_i, n, keys_ptr, keys_stride, first_j, m, dim,
                scale, past, prior, LABELS, HISTORY, PAST_UPCAST, ROWS, COLS, WIDTH, CHUNKS, FULL,
                PRECISION, UPCAST,
            )  # fmt: skip
            here = (first_j + tl.arange(0, COLS) < m)[None, :]
            e = tl.where(here, tl.exp2(x), 0.0)
            if LOSS:
                total += fold(e, ROWS, COLS)
                excess += fold(tl.where(here, p, 0.0), ROWS, COLS)
                kl = p * (log2(p, PRECISION) - x)
                divergence += fold(tl.where(here, kl, 0.0), ROWS, COLS)
            if GRADIENT:
                k = load_rows(
                    keys_ptr, keys_stride, first_j, m, stripe, dim, COLS, WIDTH, FULL, True, UPCAST
                )
                acc = into(acc, e - p, k, GRADIENT_PRECISION)
        if GRADIENT:
            acc *= block_values(table_ptr + WEIGHT * n, 1, first_i, n, ROWS, 1, True)
            store_rows(gradient_ptr, i, n, stripe, dim, acc, WIDTH)
        if LOSS:
            known = tl.load(known_ptr + i, mask=i < n, other=0.0) > 0
            of_e = tl.sum(total, 1).to(tl.float64)
            of_p = tl.where(known, tl.sum(excess, 1).to(tl.float64), of_e)
            kl = LN2 * tl.sum(divergence, 1).to(tl.float64) / of_p - tl.log(of_p / of_e)
            first_stripe = i < tl.where(tl.program_id(1) == 0, n, 0)
            tl.store(loss_ptr + i, tl.where(known, kl, 0.0 * of_e), mask=first_stripe)
    else:
        first_j = tl.program_id(0) * COLS
        acc = tl.zeros([COLS, WIDTH], tl.float32)
        for first_i in tl.range(0, n, ROWS, num_stages=1, disable_licm=True):
            x, p = mixture(
                queries_ptr, queries_stride, first_i, n, keys_ptr, keys_stride, first_j, m, dim,
                scale, past, prior, LABELS, HISTORY, PAST_UPCAST, ROWS, COLS, WIDTH, CHUNKS, FULL,
                PRECISION, UPCAST,
            )  # fmt: skip
            g = tl.exp2(x) - p
            g *= block_values(table_ptr + WEIGHT * n, 1, first_i, n, ROWS, 1, True)
            q = load_rows(
                queries_ptr, queries_stride, first_i, n, stripe, dim, ROWS, WIDTH, FULL, True,
                UPCAST,
            )  # fmt: skip
            acc = into(acc, tl.trans(g), q, GRADIENT_PRECISION)
        store_rows(gradient_ptr, first_j + tl.arange(0, COLS), m, stripe, dim, acc, WIDTH)


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
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNKS: tl.constexpr,
    FULL: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """log2 e and p, [ROWS, COLS]."""
    past_queries_ptr, past_keys_ptr, table_ptr, visits_ptr = past
    prior_ptr, prior_cols_ptr, row_labels_ptr, col_labels_ptr, entries = prior
    visits = block_values(visits_ptr, 1, first_j, m, COLS, 0, True)
    p = tl.zeros([ROWS, COLS], tl.float32) + TINY
    for s in tl.static_range(HISTORY):
        x = product(
            past_queries_ptr + tl.full([], s, tl.int64) * n * dim, dim, first_i, n,
            past_keys_ptr + tl.full([], s, tl.int64) * m * dim, dim, first_j, m, dim, ROWS, COLS,
            WIDTH, CHUNKS, FULL, PRECISION, PAST_UPCAST,
        )  # fmt: skip
        at = table_ptr + (PASTS + 3 * s) * n
        c = block_values(at, 1, first_i, n, ROWS, 1, True)
        peak = block_values(at + n, 1, first_i, n, ROWS, 1, True)
        share = block_values(at + 2 * n, 1, first_i, n, ROWS, 1, True)
        x = tl.where((visits > s) & (share != 0), (x - peak) * c, LEFT_OUT)
        p += share * tl.exp2(x)
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


def snapshot_pass(
    queries: Tensor,
    keys: Tensor,
    past_queries: Tensor,
    past_keys: Tensor,
    weights: Tensor,
    scales: Tensor,
    visits: Tensor,
    prior: Tensor,
    prior_cols: Tensor | None,
    row_labels: Tensor | None,
    col_labels: Tensor | None,
    scale: Tensor,
    needs: Needs,
) -> tuple[Tensor, Tensor, Tensor]:  # [R] float64, [R, D], [B, D]
    run = Snapshots(
        queries, keys, past_queries, past_keys, weights, scales, visits, prior, prior_cols,
        row_labels, col_labels, scale, None,
    )  # fmt: skip
    loss = queries.new_empty(len(queries), dtype=torch.float64)
    d_queries, d_keys = rooms(queries, keys, needs, torch.float32)
    run.walk("rows", loss=loss, gradient=d_queries if needs[0] else None)
    if needs[1]:
        run.walk("keys", gradient=d_keys)
    return loss, d_queries, d_keys


def snapshot_gradient(
    queries: Tensor,
    keys: Tensor,
    past_queries: Tensor,
    past_keys: Tensor,
    weights: Tensor,
    scales: Tensor,
    visits: Tensor,
    prior: Tensor,
    prior_cols: Tensor | None,
    row_labels: Tensor | None,
    col_labels: Tensor | None,
    scale: Tensor,
    loss_weights: Tensor,
    needs: Needs = BOTH,
) -> tuple[Tensor, Tensor]:  # [R, D], [B, D]
    run = Snapshots(
        queries, keys, past_queries, past_keys, weights, scales, visits, prior, prior_cols,
        row_labels, col_labels, scale, loss_weights.contiguous(),
    )  # fmt: skip
    d_queries, d_keys = rooms(queries, keys, needs, torch.float32)
    if needs[0]:
        run.walk("rows", gradient=d_queries)
    if needs[1]:
        run.walk("keys", gradient=d_keys)
    return d_queries, d_keys


class Snapshots:
    """Launches over one batch, and the table that they share."""

    def __init__(
        self,
        queries: Tensor,
        keys: Tensor,
        past_queries: Tensor,
        past_keys: Tensor,
        weights: Tensor,
        scales: Tensor,
        visits: Tensor,
        prior: Tensor,
        prior_cols: Tensor | None,
        row_labels: Tensor | None,
        col_labels: Tensor | None,
        scale: Tensor,
        loss_weights: Tensor | None,
    ) -> None:
        if weights.dtype != torch.float32:
            raise TypeError(f"backend='triton' takes no field of {weights.dtype}")
        self.queries, self.keys = launch.rows_contiguous(queries), launch.rows_contiguous(keys)
        past_queries, past_keys = past_queries.contiguous(), past_keys.contiguous()
        weights, scales, prior = weights.contiguous(), scales.contiguous(), prior.contiguous()
        visits = visits.contiguous()
        self.scale, self.history = scale, len(past_keys)
        self.n, self.dim = queries.shape
        self.m, n = len(keys), self.n
        past_peak, past_sum = queries.new_empty(2, self.history, n, dtype=torch.float32)
        config = launch.config("snapshot_sums", past_keys[0])
        width = launch.dims(queries)["WIDTH"]
        _past_sums[(triton.cdiv(n, config.rows), self.history)](
            past_queries, past_keys, scales, visits, past_peak, past_sum, n, self.m, self.dim,
            self.history, **launch.dims(past_keys[0], width), ROWS=config.rows, COLS=config.cols,
            **config.options,
        )  # fmt: skip
        peak, total, _, _ = softmax_sums(self.queries, self.keys, scale.view(1), False, [])
        self.table = queries.new_empty(3 + 3 * self.history, n, dtype=torch.float32)
        self.known = queries.new_empty(n, dtype=torch.float32)
        _snapshot_rows[(triton.cdiv(n, 128),)](
            peak, total, past_peak, past_sum, weights, scales, prior,
            *self.given(loss_weights), scale, self.table, self.known, n, prior.shape[1],
            HISTORY=self.history, WEIGHTED=loss_weights is not None, COUNT=128, num_warps=4,
            enable_fp_fusion=True,
        )  # fmt: skip
        self.tensors = (
            self.queries, self.keys, past_queries, past_keys, self.table, self.known, visits, prior,
            *self.given(prior_cols, row_labels, col_labels), scale,
        )  # fmt: skip
        self.numbers = (
            self.queries.stride(0), self.keys.stride(0), n, self.m, self.dim, prior.shape[1],
        )  # fmt: skip
        interpreted = launch.triton_status() == "interpreted"
        self.constants: dict[str, Any] = {
            "LABELS": prior_cols is None,
            "HISTORY": self.history,
            "PAST_UPCAST": interpreted and past_keys.dtype == torch.bfloat16,
            "GRADIENT_PRECISION": launch.gradient_precision(queries),
        }

    def given(self, *tensors: Tensor | None) -> list[Tensor]:
        """A tensor that nobody reads for one that is not given."""
        return [self.table if x is None else x.contiguous() for x in tensors]

    def walk(
        self, side: str, *, loss: Tensor | None = None, gradient: Tensor | None = None
    ) -> None:
        config = launch.config(f"snapshot_{side}", self.queries)
        dims = launch.dims(self.queries, config.width)
        rows = side == "rows"
        blocks = triton.cdiv(self.n, config.rows) if rows else triton.cdiv(self.m, config.cols)
        _snapshot_walk[(blocks, 1 if gradient is None else dims["CHUNKS"])](
            *self.tensors, *self.given(loss, gradient), *self.numbers, QUERIES=rows,
            LOSS=loss is not None, GRADIENT=gradient is not None, **self.constants, **dims,
            ROWS=config.rows, COLS=config.cols, **config.options,
        )  # fmt: skip
