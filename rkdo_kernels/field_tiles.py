"""The response field's loss, gradient and update by blocks of rows in PyTorch, for any device.

A block of P, of a few rows and all of the batch's columns, exists at a time, in buffers that all
blocks share. The Triton kernels compute the same under the same names.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .field_blocks import Block, Run, Target, is_flat
from .needs import BOTH, Needs
from .rounding import Noise

# ---- dense ---------------------------------------------------------------------------------------


def dense_pass(
    queries: Tensor,  # [R, D]
    keys: Tensor,  # [B, D]
    matrix: Tensor,  # [n, m] float32, bfloat16 or float64; 0 at every row's own column
    diagonal: Tensor,  # [n], what the field has there
    row_sum: Tensor,  # [n] float64, of a stored row and its diagonal
    rows: Tensor | None,  # [R] int64, of the matrix; None: start, start + 1, ..
    cols: Tensor | None,  # [B] int64, of the matrix; None: start, start + 1, ..
    own: Tensor | None,  # [R] int64, a row's own column among the batch's; None: 0, 1, ..
    start: int,
    scale: Tensor,  # [], c
    alpha: Tensor | None,  # []; None leaves the field as it is
    clock: Tensor,  # [2] int64: the seed, and the number of updates so far
    needs: Needs,  # of the gradients; any other has no entries
) -> tuple[Tensor, Tensor, Tensor]:  # [R] float64, [R, D], [B, D]
    """KL(p̂_i ‖ q_i) by row, the gradient of their sum, and the field's next block.

        p̂ = P / m,  m_i = Σ_j P_ij over the batch,  q = softmax(c S),  ∂loss_i/∂S = c (q − p̂)
        P ← m_i / row_sum_i ((1 − α) p̂ + α q)

    Entries off the diagonal are rounded to the matrix's dtype, to bfloat16 stochastically and
    without bias, the diagonal to float32. So what a row adds up to leaves 1 by its roundings:
    `row_sum` follows it, and an update divides its block by it. A row whose loss is not finite (in
    the kernels, whose q is not) stays as it is; one without mass too, and has loss 0 and
    gradient 0. A scale of NaN so leaves the whole field.
    """
    run = Run(queries, keys, scale, needs, matrix.dtype)
    stored = Stored(matrix, diagonal, rows, cols, own, start, run)
    update = None if alpha is None else Update(stored, run, alpha, row_sum, clock)
    for block in run.blocks():
        target = stored.target(block)
        block.divergence(target)
        block.add_gradient(target)
        if update:
            update.write(block, target)
    loss, mass = run.losses(stored.at_own)
    if update:
        update.finish(mass)
    return loss[:, 0], *run.result()


def dense_gradient(
    queries: Tensor,  # [R, D]
    keys: Tensor,  # [B, D]
    matrix: Tensor,  # [n, m]
    diagonal: Tensor,  # [n]
    rows: Tensor | None,
    cols: Tensor | None,
    own: Tensor | None,
    start: int,
    scale: Tensor,
    weights: Tensor,  # [R], ∂L/∂loss
    needs: Needs = BOTH,
) -> tuple[Tensor, Tensor]:  # [R, D], [B, D]
    """Through  ∂L/∂S_ij = weights_i c (q_ij − p̂_ij);  arguments as in `dense_pass`."""
    run = Run(queries, keys, scale, needs, matrix.dtype)
    stored = Stored(matrix, diagonal, rows, cols, own, start, run)
    for block in run.blocks():
        target = stored.target(block)
        block.softmax()
        block.add_gradient(target, weights[block.rows])
    return run.result()


# ---- snapshots -----------------------------------------------------------------------------------


def snapshot_pass(
    queries: Tensor,  # [R, D]
    keys: Tensor,  # [B, D]
    past_queries: Tensor,  # [K, R, D], of each row's last visits, the latest first
    past_keys: Tensor,  # [K, B, D], of each column's
    weights: Tensor,  # [R, K] float32 or float64, w_s; 0 where a row has no visit s
    scales: Tensor,  # [R, K], c_s of each row's visits
    visits: Tensor,  # [B] int64, of each column: it counts in q^(s) if it has more than s
    prior: Tensor,  # [R, L], p⁰'s entries times its weight; with Σ_s w_s they add up to 1 or 0
    prior_cols: Tensor | None,  # [R, L] int64, the columns of those entries
    row_labels: Tensor | None,  # [R] int64, and of the columns:
    col_labels: Tensor | None,  # [B] int64; p⁰ times its weight is prior_i0 where they agree
    scale: Tensor,  # [], c
    needs: Needs,  # of the gradients; any other has no entries
) -> tuple[Tensor, Tensor, Tensor]:  # [R] float64, [R, D], [B, D]
    """KL(p_i ‖ q_i) by row, and the gradient of their sum.

        p_i = Σ_s w_is softmax_j(c_s past_q_i^(s) · past_k_j^(s)) + p⁰_i,  q = softmax(c S)

    p⁰ is given by `prior_cols` or by the labels. A row whose weights are all 0 has loss 0.
    """
    run = Run(queries, keys, scale, needs, weights.dtype)
    past = Past(
        run,
        past_queries,
        past_keys,
        weights,
        scales,
        visits,
        prior,
        prior_cols,
        row_labels,
        col_labels,
    )
    for block in run.blocks():
        target = past.target(block)
        block.divergence(target)
        block.add_gradient(target)
    loss, _ = run.losses()
    return loss[:, 0], *run.result()


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
    needs: Needs = BOTH,
) -> tuple[Tensor, Tensor]:  # [R, D], [B, D]
    """Through  ∂L/∂S_ij = loss_weights_i c (q_ij − p_ij);  arguments as in `snapshot_pass`."""
    run = Run(queries, keys, scale, needs, weights.dtype)
    past = Past(
        run,
        past_queries,
        past_keys,
        weights,
        scales,
        visits,
        prior,
        prior_cols,
        row_labels,
        col_labels,
    )
    for block in run.blocks():
        target = past.target(block)
        block.softmax()
        block.add_gradient(target, loss_weights[block.rows])
    return run.result()


# ---- what a block is held to ---------------------------------------------------------------------


class Stored:
    """The batch's rows as the matrix holds them, a block of them at a time."""

    def __init__(
        self,
        matrix: Tensor,
        diagonal: Tensor,
        rows: Tensor | None,
        cols: Tensor | None,
        own: Tensor | None,
        start: int,
        run: Run,
    ) -> None:
        n, width, device = len(run.scaled), len(run.keys), matrix.device
        self.matrix, self.diagonal = matrix, diagonal
        self.whole: Tensor | None = None
        if rows is None and cols is None:
            self.whole = matrix[start : start + n, start : start + width]
        self.rows = torch.arange(start, start + n, device=device) if rows is None else rows
        self.cols = torch.arange(start, start + width, device=device) if cols is None else cols
        self.own = (torch.arange(n, device=device) if own is None else own)[:, None]
        self.at_own = diagonal[self.rows, None].to(run.p_sum.dtype)  # [R, 1]

    def target(self, block: Block) -> Target:
        """Of float32 where it lies, in blocks that follow one another; else in p's buffer."""
        rows, at_own = block.rows, self.at_own[block.rows]
        p = (
            self.matrix[self.rows[rows, None], self.cols]
            if self.whole is None
            else self.whole[rows]
        )
        if p.dtype != block.p.dtype:
            p = block.p.copy_(p)
        mass = torch.sum(p, 1, keepdim=True, out=block.run.p_sum[rows]) + at_own
        return Target(p, mass, self.own[rows], at_own)


