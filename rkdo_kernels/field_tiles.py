"""The response field's loss, gradient and update by blocks of rows in PyTorch, for any device.

A block of P, of a few rows and all of the batch's columns, exists at a time, in buffers that all
blocks share. The Triton kernels compute the same under the same names.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .tiles import Gradients, compute, sums

BLOCK_BYTES = 1 << 20  # of one of a block's three or four buffers
LEAST_ROWS = 16
LARGEST_LOGIT = {torch.float32: 40.0, torch.float64: 300.0}  # whose exponentials are safe unshifted
MASK = (1 << 32) - 1


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
    gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # [R] float64, [R, D], [B, D]
    """KL(p̂_i ‖ q_i) by row, the gradient of their sum, and the field's next block.

        p̂ = P / m,  m_i = Σ_j P_ij over the batch,  q = softmax(c S),  ∂loss_i/∂S = c (q − p̂)
        P ← max(m_i + 1 − row_sum_i, m_i / 2) ((1 − α) p̂ + α q)

    The factor is m_i, but for what earlier roundings have left of the row's sum. Entries off
    the diagonal are rounded to the matrix's dtype, to bfloat16 by chance and without bias; the
    diagonal takes up what is left of the row. A row whose loss is not finite stays as it is; one
    without mass too, and has loss 0 and gradient 0. A scale of NaN so leaves the whole field.
    """
    run = Run(queries, keys, scale, gradient, matrix.dtype)
    loss = run.queries.new_empty(len(queries), dtype=sums(queries))
    stored = Stored(matrix, diagonal, rows, cols, own, start, run)
    for block in run.blocks():
        p, mass, excess = stored.target(block)
        block.logits(run.keys, run.scale)
        loss[block.rows] = block.divergence(p, mass, excess)
        if alpha is not None:
            stored.update(block, mass, loss[block.rows], alpha, row_sum, clock)
        if gradient:
            block.add_gradient(run, p, mass)
    return loss, *run.result()


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
) -> tuple[Tensor, Tensor]:  # [R, D], [B, D]
    """Through  ∂L/∂S_ij = weights_i c (q_ij − p̂_ij);  arguments as in `dense_pass`."""
    run = Run(queries, keys, scale, True, matrix.dtype)
    stored = Stored(matrix, diagonal, rows, cols, own, start, run)
    for block in run.blocks():
        p, mass, _ = stored.target(block)
        block.logits(run.keys, run.scale)
        block.softmax()
        block.add_gradient(run, p, mass, weights[block.rows])
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
    gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # [R] float64, [R, D], [B, D]
    """KL(p_i ‖ q_i) by row, and the gradient of their sum.

        p_i = Σ_s w_is softmax_j(c_s past_q_i^(s) · past_k_j^(s)) + p⁰_i,  q = softmax(c S)

    p⁰ is given by `prior_cols` or by the labels. A row whose weights are all 0 has loss 0.
    """
    run = Run(queries, keys, scale, gradient, weights.dtype)
    loss = run.queries.new_empty(len(queries), dtype=sums(queries))
    past = Past(
        past_queries, past_keys, weights, scales, visits, prior, prior_cols, row_labels, col_labels
    )
    for block in run.blocks():
        p, mass, excess = past.target(block)
        block.logits(run.keys, run.scale)
        loss[block.rows] = block.divergence(p, mass, excess)
        if gradient:
            block.add_gradient(run, p, mass)
    return loss, *run.result()


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
) -> tuple[Tensor, Tensor]:  # [R, D], [B, D]
    """Through  ∂L/∂S_ij = loss_weights_i c (q_ij − p_ij);  arguments as in `snapshot_pass`."""
    run = Run(queries, keys, scale, True, weights.dtype)
    past = Past(
        past_queries, past_keys, weights, scales, visits, prior, prior_cols, row_labels, col_labels
    )
    for block in run.blocks():
        p, mass, _ = past.target(block)
        block.logits(run.keys, run.scale)
        block.softmax()
        block.add_gradient(run, p, mass, loss_weights[block.rows])
    return run.result()


# ---- blocks of rows ------------------------------------------------------------------------------


class Run:
    """A batch cut into blocks of rows, in memory that all blocks share."""

    def __init__(
        self, queries: Tensor, keys: Tensor, scale: Tensor, gradient: bool, field: torch.dtype
    ) -> None:
        if field == torch.float64:
            queries, keys = queries.double(), keys.double()
        self.gradients = Gradients(compute(queries), compute(keys)) if gradient else None
        self.queries, self.keys = compute(queries), compute(keys)
        self.scale = float(scale.to(self.queries.dtype))  # one too large is infinite
        n, m = len(queries), len(keys)
        size = self.queries.element_size()
        self.rows = max(1, min(n, max(LEAST_ROWS, BLOCK_BYTES // (m * size))))
        self.memory = self.queries.new_empty(3, self.rows * m)
        entries = self.rows * m if field == torch.bfloat16 else 0
        self.noise = self.queries.new_empty(entries, dtype=torch.int32)
        self.flat = self.is_flat()

    def is_flat(self) -> bool:
        """Whether no logit can be large: where asking costs nothing."""
        if self.queries.device.type != "cpu" or not len(self.queries):
            return False
        longest = self.queries.norm(dim=1).amax() * self.keys.norm(dim=1).amax()
        return float(longest) * self.scale <= LARGEST_LOGIT[self.queries.dtype]

    def blocks(self) -> Iterator[Block]:
        for start in range(0, len(self.queries), self.rows):
            yield Block(self, slice(start, min(start + self.rows, len(self.queries))))

    def result(self) -> tuple[Tensor, Tensor]:
        if self.gradients is None:
            return self.queries.new_empty(0), self.queries.new_empty(0)
        return self.gradients.d_queries, self.gradients.d_keys


class Block:
    """Rows of the batch against all of its columns: buffers for q, for p, and to work in."""

    def __init__(self, run: Run, rows: slice) -> None:
        self.rows, self.queries, self.flat = rows, run.queries[rows], run.flat
        n, m = len(self.queries), len(run.keys)
        self.q, self.p, self.work = run.memory[:, : n * m].view(3, n, m).unbind()
        self.noise = run.noise[: n * m].view(-1, m)

    def logits(self, keys: Tensor, scale: float) -> None:
        x = self.q
        torch.addmm(x[:1], self.queries, keys.T, beta=0, alpha=scale, out=x)

    def softmax(self) -> None:
        """Turns logits into q."""
        x = self.q
        if not self.flat:
            x.sub_(x.amax(1, keepdim=True))
        x.exp_()
        x.div_(x.sum(1, keepdim=True))

    def divergence(self, p: Tensor, mass: Tensor, excess: Tensor) -> Tensor:  # [rows] float64
        """KL(p ‖ q) by row, with q in the logits' place; p adds up to `excess`, about 1.

        Σ p log(p/q) with one logarithm of a ratio keeps the digits of p close to q; it wants a q
        that is a normal number, else the logarithms are subtracted.
        """
        w, tiny = self.work, torch.finfo(p.dtype).tiny
        if self.flat:
            self.softmax()
            torch.div(p, self.q, out=w).clamp_min_(tiny).log_()
        else:
            log_q = self.q
            log_q.sub_(log_q.amax(1, keepdim=True))
            log_q.sub_(torch.exp(log_q, out=w).sum(1, keepdim=True).log_())
            torch.clamp(p, min=tiny, out=w).log_().sub_(log_q)
            log_q.exp_()
        kl = w.mul_(p).sum(1, keepdim=True).to(excess.dtype)
        return torch.where(mass > 0, kl / excess - torch.log(excess), 0 * kl)[:, 0]

    def add_gradient(
        self, run: Run, p: Tensor, mass: Tensor, weights: Tensor | None = None
    ) -> None:
        """Adds up the products with G = weights (q − p), in q's place."""
        assert run.gradients is not None
        g = self.q.sub_(p)
        factor = mass > 0 if weights is None else weights[:, None] * (mass > 0)
        if weights is not None or not bool(factor.all()):
            g.mul_(factor.to(g.dtype))
        torch.mm(g, run.keys, out=run.gradients.d_queries[self.rows]).mul_(run.scale)
        run.gradients.d_keys.addmm_(g.T, self.queries, alpha=run.scale)


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
        n, width, device = len(run.queries), len(run.keys), matrix.device
        self.matrix, self.diagonal = matrix, diagonal
        self.whole: Tensor | None = None
        if rows is None and cols is None:
            self.whole = matrix[start : start + n, start : start + width]
        self.rows = torch.arange(start, start + n, device=device) if rows is None else rows
        self.cols = torch.arange(start, start + width, device=device) if cols is None else cols
        self.own = (torch.arange(n, device=device) if own is None else own)[:, None]

    def read(self, rows: slice) -> Tensor:
        if self.whole is not None:
            return self.whole[rows]
        return self.matrix[self.rows[rows, None], self.cols]

    def write(self, rows: slice, entries: Tensor) -> None:
        if self.whole is not None:
            self.whole[rows] = entries
        else:
            self.matrix[self.rows[rows, None], self.cols] = entries.to(self.matrix.dtype)

    def target(self, block: Block) -> tuple[Tensor, Tensor, Tensor]:
        """p̂ in the block's buffer; m, [rows, 1]; and what p̂ adds up to but for rounding."""
        p, raw = block.p, self.read(block.rows)
        if raw.dtype != p.dtype:
            raw = p.copy_(raw)
        at_own = self.diagonal[self.rows[block.rows], None].to(sums(p))
        mass = raw.sum(1, keepdim=True).to(at_own.dtype) + at_own
        mass = torch.where(mass >= torch.finfo(p.dtype).tiny, mass, 0)
        divisor = torch.where(mass > 0, mass, torch.inf).to(p.dtype)
        torch.div(raw, divisor, out=p)
        p.scatter_(1, self.own[block.rows], at_own.to(p.dtype) / divisor)
        return p, mass, torch.where(mass > 0, mass / divisor, 1)

    def update(
        self,
        block: Block,
        mass: Tensor,  # [rows, 1]
        loss: Tensor,  # [rows]
        alpha: Tensor,
        row_sum: Tensor,
        clock: Tensor,
    ) -> None:
        kept = ~(torch.isfinite(loss[:, None]) & (mass > 0))
        rows, own = self.rows[block.rows], self.own[block.rows]
        before = row_sum[rows, None]
        target = torch.maximum(mass + (1 - before), mass / 2)
        new = torch.lerp(block.p, block.q, alpha.to(block.p.dtype), out=block.work)
        new.mul_(target.to(new.dtype)).scatter_(1, own, 0)
        round_to(new, self.matrix.dtype, rows, self.cols, clock, block.noise)
        others = new.sum(1, keepdim=True).to(target.dtype)
        at_own = (target - others).clamp_min_(0).to(self.diagonal.dtype)
        after = before + (others + at_own - mass)
        if bool(kept.any()):
            new = torch.where(kept, self.read(block.rows), new)
            at_own = torch.where(kept, self.diagonal[rows, None], at_own)
            after = torch.where(kept, before, after)
        self.write(block.rows, new)
        self.diagonal[rows] = at_own[:, 0]
        row_sum[rows] = after[:, 0]


