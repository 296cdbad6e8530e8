"""The response field as the embeddings of every sample's last visits, in memory linear in n."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from . import checks, field_ops
from .batch import Batch
from .field_state import State
from .initial import Initial
from .needs import NEITHER, Needs, once_only
from .problem import without_autocast

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
LARGEST = 2.0**32  # an embedding's entry that is kept: a later batch pairs it with any other's


class SnapshotField(State):
    """Queries and keys of the last K visits, and each visit's alpha and scale: rings by sample."""

    kind = "snapshot"

    def __init__(
        self,
        n: int,
        held: tuple[int, int],  # the samples that this rank holds
        dim: int,
        history: int,
        dtype: torch.dtype,
        initial: Initial,
        device: torch.device,
        group: Any,
    ) -> None:
        size, self.group, self.held, self.initial = held[1] - held[0], group, held, initial
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        what = f"a snapshot field of {n} samples, dim={dim}, history={history}"
        instead = "a shorter history or a narrower dtype needs less"
        checks.fits(2 * history * size * dim, dtype, device, what, instead)

        def zeros(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(*shape, dtype=dtype, device=device)

        super().__init__({
            "queries": zeros(history, size, dim, dtype=dtype),
            "keys": zeros(history, size, dim, dtype=dtype),
            "alpha": zeros(history, size, dtype=wide),
            "scale": zeros(history, size, dtype=wide),
            "visits": zeros(size, dtype=torch.int32),
            "clock": zeros(2, dtype=torch.int64),
            **{f"initial.{name}": x for name, x in initial.tensors.items()},
        })  # fmt: skip

    @property
    def dtype(self) -> torch.dtype:
        return self.tensors["queries"].dtype

    def renewed(self) -> None:
        names = self.initial.tensors
        self.initial.hold({name: self.tensors[f"initial.{name}"] for name in names})

    def evaluate(
        self, batch: Batch, alpha: Tensor | None, needs: Needs
    ) -> tuple[Tensor, Tensor, Tensor]:  # [R], [R, D], [B, D]
        """The rows' losses and, as `needs` says, those of their sum; with alpha, an update."""
        result = field_ops.snapshot_loss(
            *batch.detached, *self.past(batch), batch.scale, needs, batch.backend
        )
        if alpha is not None:
            self.write(batch, alpha)
        return result

    def losses(self, batch: Batch, alpha: Tensor | None) -> Tensor:  # [R]
        """For autograd, whatever the rows' weights."""
        past = self.past(batch)
        loss, _, _ = field_ops.snapshot_loss(
            *batch.detached, *past, batch.scale, NEITHER, batch.backend
        )
        if alpha is not None:
            self.write(batch, alpha)
        return Rows.apply(batch.queries, batch.keys, loss, *past, batch.scale, batch.backend)

    def past(self, batch: Batch) -> tuple[Any, ...]:
        """What the operators take of a batch's past, the latest visit first."""
        rows, history = batch.rows, len(self.tensors["queries"])
        total = self.tensors["visits"][rows].long()
        slot = (total - 1 - torch.arange(history, device=total.device)[:, None]) % history
        queries, keys, alphas, scales = (
            self.tensors[name][slot, rows] for name in ("queries", "keys", "alpha", "scale")
        )
        visits = total.clamp_max(history)
        there = torch.arange(history, device=total.device)[:, None] < visits
        share = torch.where(there, alphas, 0).double()
        kept = (1 - share).cumprod(0)
        weights = share * torch.cat([torch.ones_like(kept[:1]), kept[:-1]])
        samples = batch.index[batch.own]
        prior, prior_cols, *labels = self.initial.block(samples, batch.index, batch.own)
        rest = kept[-1, :, None]
        mass = weights.sum(0)[:, None] + rest * (prior.sum(1, keepdim=True) > 0)
        inverse = torch.where(mass > 0, 1 / mass, 0)
        keys, visits = self.of_all(keys, batch, 1), self.of_all(visits, batch, 0)
        return (
            queries, keys, (weights.T * inverse).to(alphas.dtype), scales.T.contiguous(), visits,
            (rest * prior * inverse).to(alphas.dtype), prior_cols, *labels,
        )  # fmt: skip

    def of_all(self, held: Tensor, batch: Batch, dim: int) -> Tensor:
        """From the batch's rows that this rank holds to those of all ranks."""
        if batch.ranks == 1:
            return held
        shape = list(held.shape)
        shape[dim] = batch.index.shape[0]
        every = held.new_zeros(shape).index_copy_(dim, batch.own, held)
        dist.all_reduce(every, group=self.group)
        return every

    def write(self, batch: Batch, alpha: Tensor) -> None:
        """The present embeddings as the newest visit, but for rows that are not finite or whose
        logits, with these keys or with those of any visit, may not be."""
        visits, rows = self.tensors["visits"], batch.rows
        keys = batch.keys[batch.own].detach()
        queries = batch.queries.detach()
        wide = self.tensors["scale"].dtype
        most = torch.finfo(wide).max
        good = (self.scores(batch) <= most) & (batch.scale <= most)
        for x in (queries, keys):
            good &= (x.to(self.dtype).to(wide).abs() <= LARGEST).all(1)
        slot = visits[rows] % len(self.tensors["queries"])
        for name, new in (("queries", queries), ("keys", keys)):
            old = self.tensors[name]
            old[slot, rows] = torch.where(good[:, None], new.to(old.dtype), old[slot, rows])
        for name, value in (("alpha", alpha), ("scale", batch.scale)):
            old = self.tensors[name]
            old[slot, rows] = torch.where(good, value.to(old.dtype), old[slot, rows])
        # Counts stay below 2 K and the same modulo K: they tell the slot, and the visits up to K.
        history = len(self.tensors["queries"])
        count = visits[rows] + good
        visits[rows] = torch.where(count >= 2 * history, count - history, count).to(visits.dtype)
        self.tensors["clock"][1].add_(torch.isfinite(batch.scale))

    def scores(self, batch: Batch) -> Tensor:  # [R]
        """At least the rows' largest |c S_ij|, over these keys but those that are not finite, and
        over all that may be kept."""
        wide = field_ops.row_dtype(batch.keys)
        queries, keys = (x.to(wide).abs().amax(1) for x in batch.detached)
        largest = torch.where(torch.isfinite(keys), keys, 0).amax().clamp_min(LARGEST)
        return queries * largest * (batch.keys.shape[1] * batch.scale).to(wide)

    def block(self, batch: Batch) -> Tensor:  # [R, B], p̂
        past_queries, past_keys, weights, scales, visits, prior, prior_cols, *labels = self.past(
            batch
        )
        p = weights.new_zeros(len(batch.rows), len(batch.index))
        for s, of_rows in enumerate(past_queries):
            with without_autocast(p.device.type):
                x = of_rows.to(p.dtype) @ past_keys[s].to(p.dtype).T * scales[:, s, None]
            q = torch.softmax(x.masked_fill(visits <= s, float("-inf")), dim=1)
            p += torch.where(weights[:, s, None] > 0, weights[:, s, None] * q, 0)
        if prior_cols is not None:
            return p.scatter_add_(1, prior_cols, prior)
        return p + (labels[0][:, None] == labels[1]) * prior


class Rows(torch.autograd.Function):
    """The rows' losses, with a gradient that is formed when their weights are known."""

    @staticmethod
    def forward(ctx: Any, queries: Tensor, keys: Tensor, loss: Tensor, *past: Any) -> Tensor:
        *saved, ctx.backend = past
        ctx.save_for_backward(queries, keys, *saved)
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor) -> Any:  # type: ignore[override]
        queries, keys, *saved = ctx.saved_tensors
        needs = list(ctx.needs_input_grad[:2])
        gradients = field_ops.snapshot_gradient(
            queries.detach(), keys.detach(), *saved, d_loss.detach(), needs, ctx.backend
        )
        return *once_only(needs, gradients, queries, keys, d_loss), *[None] * (len(saved) + 2)
