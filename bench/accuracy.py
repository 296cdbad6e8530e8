"""The yardstick: a contender's error against float64, beside eager PyTorch's in the same dtype.

    error ≤ 2 · (eager's error) + one ulp of the largest true entry

for the loss and for every gradient, errors and magnitudes being maxima over the tensor. Ours round
half precision once on the way in and once on the way out, so that in bfloat16 and float16 they are
held to eager in float32 with the same numbers, its gradients rounded to the inputs' dtype.
Truth and eager's error come by blocks of rows, so that they exist where the materialised loss no
longer fits. Of few rows eager's errors may cancel by luck: where its error is passed, the worst of
several draws is allowed (draws.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from . import draws
from .contenders import Contender, Loss, in_chunks

BLOCK = 512  # rows
FEW = 4096  # rows, of which more draws are taken: of more the largest error is no luck
Errors = dict[str, float]
ROUNDING = 64 * torch.finfo(torch.float64).eps  # the truth's own, times 1/τ ≤ 100


@dataclass(frozen=True)
class Accuracy:
    """Largest errors ÷ the largest true entry, and by how much of the limit."""

    value: float
    gradient: float
    limit_used: float  # above 1: wrong


def evaluate(loss: Loss, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    value = loss(leaves["queries"], leaves["keys"])
    gradients = torch.autograd.grad(value, list(leaves.values()))
    return {"value": value.detach(), **dict(zip(inputs, gradients, strict=True))}


def truth(contender: Contender, inputs: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    exact = {name: x.detach().to(dtype) for name, x in inputs.items()}
    loss = in_chunks(contender.rows, contender.symmetric, BLOCK, pooled=contender.pooled)
    return evaluate(loss, exact)


def eager_in(
    contender: Contender, inputs: dict[str, Tensor]
) -> dict[bool, dict[str, Tensor]]:  # by whether a contender returns its loss in float32
    """Eager PyTorch in the inputs' dtype, and in float32 with its gradients then rounded to it."""
    dtype = inputs["queries"].dtype
    same = truth(contender, inputs, dtype)
    once = same
    if dtype.itemsize == 2:
        once = truth(contender, inputs, torch.float32)
        once |= {name: once[name].to(x.dtype) for name, x in inputs.items()}
    return {False: same | {"value": same["value"].to(dtype)}, True: once}


def judge(
    found: dict[str, Tensor],
    eager: dict[bool, dict[str, Tensor]],
    true: dict[str, Tensor],
    in_float32: bool,
    worse: Callable[[Errors], Errors] | None = None,
) -> Accuracy:
    """`worse` makes eager's errors those of its worst draw, and is asked where they are passed."""
    errors = errors_of(eager[in_float32], true)
    eps = {name: torch.finfo(x.dtype).eps for name, x in eager[in_float32].items()}
    judged = held(found, true, errors, eps)
    if worse is not None and not judged.limit_used <= 1:
        judged = held(found, true, worse(errors), eps)
    return judged


def on_draws(
    contender: Contender, inputs: dict[str, Tensor], true: dict[str, Tensor]
) -> Callable[[Errors], Errors] | None:
    """For `judge`, of a contender on a few rows."""
    if len(inputs["queries"]) > FEW:
        return None

    def worse(errors: Errors) -> Errors:
        return draws.worst(
            errors, inputs, true, lambda x: truth(contender, x, torch.float64),
            lambda x, exact: errors_of(eager_in(contender, x)[contender.in_float32], exact),
        )  # fmt: skip

    return worse


def errors_of(eager: dict[str, Tensor], true: dict[str, Tensor]) -> Errors:
    """What is not finite counts as exact."""
    errors = {name: largest(eager[name].double() - exact) for name, exact in true.items()}
    return {name: error if math.isfinite(error) else 0.0 for name, error in errors.items()}


def held(
    found: dict[str, Tensor], true: dict[str, Tensor], errors: Errors, eps: dict[str, float]
) -> Accuracy:
    relative: dict[str, float] = {}
    used = 0.0
    for name, exact in true.items():
        size = largest(exact)
        error = largest(found[name].double() - exact)
        share = error / (2 * errors[name] + eps[name] * size + 100 * ROUNDING)
        used = max(used, share if share == share else float("inf"))  # NaN is no number to compare
        relative[name] = error / size if size else error
    gradients = [error for name, error in relative.items() if name != "value"]
    return Accuracy(relative["value"], max(gradients), used)


def largest(x: Tensor) -> float:
    return float(x.abs().max())
