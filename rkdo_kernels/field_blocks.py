"""A batch against the response field by blocks of rows in PyTorch: q, losses and gradients.

What is summed up of a row is kept for all rows together, and made a loss at the end: a block costs
its passes over entries and few operators besides.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from .needs import Needs
from .tiles import Gradients, compute, sums

BLOCK_BYTES = 3 << 19  # of one of a block's three or four buffers
LEAST_ROWS = 16
# Logits whose exponentials are safe unshifted: q stays a normal number over 10⁷ columns.
LARGEST_LOGIT = {torch.float32: 35.0, torch.float64: 300.0}


@dataclass(frozen=True)
class Target:
    """A block's rows of p̂ = (p + at_own in a row's own column) / mass."""

    p: Tensor  # [rows, m]; 0 in a row's own column where at_own has that entry
    mass: Tensor  # [rows, 1]; below the smallest normal number: the row has no target
    own: Tensor | None = None  # [rows, 1] columns
    at_own: Tensor | None = None  # [rows, 1]

    @cached_property
    def extent(self) -> tuple[float, float]:
        """The least and the largest mass; NaN if one is."""
        low, high = torch.aminmax(self.mass)
        return float(low), float(high)

    @property
    def complete(self) -> bool:
        """Whether every row has mass."""
        return self.extent[0] >= least(self.mass)

    @property
    def alive(self) -> Tensor:  # [rows, 1]
        return self.mass >= least(self.mass)

    @property
    def divisor(self) -> Tensor:  # [rows, 1], the mass where there is one
        return self.mass if self.complete else torch.where(self.alive, self.mass, 1)


class Run:
    """A batch cut into blocks of rows, in memory that all blocks share."""

    def __init__(
        self, queries: Tensor, keys: Tensor, scale: Tensor, needs: Needs, field: torch.dtype
    ) -> None:
        if field == torch.float64:
            queries, keys = queries.double(), keys.double()
        self.gradients = Gradients(compute(queries), compute(keys), needs)
        self.keys, self.scale = compute(keys), scale.to(compute(queries).dtype)
        # Not by a product's alpha: some BLAS take one that is NaN for a number.
        self.scaled = compute(queries) * self.scale
        n, m = len(queries), len(keys)
        size = self.keys.element_size()
        self.rows = max(1, min(n, max(LEAST_ROWS, BLOCK_BYTES // (m * size))))
        self.memory = self.keys.new_empty(3, self.rows * m)
        entries = self.rows * m if field == torch.bfloat16 else 0
        self.noise = self.keys.new_empty(entries, dtype=torch.int32)
        self.flat = is_flat(self.scaled, self.keys)
        # Of every row, without its own column: Σ_j p_j, Σ_j (q − p̂)_j and Σ_j p_j log(p̂_j / q_j);
        # log q in that column.
        self.p_sum, self.excess, self.kl, self.log_own = self.keys.new_zeros(4, n, 1)

    def blocks(self) -> Iterator[Block]:
        for start in range(0, len(self.scaled), self.rows):
            yield Block(self, slice(start, min(start + self.rows, len(self.scaled))))

    def losses(self, at_own: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """KL(p̂ ‖ q) and mass by row, [R, 1], in what rows are added up in; both 0 without mass.

        As Σ_j p̂ log(p̂/q) − p̂ + q. The last two add up to 0, but where p̂ is close to q they take
        away what the roundings of either have added to the logarithms.
        """
        wide = sums(self.kl)
        mass, kl, excess = self.p_sum.to(wide), self.kl.to(wide), self.excess.to(wide)
        known = self.p_sum
        if at_own is not None:
            known, own, log_own = known + at_own, at_own.to(wide), self.log_own.to(wide)
            mass = mass + own
            divisor = torch.where(known >= least(known), known, 1).to(wide)
            kl = kl + torch.xlogy(own, own / divisor) - own * log_own
            excess = excess + (torch.exp(log_own) - own / divisor)
        alive = known >= least(known)
        mass = torch.where(alive, mass, 0)
        return torch.where(alive, kl / known.to(wide) + excess, 0 * kl), mass

    def result(self) -> tuple[Tensor, Tensor]:
        return self.gradients.d_queries.mul_(self.scale), self.gradients.d_keys


class Block:
    """Rows of the batch against all of its columns: buffers for q, for p, and to work in."""

    def __init__(self, run: Run, rows: slice) -> None:
        self.run, self.rows, self.scaled = run, rows, run.scaled[rows]
        n, m = len(self.scaled), len(run.keys)
        self.q, self.p, self.work = run.memory[:, : n * m].view(3, n, m).unbind()
        self.noise = run.noise[: n * m].view(-1, m)

    def softmax(self) -> None:
        """q, with its logits as they are where their exponentials are safe."""
        x = self.logits()
        if not self.run.flat:
            x.sub_(x.amax(1, keepdim=True))
        x.exp_()
        x.div_(x.sum(1, keepdim=True))

    def logits(self) -> Tensor:
        return torch.mm(self.scaled, self.run.keys.T, out=self.q)

    def divergence(self, target: Target) -> None:
        """Forms q, and notes the rows' sums.

        log(p̂/q) by the difference p̂ − q keeps the digits of p̂ close to q; it wants a q that is a
        normal number, else the logarithms are subtracted.
        """
        w, p, run, own, rows = self.work, target.p, self.run, target.own, self.rows
        if run.flat:
            self.softmax()
            torch.div(p, target.divisor, out=w).sub_(self.q)
            if own is not None:
                w.scatter_(1, own, 0)
                run.log_own[rows] = self.q.gather(1, own).log_()
            torch.sum(w, 1, keepdim=True, out=run.excess[rows]).neg_()
            w.div_(self.q).clamp_min_(torch.finfo(p.dtype).eps / 2 - 1).log1p_()
        else:
            log_q = self.logits()
            log_q.sub_(log_q.amax(1, keepdim=True))
            log_q.sub_(torch.exp(log_q, out=w).sum(1, keepdim=True).log_())
            torch.div(p, target.divisor, out=w).clamp_min_(least(p)).log_().sub_(log_q)
            if own is not None:
                run.log_own[rows] = log_q.gather(1, own)
            log_q.exp_()
        torch.sum(w.mul_(p), 1, keepdim=True, out=run.kl[rows])
        if not run.flat:
            torch.addcdiv(self.q, p, target.divisor, value=-1, out=w)
            if own is not None:
                w.scatter_(1, own, 0)
            torch.sum(w, 1, keepdim=True, out=run.excess[rows])

    def add_gradient(self, target: Target, weights: Tensor | None = None) -> None:
        """Adds up the products with G = weights (q − p̂).

        Where a row's own column has most of p̂, q − p̂ there has few digits: it is what the others
        leave of Σ_j (q − p̂)_j = 0.
        """
        run, gradients = self.run, self.run.gradients
        if not (gradients.to_queries or gradients.to_keys):
            return
        mass = target.divisor
        factor = None if weights is None else weights[:, None].to(mass.dtype)
        if not target.complete:
            factor = torch.where(target.alive, 1.0 if factor is None else factor, 0.0).to(
                mass.dtype
            )
        g = torch.addcdiv(self.q, target.p, mass, value=-1, out=self.work)
        if target.own is not None and target.at_own is not None:
            share = target.at_own / mass
            own = g.gather(1, target.own) - share
            rest = g.scatter_(1, target.own, 0).sum(1, keepdim=True)
            g.scatter_(1, target.own, torch.where(share > 0.5, -rest, own))
        if factor is not None:
            g.mul_(factor)
        if gradients.to_queries:
            torch.mm(g, run.keys, out=gradients.d_queries[self.rows])
        if gradients.to_keys:
            gradients.d_keys.addmm_(g.T, self.scaled)


def is_flat(queries: Tensor, keys: Tensor) -> bool:
    """Whether no product can be large, as a logit: where asking costs nothing."""
    if queries.device.type != "cpu" or not len(queries):
        return False
    longest = 1.0  # in float64: squares of small numbers count
    for x in (queries, keys):
        longest *= float(torch.linalg.vector_norm(x, dim=1, dtype=torch.float64).amax())
    return longest <= LARGEST_LOGIT[queries.dtype]


def least(x: Tensor) -> float:
    return torch.finfo(x.dtype).tiny
