"""Rows of the recursion's loss, and their gradient, from row moments at the Chebyshev nodes.

Off the positive entry everything the loss needs of a row is Σ_j e_ij F(u_ij) with a smooth F, and
F's interpolant turns that sum into a quadrature over the K + 1 nodes x_n of the degree:

    Σ_j e_ij F(u_ij) = Σ_n μ_in F(x_n),  μ = moments @ monomialsᵀ

So the recursion runs at the nodes and at the positive, as if those were all of a row's keys, and
the gradient's values at the nodes are what interpolates to  ∂loss_i/∂S_ij = e_ij Σ_k w_ik u_ij^k.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from . import chebyshev
from .constants import host_constant


@dataclass(frozen=True)
class Rule:
    """What the rows need of the settings. e = exp(c S), tilt_t = (c_t − c) b: see chebyshev.py."""

    monomials: Tensor  # [K + 1, K + 1], from values at the nodes to coefficients of u^k
    growth: Tensor  # [T, K + 1], exp(tilt_t x_n)
    sums: Tensor  # [K + 1, T], of moments to Σ_j exp(c_t S_ij)
    scales: Tensor  # [T], c_t for t = 0..depth
    mix: Tensor  # [depth, depth], α (1 − α)^(t−1−s):  p_t = Σ_{s<t} mix_ts q_s off the positive
    weight: float  # c
    one_hot: bool  # depth 1 from degree 0, α = 0: InfoNCE


@host_constant
def table(
    degree: int, scales: tuple[float, ...], alpha: float, bound: float, device: torch.device
) -> Tensor:
    """Of a rule, in float64: monomials, growth, scales, α and c, which a kernel reads; sums, mix.

    Made on the host, copied to a device once, and an argument of the operator that needs it: made
    within, it would lie in the memory of a CUDA graph that is being recorded. It is a tensor with
    numbers whatever mode it was asked for in: it outlives the mode.
    """
    depth = len(scales) - 1
    with _disable_current_modes(), torch.device("cpu"):
        monomials = chebyshev.monomials(degree)
        tilt = torch.tensor(chebyshev.tilts(scales, bound), dtype=torch.float64)
        growth = torch.exp(tilt[:, None] * chebyshev.nodes(degree))
        age = torch.arange(depth)[:, None] - torch.arange(depth)
        mix = alpha * (1 - alpha) ** age.clamp_min(0).double() * (age >= 0)
        rest = torch.tensor([*scales, alpha, chebyshev.middle(scales)], dtype=torch.float64)
        parts = monomials, growth, rest, (growth @ monomials).T, mix
        whole = torch.cat([x.flatten() for x in parts])
        dtype = torch.float32 if device.type == "mps" else torch.float64
        return whole.to(device=device, dtype=dtype)


def in_mode(table: Tensor) -> Tensor:
    """As an argument of an operator: a mode of fake tensors may refuse others beside them."""
    mode: Any = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE)
    return table if mode is None or mode.allow_non_fake_inputs else mode.from_tensor(table)


def scale(table: Tensor, degree: int, depth: int) -> Tensor:  # []
    """c, where a table has it."""
    return table[(degree + 1) * (degree + depth + 2) + depth + 2]


def rule(table: Tensor, degree: int, scales: Sequence[float], alpha: float) -> Rule:
    """The parts of a table."""
    nodes, steps = degree + 1, len(scales)
    depth = steps - 1
    sizes = nodes * nodes, steps * nodes, steps, 2, nodes * steps, depth * depth
    monomials, growth, c, _, sums, mix = table.split(sizes)
    return Rule(
        monomials.view(nodes, nodes), growth.view(steps, nodes), sums.view(nodes, steps), c,
        mix.view(depth, depth), chebyshev.middle(tuple(scales)),
        one_hot=depth == 1 and degree == 0 and alpha == 0,
    )  # fmt: skip


def recursion(
    moments: Tensor,  # [N, K + 1], over the keys that are not the positive
    positive: Tensor,  # [N], its similarity
    rule: Rule,
    detach_target: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # [N], [N, K + 1], [N]
    """Σ_t KL(p_t ‖ q_t), the coefficients w of its gradient, and ∂loss_i/∂S_ij at the positive.

    With odds_t against the positive, q_t = 1 / (1 + odds_t) and 1 − q_t keep all their digits, and
    with them p_t − q_t = (1 − q_t) − (1 − p_t). At the nodes E_t = q_t / e and r_t = p_t / e.
    With w_t = log p_t − log q_t and b_t = w_t + (1 − α) b_{t+1} for what p_t does to the loss, but
    for a constant, which Σ_j p_t = 1 cancels,

        ∂loss_i/∂S_ij = Σ_{t>0} c_t (q_t − p_t) + Σ_{t<depth} c_t q_t (α b_{t+1} − pull_t),
        pull_t = α Σ_j q_t b_{t+1}
    """
    if rule.one_hot:
        return info_nce(moments, positive, rule.weight)
    c, mix = rule.scales, rule.mix
    depth, (n, nodes) = len(c) - 1, moments.shape
    others = moments @ rule.sums
    odds = torch.exp(positive[:, None] * -c)  # exp(−c_t s), until it is multiplied by the others
    q = odds * others
    falls = q / (q + 1)  # 1 − q_t
    q = 1 / (q + 1)
    change = falls[:, 1:] - falls[:, :-1] @ mix.T  # p − q
    w = torch.log1p(change / q[:, 1:])
    loss = ((q[:, 1:] + change) * w).sum(1)
    at_positive = change @ -c[1:]

    mu = moments @ rule.monomials.T
    inverse = (odds * q).T.contiguous()  # 1 / Z_t
    e = rule.growth[:, None] * inverse[:, :, None]
    flat = e.view(depth + 1, n * nodes)
    r = (mix @ flat[:-1]).view(depth, n, nodes)
    log_ratio = torch.log((r / e[1:]).clamp_min_(torch.finfo(e.dtype).tiny))
    loss = loss + ((r * log_ratio).sum(0) * mu).sum(1)
    g = (c[1:] @ (flat[1:] - r.view(depth, n * nodes))).view(n, nodes)
    if not detach_target:
        b = (mix.T @ log_ratio.view(depth, n * nodes)).view(depth, n, nodes)  # α b_{t+1}
        b_positive = w @ mix
        pull = torch.linalg.vecdot(e[:-1] * b, mu).T + q[:, :-1] * b_positive
        b -= pull.T[:, :, None]
        g += (c[:-1] @ (b.mul_(e[:-1])).view(depth, n * nodes)).view(n, nodes)
        at_positive = at_positive + (q[:, :-1] * (b_positive - pull)) @ c[:-1]
    return loss, g @ rule.monomials, at_positive


def info_nce(
    moments: Tensor,  # [N, 1], over the keys that are not the positive
    positive: Tensor,  # [N]
    c: float,
) -> tuple[Tensor, Tensor, Tensor]:  # [N], [N, 1], [N]
    """`recursion` where nothing recurs: −log q, and ∂/∂S = c q, less c at the positive."""
    inverse = torch.exp(positive * -c)
    odds = moments[:, 0] * inverse
    share = c / (odds + 1)
    return torch.log1p(odds), (share * inverse)[:, None], -odds * share
