"""The response field's operators: shapes for the compiler, and dispatch to kernels or tiles.

None has a gradient: autograd must not look into a field that changes in place. What they return of
a gradient, response.py hands to autograd. Arguments are those of field_tiles.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor
from torch.library import custom_op

from . import field_tiles
from .needs import Needs, rooms
from .ops import product_dtype, row_dtype


def implementation(backend: str) -> ModuleType:
    if backend == "triton":
        from . import field

        return field
    return field_tiles


# ---- dense ---------------------------------------------------------------------------------------


@custom_op("rkdo_kernels::field_dense_loss", mutates_args=())
def dense_loss(
    queries: Tensor,  # [R, D]
    keys: Tensor,  # [B, D]
    matrix: Tensor,  # [n, m]
    diagonal: Tensor,  # [n]
    row_sum: Tensor,  # [n]
    rows: Tensor | None,  # [R]
    cols: Tensor | None,  # [B]
    own: Tensor | None,  # [R]
    start: int,
    scale: Tensor,  # []
    clock: Tensor,  # [2]
    needs: Sequence[bool],  # of the gradients; any other has no entries
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # [R], [R, D], [B, D]
    """KL(p̂_i ‖ q_i), and the gradient of their sum; the field stays as it is."""
    return implementation(backend).dense_pass(
        queries, keys, matrix, diagonal, row_sum, rows, cols, own, start, scale, None, clock,
        needs,
    )  # fmt: skip


@custom_op("rkdo_kernels::field_dense_step", mutates_args=("matrix", "diagonal", "row_sum"))
def dense_step(
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
    alpha: Tensor,  # []
    clock: Tensor,
    needs: Sequence[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """The same, and P ← (1 − α) P + α m q in the one pass."""
    return implementation(backend).dense_pass(
        queries, keys, matrix, diagonal, row_sum, rows, cols, own, start, scale, alpha, clock,
        needs,
    )  # fmt: skip


@custom_op("rkdo_kernels::field_dense_gradient", mutates_args=())
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
    weights: Tensor,  # [R], ∂L/∂loss
    needs: Sequence[bool],
    backend: str,
) -> tuple[Tensor, Tensor]:  # [R, D], [B, D]
    """Through  ∂L/∂S_ij = weights_i c (q_ij − p̂_ij)."""
    return implementation(backend).dense_gradient(
        queries, keys, matrix, diagonal, rows, cols, own, start, scale, weights, needs
    )


@dense_loss.register_fake
def _(queries, keys, matrix, diagonal, row_sum, rows, cols, own, start, scale, clock, needs,
      backend):  # fmt: skip
    return of_pass(queries, keys, needs, matrix.dtype)


@dense_step.register_fake
def _(queries, keys, matrix, diagonal, row_sum, rows, cols, own, start, scale, alpha, clock,
      needs, backend):  # fmt: skip
    return of_pass(queries, keys, needs, matrix.dtype)


@dense_gradient.register_fake
def _(queries, keys, matrix, diagonal, rows, cols, own, start, scale, weights, needs, backend):
    return rooms(queries, keys, needs, wide(queries, matrix.dtype))


# ---- snapshots -----------------------------------------------------------------------------------


@custom_op("rkdo_kernels::field_snapshot_loss", mutates_args=())
def snapshot_loss(
    queries: Tensor,  # [R, D]
    keys: Tensor,  # [B, D]
    past_queries: Tensor,  # [K, R, D]
    past_keys: Tensor,  # [K, B, D]
    weights: Tensor,  # [R, K]
    scales: Tensor,  # [R, K]
    visits: Tensor,  # [B]
    prior: Tensor,  # [R, L]
    prior_cols: Tensor | None,  # [R, L]
    row_labels: Tensor | None,  # [R]
    col_labels: Tensor | None,  # [B]
    scale: Tensor,  # []
    needs: Sequence[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # [R], [R, D], [B, D]
    """KL(p_i ‖ q_i), p the mixture that past visits make, and the gradient of their sum."""
    return implementation(backend).snapshot_pass(
        queries, keys, past_queries, past_keys, weights, scales, visits, prior, prior_cols,
        row_labels, col_labels, scale, needs,
    )  # fmt: skip


@custom_op("rkdo_kernels::field_snapshot_gradient", mutates_args=())
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
    loss_weights: Tensor,  # [R], ∂L/∂loss
    needs: Sequence[bool],
    backend: str,
) -> tuple[Tensor, Tensor]:  # [R, D], [B, D]
    """Through  ∂L/∂S_ij = loss_weights_i c (q_ij − p_ij)."""
    return implementation(backend).snapshot_gradient(
        queries, keys, past_queries, past_keys, weights, scales, visits, prior, prior_cols,
        row_labels, col_labels, scale, loss_weights, needs,
    )  # fmt: skip


@snapshot_loss.register_fake
def _(queries, keys, past_queries, past_keys, weights, scales, visits, prior, prior_cols,
      row_labels, col_labels, scale, needs, backend):  # fmt: skip
    return of_pass(queries, keys, needs, weights.dtype)


@snapshot_gradient.register_fake
def _(queries, keys, past_queries, past_keys, weights, scales, visits, prior, prior_cols,
      row_labels, col_labels, scale, loss_weights, needs, backend):  # fmt: skip
    return rooms(queries, keys, needs, wide(queries, weights.dtype))


# ---- shapes --------------------------------------------------------------------------------------


def wide(queries: Tensor, field: torch.dtype) -> torch.dtype:
    return torch.float64 if field == torch.float64 else product_dtype(queries)


def of_pass(
    queries: Tensor, keys: Tensor, needs: Needs, field: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    loss = queries.new_empty(queries.shape[0], dtype=row_dtype(queries))
    return loss, *rooms(queries, keys, needs, wide(queries, field))
