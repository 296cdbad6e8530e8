"""Where a call runs: the backend by device, the path by temperature and bound, its launches."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from . import chebyshev
from .constants import host_constant
from .launch_tables import CONFIGS as CONFIGS
from .launch_tables import TABLES, WIDTHS, Config, line, tables_for

P = ParamSpec("P")
R = TypeVar("R")

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
        if not on_gpu or triton_status() == "missing":
            return "tiled"
        if why_not := why_no_kernels(queries):
            warn_of(why_not)
            return "tiled"
        return "triton"
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
        if why_not := why_no_kernels(queries):
            raise RuntimeError(f"backend='triton' cannot run: {why_not}")
    return name


def why_no_kernels(x: Tensor) -> str:
    compiled = triton_status() == "compiled" and x.device.type == "cuda"
    return refusal(device_index(x), x.dtype) if compiled else ""


@host_constant
def triton_status() -> str:
    """'missing', 'compiled', or 'interpreted' under TRITON_INTERPRET=1."""
    try:
        import triton
    except ImportError:
        return "missing"
    return "interpreted" if triton.knobs.runtime.interpret else "compiled"


# ---- launches of the Triton kernels --------------------------------------------------------------

SINGLE = 128  # rows, and keys, up to which one program does all
CROWDED = 8  # warps that a multiprocessor holds where a thread has up to 255 registers
STRIPE_DIM = 256  # of bfloat16 embeddings, from which ∂L/∂S is formed by stripes
STRIPE_BYTES = 32 << 20  # of one: an H200's L2 holds 50 MB


INTERPRETED = Config(64, 64, 1, 1)


@dataclass(frozen=True)
class Device:
    name: str
    architecture: str  # sm_86, gfx942
    shared: int  # bytes of shared memory that a program may have

    @property
    def table(self) -> str:
        """The launch table that fits it, "" if none does."""
        known = tables_for(self.architecture)
        return next((x for x in known if TABLES[x].shared <= self.shared), "")


@host_constant
def device(index: int) -> Device:
    from triton.runtime import driver

    properties: Any = torch.cuda.get_device_properties(index)
    if torch.version.hip is not None:
        architecture = properties.gcnArchName.split(":")[0]
    else:
        architecture = "sm_{}{}".format(*torch.cuda.get_device_capability(index))
    shared = driver.active.utils.get_device_properties(index)["max_shared_mem"]
    return Device(properties.name, architecture, shared)


@host_constant
def refusal(index: int, dtype: torch.dtype) -> str:
    """Why the kernels cannot run on a device, "" if they can."""
    found = device(index)
    what = f"{found.name} ({found.architecture})"
    if not tables_for(found.architecture):
        return f"the kernels need sm_75 or newer, {what} is older"
    if not found.table:
        least = min(TABLES[x].shared for x in tables_for(found.architecture))
        return (
            f"the kernels need {least} bytes of shared memory a program, {what} has {found.shared}"
        )
    if found.table == "sm_75" and dtype == torch.bfloat16:
        return f"bfloat16 needs sm_80 or newer, {what} is older: pass float16 or float32"
    return ""


@host_constant
def warn_of(reason: str) -> None:
    """Once a process."""
    warnings.warn(f"PyTorch tiles run instead of the kernels: {reason}", stacklevel=2)


def device_index(x: Tensor) -> int:
    return torch.cuda.current_device() if x.device.index is None else x.device.index


def on_device(function: Callable[P, R]) -> Callable[P, R]:
    """Run on the device of its first argument: Triton launches on the current one."""

    @wraps(function)
    def there(*args: P.args, **kwargs: P.kwargs) -> R:
        with guard(args[0]):
            return function(*args, **kwargs)

    return there


def guard(x: Any) -> AbstractContextManager[Any]:
    return torch.cuda.device(x.device) if x.device.type == "cuda" else nullcontext()


def target(x: Tensor) -> str:
    """The launch table that holds for a tensor's device."""
    if triton_status() == "interpreted":
        return "interpreted"
    return device(device_index(x)).table if x.device.type == "cuda" else "sm_90"


def shared_memory(x: Tensor) -> int:
    """Bytes that a program may take; interpreted, as where there are few."""
    return TABLES[target(x)].shared or 64 << 10


def config(kernel: str, x: Tensor) -> Config:
    table = target(x)
    return INTERPRETED if table == "interpreted" else launch_config(kernel, x, table)


def launch_config(kernel: str, x: Tensor, table: str = "sm_90") -> Config:
    return line(table, kernel, x.element_size(), x.shape[1])


def limited(config: Config, dtype: torch.dtype, width: int, degree: int, dense: bool) -> Config:
    """Without its limit on registers where a gradient needs more of them.

    They hold the addresses of rows that lie apart, float16's operands in tf32, a sum of more than
    64 columns, and the coefficients of a higher degree.
    """
    enough = dense and dtype != torch.float16 and width <= 64 and degree <= 6
    return config if enough else replace(config, registers=None)


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
    wanted = fit * multiprocessors(device_index(result)) // (programs * warps)
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
    table = target(x)
    constants = dims_for(x, TABLES[table].tf32, width, TABLES[table].widths)
    return constants | {"UPCAST": table == "interpreted" and x.dtype == torch.bfloat16}


def dims_for(
    x: Tensor, tf32: bool, width: int | None = None, widths: dict[int, int] = WIDTHS
) -> dict[str, Any]:
    """How the embedding dimension is cut, and the precision of its products.

    tf32x3 keeps float32's digits on tensor cores that have tf32; others, and the interpreter,
    have ieee.
    """
    dim = x.shape[1]
    most = widths[x.element_size()]
    width = min(max(16, 1 << (dim - 1).bit_length()), width or most, most)
    return {
        "WIDTH": width,
        "CHUNKS": -(-dim // width),
        "FULL": dim % width == 0,
        "PRECISION": "tf32x3" if tf32 else "ieee",
        "UPCAST": False,
    }


def gradient_precision(x: Tensor) -> str:
    """float16 operands are exact in tf32, whose range the gradient of S needs; see `into`."""
    if not TABLES[target(x)].tf32:
        return "ieee"
    return "tf32" if x.dtype == torch.float16 else "tf32x3"


def rows_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 else x.contiguous()


def excluded(diagonals: list[int]) -> tuple[int, int]:
    """Two diagonals for a kernel; EXCLUDE says how many count."""
    a, b = (*diagonals, 0, 0)[:2]
    return a, b
