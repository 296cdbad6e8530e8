"""The arguments that every loss takes: checked, and what the losses need of them row by row."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from . import checks, launch, ops, small
from .constants import host_constant
from .needs import asked, handed
from .once import no_transforms, once
from .stand_ins import StandIns, Wide, joined, stand_in


class Problem:
    """Raises for bad arguments; then `queries`, `keys`, `offset` and `backend` are settled."""

    def __init__(
        self,
        queries: Tensor,
        keys: Tensor,
        temperature: float | Tensor,
        bound: float | None,
        positive_offset: int | None,
        backend: str,
        paired: bool = True,
        square: str = "",  # what it is that needs as many keys as queries
    ) -> None:
        checks.choice("backend", backend, ("auto", "triton", "tiled", "reference"))
        if backend != "reference":
            no_transforms(queries, keys, temperature)
        checks.temperature(temperature)
        self.queries, self.keys = out_of_autocast(queries, keys)
        checks.embeddings(self.queries, self.keys)
        checks.bound(bound, self.queries)
        if square:
            checks.as_many(square, queries, keys)
        self.offset = checks.pairing(queries, keys, positive_offset) if paired else 0
        self.backend = launch.backend_for(backend, self.queries)
        self.stand_ins: StandIns = stand_in(self.queries), stand_in(self.keys)
        self.bound = bound
        self.held = bound is None  # to the bound, by whoever has looked at the rows' lengths
        self.validity: Tensor | None = None  # [N], factors for the rows' losses
        if self.queries.device.type == "cpu":
            self.hold_to_bound()  # which raises
        self.temperature: float | Tensor = temperature
        if isinstance(temperature, Tensor):  # converted once: its gradient is rounded once
            wide = temperature.to(ops.row_dtype(self.queries)).to(self.queries.device)
            valid = (wide > 0) & torch.isfinite(wide)
            self.temperature = torch.where(valid, wide, float("nan")).reshape(())

    def hold_to_bound(self) -> None:
        if not self.held:
            assert self.bound is not None
            self.held = True
            self.validity = checks.within_bound(self.queries, self.keys, self.bound)

    def materialised(self) -> AbstractContextManager:
        """For reference.py: its matrix products too stay in float32 under autocast."""
        return without_autocast(self.queries.device.type)

    def is_small(self) -> bool:
        """Whether fewer operators count for more than less memory; an exported graph needs ours."""
        if torch.compiler.is_exporting():
            return False
        entries = self.queries.shape[0] * self.keys.shape[0]
        on_cpu = self.queries.device.type == "cpu"
        return on_cpu and self.backend == "tiled" and entries <= small.MAX_ENTRIES

    def inverse_temperature(self) -> Tensor:  # [], 1 / τ
        """On the device, without a copy from the host to wait for."""
        if isinstance(self.temperature, Tensor):
            return 1 / self.temperature
        dtype = ops.row_dtype(self.queries)
        return torch.full((), 1 / self.temperature, dtype=dtype, device=self.queries.device)

    def copy(self) -> Problem:
        """By name: compilers of some releases trace neither copy.copy nor a loop over vars()."""
        other = object.__new__(Problem)
        other.queries, other.keys, other.stand_ins = self.queries, self.keys, self.stand_ins
        other.offset, other.backend, other.temperature = self.offset, self.backend, self.temperature
        other.bound, other.held, other.validity = self.bound, self.held, self.validity
        return other

    def mirrored(self) -> Problem:
        """With queries and keys in each other's places."""
        other = self.copy()
        other.queries, other.keys = self.keys, self.queries
        other.stand_ins = self.stand_ins[::-1]
        return other

    def over_all_images(self) -> Problem:
        """With queries and keys as the keys, the positives in their second half."""
        other = self.copy()
        n = other.offset = self.queries.shape[0]  # which may be symbolic: len would fix it
        other.keys = torch.cat([self.queries, self.keys])
        other.stand_ins = self.stand_ins[0], joined(*self.stand_ins, (n, self.keys.shape[0]))
        return other

    def among_themselves(self) -> None:
        """Queries meet queries and keys meet keys: these products are held to the bound too."""
        if self.bound is None:
            return
        self.hold_to_bound()
        for name, x in (("queries", self.queries), ("keys", self.keys)):
            validity = checks.within_bound(x, x, self.bound, (name, name))
            if validity is not None and self.validity is not None:
                self.validity = self.validity * validity

    def as_one(self) -> None:
        """Every row's loss depends on every other: where one is not valid none is."""
        self.hold_to_bound()
        if self.validity is not None:
            self.validity = self.validity.mean()

    def positive_similarities(self) -> Tensor:  # [N]
        to_queries, to_keys = self.stand_ins
        pairs = self.queries, self.positives(self.keys)
        return Dot.apply(*pairs, to_queries, None if to_keys is None else self.positives(to_keys))

    def total_similarities(self) -> Tensor:  # [N], Σ_j S_ij
        keys = self.wide()[1]
        total = keys.sum(0, dtype=ops.row_dtype(keys)).to(keys.dtype)
        return Dot.apply(self.queries, total.expand_as(self.queries), self.stand_ins[0], None)

    def student_logits(self) -> Tensor:  # [N], −log(1 + ‖query − key‖²) of the positives
        queries, keys = self.wide()
        difference = (queries - self.positives(keys)).to(ops.row_dtype(self.queries))
        distance = difference.square().sum(1)  # rounded as the tiles have it: ties stay ties
        return -torch.log1p(distance.to(queries.dtype).to(distance.dtype))

    def positives(self, keys: Tensor) -> Tensor:  # [M, D] -> [N, D]
        return keys.narrow(0, self.offset, self.queries.shape[0])

    def wide(self) -> tuple[Tensor, Tensor]:  # [N, D], [M, D]
        """Queries and keys in float32 at least."""
        pair = self.queries, self.keys
        if self.queries.dtype == ops.product_dtype(self.queries):
            return pair
        queries, keys = (Wide.apply(*x) for x in zip(pair, self.stand_ins, strict=True))
        return queries, keys

    def reduce(self, rows: Tensor, reduction: str) -> Tensor:
        self.hold_to_bound()
        validity = self.validity
        if reduction == "none":
            if validity is not None:
                rows = rows * validity.reshape(-1, *[1] * (rows.dim() - 1))
        else:
            rows = rows.mean() if reduction == "mean" else rows.sum()
            if validity is not None:
                rows = rows * validity.mean()  # as one: every row's gradient weighs the same
        return rows.to(ops.product_dtype(self.queries))


