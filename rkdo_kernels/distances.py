"""Tiles of squared distances, and gradients through them, with the digits that differences have.

‖zq‖² + ‖zk‖² − 2 zq·zk in the inputs' dtype loses what distances are smaller than rows are long.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .needs import Needs, rooms
from .tiles import Tile, compute

NEAR = 2.0**12  # ‖row − mean‖ up to which float64 cancels to 2⁻²⁶ at most: nothing beside 1


class Distances:
    """On a CPU float32's differences are products of float64, which has digits to lose:

        ‖zq − zk‖² = (−2 zq, ‖zq‖², 1) · (zk, 1, ‖zk‖²)
        Σ_j g_j (zk_j − zq) = Σ_j g_j zk_j − zq Σ_j g_j

    of rows less the keys' mean. float64's, other devices', and of rows far apart, the distances
    themselves, are formed number by number, which takes as many passes as there are dimensions.
    """

    def __init__(self, queries: Tensor, keys: Tensor) -> None:
        self.queries, self.keys = compute(queries), compute(keys)
        self.wide = is_wide(self.queries)
        self.near = False
        if not self.wide:
            return
        center = keys.mean(0, dtype=torch.float64)
        q, k = self.queries - center, self.keys - center
        q_square, k_square = q.square().sum(1, keepdim=True), k.square().sum(1, keepdim=True)
        self.rows = torch.cat([q * -2, q_square, torch.ones_like(q_square)], 1)
        self.cols = torch.cat([k, torch.ones_like(k_square), k_square], 1)
        some = len(q) and len(k)
        farthest = torch.cat([q_square, k_square]).amax() if some else q_square.new_zeros(())
        self.near = bool(farthest <= NEAR**2)  # not so of NaN
        self.room = self.rows.new_empty(0)

    def scratch(self, like: Tensor) -> Tensor:
        if len(self.room) < like.numel():
            self.room = self.rows.new_empty(like.numel())
        return self.room[: like.numel()].view(like.shape)

    def __call__(self, rows: slice, cols: slice, out: Tensor) -> None:
        """‖zq_i − zk_j‖² of the rows i and columns j."""
        if self.near:
            product = torch.mm(self.rows[rows], self.cols[cols].T, out=self.scratch(out))
            out.copy_(product).clamp_min_(0)
        else:
            ends = self.queries[rows], self.keys[cols]
            if self.wide:  # rounded once: where distances are equal, they stay so
                ends = ends[0].double(), ends[1].double()
            between = torch.cdist(*ends, compute_mode="donot_use_mm_for_euclid_dist")
            out.copy_(between.square_())


class Gradients:
    """Σ_j G_ij (zk_j − zq_i) and Σ_i G_ij (zq_i − zk_j), added up from tiles of G."""

    def __init__(self, distances: Distances, needs: Needs) -> None:
        self.of, (self.to_queries, self.to_keys) = distances, needs
        ends = (distances.rows, distances.cols) if distances.near else (
            distances.queries, distances.keys)  # fmt: skip
        self.d_queries, self.d_keys = (x.zero_() for x in rooms(*ends, needs))

    def add(self, tile: Tile) -> None:
        if self.of.near:
            g = self.of.scratch(tile.s).copy_(tile.s)
            if self.to_queries:
                self.d_queries[tile.rows].addmm_(g, self.of.cols[tile.cols])
            if self.to_keys:
                self.d_keys[tile.cols].addmm_(g.T, self.of.rows[tile.rows])
            return
        for at in range(tile.queries.shape[1]):
            pull = (tile.keys[:, at] - tile.queries[:, at, None]).mul_(tile.s)
            if self.to_queries:
                self.d_queries[tile.rows, at] += pull.sum(1)
            if self.to_keys:
                self.d_keys[tile.cols, at] -= pull.sum(0)

    def result(self) -> tuple[Tensor, Tensor]:
        d_queries, d_keys, of = self.d_queries, self.d_keys, self.of
        if of.near and self.to_queries:
            d_queries = d_queries[:, :-2] + d_queries[:, -2:-1] * of.rows[:, :-2] / 2
        if of.near and self.to_keys:
            d_keys = d_keys[:, :-2] / -2 - d_keys[:, -1:] * of.cols[:, :-2]
        return d_queries.to(of.queries.dtype), d_keys.to(of.queries.dtype)


def below_peak(distances: Tensor, nearest: Tensor) -> Tensor:  # [N, M], [N, 1]
    """Student's logits −log(1 + distances) less that of the nearest, in the distances' place.

    A logit's own rounding grows with it, and 1/τ multiplies it; that of
    log((1 + distance)/(1 + nearest)) = log1p((distance − nearest)/(1 + nearest)) does not.
    """
    return distances.sub_(nearest).mul_(1 / (1 + nearest)).log1p_().neg_()


def is_wide(x: Tensor) -> bool:
    """Whether float64 has digits to lose, and its products cost little."""
    return x.device.type == "cpu" and x.dtype == torch.float32
