"""Rounding to bfloat16 by chance, the same in every backend: a field's small changes add up."""

from __future__ import annotations

import torch
from torch import Tensor

MASK = (1 << 32) - 1


class Noise:
    """What an update adds to the bits that are cut off: the upper 16 bits of
    (row key | 1) · column key modulo 2^32, from hashes of the row's or the column's sample, of seed
    and update."""

    def __init__(
        self,
        rows: Tensor,  # [R] int64, samples
        cols: Tensor,  # [B] int64
        clock: Tensor,  # [2]
    ) -> None:
        self.rows = keys_of(rows, clock, 0)[:, None] | 1  # [R, 1] int32
        self.cols = keys_of(cols, clock, 1)  # [B] int32

    def round(self, x: Tensor, rows: slice, work: Tensor) -> None:
        """x, [rows, B], in place: upwards as often as it is above the lower neighbour. `work` is
        int32 of x's shape."""
        single = x.float()  # x itself, unless it is float64
        torch.mul(self.rows[rows], self.cols, out=work)
        work.bitwise_right_shift_(16).bitwise_and_(0xFFFF)
        single.view(torch.int32).add_(work).bitwise_and_(-0x10000)
        if single is not x:
            x.copy_(single)


def keys_of(ids: Tensor, clock: Tensor, side: int) -> Tensor:  # [N] int64 -> [N] int32
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
