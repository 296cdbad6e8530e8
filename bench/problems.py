"""Inputs: leaves only, so that nothing upstream of a loss is timed."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize


def two_views(
    n: int, d: int, dtype: torch.dtype, device: str, seed: int = 0
) -> dict[str, Tensor]:  # queries [n, d] and keys [n, d]
    """Unit rows; row i of both are views of one sample, with a cosine near 0.6 (exact at large d).

    Drawn in float32 on the CPU, so that every device gets the same numbers.
    """
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randn(n, d, generator=generator)
    views = {}
    for name in ("queries", "keys"):
        own = torch.randn(n, d, generator=generator)
        views[name] = normalize(0.6**0.5 * shared + 0.4**0.5 * own, dim=1)
    return {name: x.to(device, dtype).requires_grad_() for name, x in views.items()}