class Dot(torch.autograd.Function):
    """Row by row; in half precision with its gradients to the stand-ins. Keeps no wider copies."""

    @staticmethod
    def forward(
        ctx: Any, a: Tensor, b: Tensor, to_a: Tensor | None, to_b: Tensor | None
    ) -> Tensor:  # [N, D], [N, D] -> [N]
        ctx.save_for_backward(a, b)
        return (a.to(ops.product_dtype(a)) * b).sum(1, dtype=ops.row_dtype(a))

    @staticmethod
    def backward(ctx: Any, d_dot: Tensor) -> Any:  # type: ignore[override]
        a, b = ctx.saved_tensors
        d = d_dot[:, None].to(ops.product_dtype(a))
        needs = asked(ctx, 2)
        gradients = [
            once(d * x, a, b) if need else d for x, need in zip((b, a), needs, strict=True)
        ]
        return handed(ctx, gradients, 2)


@host_constant
def has_autocast(device: str) -> bool:
    """As a constant: torch.compile does not trace the question in every version."""
    return torch.amp.is_autocast_available(device)


def without_autocast(device: str) -> AbstractContextManager:
    return torch.autocast(device, enabled=False) if has_autocast(device) else nullcontext()


def out_of_autocast(queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """Under autocast the losses run in float32, as PyTorch's own do."""
    if not isinstance(queries, Tensor) or not isinstance(keys, Tensor):
        return queries, keys
    device = queries.device.type
    if has_autocast(device) and torch.is_autocast_enabled(device):
        half = (torch.bfloat16, torch.float16)
        queries, keys = (x.float() if x.dtype in half else x for x in (queries, keys))
    return queries, keys
