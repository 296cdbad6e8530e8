"""The response field as a matrix: what it holds, and what becomes of it with a batch."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from . import checks, field_ops, field_tiles
from .batch import Batch
from .field_state import State
from .initial import Initial
from .needs import NEITHER, Needs, once_only
from .turns import Turns

DTYPES = (torch.float32, torch.bfloat16, torch.float64)
FILLED_AT_ONCE = 1 << 22  # entries


class DenseField(State):
    """P, n × n, of which each row is meant divided by its sum: the entries off the diagonal, the
    diagonal, and the sums."""

    kind = "dense"

    def __init__(
        self,
        n: int,
        held: tuple[int, int],  # the rows that this rank holds
        dtype: torch.dtype,
        initial: Initial,
        device: torch.device,
        seed: int,
    ) -> None:
        size = held[1] - held[0]
        what, instead = (
            f"a dense field of {n} samples",
            "ResponseField.snapshot needs no n × n matrix",
        )
        checks.fits(size * n, dtype, device, what, instead)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        matrix = torch.zeros(size, n, dtype=dtype, device=device)
        diagonal = torch.ones(size, dtype=wide, device=device)
        row_sum = torch.ones(size, dtype=field_ops.row_dtype(matrix), device=device)
        clock = torch.tensor([seed, 0], device=device)
        super().__init__({
            "matrix": matrix, "diagonal": diagonal, "row_sum": row_sum, "clock": clock,
        })  # fmt: skip
        if initial.tensors and device.type != "meta":
            self.fill(initial, held[0], n)

    @property
    def dtype(self) -> torch.dtype:
        return self.tensors["matrix"].dtype

    def fill(self, initial: Initial, first: int, n: int) -> None:
        matrix, diagonal, row_sum, clock = self.tensors.values()
        step = max(1, FILLED_AT_ONCE // n)
        for start in range(0, len(matrix), step):
            stop = min(start + step, len(matrix))
            p = initial.rows(first + start, first + stop, n, matrix.device)
            own = p.diagonal(first + start).clone()
            p.diagonal(first + start).fill_(0)
            others = field_tiles.store(matrix[start:stop], p, first + start, clock)[:, 0]
            diagonal[start:stop] = own
            row_sum[start:stop] = others + diagonal[start:stop]

    def evaluate(
        self, batch: Batch, alpha: Tensor | None, needs: Needs
    ) -> tuple[Tensor, Tensor, Tensor]:  # [R], [R, D], [B, D]
        """The rows' losses and, as `needs` says, those of their sum; with alpha, an update."""
        matrix, diagonal, row_sum, clock = self.tensors.values()
        place = *batch.rows_and_cols(), batch.scale
        if alpha is None:
            return field_ops.dense_loss(
                *batch.detached, matrix, diagonal, row_sum, *place, clock, needs, batch.backend
            )
        result = field_ops.dense_step(
            *batch.detached, matrix, diagonal, row_sum, *place, alpha, clock, needs,
            batch.backend,
        )  # fmt: skip
        clock[1].add_(torch.isfinite(batch.scale))
        return result

    def losses(self, batch: Batch, alpha: Tensor | None) -> Tensor:  # [R]
        """For autograd, whatever the rows' weights: P is read again in the backward pass."""
        matrix, diagonal = self.tensors["matrix"], self.tensors["diagonal"]
        place = batch.rows_and_cols()
        if alpha is not None:  # P will be gone
            matrix, diagonal = self.entries(batch), diagonal[batch.rows]
            place = None, None, batch.own, 0
        loss, _, _ = self.evaluate(batch, alpha, NEITHER)
        turns = None if torch.compiler.is_compiling() else self.turns
        return Rows.apply(
            batch.queries, batch.keys, loss, matrix, diagonal, *place, batch.scale, batch.backend,
            turns,
        )  # fmt: skip

    def entries(self, batch: Batch) -> Tensor:  # [R, B], without the diagonal's
        return self.tensors["matrix"][batch.rows[:, None], batch.index]

    def block(self, batch: Batch) -> Tensor:  # [R, B], p̂
        diagonal = self.tensors["diagonal"][batch.rows, None]
        p = self.entries(batch).to(diagonal.dtype).scatter_(1, batch.own[:, None], diagonal)
        mass = p.sum(1, keepdim=True)
        return torch.where(mass >= torch.finfo(p.dtype).tiny, p / mass, 0)

    def rows(self, batch: Batch) -> Tensor:  # [R, n]
        diagonal = self.tensors["diagonal"][batch.rows, None]
        p = self.tensors["matrix"][batch.rows].to(diagonal.dtype)
        p.scatter_(1, batch.index[batch.own, None], diagonal)
        return p.div_(p.sum(1, keepdim=True))


class Rows(torch.autograd.Function):
    """The rows' losses, with a gradient that is formed when their weights are known."""

    @staticmethod
    def forward(
        ctx: Any,
        queries: Tensor,  # [R, D]
        keys: Tensor,  # [B, D]
        loss: Tensor,  # [R]
        matrix: Tensor,  # saved as it is: autograd refuses one that an update has changed
        diagonal: Tensor,
        rows: Tensor | None,
        cols: Tensor | None,
        own: Tensor | None,
        start: int,
        scale: Tensor,
        backend: str,
        turns: Turns | None,
    ) -> Tensor:
        ctx.start, ctx.backend, ctx.turns = start, backend, turns or nullcontext()
        ctx.save_for_backward(queries, keys, matrix, diagonal, rows, cols, own, scale)
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor) -> Any:  # type: ignore[override]
        needs = list(ctx.needs_input_grad[:2])
        with ctx.turns:
            queries, keys, *field, scale = ctx.saved_tensors
            gradients = field_ops.dense_gradient(
                queries.detach(), keys.detach(), *field, ctx.start, scale, d_loss.detach(), needs,
                ctx.backend,
            )  # fmt: skip
        return *once_only(needs, gradients, queries, keys, d_loss), *[None] * 10
