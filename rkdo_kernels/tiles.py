"""Tiles of S: the blocks that the CPU's loops run over, and the gradients they add up."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from .needs import BOTH, Needs

ROWS, COLS = 256, 1024  # of a tile
LEAST_ROWS = 32
SMALL = 1 << 17  # entries of S up to which two tiles' rows hold it: operators are the cost
KEPT_BYTES = 32 << 20  # of two tiles' buffers for all keys of a block of rows
STRIP_BYTES = 2 << 20  # of a strip's buffers together: they stay in the cores' caches


def split(n: int, m: int, size: int) -> tuple[int, int]:
    """Rows and columns of a tile of S, of entries of `size` bytes.

    Every pass over S, of a forward or of a backward function, must take this split: a matrix
    product of another shape adds up in another order or in another kernel, S differs in its last
    bits, and 1/τ multiplies the difference in rows that one key dominates.
    """
    parts = 2 if n * m <= SMALL else 4
    rows = min(KEPT_BYTES // (2 * m * size), ROWS, -(-n // parts))
    return min(max(rows, LEAST_ROWS), n), min(m, COLS)


class Strip:
    """Some rows of a tile: S there, and buffers of its shape."""

    def __init__(self, tile: Tile, local: slice, memory: Tensor):
        self.s = tile.s[local]
        self.cols = tile.cols
        self.rows = slice(tile.rows.start + local.start, tile.rows.start + local.stop)
        self.queries, self.keys = tile.queries[local], tile.keys
        self.memory = memory[:, : self.s.numel()].view(len(memory), *self.s.shape)
        self.buffers = self.memory.unbind()

    def fill(self, matrix: Tensor, diagonals: list[int], value: float) -> None:
        for offset in diagonals:
            self.diagonal(matrix, offset).fill_(value)

    def take(self, into: Tensor, offset: int) -> None:
        """S of the rows whose column row + offset is here."""
        diagonal = self.diagonal(self.s, offset)
        if len(diagonal):
            start = max(self.rows.start, self.cols.start - offset)
            into[start : start + len(diagonal)] = diagonal

    def diagonal(self, matrix: Tensor, offset: int) -> Tensor:
        """The entries whose column is their row + offset."""
        return matrix.diagonal(offset + self.rows.start - self.cols.start)


class Tile:
    """A block of rows and a block of columns of S."""

    def __init__(
        self,
        queries: Tensor,
        keys: Tensor,
        rows: slice,
        cols: slice,
        memory: Tensor,  # for S
        work: Tensor,  # [buffers, entries of a strip]
    ):
        self.queries, self.keys = queries[rows], keys[cols]
        self.rows, self.cols, self.work = rows, cols, work
        n, m = len(self.queries), len(self.keys)
        self.s = memory[: n * m].view(n, m)

    def product(self, factor: float) -> None:
        """factor · S."""
        s = self.s
        torch.addmm(s[:1], self.queries, self.keys.T, beta=0, alpha=factor, out=s)

    @property
    def mirrored(self) -> int:
        """Of an upper tile, columns before the first that stands for its mirror image too."""
        return max(self.rows.stop - self.cols.start, 0)

    def strips(self) -> Iterator[Strip]:
        n, m = self.s.shape
        count = -(-n // max(1, self.work.shape[1] // m))
        height = -(-n // count)
        for start in range(0, n, height):
            yield Strip(self, slice(start, min(start + height, n)), self.work)


def tiles(
    queries: Tensor,  # [N, D]
    keys: Tensor,  # [M, D]
    buffers: int,  # that a strip has beside S
    factor: float = 1.0,
    upper: bool = False,
    form: Callable[[slice, slice, Tensor], None] | None = None,
) -> Iterator[Tile]:
    """All of factor · S, or what `form` makes in its place of rows, columns and room for it; if
    `upper`, every block of rows from its own columns on."""
    (n, m), size = (len(queries), len(keys)), queries.element_size()
    n_rows, n_cols = split(n, m, size)
    height = min(n_rows, max(1, STRIP_BYTES // (max(buffers, 1) * n_cols * size)))
    memory = queries.new_empty(n_rows * n_cols)
    work = queries.new_empty(buffers, height * n_cols)
    for row in range(0, n, n_rows):
        for col in range(row if upper else 0, m, n_cols):
            rows, cols = slice(row, min(row + n_rows, n)), slice(col, min(col + n_cols, m))
            tile = Tile(queries, keys, rows, cols, memory, work)
            tile.product(factor) if form is None else form(rows, cols, tile.s)
            yield tile


class Gradients:
    """∂L/∂queries and ∂L/∂keys, added up from tiles of ∂L/∂S; of no entries if not needed."""

    def __init__(self, queries: Tensor, keys: Tensor, needs: Needs = BOTH) -> None:
        self.to_queries, self.to_keys = needs
        self.queries, self.keys = compute(queries), compute(keys)
        self.d_queries = self.queries.new_zeros(queries.shape if self.to_queries else 0)
        self.d_keys = self.keys.new_zeros(keys.shape if self.to_keys else 0)

    def add(self, tile: Tile) -> None:
        """With ∂L/∂S where the tile had S."""
        if self.to_queries:
            self.d_queries[tile.rows].addmm_(tile.s, tile.keys)
        if self.to_keys:
            self.d_keys[tile.cols].addmm_(tile.s.T, tile.queries)

    def add_pairs(self, g: Tensor, offset: int) -> None:
        """g_i = ∂L/∂S_ij at j = i + offset."""
        g = g[:, None].to(self.queries.dtype)
        if self.to_queries:
            self.d_queries.addcmul_(g, self.keys.narrow(0, offset, len(g)))
        if self.to_keys:
            self.d_keys.narrow(0, offset, len(g)).addcmul_(g, self.queries)

    def result(self) -> tuple[Tensor, Tensor]:
        return self.d_queries, self.d_keys


def may_pass(most: float, queries: Tensor, keys: Tensor) -> bool:
    """Whether a difference of products may pass `most`; yes, where asking takes a device."""
    if queries.device.type != "cpu" or not (queries.numel() and keys.numel()):
        return True
    largest = 1.0
    for x in (queries, keys):
        low, high = torch.aminmax(x.detach())
        largest *= max(-float(low), float(high)) if low == low else torch.nan
    return not 2 * largest * queries.shape[1] <= most


def compute(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def sums(x: Tensor) -> torch.dtype:
    """What a row is added up in; MPS has no float64."""
    return torch.float32 if x.device.type == "mps" else torch.float64