class Update:
    """The field's next block: the matrix as blocks go by, the diagonal and the sums at the end."""

    def __init__(
        self, stored: Stored, run: Run, alpha: Tensor, row_sum: Tensor, clock: Tensor
    ) -> None:
        self.stored, self.row_sum, self.alpha = stored, row_sum, float(alpha)
        self.before = row_sum[stored.rows, None]  # [R, 1]
        self.share = (1 / self.before).to(run.kl.dtype)
        # [R, 1] each: Σ_j of what is written to the matrix; the next diagonal; which rows move
        self.others, self.at_own = torch.zeros_like(run.kl), stored.at_own.clone()
        self.moves = torch.ones_like(run.kl, dtype=torch.bool)
        self.noise = None
        if stored.matrix.dtype == torch.bfloat16:
            self.noise = Noise(stored.cols[stored.own[:, 0]], stored.cols, clock)

    def write(self, block: Block, target: Target) -> None:
        p, q, rows, stored = target.p, block.q, block.rows, self.stored
        assert target.own is not None
        share, at_own = self.share[rows], self.at_own[rows]
        keep, gain = share * (1 - self.alpha), share * self.alpha * target.mass
        loss = block.run.kl[rows] - target.at_own * block.run.log_own[rows]
        if not (target.complete and math.isfinite(float(loss.sum()))):
            moves = torch.logical_and(torch.isfinite(loss), target.alive, out=self.moves[rows])
            q.masked_fill_(~moves, 0)
            keep, gain = torch.where(moves, keep, 1), torch.where(moves, gain, 0)
        at_own.mul_(keep).addcmul_(q.gather(1, target.own), gain)
        p.mul_(keep).addcmul_(q, gain).scatter_(1, target.own, 0)
        if self.noise:
            self.noise.round(p, rows, block.noise)
        elif p.dtype != stored.matrix.dtype:
            p.copy_(p.to(stored.matrix.dtype))
        torch.sum(p, 1, keepdim=True, out=self.others[rows])
        if stored.whole is None:
            stored.matrix[stored.rows[rows, None], stored.cols] = p.to(stored.matrix.dtype)
        elif p.dtype != stored.matrix.dtype:
            stored.whole[rows] = p

    def finish(self, mass: Tensor) -> None:  # [R, 1]
        rows, diagonal = self.stored.rows, self.stored.diagonal
        diagonal[rows] = self.at_own[:, 0].to(diagonal.dtype)
        change = self.others.to(mass.dtype) + self.at_own.to(mass.dtype) - mass
        self.row_sum[rows] = (self.before + torch.where(self.moves, change, 0))[:, 0]


