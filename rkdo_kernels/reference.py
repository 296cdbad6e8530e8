"""The objectives in plain PyTorch, on materialised [N, M] matrices, in any dtype.

This is the mathematics to read and the truth to test against; nothing here saves time or memory.
Every function returns one loss a row, [N], in nats; row i's positive is key i + `positive_offset`.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rkdo_loss(
    queries: Tensor,  # [N, D]
    keys: Tensor,  # [M, D]
    *,
    temperature: float | Tensor = 0.5,
    alpha: float = 0.5,
    depth: int = 3,
    cooling: float = 0.1,
    detach_target: bool = False,
    positive_offset: int = 0,
) -> Tensor:  # [N]
    """Recursive KL divergence over a batch (Martin 2025, eqs. 1-4).

    p_0 = I,  p_t = (1 − α) p_{t−1} + α q_{t−1},  loss_i = Σ_{t=1..depth} KL(p_t(·|i) ‖ q_t(·|i))
    q_t = softmax(S / τ_t),  τ_t = τ (1 − cooling · t / depth)
    """
    similarity = queries @ keys.T
    log_q = [
        torch.log_softmax(similarity / (temperature * (1 - cooling * (t / depth))), dim=1)
        for t in range(depth + 1)
    ]
    p = torch.zeros_like(similarity)
    p.diagonal(positive_offset).fill_(1)
    loss = similarity.new_zeros(len(queries))
    for t in range(1, depth + 1):
        p = (1 - alpha) * p + alpha * log_q[t - 1].exp()
        target = p.detach() if detach_target else p
        loss = loss + kl_divergence(target, log_q[t])
    return loss


def icon_loss(
    queries: Tensor,  # [N, D]
    keys: Tensor,  # [M, D]
    *,
    temperature: float | Tensor = 0.5,
    debias: float = 0.2,
    kernel: str = "gaussian",
    positive_offset: int = 0,
) -> Tensor:  # [N]
    """I-Con: KL(p ‖ q) with the debiased one-hot target p = (1 − δ) I + δ / M.

    q = softmax of S / τ ("gaussian"), or of −log(1 + ‖zq_i − zk_j‖²) / τ ("student").
    """
    logits = queries @ keys.T
    if kernel == "student":
        squares = queries.square().sum(1)[:, None] + keys.square().sum(1)
        logits = -torch.log1p(squares - 2 * logits)
    p = torch.full_like(logits, debias / len(keys))
    p.diagonal(positive_offset).add_(1 - debias)
    return kl_divergence(p, torch.log_softmax(logits / temperature, dim=1))


def info_nce(
    queries: Tensor,  # [N, D]
    keys: Tensor,  # [M, D]
    *,
    temperature: float | Tensor = 0.1,
    exclude_self: bool = False,
    symmetric: bool = False,
    positive_offset: int = 0,
) -> Tensor:  # [N]
    """InfoNCE: −log softmax(S / τ) at the positive; `exclude_self` leaves key i out of row i.

    `symmetric` is the mean of that and of the same with queries and keys swapped.
    """
    logits = queries @ keys.T / temperature
    if exclude_self:
        logits = logits.masked_fill(diagonal_mask(logits, 0), float("-inf"))
    losses = -torch.log_softmax(logits, dim=1).diagonal(positive_offset)[: len(queries)]
    if symmetric:
        losses = (losses - torch.log_softmax(logits, dim=0).diagonal()) / 2
    return losses


def nt_xent(
    queries: Tensor,  # [N, D]
    keys: Tensor,  # [N, D]
    *,
    temperature: float | Tensor = 0.5,
) -> Tensor:  # [2 N], the queries' losses, then the keys'
    """NT-Xent: InfoNCE of each of the 2N images among the others, its positive the other view."""
    images = torch.cat([queries, keys])
    logits = images @ images.T / temperature
    log_q = torch.log_softmax(logits.masked_fill(diagonal_mask(logits, 0), float("-inf")), dim=1)
    n = len(queries)
    return -torch.cat([log_q.diagonal(n), log_q.diagonal(-n)])


def similarity_logsumexp(
    queries: Tensor,  # [N, D]
    keys: Tensor,  # [M, D]
    *,
    temperature: float | Tensor,
    exclude_self: bool = False,
) -> Tensor:  # [N]
    """log Σ_j exp(S_ij / τ); −∞ for a row whose every key is left out."""
    logits = queries @ keys.T / temperature
    if exclude_self:
        logits = logits.masked_fill(diagonal_mask(logits, 0), float("-inf"))
    return torch.logsumexp(logits, dim=1)


def similarity_moments(
    queries: Tensor,  # [N, D]
    keys: Tensor,  # [M, D]
    *,
    temperature: float | Tensor,
    degree: int,
    bound: float = 1.0,
    exclude_self: bool = False,
) -> Tensor:  # [N, degree + 1]
    """M_ik = Σ_j exp((S_ij − b) / τ) (S_ij / b)^k, b = `bound`."""
    similarity = queries @ keys.T
    weight = torch.exp((similarity - bound) / temperature)
    if exclude_self:
        weight = weight.masked_fill(diagonal_mask(weight, 0), 0)
    return torch.stack([(weight * (similarity / bound) ** k).sum(1) for k in range(degree + 1)], 1)


def field_loss(
    block: Tensor,  # [B, B], P[I, I] of the field over all samples
    queries: Tensor,  # [B, D], of the samples I
    keys: Tensor,  # [B, D]
    *,
    temperature: float,
) -> Tensor:  # [B]
    """KL(p̂ ‖ q), p̂ = P[I, I] / m without gradient, q = softmax(S / τ); 0 for a row without mass."""
    mass = block.sum(1, keepdim=True)
    target = torch.where(mass > 0, block / mass, 0).detach()
    return kl_divergence(target, torch.log_softmax(queries @ keys.T / temperature, dim=1))


def field_update(
    block: Tensor,  # [B, B], P[I, I]
    queries: Tensor,  # [B, D]
    keys: Tensor,  # [B, D]
    *,
    alpha: float,
    temperature: float,
) -> Tensor:  # [B, B]
    """P[I, I] ← (1 − α) P[I, I] + α m q,  m_i = Σ_{k in I} P_ik (Martin 2025, eq. 3)."""
    q = torch.softmax(queries @ keys.T / temperature, dim=1)
    return (1 - alpha) * block + alpha * block.sum(1, keepdim=True) * q


def snapshot_target(
    past_queries: Tensor,  # [K, B, D], of each sample's last visits, the latest first
    past_keys: Tensor,  # [K, B, D]
    alphas: Tensor,  # [K, B], of each visit
    temperatures: Tensor,  # [K, B]
    visits: Tensor,  # [B], how many of the K a sample has
    initial: Tensor,  # [B, B], p⁰
) -> Tensor:  # [B, B]
    """p_i = Σ_s α_s Π_{r<s} (1 − α_r) q_i^(s) + Π_s (1 − α_s) p_i⁰ over a sample's visits s.

    q^(s) is over the columns with more than s visits, p⁰ over those of the batch; a p⁰ without mass
    there has no weight.
    """
    p, rest = torch.zeros_like(initial), torch.ones_like(initial[:, :1])
    for s in range(len(past_queries)):
        counted = visits > s
        logits = past_queries[s] @ past_keys[s].T / temperatures[s, :, None]
        q = torch.softmax(logits.masked_fill(~counted, float("-inf")), dim=1)
        share = torch.where(counted, alphas[s], 0)[:, None]
        p = p + torch.where(counted[:, None], rest * share * q, 0)
        rest = rest * (1 - share)
    mass = initial.sum(1, keepdim=True)
    p = p + torch.where(mass > 0, rest * initial / mass, 0)
    mass = p.sum(1, keepdim=True)
    return torch.where(mass > 0, p / mass, 0)


def kl_divergence(p: Tensor, log_q: Tensor) -> Tensor:
    """Row-wise KL(p ‖ q) of [N, M] distributions, with 0 · log 0 = 0 in value and derivatives.

    So are terms of a p whose reciprocal, which second derivatives take, is hardly a number.
    """
    info = torch.finfo(p.dtype)
    counts = ~(p <= info.tiny / info.eps)  # NaN counts
    log_p = torch.where(counts, p, 1).log()
    return torch.where(counts, p * (log_p - log_q), 0).sum(1)


def diagonal_mask(like: Tensor, offset: int) -> Tensor:
    """[N, M] booleans: True where column − row = offset."""
    return torch.zeros_like(like, dtype=torch.bool).diagonal_scatter(
        torch.ones(like.diagonal(offset).shape, dtype=torch.bool, device=like.device), offset
    )
