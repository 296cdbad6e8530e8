"""A batch against the response field by blocks of rows in PyTorch: q, losses and gradients.

What is summed up of a row is kept for all rows together, and made a loss at the end: a block costs
its passes over entries and few operators besides.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .tiles import Gradients, compute, sums

BLOCK_BYTES = 3 << 19  # of one of a block's three or four buffers
LEAST_ROWS = 16
LARGEST_LOGIT = {torch.float32: 40.0, torch.float64: 300.0}  # whose exponentials are safe unshifted


@dataclass(frozen=True)
class Target:
    """A block's rows of p̂ = (p + at_own in a row's own column) / mass."""

    p: Tensor  # [rows, m]; 0 in a row's own column where at_own has that entry
    mass: Tensor  # [rows, 1]; below the smallest normal number: the row has no target
    own: Tensor | None = None  # [rows, 1] columns
    at_own: Tensor | None = None  # [rows, 1]


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
        self.flat = is_flat(self.queries, self.keys, self.scale)
        # Of every row: Σ_j p_j, Σ_j p_j log(p_j / q_j) without its own column, and log q there.
        self.p_sum, self.kl, self.log_own = self.queries.new_zeros(3, n, 1)

    def blocks(self) -> Iterator[Block]:
        for start in range(0, len(self.queries), self.rows):
            yield Block(self, slice(start, min(start + self.rows, len(self.queries))))

    def losses(self, at_own: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """KL(p̂ ‖ q) and mass by row, [R, 1], in what rows are added up in; both 0 without mass."""
        wide = sums(self.kl)
        mass, kl, alive = self.p_sum.to(wide), self.kl.to(wide), self.p_sum
        if at_own is not None:
            alive = alive + at_own.to(alive.dtype)
            own = at_own.to(wide)
            mass, kl = mass + own, kl + torch.xlogy(own, own) - own * self.log_own
        has_mass = alive >= least(alive)
        mass = torch.where(has_mass, mass, 0)
        return torch.where(has_mass, kl / mass - torch.log(mass), 0 * kl), mass

    def result(self) -> tuple[Tensor, Tensor]:
        if self.gradients is None:
            return self.queries.new_empty(0), self.queries.new_empty(0)
        return self.gradients.d_queries.mul_(self.scale), self.gradients.d_keys.mul_(self.scale)


class Block:
    """Rows of the batch against all of its columns: buffers for q, for p, and to work in."""

    def __init__(self, run: Run, rows: slice) -> None:
        self.run, self.rows, self.queries = run, rows, run.queries[rows]
        n, m = len(self.queries), len(run.keys)
        self.q, self.p, self.work = run.memory[:, : n * m].view(3, n, m).unbind()
        self.noise = run.noise[: n * m].view(-1, m)

    def softmax(self) -> None:
        """q, with its logits as they are where their exponentials are safe."""
        x = self.logits()
        if not self.run.flat:
            x.sub_(x.amax(1, keepdim=True))
        x.exp_()
        x.mul_(x.sum(1, keepdim=True).reciprocal_())

    def logits(self) -> Tensor:
        run, x = self.run, self.q
        return torch.addmm(x[:1], self.queries, run.keys.T, beta=0, alpha=run.scale, out=x)

    def divergence(self, target: Target) -> None:
        """Forms q, and notes the rows' sums.

        Σ p log(p/q) with one logarithm of a ratio keeps the digits of p close to q; it wants a q
        that is a normal number, else the logarithms are subtracted.
        """
        w, p, run, own = self.work, target.p, self.run, target.own
        if run.flat:
            self.softmax()
            torch.div(p, self.q, out=w).clamp_min_(least(p)).log_()
            if own is not None:
                run.log_own[self.rows] = self.q.gather(1, own).log_()
        else:
            log_q = self.logits()
            log_q.sub_(log_q.amax(1, keepdim=True))
            log_q.sub_(torch.exp(log_q, out=w).sum(1, keepdim=True).log_())
            torch.clamp(p, min=least(p), out=w).log_().sub_(log_q)
            if own is not None:
                run.log_own[self.rows] = log_q.gather(1, own)
            log_q.exp_()
        torch.sum(w.mul_(p), 1, keepdim=True, out=run.kl[self.rows])

    def add_gradient(self, target: Target, weights: Tensor | None = None) -> None:
        """Adds up the products with G = weights (q − p̂)."""
        run = self.run
        assert run.gradients is not None
        inverse = 1 / target.mass
        factor = None if weights is None else weights[:, None].to(inverse.dtype)
        if not has_mass(target.mass):
            there = target.mass >= least(target.mass)
            inverse = torch.where(there, inverse, 0)
            factor = torch.where(there, 1 if factor is None else factor, 0)
        g = torch.addcmul(self.q, target.p, inverse, value=-1, out=self.work)
        if target.own is not None and target.at_own is not None:
            g.scatter_add_(1, target.own, -target.at_own * inverse)
        if factor is not None:
            g.mul_(factor)
        torch.mm(g, run.keys, out=run.gradients.d_queries[self.rows])
        run.gradients.d_keys.addmm_(g.T, self.queries)


def is_flat(queries: Tensor, keys: Tensor, scale: float) -> bool:
    """Whether no logit can be large: where asking costs nothing."""
    if queries.device.type != "cpu" or not len(queries):
        return False
    longest = queries.norm(dim=1).amax() * keys.norm(dim=1).amax()
    return float(longest) * scale <= LARGEST_LOGIT[queries.dtype]


def has_mass(mass: Tensor) -> bool:
    """Whether every row has."""
    return float(mass.amin()) >= least(mass)


def least(x: Tensor) -> float:
    return torch.finfo(x.dtype).tiny
