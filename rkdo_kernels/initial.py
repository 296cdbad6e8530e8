"""The response field before its first update: identity, labels, or given neighbours."""

from __future__ import annotations

import torch
from torch import Tensor

from . import checks


class Initial:
    """p⁰ over n samples; `tensors` is what it holds, by name: nothing for the identity."""

    def __init__(self, given: str | Tensor, n: int, device: torch.device | None) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.most = 1  # neighbours of a sample
        on_mps = device is not None and device.type == "mps"
        self.dtype = torch.float32 if on_mps else torch.float64
        if isinstance(given, str) and given == "identity":
            return
        if not isinstance(given, Tensor):
            raise TypeError(
                "initial must be 'identity', a tensor of labels or a sparse CSR tensor, got "
                f"{given!r}"
            )
        if given.layout == torch.sparse_csr:
            tensors = neighbours(given.detach(), n)
        else:
            if given.layout != torch.strided or given.dtype not in (torch.int64, torch.int32):
                raise TypeError(
                    "initial must be 'identity', int64 or int32 labels or a sparse CSR tensor, got "
                    f"{checks.dtype_name(given)} of layout {given.layout}"
                )
            if list(given.shape) != [n]:
                raise ValueError(f"initial must have {n} labels, got shape {list(given.shape)}")
            tensors = {"labels": given.to(torch.int64, copy=True)}  # not the caller's own
        self.hold(tensors)
        self.hold({name: x.to(device) for name, x in tensors.items()})

    def hold(self, tensors: dict[str, Tensor]) -> None:
        """Takes tensors for its own, which may have new values."""
        self.tensors = tensors
        first = tensors.get("first")
        if first is not None and not first.is_meta:
            self.most = int(first.diff().amax())

    def rows(self, start: int, stop: int, n: int, device: torch.device) -> Tensor:
        """p⁰ of a range of samples, [stop − start, n] float64 (float32 where there is none)."""
        p = torch.zeros(stop - start, n, dtype=self.dtype, device=device)
        if "labels" in self.tensors:
            labels = self.tensors["labels"]
            p.copy_(labels[start:stop, None] == labels)
            return p.div_(p.sum(1, keepdim=True))
        if "first" in self.tensors:
            first, col, value = (self.tensors[name] for name in ("first", "col", "value"))
            inside = slice(int(first[start]), int(first[stop]))
            row = torch.repeat_interleave(first[start : stop + 1].diff())
            return p.index_put_((row, col[inside]), value[inside].to(self.dtype), accumulate=True)
        p.diagonal(start).fill_(1)
        return p

    def block(
        self,
        samples: Tensor,  # [R]
        index: Tensor,  # [B], the batch
        own: Tensor,  # [R], of samples in the batch
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """p⁰ over a batch: its entries in a row [R, L] and either their columns [R, L], or the
        labels of samples [R] and of the batch [B]. A row adds up to 1, or has no mass there."""
        if "labels" in self.tensors:
            labels = self.tensors["labels"]
            of_rows, of_cols = labels[samples], labels[index]
            ordered = of_cols.sort().values
            last = torch.searchsorted(ordered, of_rows, right=True)
            count = last - torch.searchsorted(ordered, of_rows)
            return 1 / count[:, None].to(self.dtype), None, of_rows, of_cols
        if "first" not in self.tensors:
            return torch.ones_like(own[:, None], dtype=self.dtype), own[:, None], None, None
        first, col, value = (self.tensors[name] for name in ("first", "col", "value"))
        at = first[samples, None] + torch.arange(self.most, device=index.device)
        there = at < first[samples + 1, None]
        at = at.clamp_max(len(col) - 1)
        ordered, order = index.sort()
        place = torch.searchsorted(ordered, col[at]).clamp_max_(len(index) - 1)
        there &= ordered[place] == col[at]
        entries = torch.where(there, value[at], 0)
        mass = entries.sum(1, keepdim=True)
        return torch.where(mass > 0, entries / mass, 0), order[place], None, None


def neighbours(given: Tensor, n: int) -> dict[str, Tensor]:
    """A sparse CSR tensor's rows, normalised; an empty one is the sample itself."""
    if list(given.shape) != [n, n]:
        raise ValueError(f"initial must be [{n}, {n}], got shape {list(given.shape)}")
    dtype = given.dtype if given.dtype == torch.float64 else torch.float32
    value = given.values().cpu().double()
    if not bool((torch.isfinite(value) & (value >= 0)).all()):
        raise ValueError("initial must have finite neighbours' weights of at least 0")
    size = given.crow_indices().long().cpu().diff()
    row = torch.repeat_interleave(size)
    mass = value.new_zeros(n).index_add_(0, row, value)
    if bool(mass.isinf().any()):  # 2⁶⁴ are more than there are
        value = torch.where(mass.isinf()[row], value * 2.0**-64, value)
        mass = value.new_zeros(n).index_add_(0, row, value)
    kept, empty = mass[row] > 0, (mass == 0).nonzero()[:, 0]
    row = torch.cat([row[kept], empty])
    col = torch.cat([given.col_indices().long().cpu()[kept], empty])
    share = value[kept] / mass[row[: len(row) - len(empty)]]
    value = torch.cat([share, value.new_ones(len(empty))])
    order = row.argsort(stable=True)
    first = row.new_zeros(n + 1)
    first[1:] = row.bincount(minlength=n).cumsum(0)
    return {"first": first, "col": col[order], "value": value[order].to(dtype)}
