"""The recursion's loss and gradient by blocks of rows in PyTorch: S and exp(c S) are formed once.

A row's coefficients follow from its own moments alone. So where every row's loss weighs the same,
as in a mean, the gradient is formed beside the loss, from tiles that are still at hand.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from . import quadrature, tiles
from .needs import Needs
from .tiles import Gradients, sums


def fits(keys: int, size: int) -> bool:
    """Whether a block of rows, with S and exp(c S) over all of the keys, may be kept."""
    return 2 * tiles.LEAST_ROWS * keys * size <= tiles.KEPT_BYTES


def recursion_moments(
    queries: Tensor,  # [N, D]
    keys: Tensor,  # [M, D]
    scales: list[float],  # c_t for t = 0..depth
    alpha: float,
    bound: float,
    degree: int,
    exclude: list[int],  # diagonals without weight; the first is the positives'
    detach_target: bool,
    needs: Needs,
    table: Tensor,  # see quadrature.table
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # [N], [N, degree + 1], [N], [N, D], [M, D]
    """The loss and, as `needs` says, its coefficients and gradient at the positive, or that of
    the rows' sum to queries and keys in float32 (float64 for float64 inputs).
    """
    gradient = any(needs)
    run = Run(queries, keys, needs)
    queries, keys = run.gradients.queries, run.gradients.keys
    rule = quadrature.rule(table, degree, scales, alpha)
    positives = keys.narrow(0, exclude[0], len(queries))
    positive = (queries * positives).sum(1, dtype=sums(queries))
    x_scale, e_scale = 1 / bound, rule.weight * bound
    if gradient and powers_are_safe(e_scale, degree, len(keys), queries.dtype):
        x_scale, e_scale = rule.weight, 1.0  # which saves a pass over x
    k = torch.arange(degree + 1, dtype=positive.dtype, device=queries.device)
    powers = (rule.weight / e_scale * bound) ** -k
    loss, at_positive = torch.empty_like(positive), torch.empty_like(positive)
    weights = loss.new_empty(len(queries), degree + 1)
    for rows, columns in run.blocks(degree):
        block = queries[rows]
        for tile in columns:
            tile.add_up(block, rows.start, x_scale, e_scale, exclude)
        moments = torch.stack([tile.sums for tile in columns]).sum(0, dtype=loss.dtype).T * powers
        loss[rows], weights[rows], at_positive[rows] = quadrature.recursion(
            moments, positive[rows], rule, detach_target
        )
        if gradient:
            w = (weights[rows] * powers).to(queries.dtype).T[:, :, None].contiguous().unbind()
            for tile in reversed(columns):  # what was formed last is in the cache yet
                tile.add_gradient(block, w, run.gradients.d_queries[rows], needs)
    nothing = loss.new_empty(0)
    if not gradient:
        return loss, weights, at_positive, queries.new_empty(0), queries.new_empty(0)
    run.gradients.add_pairs(at_positive, exclude[0])
    return loss, nothing, nothing.clone(), run.gradients.d_queries, run.gradients.d_keys


def powers_are_safe(logit: float, degree: int, m: int, dtype: torch.dtype) -> bool:
    """Whether m terms exp(x) x^degree with |x| ≤ logit add up to a finite number."""
    largest = logit + degree * math.log(max(logit, 1)) + math.log(m)
    return largest < 0.9 * math.log(torch.finfo(dtype).max)


class Run:
    """Blocks of rows and what the tiles of all blocks share."""

    def __init__(self, queries: Tensor, keys: Tensor, needs: Needs) -> None:
        self.gradients = Gradients(queries, keys, needs)
        queries, keys = self.gradients.queries, self.gradients.keys
        self.count, m = len(queries), len(keys)
        self.rows, self.cols = tiles.split(self.count, m, queries.element_size())
        self.starts = range(0, m, self.cols)
        tile = self.rows * self.cols
        count = len(self.starts) if any(needs) else 1
        self.x, self.e = (queries.new_empty(count, tile) for _ in range(2))
        self.work = queries.new_empty(tile)

    def blocks(self, degree: int) -> Iterator[tuple[slice, list[Columns]]]:
        height, columns = 0, []
        for start in range(0, self.count, self.rows):
            rows = slice(start, min(start + self.rows, self.count))
            if rows.stop - start != height:
                height = rows.stop - start
                columns = [
                    Columns(self, index, height, degree) for index in range(len(self.starts))
                ]
            yield rows, columns


class Columns:
    """Some of the keys against a block of rows. Its views are made once: so many small operators
    take their time too."""

    def __init__(self, run: Run, index: int, height: int, degree: int) -> None:
        self.first = run.starts[index]
        keys, d_keys = run.gradients.keys, run.gradients.d_keys
        self.keys, self.d_keys = (x[self.first : self.first + run.cols] for x in (keys, d_keys))
        self.keys_t = self.keys.T
        self.width = len(self.keys)

        def view(memory: Tensor) -> Tensor:
            return memory[: height * self.width].view(height, self.width)

        self.x, self.e = (view(x[index % len(x)]) for x in (run.x, run.e))
        self.work = view(run.work)
        if degree == 0:  # nothing but e is needed
            self.x = self.work = self.e
        self.work_t = self.work.T
        self.sums = keys.new_empty(degree + 1, height)
        self.powers = self.sums.unbind()

    def add_up(
        self, queries: Tensor, first: int, x_scale: float, e_scale: float, exclude: list[int]
    ) -> None:
        """sums_k = Σ_j e x^k; x and e stay."""
        x, e, work = self.x, self.e, self.work
        torch.addmm(x[:1], queries, self.keys_t, beta=0, alpha=x_scale, out=x)
        if e_scale == 1:
            torch.exp(x, out=e)
        else:
            torch.mul(x, e_scale, out=e).exp_()
        for offset in exclude:
            diagonal = offset + first - self.first
            if -len(x) < diagonal < self.width:
                e.diagonal(diagonal).zero_()
        torch.sum(e, 1, out=self.powers[0])
        for k, total in enumerate(self.powers[1:]):
            torch.sum(torch.mul(work if k else e, x, out=work), 1, out=total)

    def add_gradient(
        self, queries: Tensor, w: Sequence[Tensor], d_queries: Tensor, needs: Needs
    ) -> None:
        """By G = e Σ_k w_k x^k."""
        g, x = self.work, self.x
        if len(w) == 1:
            g.mul_(w[0])
        else:
            torch.addcmul(w[-2], w[-1], x, out=g)
            for w_k in w[-3::-1]:
                torch.addcmul(w_k, g, x, out=g)
            g.mul_(self.e)
        if needs[0]:
            d_queries.addmm_(g, self.keys)
        if needs[1]:
            self.d_keys.addmm_(self.work_t, queries)
