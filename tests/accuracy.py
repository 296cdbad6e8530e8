"""The yardstick: as accurate as eager PyTorch in float32, measured against float64.

For the value and for every gradient, with errors and magnitudes taken as maxima over the tensor:

    error ≤ 2 · (eager's error) + one ulp of the largest true entry + the truth's own rounding

Half precision is rounded once on the way in and once on the way out: values and gradients of
bfloat16 and float16 inputs are held to what eager does in float32 with the same numbers, its
gradients then rounded to the inputs' dtype. Eager in the inputs' own dtype, which adds up rounded
gradients, would allow many times that. float64 inputs are held to eager in float64.

Eager's error is one draw of its rounding, which another CPU may make smaller by luck: where it is
passed, the worst of several draws is allowed (`bench/draws.py`). An eager result that is not finite
counts as exact. One ulp is the dtype's ε times the entry. The truth's rounding is a few float64
ulps of the `scale` it was subtracted from (1/τ for the losses here), and float32's smallest normal
number.

The gradient for a temperature is one number, in which eager's errors may cancel by luck: it is held
to the Euclidean norms, over the rows, of eager's errors and of the true gradients.
"""

import math
from functools import partial

import torch
from torch.nn.functional import normalize

from bench.draws import worst

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SMALLEST_NORMAL = torch.finfo(torch.float32).smallest_normal
FLOAT64_ULPS = 32


def sample_views(n, d, dtype=torch.float32, *, m=None, aligned=False, seed=0, length=1.0):
    """queries [n, d] and keys [m or n, d], unit rows; `aligned` pairs have a cosine of 0.9."""
    generator = torch.Generator().manual_seed(seed)
    queries = torch.randn(n, d, generator=generator, dtype=torch.float64)
    keys = torch.randn(m or n, d, generator=generator, dtype=torch.float64)
    if aligned:
        keys[:n] = 0.5 * keys[:n] + queries
    views = {"queries": normalize(queries, dim=1), "keys": normalize(keys, dim=1)}
    return {name: (length * x).to(DEVICE, dtype) for name, x in views.items()}


def evaluate(loss, inputs):
    """`loss(**inputs)`, and the gradient for every input of Σ w · loss with w from −1 to 1."""
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    value = loss(**leaves)
    w = torch.linspace(-1, 1, value.numel(), device=value.device, dtype=torch.float64)
    total = (w.view(value.shape) * value.double()).sum()
    gradients = torch.autograd.grad(total, list(leaves.values()), materialize_grads=True)
    for x, gradient in zip(leaves.values(), gradients, strict=True):
        assert gradient.dtype == x.dtype
    return {"value": value.detach(), **dict(zip(inputs, gradients, strict=True))}


def widened(inputs):
    narrow = (torch.bfloat16, torch.float16)
    return {name: x.float() if x.dtype in narrow else x for name, x in inputs.items()}


def rounded_once(found, inputs):
    """What was found in float32 at least, its gradients rounded to the inputs' dtypes."""
    return {name: x.to(inputs[name].dtype) if name in inputs else x for name, x in found.items()}


def cast(inputs, dtype):
    return {name: x.to(dtype) for name, x in inputs.items()}


def assert_as_accurate(loss, eager, inputs, scale=1.0):
    """Holds `loss` to the yardstick; `eager` is the same function materialised, for any dtype."""
    ours = evaluate(loss, inputs)
    assert ours["value"].dtype == next(iter(widened(inputs).values())).dtype
    if "temperature" in inputs:
        inputs = {**inputs, "temperature": inputs["temperature"].repeat(len(inputs["queries"]), 1)}
    compare(ours, partial(evaluate, eager), inputs, scale)


def compare(ours, eager, inputs, scale=1.0, truth=None):
    """Holds results by name to the yardstick. `eager(inputs)` has what they are to be, in the dtype
    of the inputs, and the truth where it is not given."""
    truth = truth or eager(cast(inputs, torch.float64))
    naive = rounded_once(eager(widened(inputs)), inputs)
    eps = {name: torch.finfo(x.dtype).eps for name, x in naive.items()}
    errors = errors_of(naive, truth)
    if misses(ours, truth, errors, eps, scale):
        errors = worst(
            errors, widened(inputs), truth, lambda x: eager(cast(x, torch.float64)),
            lambda x, exact: errors_of(rounded_once(eager(x), inputs), exact),
        )  # fmt: skip
    missed = misses(ours, truth, errors, eps, scale)
    assert not missed, "\n".join(missed)


def errors_of(naive, truth):
    """Eager's by name, the truth naming them; of a temperature by row the norm."""
    found = {
        name: float(size_of(name)(naive[name].double() - true)) for name, true in truth.items()
    }
    return {name: error if math.isfinite(error) else 0.0 for name, error in found.items()}


def misses(ours, truth, errors, eps, scale):
    """A line for each result that is too far off."""
    found = []
    for name, true in truth.items():
        exact = true.sum() if name == "temperature" else true
        error, magnitude = float(largest(ours[name].double() - exact)), float(size_of(name)(true))
        ulp = eps[name] * magnitude
        rounding = FLOAT64_ULPS * torch.finfo(torch.float64).eps * max(scale, magnitude)
        limit = 2 * errors[name] + ulp + rounding + SMALLEST_NORMAL
        if not error <= limit:  # NaN is no number to compare with
            found.append(
                f"{name}: error {error:.3g} passes {limit:.3g}; eager {errors[name]:.3g}, "
                f"ulp {ulp:.3g}, largest true entry {magnitude:.3g}"
            )
    return found


def size_of(name):
    return torch.linalg.vector_norm if name == "temperature" else largest


def largest(x):
    return x.abs().max()
