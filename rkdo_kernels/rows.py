"""From row sums to the rows of the losses: differentiable PyTorch on [N, few] tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import chebyshev, launch, ops, small
from .constants import host_constant
from .once import once
from .problem import Problem
from .ratios import log_ratios


def rkdo_from_moments(
    problem: Problem,
    degree: int,
    scales: Sequence[float],
    bound: float,
    alpha: float,
    detach_target: bool,
) -> Tensor:  # [N]
    """RKDO of any depth from one set of moments over the keys that are not the positive.

    There p_t = e r_t(u) and q_t = e exp(tilt_t u) / Z_t with e = exp(c S), so a row's share of the
    loss is Σ_j e_ij f_i(u_ij), f of `chebyshev.interpolation_error`; the positive's is exact.
    """
    queries, keys = problem.queries, problem.keys
    c = chebyshev.middle(scales)
    tilt = chebyshev.tilts(scales, bound)
    weight = torch.full((), c, dtype=ops.row_dtype(queries), device=queries.device)
    m = ops.moments(queries, keys, weight, bound, degree, [problem.offset], problem.backend)
    positive = problem.positive_similarities()
    u, coefficients = interpolation(degree, str(queries.device))

    log_q, log_z = [], []  # log_q at the positive
    for c_t, tilt_t in zip(scales, tilt, strict=True):
        others = _log(m @ (torch.exp(tilt_t * u) @ coefficients))
        log_q.append(-torch.logaddexp(others - c_t * positive, torch.zeros_like(positive)))
        log_z.append(c_t * positive - log_q[-1])
    w = log_ratios(torch.stack(log_q, dim=1), alpha)
    p = [torch.ones_like(positive)]
    for log_q_t in log_q[:-1]:
        p.append((1 - alpha) * p[-1] + alpha * torch.exp(log_q_t))
    loss = (torch.stack(p[1:], dim=1) * w).sum(1)
    r = torch.zeros_like(m)  # at the nodes
    f = torch.zeros_like(m)
    descent = torch.zeros_like(m)  # Σ_t c_t r_t at the nodes, for a target without gradient
    surrogate = torch.zeros_like(positive)
    for t in range(1, len(scales)):
        if alpha > 0:
            r = (1 - alpha) * r + alpha * torch.exp(tilt[t - 1] * u - log_z[t - 1][:, None])
            f = f + r * (torch.log(r) - tilt[t] * u + log_z[t][:, None])
        if detach_target:
            descent = descent + scales[t] * r.detach()
            surrogate = surrogate + log_z[t] - scales[t] * positive * p[t].detach()
    loss = loss + ((f @ coefficients) * m).sum(1)
    if detach_target:
        surrogate = surrogate - (_antiderivative(descent @ coefficients, c, bound) * m).sum(1)
        loss = loss.detach() + surrogate - surrogate.detach()
    return loss


def _antiderivative(w: Tensor, scale: float, bound: float) -> Tensor:  # [N, degree + 1]
    """φ with ∂(e φ(u))/∂S = e w(u), that is c φ + φ'/b = w; constant to autograd."""
    phi = torch.zeros_like(w[:, 0])
    result = []
    for k in range(w.shape[1] - 1, -1, -1):
        phi = (w[:, k] - (k + 1) / bound * phi) / scale
        result.append(phi)
    return torch.stack(result[::-1], dim=1).detach()


def rkdo_direct(
    problem: Problem, alpha: float, depth: int, cooling: float, detach_target: bool
) -> Tensor:  # [N]
    learnable = isinstance(problem.temperature, Tensor)
    if problem.is_small() and not learnable:
        scales = small.scales(problem.temperature, depth, cooling)
    else:
        scale = problem.inverse_temperature()
        step = torch.arange(depth + 1, dtype=scale.dtype, device=scale.device)
        scales = scale / (1 - cooling / depth * step)
    arguments = (
        problem.queries, problem.keys, scales.detach(), alpha, problem.offset, detach_target,
    )  # fmt: skip
    if problem.is_small():
        coldest = 0 if learnable else problem.temperature * (1 - cooling)
        bounded = problem.bound is not None and 2 * problem.bound < 600 * coldest
        loss, d_scales = small.Recursion.apply(
            *arguments[:3], depth, *arguments[3:], learnable, not bounded
        )
    else:
        loss, d_scales, *_ = ops.recursion(*arguments, problem.backend)
    if learnable:
        loss = Sloped.apply(loss, d_scales, scales)
    return loss


def logsumexp(problem: Problem, exclude: Sequence[int]) -> Tensor:  # [N]
    """log Σ_j exp(S_ij / τ) over the keys off the diagonals in `exclude`."""
    queries, keys, bound = problem.queries, problem.keys, problem.bound
    scale = problem.inverse_temperature()
    if bound is not None and launch.fixed_shift_is_safe(problem.temperature, bound, queries.dtype):
        m = ops.moments(queries, keys, scale, bound, 0, exclude, problem.backend)
        return _log(m[:, 0])
    sums = ops.softmax_sums(queries, keys, scale.detach()[None], False, exclude, problem.backend)
    return _from_sums(scale, *sums[:3])


def student_sums(problem: Problem) -> tuple[Tensor, Tensor]:  # [N], [N]
    """log Σ_j (1 + ‖zq_i − zk_j‖²)^(−1/τ) and Σ_j −log(1 + ‖zq_i − zk_j‖²) off the positive."""
    scale = problem.inverse_temperature()
    peak, mass, slope, total = ops.softmax_sums(
        problem.queries, problem.keys, scale.detach()[None], True, [problem.offset],
        problem.backend,
    )  # fmt: skip
    return _from_sums(scale, peak, mass, slope), total


def _from_sums(scale: Tensor, peak: Tensor, mass: Tensor, slope: Tensor) -> Tensor:  # [N]
    """c peak + log mass, the second with its gradient for c; −∞ for a row without keys."""
    peak = peak.detach()
    mass = Sloped.apply(mass[:, 0], slope, scale[None])
    return torch.where(mass > 0, scale * peak, 0) + _log(mass)


class Sloped(torch.autograd.Function):
    """The value, with a gradient for the scales whose slopes its operator has computed too."""

    @staticmethod
    def forward(
        ctx: Any,
        value: Tensor,  # [..]
        slope: Tensor,  # [.., T], ∂value/∂scales
        scales: Tensor,  # [T]
    ) -> Tensor:
        ctx.save_for_backward(slope, scales)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, d_value: Tensor) -> Any:  # type: ignore[override]
        slope, scales = ctx.saved_tensors
        d_scales = (d_value[..., None] * slope).flatten(0, -2).sum(0)
        return d_value, None, once(d_scales, scales)


def _log(x: Tensor) -> Tensor:
    """log x, with −∞ and no gradient at 0."""
    return torch.where(x == 0, float("-inf"), torch.log(torch.where(x == 0, 1, x)))


@host_constant
def interpolation(degree: int, device: str) -> tuple[Tensor, Tensor]:
    """`chebyshev.nodes` and `chebyshev.monomials`, copied to a device once."""
    dtype = torch.float32 if device.startswith("mps") else torch.float64
    constants = chebyshev.nodes(degree), chebyshev.monomials(degree)
    nodes, monomials = (x.to(device=device, dtype=dtype) for x in constants)
    return nodes, monomials
