"""Kernels: the snapshot field's loss and gradient, a walk with K + 1 products a tile.

The functions at the end are field_tiles.py's.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch, parts
from .field_mixture import WEIGHT, _past_sums, _snapshot_rows, mixture
from .needs import BOTH, Needs, rooms
from .parts import store_part
from .primitives import LANES, LN2, LOG2E, block_values, fold, into, load_rows, log2, walk
from .softmax_sums import softmax_sums


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
    parts_ptr,  # [splits, 3, R]    out, fp64, for SPLIT: what `row_losses` takes
    gradient_ptr,  # [R or B, D]    out; a part a split, where they are split
    queries_stride,
    keys_stride,
    n,
    m,
    dim,
    entries,  # L
    span,  # rows of the other operand that a split walks over
    QUERIES: tl.constexpr,  # the gradient to the queries, else to the keys
    LOSS: tl.constexpr,
    GRADIENT: tl.constexpr,
    LABELS: tl.constexpr,
    HISTORY: tl.constexpr,  # K
    PAST_UPCAST: tl.constexpr,
    UNROLL: tl.constexpr,  # see `mixture`
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
    """One program per block of rows, or of keys, stripe of WIDTH columns of a gradient, and split:

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
        start, _, stop = walk(span, m, SPLIT, COLS)
        for first_j in tl.range(start, stop, COLS, num_stages=1, disable_licm=True):
            x, p = mixture(
                queries_ptr, queries_stride, first_i, n, keys_ptr, keys_stride, first_j, m, dim,
                scale, past, prior, LABELS, HISTORY, PAST_UPCAST, UNROLL, ROWS, COLS, WIDTH, CHUNKS,
                FULL, PRECISION, UPCAST,
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
            store_part(gradient_ptr, i, n, stripe, dim, acc, WIDTH, SPLIT)
        if LOSS:
            of_e = tl.sum(total, 1).to(tl.float64)
            of_p = tl.sum(excess, 1).to(tl.float64)
            kl = tl.sum(divergence, 1).to(tl.float64)
            first_stripe = i < tl.where(tl.program_id(1) == 0, n, 0)
            if SPLIT:
                part = parts_ptr + tl.program_id(2) * tl.cast(n, tl.int64) * 3 + i
                tl.store(part, of_e, mask=first_stripe)
                tl.store(part + n, of_p, mask=first_stripe)
                tl.store(part + 2 * n, kl, mask=first_stripe)
            else:
                row_losses(of_e, of_p, kl, i, first_stripe, known_ptr, loss_ptr)
    else:
        first_j = tl.program_id(0) * COLS
        acc = tl.zeros([COLS, WIDTH], tl.float32)
        start, _, stop = walk(span, n, SPLIT, ROWS)
        for first_i in tl.range(start, stop, ROWS, num_stages=1, disable_licm=True):
            x, p = mixture(
                queries_ptr, queries_stride, first_i, n, keys_ptr, keys_stride, first_j, m, dim,
                scale, past, prior, LABELS, HISTORY, PAST_UPCAST, UNROLL, ROWS, COLS, WIDTH, CHUNKS,
                FULL, PRECISION, UPCAST,
            )  # fmt: skip
            g = tl.exp2(x) - p
            g *= block_values(table_ptr + WEIGHT * n, 1, first_i, n, ROWS, 1, True)
            q = load_rows(
                queries_ptr, queries_stride, first_i, n, stripe, dim, ROWS, WIDTH, FULL, True,
                UPCAST,
            )  # fmt: skip
            acc = into(acc, tl.trans(g), q, GRADIENT_PRECISION)
        store_part(gradient_ptr, first_j + tl.arange(0, COLS), m, stripe, dim, acc, WIDTH, SPLIT)


@triton.jit
def row_losses(
    of_e,  # [COUNT] fp64, Σ_j e
    of_p,  # [COUNT] fp64, Σ_j p
    divergence,  # [COUNT] fp64, Σ_j p log2(p / e)
    i,
    there,
    known_ptr,
    loss_ptr,
):
    known = tl.load(known_ptr + i, mask=there, other=0.0) > 0
    of_p = tl.where(known, of_p, of_e)
    kl = LN2 * divergence / of_p - tl.log(of_p / of_e)
    tl.store(loss_ptr + i, tl.where(known, kl, 0.0 * of_e), mask=there)


@triton.jit
def _snapshot_losses(
    parts_ptr,  # [splits, 3, R]  in, fp64
    known_ptr,  # [R]             in
    loss_ptr,  # [R]              out, fp64
    n,
    splits,
    COUNT: tl.constexpr,
):
    """One program per COUNT rows: what the splits of a walk have added up, in their order."""
    i = tl.program_id(0) * COUNT + tl.arange(0, COUNT)
    of_e = tl.zeros([COUNT], tl.float64)
    of_p = tl.zeros([COUNT], tl.float64)
    divergence = tl.zeros([COUNT], tl.float64)
    for s in range(splits):
        part = parts_ptr + s * tl.cast(n, tl.int64) * 3 + i
        of_e += tl.load(part, mask=i < n, other=1.0)
        of_p += tl.load(part + n, mask=i < n, other=1.0)
        divergence += tl.load(part + 2 * n, mask=i < n, other=0.0)
    row_losses(of_e, of_p, divergence, i, i < n, known_ptr, loss_ptr)


@launch.on_device
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


@launch.on_device
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
        sums = queries.new_empty(2 * self.history * n, dtype=torch.float32)
        config = launch.config("snapshot_sums", past_keys[0])
        # One width, so that every pass rounds S alike: that of the wider dtype.
        width = min(launch.dims(x)["WIDTH"] for x in (queries, past_keys[0]))
        blocks = triton.cdiv(n, config.rows)
        splits, span = launch.split(blocks * self.history, self.m, config.cols, config.warps, sums)
        past_peak, past_sum = sums.new_empty(2, splits, self.history, n)
        _past_sums[(blocks, self.history, splits)](
            past_queries, past_keys, scales, visits, past_peak, past_sum, n, self.m, self.dim,
            self.history, span, SPLIT=splits > 1, **launch.dims(past_keys[0], width),
            ROWS=config.rows, COLS=config.cols, **config.options,
        )  # fmt: skip
        peak, total, _, _ = softmax_sums(self.queries, self.keys, scale.view(1), False, [])
        self.table = queries.new_empty(3 + 3 * self.history, n, dtype=torch.float32)
        self.known = queries.new_empty(n, dtype=torch.float32)
        _snapshot_rows[(triton.cdiv(n, 128),)](
            peak, total, past_peak, past_sum, weights, scales, prior,
            *self.given(loss_weights), scale, self.table, self.known, n, prior.shape[1],
            splits, HISTORY=self.history, WEIGHTED=loss_weights is not None, COUNT=128, num_warps=4,
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
        self.width, self.past_size = width, past_keys.element_size()

    def fits_unrolled(self, config: launch.Config, dims: dict[str, Any]) -> bool:
        """Whether shared memory holds a tile of every visit's rows, and one of each operand's."""
        least = 4 if launch.target(self.queries) == "sm_75" else 1  # where float32 is multiplied
        sizes = [max(least, self.past_size)] * self.history
        sizes.append(max(least, self.queries.element_size()))
        copies = {4: 2 if dims["PRECISION"] == "tf32x3" else 1}  # the digits in two parts
        held = [dims["WIDTH"] * size * copies.get(size, 1) for size in sizes]
        tallest = max(config.rows, config.cols)
        limit = launch.shared_memory(self.queries)
        return dims["CHUNKS"] > 1 or tallest * (sum(held) + max(held)) <= limit

    def given(self, *tensors: Tensor | None) -> list[Tensor]:
        """A tensor that nobody reads for one that is not given."""
        return [self.table if x is None else x.contiguous() for x in tensors]

    def walk(
        self, side: str, *, loss: Tensor | None = None, gradient: Tensor | None = None
    ) -> None:
        config = launch.config(f"snapshot_{side}", self.queries)
        dims = launch.dims(self.queries, min(config.width or self.width, self.width))
        rows = side == "rows"
        own, other = (config.rows, config.cols) if rows else (config.cols, config.rows)
        blocks, walked = triton.cdiv(self.n if rows else self.m, own), self.m if rows else self.n
        # As many with a gradient as without: the same bits of the loss.
        splits, span = launch.split(
            blocks * dims["CHUNKS"], walked, other, config.warps, self.queries, launch.CROWDED
        )
        sums = self.table
        if splits > 1 and loss is not None:
            sums = loss.new_empty(splits, 3, self.n)
        out = self.table if gradient is None else parts.room(gradient, splits)
        _snapshot_walk[(blocks, 1 if gradient is None else dims["CHUNKS"], splits)](
            *self.tensors, *self.given(loss), sums, out, *self.numbers, span, QUERIES=rows,
            LOSS=loss is not None, GRADIENT=gradient is not None, SPLIT=splits > 1,
            UNROLL=self.fits_unrolled(config, dims), **self.constants, **dims, ROWS=config.rows,
            COLS=config.cols, **config.options,
        )  # fmt: skip
        if gradient is not None:
            parts.add(out, gradient)
        if splits > 1 and loss is not None:
            _snapshot_losses[(triton.cdiv(self.n, 128),)](
                sums, self.known, loss, self.n, splits, COUNT=128, num_warps=4,
                enable_fp_fusion=True,
            )  # fmt: skip
