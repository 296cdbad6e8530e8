"""Where a call runs: the backend by device, the path by temperature and bound, launch tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from . import chebyshev
from .constants import host_constant

ACCURATE_RANGE = 40  # of float32 exponents: rounded at 20 they have an error of 1e-6, at 40 of 2e-6


def fixed_shift_is_safe(
    temperature: float | Tensor, bound: float | None, dtype: torch.dtype
) -> bool:
    """Whether exp(S / τ) can be summed as it is, without a running maximum, and keep its digits.

    |S| ≤ b keeps it within exp(±b/τ). 2b/τ ≤ 40 (1400 for float64) keeps the ratio of any two
    entries, and sums of 2³² of them, normal float32 numbers, and b/τ small: the exponent is rounded
    at that size. At 80 rows of few keys missed the yardstick in 13 of 432 draws, at 40 in 4, which
    the direct path misses too. A tensor temperature is never read.
    """
    if bound is None or isinstance(temperature, Tensor):
        return False
    return 2 * bound / temperature <= (1400 if dtype == torch.float64 else ACCURATE_RANGE)


def odds_are_safe(temperature: float, bound: float | None, dtype: torch.dtype) -> bool:
    """Whether a fixed shift is, and its sums divided by any entry stay float64 numbers."""
    return (
        bound is not None
        and fixed_shift_is_safe(temperature, bound, dtype)
        and 2 * bound / temperature <= 600
    )


def exponent_range(dtype: torch.dtype) -> float:
    """Up to which 2b/τ exp(S / τ) and its sums are normal numbers, of fewer digits or not."""
    return 1400 if dtype == torch.float64 else 80


def rkdo_degree(
    scales: Sequence[float] | None, alpha: float, bound: float | None, dtype: torch.dtype
) -> int | None:
    """The degree of the row moments that RKDO runs on, or None for the direct path.

    `scales` are the 1/τ_t, None for a learnable temperature. Moments need a fixed shift and a
    degree K ≤ 12 whose interpolation error, found on the host by `chebyshev.interpolation_error`
    from these arguments alone, is at most ε of float32, 1.2e-7, and less where alpha > ½: of a
    row's loss in nats, of a normaliser relatively, and of the gradient. It is of the order of
    (δ/2)^(K+1) / (K+1)! with δ = (c_depth − c_0) b / 2, which must not pass 1: float32's rounding
    grows as exp(2δ). float64 inputs want 16 digits: direct path.
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


@host_constant
def triton_status() -> str:
    """'missing', 'compiled', or 'interpreted' under TRITON_INTERPRET=1."""
    try:
        import triton
    except ImportError:
        return "missing"
    return "interpreted" if triton.knobs.runtime.interpret else "compiled"


# ---- launches of the Triton kernels --------------------------------------------------------------

WIDTHS = {4: 64, 2: 128}  # columns of an operand held at once, by bytes an element
SINGLE = 128  # rows, and keys, up to which one program does all
CROWDED = 8  # warps that a multiprocessor holds where a thread has up to 255 registers
STRIPE_DIM = 256  # of bfloat16 embeddings, from which ∂L/∂S is formed by stripes
STRIPE_BYTES = 32 << 20  # of one: an H200's L2 holds 50 MB


