"""The recursion's target against its softmax at one entry, in logarithms."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def log_ratios(log_q: Tensor, alpha: float) -> Tensor:  # [N, depth + 1] -> [N, depth]
    """log p_t − log q_t for t = 1..depth where p_0 = 1, from log q_t for t = 0..depth.

    p_t = (1 − α) p_{t−1} + α q_{t−1} divided by q_t is a recursion of the ratio alone,

        w_t = log q_{t−1} − log q_t + log((1 − α) exp(w_{t−1}) + α),  w_0 = −log q_0,

    which keeps its digits where p and q are both almost 1, as they are for aligned views.
    """
    rest = math.log1p(-alpha) if alpha < 1 else -math.inf
    share = torch.full_like(log_q[:, 0], math.log(alpha) if alpha > 0 else -math.inf)
    w = -log_q[:, 0]
    result = []
    for t in range(1, log_q.shape[1]):
        small = torch.log1p((1 - alpha) * torch.expm1(w.clamp_max(30)))
        mixed = torch.where(w < 30, small, torch.logaddexp(w + rest, share))
        w = log_q[:, t - 1] - log_q[:, t] + mixed
        result.append(w)
    return torch.stack(result, dim=1)
