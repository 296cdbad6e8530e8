"""Derivatives that are not there: an error instead of a part of them."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad

REFUSAL = (
    "rkdo_kernels' losses are differentiated once, by backward or torch.autograd.grad: second "
    "derivatives, forward mode and torch.func's transforms need backend='reference'"
)


def once(gradient: Tensor, *inputs: Tensor) -> Tensor:
    """A gradient that depends on `inputs` in ways that autograd has not seen."""
    return _Once.apply(gradient, *inputs) if torch.is_grad_enabled() else gradient


def no_second_derivative(ctx: Any, *_: Any) -> NoReturn:
    """The backward pass of an operator that is one already."""
    raise NotImplementedError(REFUSAL)


def no_transforms(*values: Any) -> None:
    """The operators would drop a forward-mode tangent without a word, and torch.func's transforms
    fail in words of their own."""
    if torch.compiler.is_compiling():
        return
    for value in values:
        if isinstance(value, Tensor) and (
            torch._C._functorch.is_functorch_wrapped_tensor(value)
            or forward_ad.unpack_dual(value).tangent is not None
        ):
            raise NotImplementedError(REFUSAL)


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gradient: Tensor, *inputs: Tensor) -> Tensor:
        return gradient.clone()

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        raise NotImplementedError(REFUSAL)
