"""Calls of a response field that has been updated before, beside the same on whole matrices.

Updates that came before are made by tiles: what is judged is one call. A dense field is judged from
the block that it holds, a snapshot from the embeddings of its visits.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

import rkdo_kernels as rk
from rkdo_kernels import reference

from .calls import DTYPES, Outcome, evaluate, scarce_memory, split_in, views


@dataclass(frozen=True)
class FieldCall:
    """`does` to a field that has been updated before: loss, none (by row), step or update."""

    name: str
    kind: str  # dense or snapshot
    does: str = "step"
    samples: int = 200  # of the field
    batch: int = 67
    dim: int = 40
    dtype: str = "fp32"
    stored: str = "fp32"
    gathered: bool = True  # the batch's samples lie apart
    initial: str = "neighbours"  # or "labels", "identity"
    history: int = 3
    frozen: str = ""
    splits: int = 1
    scarce: bool = False  # shared memory, so that visits come one after another
    quick: bool = False

    ALPHA = 0.4
    TEMPERATURE = 0.3

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.batch, self.batch, self.dim

    def index(self) -> Tensor | slice:
        if not self.gathered:
            return slice(self.samples - self.batch, self.samples)
        generator = torch.Generator().manual_seed(self.samples)
        return torch.randperm(self.samples, generator=generator)[: self.batch]

    def inputs(self) -> dict[str, Tensor]:
        return views(self.batch, self.batch, self.dim, DTYPES[self.dtype])

    def first(self) -> Tensor:  # [samples, samples], float64
        """Rows that the field starts from."""
        n = self.samples
        if self.initial == "identity":
            return torch.eye(n, dtype=torch.float64)
        if self.initial == "labels":
            labels = torch.arange(n) % 7
            same = (labels[:, None] == labels).double()
            return same / same.sum(1, keepdim=True)
        generator = torch.Generator().manual_seed(n)
        p = torch.rand(n, n, generator=generator, dtype=torch.float64) ** 6
        p[torch.rand(n, n, generator=generator) < 0.2] = 0
        p.diagonal().add_(0.1)
        return p / p.sum(1, keepdim=True)

    def visits(self) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        """Earlier updates: the samples' places in the batch, fewer each time, and embeddings."""
        for turn in range(self.history + 1 if self.kind == "snapshot" else 2):
            places = torch.arange(max(1, self.batch - 5 * turn))
            yield places, views(len(places), len(places), self.dim, DTYPES[self.dtype], 7 + turn)

    def numbers(self) -> Tensor:
        return torch.arange(self.samples)[self.index()]

    def made(self) -> rk.ResponseField:
        initial: Any = self.initial
        if self.initial == "labels":
            initial = torch.arange(self.samples) % 7
        elif self.initial == "neighbours":
            initial = self.first().to_sparse_csr()
        options = {"dtype": DTYPES[self.stored], "initial": initial}
        if self.kind == "dense":
            made = rk.ResponseField.dense(self.samples, **options)
        else:
            made = rk.ResponseField.snapshot(
                self.samples, self.dim, history=self.history, **options
            )
        settings = {"alpha": self.ALPHA, "temperature": self.TEMPERATURE, "backend": "tiled"}
        for places, embeddings in self.visits():
            made.update(**embeddings, index=self.numbers()[places], **settings)
        return made

    def ours(self) -> Outcome:
        made, index = self.made(), self.index()
        settings: dict[str, Any] = {"index": index, "temperature": self.TEMPERATURE}
        updates = self.does in ("step", "update")
        call = made.loss if self.does == "none" else getattr(made, self.does)
        if updates:
            settings["alpha"] = self.ALPHA
        if self.does == "none":
            settings["reduction"] = "none"
        with split_in(self.splits), scarce_memory(self.scarce):
            if self.does == "update":
                call(**self.inputs(), **settings)
                outcome: Outcome = {}
            else:
                outcome = evaluate(partial(call, **settings), self.inputs(), self.frozen)
        if updates and self.kind == "dense":
            outcome |= parts_of(made.rows(index)[:, self.numbers()].double())
        return outcome

    def eager(self, dtype: torch.dtype) -> Outcome:
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        before = self.dense_before() if self.kind == "dense" else self.snapshot_before()
        inputs = {name: x.to(dtype) for name, x in self.inputs().items()}

        def loss(queries: Tensor, keys: Tensor) -> Tensor:
            rows = reference.field_loss(
                before.to(wide), queries, keys, temperature=self.TEMPERATURE
            )
            return rows if self.does == "none" else rows.mean()

        outcome = {} if self.does == "update" else evaluate(loss, inputs, self.frozen)
        if self.kind == "dense" and self.does in ("step", "update"):
            after = reference.field_update(
                before.to(wide), **{name: x.to(wide) for name, x in inputs.items()},
                alpha=self.ALPHA, temperature=self.TEMPERATURE,
            )  # fmt: skip
            if dtype != torch.float64:
                after = self.as_stored(after)
                after.diagonal().add_(1 - self.made().rows(self.index()).double().sum(1))
            outcome |= parts_of(after.double())
        return outcome

    def as_stored(self, block: Tensor) -> Tensor:
        """Rounded by chance; the diagonal stays in float32, and takes up what that leaves, so that
        rows add up to one."""
        rounded = block.clone()
        if self.stored == "bf16":
            generator = torch.Generator().manual_seed(self.batch)
            noise = torch.randint(0, 1 << 16, block.shape, generator=generator, dtype=torch.int32)
            rounded = (block.view(torch.int32) + noise & -(1 << 16)).view(torch.float32)
        left = (block - rounded).fill_diagonal_(0).sum(1)
        return rounded.diagonal_scatter(block.diagonal() + left)

    def dense_before(self) -> Tensor:
        return self.made().rows(self.index())[:, self.numbers()].double()

    def snapshot_before(self) -> Tensor:
        """p of the batch, from the visits themselves."""
        past: list[list[tuple[Tensor, Tensor]]] = [[] for _ in range(self.batch)]
        stored = DTYPES[self.stored]
        for places, embeddings in self.visits():
            q, k = (x.to(stored).double() for x in embeddings.values())
            for at in places.tolist():
                past[at].insert(0, (q[at], k[at]))
        queries, keys = torch.zeros(2, self.history, self.batch, self.dim, dtype=torch.float64)
        counts = torch.tensor([min(len(x), self.history) for x in past])
        for at, of_one in enumerate(past):
            for s, (q, k) in enumerate(of_one[: self.history]):
                queries[s, at], keys[s, at] = q, k
        each = torch.ones(self.history, self.batch, dtype=torch.float64)
        first = self.first()[self.numbers()][:, self.numbers()]
        return reference.snapshot_target(
            queries, keys, self.ALPHA * each, self.TEMPERATURE * each, counts, first
        )


def parts_of(block: Tensor) -> Outcome:
    """Of rows: entries but for the diagonal, which are small; and 1 − the diagonal, which takes up
    what a row has lost that is to add up to one, and so is held to digits of one."""
    return {"beside": 1 - block.diagonal(), "others": block.clone().fill_diagonal_(0)}
