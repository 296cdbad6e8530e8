"""Batch norm over the global batch, on any device.

torch's SyncBatchNorm refuses CPU tensors, and ranks that normalise by their own rows would not
compute what one rank computes.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


class GlobalBatchNorm2d(nn.BatchNorm2d):
    """`nn.BatchNorm2d` with the statistics of all ranks' rows; every rank brings as many rows."""

    def forward(self, x: Tensor) -> Tensor:  # [N, C, H, W] -> [N, C, H, W]
        if not (self.training and dist.is_initialized()):
            return super().forward(x)
        y, mean, var = _normalise(x, self.weight, self.bias, self.eps)
        count = x.numel() // x.shape[1] * dist.get_world_size()
        with torch.no_grad():
            assert self.running_mean is not None
            assert self.running_var is not None
            assert self.num_batches_tracked is not None
            assert self.momentum is not None
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * (count / (count - 1)), self.momentum)
            self.num_batches_tracked.add_(1)
        return y


def synchronise_batch_norm(model: nn.Module) -> None:
    """Make every `BatchNorm2d` in `model` a `GlobalBatchNorm2d`, keeping its parameters."""
    for module in model.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = GlobalBatchNorm2d


def _normalise(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, ...]:
    return _GlobalNormalise.apply(x, weight, bias, eps)


class _GlobalNormalise(torch.autograd.Function):
    """y = w x̂ + b,  x̂ = (x − mean) / √(var + eps),  mean and var over the rows of all ranks.

    With the sum of all ranks' losses L:  ∂L/∂x = w/√(var + eps) (g − mean(g) − x̂ mean(g x̂)),
    both means over all ranks. w and b get their own rows' gradients: DDP averages those.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Any:
        mean = _global_mean(x)
        centred = x - _per_channel(mean)
        var = _global_mean(centred.square())
        scale = (var + eps).rsqrt()
        normalised = centred * _per_channel(scale)
        ctx.save_for_backward(normalised, weight, scale)
        ctx.mark_non_differentiable(mean, var)
        return normalised * _per_channel(weight) + _per_channel(bias), mean, var

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        grad = gradients[0]
        normalised, weight, scale = ctx.saved_tensors
        grad_bias = grad.sum((0, 2, 3))
        grad_weight = (grad * normalised).sum((0, 2, 3))
        both = torch.stack([grad_bias, grad_weight])
        dist.all_reduce(both)
        mean_grad, mean_product = both / (grad.numel() // grad.shape[1] * dist.get_world_size())
        grad_x = _per_channel(weight * scale) * (
            grad - _per_channel(mean_grad) - normalised * _per_channel(mean_product)
        )
        return grad_x, grad_weight, grad_bias, None


def _global_mean(x: Tensor) -> Tensor:  # [N, C, H, W] -> [C]
    total = x.sum((0, 2, 3))
    dist.all_reduce(total)
    return total / (x.numel() // x.shape[1] * dist.get_world_size())


def _per_channel(values: Tensor) -> Tensor:  # [C] -> [C, 1, 1]
    return values[:, None, None]