def round_to(
    x: Tensor,  # [R, B], changed in place
    dtype: torch.dtype,
    rows: Tensor,  # [R] int64
    cols: Tensor,  # [B] int64
    clock: Tensor,  # [2]
    noise: Tensor,  # [R, B] int32, to work in
) -> None:
    """To numbers that `dtype` has; to bfloat16 upwards as often as x is above the lower one."""
    if dtype == torch.bfloat16:
        single = x.float()  # x itself, unless it is float64
        r, s = noise_keys(rows, clock, 0), noise_keys(cols, clock, 1)
        torch.mul(r[:, None] | 1, s, out=noise)
        noise.bitwise_right_shift_(16).bitwise_and_(0xFFFF)
        single.view(torch.int32).add_(noise).bitwise_and_(-0x10000)
        x.copy_(single)
    elif x.dtype != dtype:
        x.copy_(x.to(dtype))


def store(matrix: Tensor, p: Tensor, start: int, clock: Tensor) -> Tensor:  # [r, n] -> [r, 1]
    """Rounds rows into the matrix, and returns what they add up to there."""
    rows = torch.arange(start, start + len(p), device=p.device)
    cols = torch.arange(p.shape[1], device=p.device)
    round_to(p, matrix.dtype, rows, cols, clock, torch.empty_like(p, dtype=torch.int32))
    matrix[start : start + len(p)] = p
    return p.sum(1, keepdim=True)


