"""Second derivatives, which are not there: an error instead of a part of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def once(gradient: Tensor, *inputs: Tensor) -> Tensor:
    """A gradient that depends on `inputs` in ways that autograd has not seen."""
    return _Once.apply(gradient, *inputs) if torch.is_grad_enabled() else gradient


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gradient: Tensor, *inputs: Tensor) -> Tensor:
        return gradient.clone()

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        raise RuntimeError("rkdo_kernels' losses can be differentiated once, not twice")
