"""RKDO where all of S is no larger than a tile: every t in one tensor, so that operators are few.

A batch of 64 is bound by the number of operators, not by what they compute; float64 costs nothing
then, and the plain formulas keep all their digits in it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .constants import host_constant
from .once import once

MAX_ENTRIES = 1 << 14


def recursion(
    queries: Tensor,  # [N, D]
    keys: Tensor,  # [M, D]
    scales: Tensor,  # [depth + 1] float64, c_t
    depth: int,
    alpha: float,
    positive_offset: int,
    detach_target: bool,
    learnable: bool,  # whether the gradient for the scales is wanted
    underflow: bool,  # whether a q_t may be too small for float64
) -> tuple[Tensor, Tensor, Tensor]:  # [N], [N, T], [N, M], float64
    """Σ_t KL(p_t ‖ q_t) by row, its gradient for the scales, and its gradient for S.

    With w_t = log p_t − log q_t and b_t = w_t + (1 − α) b_{t+1} for what p_t does to the loss, but
    for a constant, which Σ_j p_t = 1 cancels, and the logits c_t S of q_t,

        ∂loss/∂logits_t = [t > 0] (q_t − p_t) + [t < depth] α q_t (b_{t+1} − Σ_j q_t b_{t+1}).
    """
    n, m = queries.shape[0], keys.shape[0]
    mix, rest = mixture(alpha, depth)
    s = queries.double() @ keys.double().T
    s -= s.amax(1, keepdim=True)
    log_q = s * scales[:, None, None]
    q = log_q.exp()
    mass = q.sum(2, keepdim=True)
    q /= mass
    log_q -= mass.log_()
    p = (mix @ q[:-1].view(depth, n * m)).view(depth, n, m)
    p.diagonal(positive_offset, 1, 2).add_(rest)
    if alpha > 0 and not underflow:
        w = (p / q[1:]).log_()  # exact where p = q
    else:
        some_p = p.clamp_min(torch.finfo(p.dtype).tiny)
        w = (some_p / q[1:]).log_()
        w = torch.where(q[1:] > 1e-290, w, some_p.log_().sub_(log_q[1:]))
        w.masked_fill_(log_q[1:].isinf() & (p == 0), 0)  # a product of −∞: 0 · log 0
    d_logits = torch.zeros_like(q)
    if not detach_target:
        through = d_logits[:-1]
        torch.mm(mix.T, w.view(depth, n * m), out=through.view(depth, n * m))
        through.mul_(q[:-1])
        through.addcmul_(q[:-1], through.sum(2, keepdim=True), value=-1)
    d_logits[1:] += q[1:]
    d_logits[1:] -= p
    loss = w.mul_(p).sum((0, 2))
    d_similarity = torch.mv(d_logits.view(depth + 1, n * m).T, scales).view(n, m)
    d_scales = torch.linalg.vecdot(d_logits, s).T if learnable else loss.new_zeros(n, depth + 1)
    return loss, d_scales, d_similarity


class Recursion(torch.autograd.Function):
    """`recursion` for autograd: the gradient for S is ready when the forward pass ends."""

    @staticmethod
    def forward(ctx: Any, queries: Tensor, keys: Tensor, *settings: Any) -> tuple[Tensor, Tensor]:
        loss, d_scales, d_similarity = recursion(queries, keys, *settings)
        if queries.dtype != torch.float64:
            d_similarity = d_similarity.float()
        ctx.settings = len(settings)
        ctx.save_for_backward(queries, keys, d_similarity)
        ctx.mark_non_differentiable(d_scales)
        return loss, d_scales

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor, _: Tensor) -> Any:  # type: ignore[override]
        queries, keys, g = ctx.saved_tensors
        g = g * d_loss[:, None].to(g.dtype)
        d_queries = d_keys = None
        with torch.autocast("cpu", enabled=False):
            if ctx.needs_input_grad[0]:
                d_queries = once((g @ keys.to(g.dtype)).to(queries.dtype), queries, keys)
            if ctx.needs_input_grad[1]:
                d_keys = once((g.T @ queries.to(g.dtype)).to(keys.dtype), queries, keys)
        return d_queries, d_keys, *[None] * ctx.settings


@host_constant
def scales(temperature: float, depth: int, cooling: float) -> Tensor:  # [depth + 1], 1 / τ_t
    t = torch.arange(depth + 1, dtype=torch.float64)
    return 1 / (temperature * (1 - cooling * (t / depth)))


@host_constant
def mixture(alpha: float, depth: int) -> tuple[Tensor, Tensor]:  # [depth, depth], [depth, 1]
    """p_t = Σ_{s<t} mix_ts q_s + rest_t I for t = 1..depth."""
    t = torch.arange(depth)
    age = t[:, None] - t
    mix = alpha * (1 - alpha) ** age.clamp_min(0).double() * (age >= 0)
    return mix, (1 - alpha) ** (t[:, None] + 1).double()
