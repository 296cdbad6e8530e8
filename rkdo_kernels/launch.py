"""Where a call runs: the backend by device, the path by temperature and bound, the launch tables."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from . import chebyshev


def fixed_shift_is_safe(
    temperature: float | Tensor, bound: float | None, dtype: torch.dtype
) -> bool:
    """Whether exp(S / τ) can be summed as it is, without a running maximum.

    |S| ≤ b keeps it within exp(±b/τ). 2b/τ ≤ 80 keeps the ratio of any two entries, and sums of
    2³² of them, normal float32 numbers (1400 for float64). A tensor temperature is never read.
    """
    if bound is None or isinstance(temperature, Tensor):
        return False
    return 2 * bound / temperature <= exponent_range(dtype)


def exponent_range(dtype: torch.dtype) -> float:
    return 1400 if dtype == torch.float64 else 80


def rkdo_degree(
    scales: Sequence[float] | None, alpha: float, bound: float | None, dtype: torch.dtype
) -> int | None:
    """The degree of the row moments that RKDO runs on, or None for the direct path.

    `scales` are the 1/τ_t, None for a learnable temperature. Moments need a fixed shift and a degree
    K ≤ 12 whose interpolation error, found on the host by `chebyshev.interpolation_error` from these
    arguments alone, is at most 12 ε of float32, 1.4e-6: of a row's loss in nats, of a normaliser
    relatively, and of their gradients. It is of the order of (δ/4)^(K+1) / (K+1)! with
    δ = (c_depth − c_0) b. float64 inputs want 16 digits: direct path.
    """
    if scales is None or bound is None or dtype == torch.float64:
        return None
    if not fixed_shift_is_safe(1 / scales[-1], bound, dtype):
        return None
    return chebyshev.rkdo_degree(float(alpha), tuple(scales), float(bound))


def backend_for(name: str, queries: Tensor) -> str:
    """'triton' or 'tiled' for what was asked; an explicit 'triton' that cannot run is an error."""
    if name == "auto":
        on_gpu = queries.device.type == "cuda" and queries.dtype != torch.float64
        return "triton" if on_gpu and triton_status() != "missing" else "tiled"
    if name == "triton":
        status = triton_status()
        if status == "missing":
            raise RuntimeError("backend='triton' needs Triton, which cannot be imported")
        if queries.dtype == torch.float64:
            raise TypeError("backend='triton' takes float32, bfloat16 or float16, got float64")
        if queries.device.type != "cuda" and status != "interpreted":
            raise RuntimeError(
                f"backend='triton' needs a GPU, got tensors on {queries.device} "
                "(TRITON_INTERPRET=1 runs it on CPU tensors, slowly)"
            )
    return name


@torch.compiler.assume_constant_result
@lru_cache(maxsize=1)
def triton_status() -> str:
    """'missing', 'compiled', or 'interpreted' under TRITON_INTERPRET=1."""
    try:
        import triton
    except ImportError:
        return "missing"
    return "interpreted" if triton.knobs.runtime.interpret else "compiled"
