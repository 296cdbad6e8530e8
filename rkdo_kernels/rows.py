"""From row sums to the rows of the losses: differentiable PyTorch on [N, few] tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import launch, one_pass, ops, small
from .needs import needed
from .once import once
from .problem import Problem


def rkdo_from_moments(
    problem: Problem,
    degree: int,
    scales: Sequence[float],
    alpha: float,
    detach_target: bool,
    reduction: str,
    exclude: Sequence[int] = (),
) -> Tensor:  # [N]
    """RKDO of any depth from one set of moments over the keys that are not the positive."""
    queries, keys, bound = problem.queries, problem.keys, problem.bound
    assert bound is not None
    (n, _), m = queries.shape, keys.shape[0]
    if problem.backend == "tiled":
        at_once = one_pass.fits(m, ops.product_dtype(keys).itemsize)
    else:
        at_once = launch.is_single(n, m)
    needs = needed(queries, keys) if at_once and reduction != "none" else [False, False]
    if any(needs) and problem.backend == "triton":
        problem.held = True  # by the kernel
    loss, *_ = ops.recursion_moments(
        queries, keys, scales, alpha, bound, degree, [problem.offset, *exclude], detach_target,
        needs, problem.backend, *problem.stand_ins,
    )  # fmt: skip
    return loss


def one_hot(problem: Problem, reduction: str, exclude: Sequence[int] = ()) -> Tensor:  # [N]
    """−log q at the positive, q = softmax(S / τ) off the diagonals in `exclude`."""
    temperature = problem.temperature
    if isinstance(temperature, Tensor) or not odds_are_safe(problem):
        similarity = problem.positive_similarities()
        odds = logsumexp(problem, [problem.offset, *exclude], similarity)
        return from_odds(odds, similarity)
    scales = [1 / temperature] * 2
    return rkdo_from_moments(problem, 0, scales, 0.0, False, reduction, exclude)


def from_odds(odds: Tensor, positive: Tensor) -> Tensor:  # [N] each
    """−log q at the positive, whose logit is given, of log Σ_{j ≠ positive} q_j / q."""
    lost = 0 * torch.where(odds == float("-inf"), positive, positive.clamp_min(0))
    return torch.logaddexp(odds, lost)  # NaN, not 0, if that is ∞, or −∞ and alone


def odds_are_safe(problem: Problem) -> bool:
    temperature = problem.temperature
    return not isinstance(temperature, Tensor) and launch.odds_are_safe(
        temperature, problem.bound, problem.queries.dtype
    )


def one_hot_both_ways(problem: Problem, reduction: str) -> Tensor:  # [N]
    """The mean of `one_hot` and of the same with queries and keys swapped."""
    if not odds_are_safe(problem):
        return (one_hot(problem, reduction) + one_hot(problem.mirrored(), reduction)) / 2
    rows, cols, inverse = _sums_and_positives(problem)
    return (torch.log1p(rows * inverse) + torch.log1p(cols * inverse)) / 2


def nt_xent(problem: Problem, reduction: str) -> Tensor:  # [2 N]
    """−log q at the other view, q = softmax(S / τ) over all images but the row's own."""
    if not odds_are_safe(problem):
        problems = [x.over_all_images() for x in (problem, problem.mirrored())]
        return torch.cat([one_hot(x, reduction, exclude=[0]) for x in problems])
    rows, cols, inverse = _sums_and_positives(problem)
    scale, backend = 1 / problem.temperature, problem.backend
    to_queries, to_keys = problem.stand_ins
    rows = rows + ops.self_sums(problem.queries, scale, backend, to_queries)
    cols = cols + ops.self_sums(problem.keys, scale, backend, to_keys)
    return torch.log1p(torch.cat([rows * inverse, cols * inverse]))


def _sums_and_positives(problem: Problem) -> tuple[Tensor, Tensor, Tensor]:  # [N] each
    """Of exp(S / τ) off the positives by row and by column, and exp(−S / τ) at the positives."""
    scale = 1 / problem.temperature
    rows, cols, positive = ops.both_sums(
        problem.queries, problem.keys, scale, [0], True, problem.backend, *problem.stand_ins
    )
    return rows, cols, torch.exp(-scale * positive)