def store(
    rows: Tensor,  # [r, n], of the matrix
    p: Tensor,  # [r, n]
    first: int,  # the sample that the first row is of
    clock: Tensor,
) -> Tensor:  # [r, 1]
    """Rounds p into the rows, and returns what they add up to there."""
    if rows.dtype == torch.bfloat16:
        cols = torch.arange(p.shape[1], device=p.device)
        noise = Noise(cols[first : first + len(p)], cols, clock)
        noise.round(p, slice(0, len(p)), torch.empty_like(p, dtype=torch.int32))
    elif p.dtype != rows.dtype:
        p.copy_(p.to(rows.dtype))
    rows.copy_(p)
    return p.sum(1, keepdim=True)


class Past:
    """The mixture of what the last visits of rows and columns make of the batch."""

    def __init__(
        self,
        run: Run,
        queries: Tensor,
        keys: Tensor,
        weights: Tensor,
        scales: Tensor,
        visits: Tensor,
        prior: Tensor,
        prior_cols: Tensor | None,
        row_labels: Tensor | None,
        col_labels: Tensor | None,
    ) -> None:
        wide = run.keys.dtype
        self.queries = [x.to(wide) * scales[:, s, None] for s, x in enumerate(queries)]
        self.keys = [x.to(wide) for x in keys]
        steps = torch.arange(len(keys), device=keys.device)
        self.present = (visits > steps[:, None]).to(wide)
        self.weights, self.prior, self.prior_cols = weights, prior, prior_cols
        self.row_labels, self.col_labels = row_labels, col_labels
        pairs = zip(self.queries, self.keys, strict=True)
        self.flat = [is_flat(x, y) for x, y in pairs]
        self.everywhere = [bool(x.all()) for x in self.present]

    def target(self, block: Block) -> Target:
        """p in the block's buffer."""
        x, p, w, rows = block.q, block.p.zero_(), block.work, block.rows
        for s, keys in enumerate(self.keys):
            weight = self.weights[rows, s : s + 1]
            if not bool(weight.any()):
                continue
            torch.mm(self.queries[s][rows], keys.T, out=x)
            if not self.flat[s]:
                x.masked_fill_(self.present[s] == 0, -torch.inf)
                x.sub_(x.amax(1, keepdim=True).clamp_min_(-torch.finfo(p.dtype).max))
            x.exp_()
            if self.flat[s] and not self.everywhere[s]:
                x.mul_(self.present[s])
            share = torch.where(weight > 0, weight / x.sum(1, keepdim=True), 0)
            p.addcmul_(x, share.to(p.dtype))
        prior = self.prior[rows].to(p.dtype)
        if self.prior_cols is None:
            assert self.row_labels is not None
            torch.mul(self.row_labels[rows, None] == self.col_labels, prior, out=w)
            p.add_(w)
        else:
            p.scatter_add_(1, self.prior_cols[rows], prior)
        known = (self.weights[rows].sum(1, keepdim=True) + prior.sum(1, keepdim=True)) > 0
        mass = torch.where(known, p.sum(1, keepdim=True), 0)
        block.run.p_sum[rows] = mass
        return Target(p, mass)
