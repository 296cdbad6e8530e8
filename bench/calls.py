"""Public calls, each on one batch and beside the same on whole matrices: problems to hold code to.

A call is settings, a shape, a dtype and a layout. `ours()` is what the public function gives, and
`eager(dtype)` what reference.py does, in any dtype, on the same numbers; both by name: "value",
the gradients "queries", "keys" and "temperature", and of a field the block after an update.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn.functional import normalize

import rkdo_kernels as rk
from rkdo_kernels import launch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
HALF = (torch.bfloat16, torch.float16)
Outcome = dict[str, Tensor]


class AnyCall(Protocol):
    """What `bench execute` and others need of a call, of a loss or of a field."""

    @property
    def name(self) -> str: ...
    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> tuple[int, int, int]: ...  # N, M, D
    @property
    def quick(self) -> bool: ...  # one of the few that tests run

    def ours(self) -> Outcome: ...
    def eager(self, dtype: torch.dtype) -> Outcome: ...


@dataclass(frozen=True)
class LossCall:
    name: str
    function: Callable[..., Tensor]
    rows: Callable[..., Tensor]  # the same in reference.py: one value a row
    shape: tuple[int, int, int] = (200, 200, 64)  # N, M, D
    dtype: str = "fp32"
    settings: dict[str, Any] = field(default_factory=dict)  # of both
    ours_only: dict[str, Any] = field(default_factory=dict)  # bound, reduction
    cosine: float = 0.0  # of all rows with one another, and 0: independent, as `views` has them
    layout: str = "dense"  # or "odd": rows that start at no multiple of 16 bytes
    frozen: str = ""  # "queries" or "keys", which then take no gradient
    learnable: float = 0.0  # a temperature that takes a gradient
    splits: int = 1  # programs that share a walk, as where there are few for a device
    stripe_bytes: int = 0  # of ∂L/∂S at once, where another limit than the library's is wanted
    quick: bool = False

    def inputs(self) -> dict[str, Tensor]:
        n, m, d = self.shape
        if self.cosine:
            return collapsed(n, m, d, DTYPES[self.dtype], self.cosine)
        return views(n, m, d, DTYPES[self.dtype])

    def ours(self) -> Outcome:
        inputs = {name: laid_out(x, self.layout) for name, x in self.inputs().items()}
        if self.learnable:
            inputs["temperature"] = torch.tensor(self.learnable)
        function = partial(self.function, **self.settings, **self.ours_only)
        with split_in(self.splits), stripes_of(self.stripe_bytes):
            return evaluate(function, inputs, self.frozen)

    def eager(self, dtype: torch.dtype) -> Outcome:
        inputs = {name: x.to(dtype) for name, x in self.inputs().items()}
        if self.learnable:
            wide = torch.float32 if dtype in HALF else dtype
            inputs["temperature"] = torch.tensor(self.learnable, dtype=wide)
        reduction = self.ours_only.get("reduction", "none" if per_row(self) else "mean")

        def function(**x: Tensor) -> Tensor:
            rows = self.rows(**x, **self.settings)
            return rows if reduction == "none" else getattr(rows, reduction)()

        return evaluate(function, inputs, self.frozen)


def per_row(call: LossCall) -> bool:
    """Whether the function has no reduction."""
    return call.function in (rk.similarity_moments, rk.similarity_logsumexp)


def views(n: int, m: int, d: int, dtype: torch.dtype, seed: int = 0) -> dict[str, Tensor]:
    """queries [n, d] and keys [m, d], unit rows; the positives' cosine is near 0.6."""
    generator = torch.Generator().manual_seed(1000 * seed + n)
    queries, keys = (torch.randn(k, d, generator=generator) for k in (n, m))
    keys[:n] = 0.8 * keys[:n] + 0.6 * queries[:m]
    return {k: normalize(x, dim=1).to(dtype) for k, x in {"queries": queries, "keys": keys}.items()}


def collapsed(n: int, m: int, d: int, dtype: torch.dtype, cosine: float) -> dict[str, Tensor]:
    """The same about one direction, which any two rows share up to `cosine`, but for positives."""
    generator = torch.Generator().manual_seed(n)
    common = normalize(torch.randn(d, generator=generator), dim=0)
    apart = views(n, m, d, torch.float32)
    mixed = {k: cosine**0.5 * common + (1 - cosine) ** 0.5 * x for k, x in apart.items()}
    return {k: normalize(x, dim=1).to(dtype) for k, x in mixed.items()}


def laid_out(x: Tensor, layout: str) -> Tensor:
    if layout == "dense":
        return x
    n, d = x.shape
    room = x.new_full((n * (d + 3) + 1,), float("nan"))
    odd = room[1:].view(n, d + 3)[:, :d]
    return odd.copy_(x)


def evaluate(function: Callable[..., Tensor], inputs: dict[str, Tensor], frozen: str) -> Outcome:
    """The value, and the gradients of Σ w · value with w from −1 to 1, or of one value."""
    leaves = {name: x.detach().requires_grad_(name != frozen) for name, x in inputs.items()}
    value = function(**leaves)
    if value.dim():
        weights = torch.linspace(-1, 1, value.numel(), dtype=torch.float64).view(value.shape)
        total = (weights * value.double()).sum()
    else:
        total = value
    wanted = {name: x for name, x in leaves.items() if x.requires_grad}
    gradients = torch.autograd.grad(total, list(wanted.values()))
    return {"value": value.detach(), **dict(zip(wanted, gradients, strict=True))}


def split_in(splits: int) -> AbstractContextManager:
    """Every walk shared by as many programs, where it is long enough."""
    if splits == 1:
        return nullcontext()
    return patch.object(launch, "splits", lambda programs, count, step, *_: splits)


def scarce_memory(scarce: bool) -> AbstractContextManager:
    """Shared memory that holds nothing more than a walk must have."""
    return patch.object(launch, "shared_memory", lambda _: 0) if scarce else nullcontext()


def stripes_of(limit: int) -> AbstractContextManager:
    return patch.object(launch, "STRIPE_BYTES", limit) if limit else nullcontext()