def rkdo_direct(
    problem: Problem, alpha: float, depth: int, cooling: float, detach_target: bool
) -> Tensor:  # [N]
    learnable = isinstance(problem.temperature, Tensor)
    if problem.is_small() and not learnable:
        scales = small.scales(problem.temperature, depth, cooling)
    else:
        scale = problem.inverse_temperature()
        step = torch.arange(depth + 1, dtype=scale.dtype, device=scale.device)
        scales = scale / (1 - cooling * (step / depth))
    arguments = (
        problem.queries, problem.keys, scales.detach(), alpha, problem.offset, detach_target,
    )  # fmt: skip
    if problem.is_small():
        coldest = 0 if learnable else float(problem.temperature) * (1 - cooling)
        loss, d_scales = small.Recursion.apply(
            *arguments[:3], depth, *arguments[3:], learnable,
            may_underflow(problem.bound, coldest, alpha),
        )  # fmt: skip
    else:
        loss, d_scales, *_ = ops.recursion(*arguments, problem.backend, *problem.stand_ins)
    if learnable:
        loss = Sloped.apply(loss, d_scales, scales)
    return loss


def may_underflow(bound: float | None, temperature: float, alpha: float) -> bool:
    """Whether α q may be no normal float64 number, with q = softmax(S / τ) over some 10⁴ keys."""
    return bound is None or alpha == 0 or 2 * bound >= (690 + math.log(alpha)) * temperature


def logsumexp(
    problem: Problem,
    exclude: Sequence[int],
    less: Tensor | None = None,  # [N]
) -> Tensor:  # [N]
    """log Σ_j exp((S_ij − less_i) / τ) over the keys off the diagonals in `exclude`."""
    queries, keys, bound = problem.queries, problem.keys, problem.bound
    scale = problem.inverse_temperature()
    if bound is not None and launch.fixed_shift_is_safe(problem.temperature, bound, queries.dtype):
        m = ops.moments(
            queries, keys, scale, bound, 0, exclude, problem.backend, *problem.stand_ins
        )
        return _log(m[:, 0]) if less is None else _log(m[:, 0]) - scale * less
    peak, mass, slope, _ = ops.softmax_sums(
        queries, keys, scale.detach()[None], False, exclude, problem.backend, *problem.stand_ins
    )
    return _from_sums(scale, peak, mass, slope, less)


def sums_and_total(
    problem: Problem,
    student: bool,
    positive: Tensor,  # [N], x_i at the positive
) -> tuple[Tensor, Tensor]:  # [N], [N]
    """log Σ_j exp((x_ij − positive_i) / τ) and Σ_j x_ij off the positive, both with their gradients
    in one term an entry; x = S or, if `student`, −log(1 + ‖zq_i − zk_j‖²)."""
    scale = problem.inverse_temperature()
    peak, mass, slope, total = ops.softmax_sums(
        problem.queries, problem.keys, scale.detach()[None], student, [problem.offset],
        problem.backend, *problem.stand_ins,
    )  # fmt: skip
    return _from_sums(scale, peak, mass, slope, positive), total


def _from_sums(
    scale: Tensor, peak: Tensor, mass: Tensor, slope: Tensor, less: Tensor | None = None
) -> Tensor:  # [N]
    """c (peak − less) + log mass, the latter with its gradient for c; −∞ for a row without keys.

    In this order: next to a large c peak the mass would have no digits.
    """
    peak = peak.detach() if less is None else peak.detach() - less
    mass = Sloped.apply(mass[:, 0], slope, scale[None])
    return torch.where(mass > 0, scale * peak, 0) + _log(mass)


class Sloped(torch.autograd.Function):
    """The value, with a gradient for the scales whose slopes its operator has computed too. Each of
    its gradients depends on the scales and on what the value is made of."""

    @staticmethod
    def forward(
        ctx: Any,
        value: Tensor,  # [..]
        slope: Tensor,  # [.., T], ∂value/∂scales
        scales: Tensor,  # [T]
    ) -> Tensor:
        ctx.save_for_backward(value, slope, scales)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, d_value: Tensor) -> Any:  # type: ignore[override]
        value, slope, scales = ctx.saved_tensors
        d_scales = (d_value[..., None] * slope).sum(list(range(value.dim())))
        return once(d_value, scales), None, once(d_scales, value, scales)


def _log(x: Tensor) -> Tensor:
    """log x, with −∞ and no gradient at 0."""
    return torch.where(x == 0, float("-inf"), torch.log(torch.where(x == 0, 1, x)))