@dataclass(frozen=True)
class Config:
    rows: int
    cols: int
    warps: int
    stages: int
    steps: int = 1  # tiles a pass through the loop
    registers: int | None = None  # most that a thread may have
    width: int | None = None  # columns of an operand held at once, where WIDTHS are too many

    @property
    def options(self) -> dict[str, Any]:
        options = {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": True}
        return options | ({"maxnreg": self.registers} if self.registers else {})


# By kernel, bytes an element, and whether the embedding is wider than WIDTHS. Chosen from what the
# kernels compile to for sm_90 (python -m bench static): the fewest issue slots without spills.
CONFIGS = {
    ("logsumexp", 2, False): Config(128, 128, 8, 3),
    ("logsumexp", 2, True): Config(128, 64, 8, 2),
    ("logsumexp", 4, False): Config(128, 64, 8, 2),
    ("logsumexp", 4, True): Config(64, 64, 4, 1),
    ("moments_fwd", 2, False): Config(128, 64, 8, 3),
    ("moments_fwd", 2, True): Config(128, 64, 8, 2),
    ("moments_fwd", 4, False): Config(128, 64, 8, 2),
    ("moments_fwd", 4, True): Config(64, 64, 4, 1),
    ("single_launch", 2, False): Config(64, 64, 4, 1),
    ("single_launch", 2, True): Config(64, 64, 8, 1),
    ("single_launch", 4, False): Config(64, 64, 8, 1, width=32),
    ("single_launch", 4, True): Config(64, 64, 8, 1, width=32),
    ("gradient_stripe", 2, True): Config(128, 128, 8, 3, width=64),
    ("both_sums", 2, False): Config(128, 64, 4, 3, registers=168),
    ("both_sums", 2, True): Config(128, 128, 8, 2),
    ("both_sums", 4, False): Config(64, 128, 8, 2),
    ("both_sums", 4, True): Config(64, 128, 8, 1),
    ("both_sums_bwd", 2, False): Config(64, 64, 4, 2, steps=2, registers=128),
    ("both_sums_bwd", 2, True): Config(128, 64, 8, 2),
    ("both_sums_bwd", 4, False): Config(128, 64, 8, 2),
    ("both_sums_bwd", 4, True): Config(128, 64, 8, 1),
    ("moments_dq", 2, False): Config(64, 64, 4, 2, steps=2, registers=128),
    ("moments_dq", 2, True): Config(128, 64, 8, 2),
    ("moments_dq", 4, False): Config(128, 64, 8, 2),
    ("moments_dq", 4, True): Config(128, 64, 8, 1),
    ("moments_dk", 2, False): Config(64, 64, 4, 2, steps=2, registers=128),
    ("moments_dk", 2, True): Config(128, 64, 8, 2),
    ("moments_dk", 4, False): Config(64, 64, 4, 1),
    ("moments_dk", 4, True): Config(64, 32, 4, 1),
    ("softmax_sums", 2, False): Config(128, 64, 8, 3),
    ("softmax_sums", 2, True): Config(128, 64, 8, 2),
    ("softmax_sums", 4, False): Config(128, 64, 8, 2),
    ("softmax_sums", 4, True): Config(64, 32, 4, 1),
    ("softmax_sums_dq", 2, False): Config(64, 64, 4, 2),
    ("softmax_sums_dq", 2, True): Config(128, 32, 8, 2),
    ("softmax_sums_dq", 4, False): Config(128, 32, 8, 2),
    ("softmax_sums_dq", 4, True): Config(64, 32, 4, 1),
    ("softmax_sums_dk", 2, False): Config(64, 64, 4, 2),
    ("softmax_sums_dk", 2, True): Config(32, 128, 8, 2),
    ("softmax_sums_dk", 4, False): Config(32, 64, 4, 1),
    ("softmax_sums_dk", 4, True): Config(16, 64, 4, 1),
    ("student_sums", 2, False): Config(128, 64, 8, 3),
    ("student_sums", 2, True): Config(128, 64, 8, 2),
    ("student_sums", 4, False): Config(128, 64, 8, 2),
    ("student_sums", 4, True): Config(64, 32, 4, 1),
    ("student_sums_dq", 2, False): Config(64, 64, 4, 2),
    ("student_sums_dq", 2, True): Config(128, 32, 8, 2),
    ("student_sums_dq", 4, False): Config(128, 32, 8, 2),
    ("student_sums_dq", 4, True): Config(64, 16, 4, 1),
    ("student_sums_dk", 2, False): Config(64, 64, 4, 2),
    ("student_sums_dk", 2, True): Config(32, 128, 8, 2),
    ("student_sums_dk", 4, False): Config(16, 64, 4, 2),
    ("student_sums_dk", 4, True): Config(16, 64, 4, 1),
    ("recursion", 2, False): Config(64, 32, 4, 2),
    ("recursion", 2, True): Config(64, 16, 4, 2),
    ("recursion", 4, False): Config(64, 16, 4, 2),
    ("recursion", 4, True): Config(64, 16, 4, 1),
    ("recursion_dq", 2, False): Config(64, 32, 4, 2),
    ("recursion_dq", 2, True): Config(64, 16, 4, 2, width=64),
    ("recursion_dq", 4, False): Config(128, 32, 8, 2),
    ("recursion_dq", 4, True): Config(64, 16, 4, 1),
    ("recursion_dk", 2, False): Config(32, 64, 4, 2),
    ("recursion_dk", 2, True): Config(16, 64, 4, 2, width=64),
    ("recursion_dk", 4, False): Config(16, 64, 4, 1),
    ("recursion_dk", 4, True): Config(16, 64, 4, 1, width=32),
    ("field_masses", 2, False): Config(16, 256, 4, 2),
    ("field_masses", 2, True): Config(16, 256, 4, 2),
    ("field_masses", 4, False): Config(16, 256, 4, 2),
    ("field_masses", 4, True): Config(16, 256, 4, 2),
    ("field_walk", 2, False): Config(128, 32, 8, 3),
    ("field_walk", 2, True): Config(128, 32, 8, 2),
    ("field_walk", 4, False): Config(128, 16, 8, 1),
    ("field_walk", 4, True): Config(128, 16, 8, 1),
    ("field_keys", 2, False): Config(64, 64, 4, 2),
    ("field_keys", 2, True): Config(64, 64, 8, 1),
    ("field_keys", 4, False): Config(64, 64, 4, 1),
    ("field_keys", 4, True): Config(64, 32, 4, 1, width=32),
    # rows and columns by index: addresses of their own take registers
    ("field_walk_gathered", 2, False): Config(128, 16, 8, 2),
    ("field_walk_gathered", 2, True): Config(128, 16, 8, 2),
    ("field_walk_gathered", 4, False): Config(128, 16, 8, 1),
    ("field_walk_gathered", 4, True): Config(128, 16, 8, 1),
    ("field_keys_gathered", 2, False): Config(64, 64, 4, 2),
    ("field_keys_gathered", 2, True): Config(64, 64, 8, 1),
    ("field_keys_gathered", 4, False): Config(64, 32, 4, 1),
    ("field_keys_gathered", 4, True): Config(64, 32, 4, 1),
    ("snapshot_sums", 2, False): Config(64, 32, 4, 1),
    ("snapshot_sums", 2, True): Config(64, 32, 4, 1),
    ("snapshot_sums", 4, False): Config(64, 32, 4, 1),
    ("snapshot_sums", 4, True): Config(64, 32, 4, 1),
    ("snapshot_rows", 2, False): Config(64, 32, 4, 1),
    ("snapshot_rows", 2, True): Config(64, 32, 4, 1),
    ("snapshot_rows", 4, False): Config(64, 32, 4, 1),
    ("snapshot_rows", 4, True): Config(64, 32, 4, 1),
    ("snapshot_keys", 2, False): Config(64, 32, 4, 1),
    ("snapshot_keys", 2, True): Config(64, 32, 4, 1),
    ("snapshot_keys", 4, False): Config(64, 32, 4, 1),
    ("snapshot_keys", 4, True): Config(64, 32, 4, 1),
}
# Where another architecture needs another tile for the same reasons.
ARCH_CONFIGS = {
    ("sm_80", "logsumexp", 2, False): Config(128, 64, 8, 2),
    ("sm_80", "logsumexp", 4, False): Config(32, 64, 4, 2),
    ("sm_80", "logsumexp", 4, True): Config(32, 64, 4, 2),
    ("sm_80", "moments_fwd", 2, False): Config(128, 64, 8, 2),
    ("sm_80", "moments_fwd", 4, False): Config(32, 64, 4, 2),
    ("sm_80", "moments_fwd", 4, True): Config(32, 64, 4, 2),
    ("sm_100", "logsumexp", 2, False): Config(128, 64, 8, 3),
    ("sm_100", "logsumexp", 4, True): Config(64, 64, 8, 2),
    ("sm_100", "moments_fwd", 4, True): Config(64, 64, 8, 2),
    ("sm_100", "single_launch", 4, False): Config(64, 64, 4, 1, width=32),
    ("gfx942", "logsumexp", 4, True): Config(128, 64, 8, 2),
    ("gfx942", "moments_fwd", 4, True): Config(128, 64, 8, 2),
    ("sm_80", "moments_dq", 2, False): Config(64, 64, 4, 2),
    ("sm_80", "moments_dq", 2, True): Config(64, 64, 8, 2),
    ("sm_80", "moments_dq", 4, False): Config(32, 32, 2, 2),
    ("sm_80", "moments_dk", 2, False): Config(64, 64, 4, 2),
    ("sm_80", "moments_dq", 4, True): Config(32, 32, 4, 1),
    ("sm_80", "moments_dk", 4, False): Config(64, 32, 4, 2),
    ("sm_80", "moments_dk", 4, True): Config(32, 32, 4, 1),
    ("sm_100", "moments_dq", 2, False): Config(128, 64, 4, 2, steps=2),
    ("sm_100", "moments_dq", 2, True): Config(128, 128, 8, 1),
    ("sm_100", "moments_dk", 2, False): Config(64, 128, 4, 2, steps=2),
    ("sm_100", "moments_dk", 2, True): Config(128, 128, 8, 1),
    ("sm_100", "moments_dk", 4, False): Config(64, 64, 8, 1),
    ("sm_100", "moments_dq", 4, True): Config(64, 64, 8, 1),
    ("sm_100", "moments_dk", 4, True): Config(64, 64, 8, 1),
    ("gfx942", "gradient_stripe", 2, True): Config(128, 128, 8, 2, width=64),
    ("gfx942", "moments_dq", 2, False): Config(128, 64, 4, 1),
    ("gfx942", "moments_dq", 2, True): Config(128, 64, 4, 1),
    ("gfx942", "moments_dq", 4, False): Config(128, 32, 4, 1),
    ("gfx942", "moments_dq", 4, True): Config(128, 32, 4, 1),
    ("gfx942", "moments_dk", 2, False): Config(128, 64, 4, 1),
    ("gfx942", "moments_dk", 2, True): Config(128, 64, 4, 1),
    ("gfx942", "moments_dk", 4, False): Config(128, 64, 4, 1),
    ("gfx942", "moments_dk", 4, True): Config(128, 64, 4, 1),
    ("sm_80", "both_sums", 4, True): Config(32, 64, 4, 1),
    ("sm_80", "both_sums_bwd", 2, True): Config(64, 64, 8, 2),
    ("sm_80", "both_sums_bwd", 4, False): Config(32, 32, 2, 2),
    ("sm_80", "both_sums_bwd", 4, True): Config(32, 32, 4, 1),
    ("sm_100", "both_sums", 2, False): Config(64, 128, 8, 3),
    ("sm_100", "both_sums", 2, True): Config(64, 128, 8, 2),
    ("sm_100", "both_sums", 4, True): Config(64, 64, 8, 2),
    ("sm_100", "both_sums_bwd", 2, False): Config(128, 64, 4, 2, steps=2),
    ("sm_100", "both_sums_bwd", 2, True): Config(128, 64, 8, 1),
    ("sm_100", "both_sums_bwd", 4, False): Config(64, 64, 8, 1),
    ("sm_100", "both_sums_bwd", 4, True): Config(64, 64, 8, 1),
    ("gfx942", "both_sums", 2, True): Config(64, 128, 8, 2),
    ("gfx942", "both_sums", 4, True): Config(64, 64, 4, 1),
    ("gfx942", "both_sums_bwd", 2, False): Config(128, 64, 4, 1),
    ("gfx942", "both_sums_bwd", 2, True): Config(128, 32, 4, 1),
    ("gfx942", "both_sums_bwd", 4, False): Config(128, 32, 4, 1),
    ("gfx942", "both_sums_bwd", 4, True): Config(128, 32, 4, 1),
    ("sm_80", "softmax_sums", 2, True): Config(64, 16, 4, 2),
    ("sm_80", "softmax_sums", 4, False): Config(64, 32, 4, 1),
    ("sm_80", "softmax_sums", 4, True): Config(64, 16, 4, 1),
    ("sm_80", "softmax_sums_dq", 2, True): Config(64, 16, 4, 2),
    ("sm_80", "softmax_sums_dq", 4, False): Config(64, 16, 4, 2),
    ("sm_80", "softmax_sums_dq", 4, True): Config(64, 16, 4, 1, width=32),
    ("sm_80", "softmax_sums_dk", 4, False): Config(16, 64, 4, 2),
    ("sm_80", "softmax_sums_dk", 4, True): Config(16, 64, 4, 1, width=32),
    ("sm_80", "student_sums", 2, True): Config(64, 16, 4, 2),
    ("sm_80", "student_sums", 4, False): Config(64, 32, 4, 1),
    ("sm_80", "student_sums_dq", 2, True): Config(32, 32, 4, 1),
    ("sm_80", "student_sums_dq", 4, False): Config(16, 16, 4, 1),
    ("sm_80", "student_sums_dq", 4, True): Config(64, 16, 4, 1, width=32),
    ("sm_80", "student_sums_dk", 2, True): Config(32, 32, 4, 1),
    ("sm_80", "student_sums_dk", 4, False): Config(16, 16, 4, 1),
    ("sm_80", "student_sums_dk", 4, True): Config(16, 64, 4, 1, width=32),
    ("sm_80", "recursion", 2, False): Config(64, 16, 4, 2),
    ("sm_80", "recursion_dq", 2, True): Config(64, 16, 4, 2),
    ("sm_80", "recursion_dq", 4, False): Config(64, 16, 4, 2),
    ("sm_80", "recursion_dq", 4, True): Config(64, 16, 4, 1, width=32),
    ("sm_80", "recursion_dk", 2, True): Config(32, 32, 4, 1),
    ("sm_80", "recursion_dk", 4, False): Config(16, 64, 4, 2),
    ("sm_100", "softmax_sums", 2, True): Config(64, 64, 8, 2),
    ("sm_100", "softmax_sums", 4, False): Config(64, 32, 4, 1, width=32),
    ("sm_100", "softmax_sums", 4, True): Config(64, 32, 4, 1, width=32),
    ("sm_100", "softmax_sums_dk", 2, False): Config(32, 64, 4, 2),
    ("sm_100", "softmax_sums_dk", 4, False): Config(16, 64, 4, 1, width=32),
    ("sm_100", "student_sums", 4, True): Config(64, 32, 4, 1, width=32),
    ("sm_100", "softmax_sums_dq", 4, True): Config(64, 16, 4, 1, width=32),
    ("sm_100", "softmax_sums_dk", 4, True): Config(16, 64, 4, 1, width=32),
    ("sm_100", "student_sums_dq", 4, True): Config(64, 16, 4, 1, width=32),
    ("sm_100", "student_sums_dk", 4, True): Config(16, 64, 4, 1, width=32),
    ("sm_100", "recursion", 4, False): Config(64, 16, 4, 1),
    ("sm_100", "recursion", 4, True): Config(64, 16, 4, 1, width=32),
    ("sm_100", "recursion_dq", 2, True): Config(64, 16, 4, 1, width=64),
    ("sm_100", "recursion_dq", 4, False): Config(64, 16, 4, 2),
    ("sm_100", "recursion_dq", 4, True): Config(64, 16, 4, 1, width=32),
    ("sm_100", "recursion_dk", 4, False): Config(16, 64, 4, 1, width=32),
    ("gfx942", "softmax_sums_dq", 2, True): Config(64, 32, 8, 2),
    ("gfx942", "softmax_sums_dq", 4, False): Config(64, 32, 4, 1),
    ("gfx942", "softmax_sums_dk", 2, True): Config(32, 64, 4, 1),
    ("gfx942", "student_sums_dq", 2, True): Config(64, 32, 8, 2),
    ("gfx942", "student_sums_dk", 2, True): Config(32, 64, 4, 1),
    ("gfx942", "recursion_dq", 2, True): Config(64, 16, 4, 2),
    ("gfx942", "recursion_dq", 4, False): Config(64, 32, 4, 1),
    ("gfx942", "recursion_dk", 4, True): Config(16, 64, 4, 1),
    ("sm_80", "field_walk", 2, False): Config(128, 32, 8, 2),
    ("sm_80", "field_walk", 4, False): Config(64, 16, 4, 1),
    ("sm_80", "field_keys", 4, False): Config(32, 32, 4, 1),
    ("sm_100", "field_walk", 2, False): Config(128, 32, 8, 2),
    ("sm_100", "field_keys", 2, False): Config(128, 64, 4, 1),
    ("sm_100", "field_keys", 4, False): Config(64, 64, 8, 1),
    ("gfx942", "field_walk", 2, False): Config(64, 32, 4, 1),
    ("gfx942", "field_walk", 2, True): Config(64, 32, 4, 1),
    ("gfx942", "field_walk", 4, False): Config(64, 32, 4, 1),
    ("gfx942", "field_walk", 4, True): Config(64, 32, 4, 1, width=32),
    ("gfx942", "field_keys", 2, False): Config(64, 64, 4, 1),
    ("gfx942", "field_keys", 2, True): Config(64, 64, 4, 2),
    ("gfx942", "field_keys", 4, False): Config(64, 64, 4, 2),
    ("gfx942", "field_keys", 4, True): Config(64, 64, 4, 2),
}
INTERPRETED = Config(64, 64, 1, 1)


def config(kernel: str, x: Tensor) -> Config:
    if triton_status() == "interpreted":
        return INTERPRETED
    arch = architecture(x.device.index or 0) if x.device.type == "cuda" else "sm_90"
    return launch_config(kernel, x, arch)


def launch_config(kernel: str, x: Tensor, arch: str = "sm_90") -> Config:
    key = (kernel, x.element_size(), x.shape[1] > WIDTHS[x.element_size()])
    return ARCH_CONFIGS.get((arch, *key), CONFIGS[key])


def limited(config: Config, dtype: torch.dtype, width: int, degree: int, dense: bool) -> Config:
    """Without its limit on registers where a gradient needs more of them.

    They hold the addresses of rows that lie apart, float16's operands in tf32, a sum of more than
    64 columns, and the coefficients of a higher degree.
    """
    enough = dense and dtype != torch.float16 and width <= 64 and degree <= 6
    return config if enough else replace(config, registers=None)


@host_constant
def architecture(device: int) -> str:
    """The nearest architecture that the launch tables know."""
    if torch.version.hip is not None:
        return "gfx942"
    major = torch.cuda.get_device_capability(device)[0]
    return "sm_80" if major < 9 else "sm_90" if major == 9 else "sm_100"


@host_constant
def multiprocessors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def splits(programs: int, count: int, step: int, warps: int, result: Tensor, fit: int) -> int:
    """How many programs share one walk over `count` rows, each with a part of the result.

    As many as give every multiprocessor the `fit` warps that it can hold, where `programs` are too
    few for that. Each walks over four steps at least, and the parts, float32, take 8 MiB or what
    the result does at most.
    """
    if triton_status() == "interpreted" or result.device.type != "cuda":
        return 1
    wanted = fit * multiprocessors(result.device.index or 0) // (programs * warps)
    room = max(8 << 20, result.numel() * result.element_size()) // (4 * result.numel())
    return max(1, min(wanted, count // (4 * step), room))


def span(count: int, step: int, parts: int) -> int:
    """Rows that each of `parts` programs walks over: whole steps, but for the last."""
    return step * -(-count // (step * parts))


def split(
    programs: int, count: int, step: int, warps: int, result: Tensor, fit: int = 16
) -> tuple[int, int]:
    """How many programs share a walk, see `splits`, and the rows that each walks over."""
    each = span(count, step, splits(programs, count, step, warps, result, fit))
    return -(-count // each), each


def is_single(n: int, m: int) -> bool:
    """Whether one program does all, of the loss and of its gradient."""
    return n <= SINGLE and m <= SINGLE


def stripe(count: int, length: int) -> int:
    """Of `count` rows of bfloat16, as many as a stripe holds: multiples of 128, 128 at least."""
    return min(count, 128 * max(1, STRIPE_BYTES // (256 * length)))


def dims(x: Tensor, width: int | None = None) -> dict[str, Any]:
    interpreted = triton_status() == "interpreted"
    nvidia = torch.version.hip is None and not interpreted
    constants = dims_for(x, nvidia, width)
    return constants | {"UPCAST": interpreted and x.dtype == torch.bfloat16}


def dims_for(x: Tensor, nvidia: bool, width: int | None = None) -> dict[str, Any]:
    """How the embedding dimension is cut, and the precision of its products.

    tf32x3 keeps float32's digits on NVIDIA's tensor cores; AMD and the interpreter have ieee.
    """
    dim = x.shape[1]
    width = min(max(16, 1 << (dim - 1).bit_length()), width or WIDTHS[x.element_size()])
    return {
        "WIDTH": width,
        "CHUNKS": -(-dim // width),
        "FULL": dim % width == 0,
        "PRECISION": "tf32x3" if nvidia else "ieee",
        "UPCAST": False,
    }


def gradient_precision(x: Tensor) -> str:
    """float16 operands are exact in tf32, whose range the gradient of S needs; see `into`."""
    if torch.version.hip is not None or triton_status() == "interpreted":
        return "ieee"
    return "tf32" if x.dtype == torch.float16 else "tf32x3"


def rows_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 else x.contiguous()


def excluded(diagonals: list[int]) -> tuple[int, int]:
    """Two diagonals for a kernel; EXCLUDE says how many count."""
    a, b = (*diagonals, 0, 0)[:2]
    return a, b
