"""Digits of RKDO's loss and gradient against float64, for float32 eager and for ours.

python -m bench precision [--out FILE]        (bench/runs/precision.jsonl; prints its table)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from rkdo_kernels import launch, reference, rkdo_loss

from .readme import precision_table
from .record import environment, out_of, write_lines

N, D, DEPTH, ALPHA, COOLING = 512, 64, 3, 0.5, 0.1


def views(cosine: float | None) -> tuple[Tensor, Tensor]:
    """Unit rows; keys[i] is independent of queries[i], or at this cosine to it."""
    generator = torch.Generator().manual_seed(0)
    a, b = functional.normalize(torch.randn(2, N, D, generator=generator), dim=2)
    if cosine is not None:
        b = functional.normalize(b - (a * b).sum(1, keepdim=True) * a, dim=1)
        b = cosine * a + (1 - cosine**2) ** 0.5 * b
    return a, b


def evaluate(loss: Callable[..., Tensor], pair: tuple[Tensor, Tensor], dtype: torch.dtype):
    leaves = [x.to(dtype).requires_grad_() for x in pair]
    value = loss(*leaves)
    gradients = torch.autograd.grad(value, leaves)
    return value.detach().double(), torch.cat(gradients).double()


def relative_errors(loss: Callable[..., Tensor], truth, pair) -> list[float]:
    pairs = zip(evaluate(loss, pair, torch.float32), truth, strict=True)
    return [float((a - b).norm() / b.norm()) for a, b in pairs]


def main(arguments: list[str]) -> int:
    path = out_of("precision", arguments)
    about = environment("cpu")
    lines = []
    for cosine in (None, 0.6, 0.95):
        for temperature in (0.5, 0.2, 0.1, 0.05, 0.01):
            if line := measured(cosine, temperature):
                lines.append({**line, **about})
    write_lines(path, lines)
    print(precision_table(lines))
    return 0


def measured(cosine: float | None, temperature: float) -> dict[str, Any] | None:
    """None where float64 has too few digits of so small a loss to judge by."""
    pair = views(cosine)

    def materialised(queries: Tensor, keys: Tensor) -> Tensor:
        return reference.rkdo_loss(queries, keys, temperature=temperature).mean()

    def ours(queries: Tensor, keys: Tensor) -> Tensor:
        return rkdo_loss(queries, keys, temperature=temperature, backend="tiled")

    truth = evaluate(materialised, pair, torch.float64)
    if truth[0] < 1e-10:
        return None
    eager = relative_errors(materialised, truth, pair)
    fused = relative_errors(ours, truth, pair)
    scales = [1 / (temperature * (1 - COOLING * t / DEPTH)) for t in range(DEPTH + 1)]
    degree = launch.rkdo_degree(scales, ALPHA, 1.0, torch.float32)
    return {
        "positives": "independent" if cosine is None else f"cos {cosine}",
        "temperature": temperature,
        "path": "direct" if degree is None else f"moments, degree {degree}",
        "eager_loss": eager[0],
        "eager_gradient": eager[1],
        "ours_loss": fused[0],
        "ours_gradient": fused[1],
        "n": N,
        "d": D,
        "depth": DEPTH,
    }