def noise_keys(ids: Tensor, clock: Tensor, side: int) -> Tensor:  # [N] int64 -> [N] int32
    """Hashes of sample, seed and update: the upper 16 bits of (row key | 1) · column key, modulo
    2^32, are what is added to an entry's lower bits before they are cut off."""
    seed, updates = clock.unbind()
    x = mix(seed + side) ^ mix(updates)
    x = mix(ids ^ mix(x))
    return ((x ^ 0x80000000) - 0x80000000).to(torch.int32)


def mix(x: Tensor) -> Tensor:
    """A permutation of 32-bit numbers, held in int64."""
    x = x & MASK
    for _ in range(2):
        x = ((x ^ (x >> 16)) * 0x45D9F3B) & MASK
    return x ^ (x >> 16)


class Past:
    """The mixture of what the last visits of rows and columns make of the batch."""

    def __init__(
        self,
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
        self.queries, self.keys = queries, keys
        self.weights, self.scales = weights, scales
        steps = torch.arange(len(keys), device=keys.device)
        self.absent = visits <= steps[:, None]
        self.prior, self.prior_cols = prior, prior_cols
        self.row_labels, self.col_labels = row_labels, col_labels

    def target(self, block: Block) -> tuple[Tensor, Tensor, Tensor]:
        """p in the block's buffer; its mass, 1 or 0; and what p adds up to."""
        x, p, w, rows = block.q, block.p.zero_(), block.work, block.rows
        lowest = torch.finfo(p.dtype).min
        for s, keys in enumerate(self.keys):
            weight = self.weights[rows, s : s + 1]
            if not bool(weight.any()):
                continue
            torch.mm(self.queries[s, rows].to(p.dtype), keys.to(p.dtype).T, out=x)
            x.mul_(self.scales[rows, s : s + 1]).masked_fill_(self.absent[s], -torch.inf)
            x.sub_(x.amax(1, keepdim=True).clamp_min_(lowest)).exp_()
            share = torch.where(weight > 0, weight / x.sum(1, keepdim=True), 0)
            p.addcmul_(x, share.to(p.dtype))
        prior = self.prior[rows].to(p.dtype)
        if self.prior_cols is None:
            assert self.row_labels is not None
            torch.mul(self.row_labels[rows, None] == self.col_labels, prior, out=w)
            p.add_(w)
        else:
            p.scatter_add_(1, self.prior_cols[rows], prior)
        mass = (self.weights[rows].sum(1, keepdim=True) + prior.sum(1, keepdim=True)) > 0
        excess = p.sum(1, keepdim=True, dtype=sums(p))
        return p, mass.to(excess.dtype), torch.where(mass, excess, 1)
