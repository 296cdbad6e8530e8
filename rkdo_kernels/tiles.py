"""Tiles of S: the blocks that the CPU's loops run over, and the gradients they add up."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .needs import BOTH, Needs

TILE_BYTES = 2 << 20  # of a tile's buffers together: they stay in the cores' caches
TILE_COLS = 1 << 13
TILE_ROWS = 128  # up to which one tile may hold all of S


class Tile:
    """A block of rows and a block of columns of S, with buffers of their shape."""

    def __init__(self, queries: Tensor, keys: Tensor, rows: slice, cols: slice, memory: Tensor):
        self.queries, self.keys = queries[rows], keys[cols]
        self.rows, self.cols = rows, cols
        n, m = len(self.queries), len(self.keys)
        self.memory = memory[:, : n * m].view(len(memory), n, m)
        self.buffers = self.memory.unbind()

    def similarity(self, factor: float = 1.0) -> Tensor:
        """factor · S."""
        s = self.buffers[0]
        return torch.addmm(s[:1], self.queries, self.keys.T, beta=0, alpha=factor, out=s)

    def fill(self, matrix: Tensor, diagonals: list[int], value: float) -> None:
        for offset in diagonals:
            self.diagonal(matrix, offset).fill_(value)

    def diagonal(self, matrix: Tensor, offset: int) -> Tensor:
        """The entries whose column is their row + offset."""
        return matrix.diagonal(offset + self.rows.start - self.cols.start)


def tiles(queries: Tensor, keys: Tensor, buffers: int, upper: bool = False) -> Iterator[Tile]:
    """All of S; or if `upper`, every block of rows from its own columns on."""
    n, m = len(queries), len(keys)
    n_cols = min(m, TILE_COLS)
    n_rows = max(1, TILE_BYTES // (buffers * n_cols * queries.element_size()))
    n_rows = min(n_rows, n if n <= TILE_ROWS else (n + 1) // 2)
    memory = queries.new_empty(buffers, n_rows * n_cols)
    for row in range(0, n, n_rows):
        for col in range(row if upper else 0, m, n_cols):
            rows, cols = slice(row, min(row + n_rows, n)), slice(col, min(col + n_cols, m))
            yield Tile(queries, keys, rows, cols, memory)


class Gradients:
    """∂L/∂queries and ∂L/∂keys, added up from tiles of ∂L/∂S; of no entries if not needed."""

    def __init__(self, queries: Tensor, keys: Tensor, needs: Needs = BOTH) -> None:
        self.to_queries, self.to_keys = needs
        self.queries, self.keys = compute(queries), compute(keys)
        self.d_queries = self.queries.new_zeros(queries.shape if self.to_queries else 0)
        self.d_keys = self.keys.new_zeros(keys.shape if self.to_keys else 0)

    def add(self, tile: Tile, g: Tensor) -> None:
        if self.to_queries:
            self.d_queries[tile.rows].addmm_(g, tile.keys)
        if self.to_keys:
            self.d_keys[tile.cols].addmm_(g.T, tile.queries)

    def add_pairs(self, g: Tensor, offset: int) -> None:
        """g_i = ∂L/∂S_ij at j = i + offset."""
        g = g[:, None].to(self.queries.dtype)
        if self.to_queries:
            self.d_queries.addcmul_(g, self.keys.narrow(0, offset, len(g)))
        if self.to_keys:
            self.d_keys.narrow(0, offset, len(g)).addcmul_(g, self.queries)

    def result(self) -> tuple[Tensor, Tensor]:
        return self.d_queries, self.d_keys


def compute(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def sums(x: Tensor) -> torch.dtype:
    """What a row is added up in; MPS has no float64."""
    return torch.float32 if x.device.type == "mps" else torch.float64
