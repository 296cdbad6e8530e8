"""The arguments that every loss takes: checked, and what the losses need of them row by row."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from . import checks, launch, ops, small
from .constants import host_constant


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
        checks.temperature(temperature)
        checks.bound(bound)
        self.queries, self.keys = out_of_autocast(queries, keys)
        checks.embeddings(self.queries, self.keys)
        checks.no_forward_mode(self.queries, self.keys, temperature)
        if square:
            checks.as_many(square, queries, keys)
        self.offset = checks.pairing(queries, keys, positive_offset) if paired else 0
        self.backend = launch.backend_for(backend, self.queries)
        self.bound = bound
        self.held = bound is None  # to the bound, by whoever has looked at the rows' lengths
        self.validity: Tensor | None = None  # [N], factors for the rows' losses
        if self.queries.device.type == "cpu":
            self.hold_to_bound()  # which raises
        self.temperature = temperature
        if isinstance(temperature, Tensor):
            valid = (temperature > 0) & torch.isfinite(temperature)
            self.temperature = torch.where(valid, temperature, float("nan")).reshape(())
            if temperature.device != self.queries.device:
                self.temperature = self.temperature.to(self.queries.device)

    def hold_to_bound(self) -> None:
        if not self.held:
            assert self.bound is not None
            self.held = True
            self.validity = checks.within_bound(self.queries, self.keys, self.bound)

    def materialised(self) -> AbstractContextManager:
        """For reference.py: its matrix products too stay in the inputs' dtype under autocast."""
        return without_autocast(self.queries.device.type)

    def is_small(self) -> bool:
        """Whether fewer operators count for more than less memory."""
        entries = self.queries.shape[0] * self.keys.shape[0]
        on_cpu = self.queries.device.type == "cpu"
        return on_cpu and self.backend == "tiled" and entries <= small.MAX_ENTRIES

    def inverse_temperature(self) -> Tensor:  # [], 1 / τ
        """On the device, without a copy from the host to wait for."""
        dtype = ops.row_dtype(self.queries)
        if isinstance(self.temperature, Tensor):
            return 1 / self.temperature.to(dtype)
        return torch.full((), 1 / self.temperature, dtype=dtype, device=self.queries.device)

    def mirrored(self) -> Problem:
        return Problem(self.keys, self.queries, self.temperature, self.bound, None, self.backend)

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
        return row_dot(self.queries, self.positives())

    def positive_distances(self) -> Tensor:  # [N], ‖query − key‖²
        difference = self.queries.to(ops.product_dtype(self.queries)) - self.positives()
        return difference.square().sum(1, dtype=ops.row_dtype(self.queries))

    def positives(self) -> Tensor:  # [N, D]
        return self.keys.narrow(0, self.offset, self.queries.shape[0])

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


def row_dot(a: Tensor, b: Tensor) -> Tensor:  # [N, D], [N or 1, D] -> [N]
    return (a.to(ops.product_dtype(a)) * b).sum(1, dtype=ops.row_dtype(a))


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
