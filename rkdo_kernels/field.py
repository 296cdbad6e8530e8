"""The dense response field by kernels: field_tiles.py's functions, of both kinds of field.

What a walk over the block does is in field_walk.py and field_gradient.py, what it needs to know of
rows first in field_rows.py; the snapshots' functions are field_snapshot.py's.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from . import launch, parts
from .field_gradient import _dense_keys
from .field_rows import VALUES, _dense_rows, _row_masses
from .field_snapshot import snapshot_gradient, snapshot_pass
from .field_walk import _dense_finish, _dense_walk
from .needs import BOTH, Needs, rooms
from .softmax_sums import softmax_sums

__all__ = ["dense_gradient", "dense_pass", "snapshot_gradient", "snapshot_pass"]


@launch.on_device
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


@launch.on_device
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
        self.mass = queries.new_empty(2, self.n, dtype=torch.float64)
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
        masses, splits = peak, 1
        if not whole:
            masses = queries.new_empty(n, dtype=torch.float32)
            config = launch.config("field_masses", queries)
            blocks = triton.cdiv(n, config.rows)
            splits, span = launch.split(blocks, m, config.cols, config.warps, masses)
            masses = parts.room(masses, splits)
            _row_masses[(blocks, 1, splits)](
                self.matrix, *self.indices(self.rows, self.cols), masses, self.matrix.stride(0), n,
                m, span, **self.index, SPLIT=splits > 1, ROWS=config.rows, COLS=config.cols,
                **config.options,
            )  # fmt: skip
        if row_sum is not None:
            self.row_sum = row_sum if self.rows is not None else row_sum[self.start :]
        _dense_rows[(triton.cdiv(max(n, m), 128),)](
            peak, mass, total, masses, self.diagonal, self.row_sum,
            *self.indices(weights, self.rows, self.cols, self.own), self.scale,
            *self.indices(alpha, clock), self.table, self.mass, self.keys_of_noise, n, m,
            self.start, splits, WHOLE=whole, WEIGHTED=weights is not None, UPDATE=alpha is not None,
            NOISE=alpha is not None and self.noise, **self.index, BY_OWN=self.own is not None,
            COUNT=128, num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip

    def walk(
        self, *, loss: Tensor | None = None, update: bool = False, gradient: Tensor | None = None
    ) -> None:
        config = launch.config(f"field_walk{self.gathered}", self.queries)
        blocks = triton.cdiv(self.n, config.rows)
        stripes = 1 if gradient is None else self.dims["CHUNKS"]
        # As many for every kind of walk: `step` has the bits of `loss` and `update`.
        splits, span = launch.split(
            blocks, self.m, config.cols, config.warps, self.queries, launch.CROWDED
        )
        sums = self.mass.new_empty(splits, 3, self.n) if splits > 1 else self.mass
        out = self.table if gradient is None else parts.room(gradient, splits)
        _dense_walk[(blocks, stripes, splits)](
            self.queries, self.keys, self.matrix, self.diagonal, self.row_sum,
            *self.indices(self.rows, self.cols, self.own), self.table, self.mass,
            self.keys_of_noise, self.scale, *self.indices(loss), sums, out, self.queries.stride(0),
            self.keys.stride(0), self.matrix.stride(0), self.n, self.m, self.dim, span,
            LOSS=loss is not None, UPDATE=update, GRADIENT=gradient is not None,
            NOISE=update and self.noise, SPLIT=splits > 1, **self.layout, **self.dims,
            ROWS=config.rows, COLS=config.cols, **config.options,
        )  # fmt: skip
        if gradient is not None:
            parts.add(out, gradient)
        if splits > 1 and (update or loss is not None):
            _dense_finish[(triton.cdiv(self.n, 128),)](
                sums, *self.indices(self.rows), self.table, self.mass, self.diagonal,
                self.row_sum, *self.indices(loss), self.n, splits, LOSS=loss is not None,
                UPDATE=update, BY_ROW=self.rows is not None, COUNT=128, num_warps=4,
                enable_fp_fusion=True,
            )  # fmt: skip

    def keys_gradient(self, gradient: Tensor) -> None:
        config = launch.config(f"field_keys{self.gathered}", self.queries)
        grid, out, span = parts.shared(
            gradient, config, self.dims["CHUNKS"], False, self.n, launch.CROWDED
        )
        _dense_keys[grid](
            self.queries, self.keys, self.matrix, self.diagonal,
            *self.indices(self.rows, self.cols, self.own), self.table, self.scale, out,
            self.queries.stride(0), self.keys.stride(0), self.matrix.stride(0), self.n, self.m,
            self.dim, span, SPLIT=grid[2] > 1, **self.layout, **self.dims, ROWS=config.rows,
            COLS=config.cols, **config.options,
        )  # fmt: skip
        parts.add(out, gradient)
