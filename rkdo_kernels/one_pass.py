"""The recursion's loss and gradient by blocks of rows in PyTorch: S and exp(c S) are formed once.

A row's coefficients follow from its own moments alone. So where every row's loss weighs the same,
as in a mean, the gradient is formed beside the loss, from tiles that are still at hand.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from . import quadrature
from .tiles import Gradients, Tile, sums

ROWS, COLS = 256, 1024  # of a tile
LEAST_ROWS = 32
KEPT_BYTES = 32 << 20  # of the tiles of a block of rows, of which there are four if they are large


def fits(keys: int, size: int) -> bool:
    """Whether a block of rows, with S and exp(c S) over all of the keys, may be kept."""
    return 2 * LEAST_ROWS * keys * size <= KEPT_BYTES


def recursion_moments(
    queries: Tensor,  # [N, D]
    keys: Tensor,  # [M, D]
    scales: list[float],  # c_t for t = 0..depth
    alpha: float,
    bound: float,
    degree: int,
    exclude: list[int],  # diagonals without weight; the first is the positives'
    detach_target: bool,
    gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # [N], [N, degree + 1], [N], [N, D], [M, D]
    """The loss and, as `gradient` says, its coefficients and gradient at the positive, or that of
    the rows' sum to queries and keys in float32 (float64 for float64 inputs).
    """
    run = Run(queries, keys, gradient)
    queries, keys = run.gradients.queries, run.gradients.keys
    rule = quadrature.rule(degree, tuple(scales), alpha, bound, str(queries.device))
    positives = keys.narrow(0, exclude[0], len(queries))
    positive = (queries * positives).sum(1, dtype=sums(queries))
    x_scale, e_scale = 1 / bound, rule.weight * bound
    if gradient and powers_are_safe(e_scale, degree, len(keys), queries.dtype):
        x_scale, e_scale = rule.weight, 1.0  # which saves a pass over x
    powers = (rule.weight / e_scale * bound) ** -torch.arange(degree + 1, dtype=positive.dtype)
    powers = powers.to(queries.device)
    loss, at_positive = torch.empty_like(positive), torch.empty_like(positive)
    weights = loss.new_empty(len(queries), degree + 1)
    for block in run.blocks():
        rows = block[0].rows
        moments = torch.zeros_like(weights[rows])
        for tile in block:
            tile_moments(tile, run.scratch(tile), x_scale, e_scale, exclude, moments)
        loss[rows], weights[rows], at_positive[rows] = quadrature.recursion(
            moments * powers, positive[rows], rule, detach_target
        )
        if gradient:
            add_gradient(run, block, (weights[rows] * powers).to(queries.dtype))
    nothing = loss.new_empty(0)
    if not gradient:
        return loss, weights, at_positive, queries.new_empty(0), queries.new_empty(0)
    run.gradients.add_pairs(at_positive, exclude[0])
    return loss, nothing, nothing.clone(), run.gradients.d_queries, run.gradients.d_keys


def powers_are_safe(logit: float, degree: int, m: int, dtype: torch.dtype) -> bool:
    """Whether m terms exp(x) x^degree with |x| ≤ logit add up to a finite number."""
    largest = logit + degree * math.log(max(logit, 1)) + math.log(m)
    return largest < 0.9 * math.log(torch.finfo(dtype).max)


def tile_moments(
    tile: Tile,
    power: Tensor,
    x_scale: float,
    e_scale: float,
    exclude: list[int],
    moments: Tensor,  # [R, degree + 1], added to
) -> None:
    """Σ_j e x^k; x and e stay in the tile's buffers, of which degree 0 needs one alone."""
    degree, x = moments.shape[1] - 1, tile.buffers[0]
    e = tile.buffers[1] if degree else x
    tile.similarity(x_scale)
    if e_scale == 1:
        torch.exp(x, out=e)
    else:
        torch.mul(x, e_scale, out=e).exp_()
    tile.fill(e, exclude, 0)
    moments[:, 0] += e.sum(1)
    for k in range(1, degree + 1):
        moments[:, k] += torch.mul(power if k > 1 else e, x, out=power).sum(1)


def add_gradient(run: Run, block: list[Tile], weights: Tensor) -> None:  # weights [R, degree + 1]
    """G = e Σ_k weights_k x^k, the tile that was formed last first: it is in the cache yet."""
    w = weights.T[:, :, None].unbind()
    for tile in reversed(block):
        x, e = tile.buffers
        g = run.scratch(tile)
        if len(w) == 1:
            torch.mul(x, w[0], out=g)
        else:
            torch.addcmul(w[-2], w[-1], x, out=g)
            for w_k in w[-3::-1]:
                torch.addcmul(w_k, g, x, out=g)
            g.mul_(e)
        run.gradients.add(tile, g)


class Run:
    """Blocks of rows cut into tiles, in memory that all blocks share."""

    def __init__(self, queries: Tensor, keys: Tensor, gradient: bool) -> None:
        self.gradients = Gradients(queries, keys)
        queries, keys = self.gradients.queries, self.gradients.keys
        n, m = len(queries), len(keys)
        row_bytes = 2 * m * queries.element_size()
        self.rows = min(KEPT_BYTES // row_bytes, ROWS, (n + 3) // 4)
        self.rows = min(max(self.rows, LEAST_ROWS), n)
        starts = range(0, m, COLS)
        self.cols = [slice(start, min(start + COLS, m)) for start in starts]
        tile = self.rows * min(COLS, m)
        self.kept = queries.new_empty(len(starts) if gradient else 1, 2, tile)
        self.memory = queries.new_empty(tile)

    def blocks(self) -> Iterator[list[Tile]]:
        queries, keys = self.gradients.queries, self.gradients.keys
        for start in range(0, len(queries), self.rows):
            rows = slice(start, min(start + self.rows, len(queries)))
            yield [
                Tile(queries, keys, rows, cols, self.kept[index % len(self.kept)])
                for index, cols in enumerate(self.cols)
            ]

    def scratch(self, tile: Tile) -> Tensor:
        return self.memory[: tile.buffers[0].numel()].view_as(tile.buffers[0])
