"""The yardstick: as accurate as eager PyTorch in float32, measured against float64.

For the value and for every gradient, with errors and magnitudes taken as maxima over the tensor:

    error ≤ 2 · (eager's error) + one ulp of the largest true entry + the truth's own rounding

Half precision is rounded once on the way in and once on the way out: values and gradients of
bfloat16 and float16 inputs are held to what eager does in float32 with the same numbers, its
gradients then rounded to the inputs' dtype. Eager in the inputs' own dtype, which adds up rounded
gradients, would allow many times that. float64 inputs are held to eager in float64.

An eager result that is not finite counts as exact. The truth's rounding is a few float64 ulps of
the `scale` it was subtracted from (1/τ for the losses here), and float32's smallest normal number.

The gradient for a temperature is one number, in which eager's errors may cancel by luck: it is held
to the Euclidean norms, over the rows, of eager's errors and of the true gradients.
"""

import torch
from torch.nn.functional import normalize

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


def rounded_once(eager, inputs):
    """`evaluate` in float32 at least, the gradients then rounded to the inputs' dtypes."""
    narrow = (torch.bfloat16, torch.float16)
    wide = {name: x.float() if x.dtype in narrow else x for name, x in inputs.items()}
    found = evaluate(eager, wide)
    return {name: x.to(inputs[name].dtype) if name in inputs else x for name, x in found.items()}


def cast(inputs, dtype):
    return {name: x.to(dtype) for name, x in inputs.items()}


def assert_as_accurate(loss, eager, inputs, scale=1.0):
    """Holds `loss` to the yardstick; `eager` is the same function materialised, for any dtype."""
    ours = evaluate(loss, inputs)
    if "temperature" in inputs:
        inputs = {**inputs, "temperature": inputs["temperature"].repeat(len(inputs["queries"]), 1)}
    naive = rounded_once(eager, inputs)
    assert ours["value"].dtype == naive["value"].dtype
    compare(ours, naive, evaluate(eager, cast(inputs, torch.float64)), scale)


def compare(ours, naive, truth, scale=1.0):
    misses = []
    for name, true in truth.items():
        size, found = largest, ours[name].double()
        if name == "temperature":
            size, found = torch.linalg.vector_norm, found - true.sum()
            error = float(found.abs())
        else:
            error = float(largest(found - true))
        eagers, magnitude = float(size(naive[name].double() - true)), float(size(true))
        ulp = torch.finfo(naive[name].dtype).eps * magnitude
        rounding = FLOAT64_ULPS * torch.finfo(torch.float64).eps * max(scale, magnitude)
        limit = 2 * (eagers if eagers < float("inf") else 0) + ulp + rounding + SMALLEST_NORMAL
        if not error <= limit:  # NaN is no number to compare with
            misses.append(
                f"{name}: error {error:.3g} passes {limit:.3g}; eager {eagers:.3g}, ulp {ulp:.3g}, "
                f"largest true entry {magnitude:.3g}"
            )
    assert not misses, "\n".join(misses)


def largest(x):
    return x.abs().max()
