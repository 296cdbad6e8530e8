"""What this device does at best, measured before anything is compared with it.

Rates a second: of multiply-adds · 2 in matrix products by dtype, of bytes to and from memory, of
bytes out of L2, of exponentials; and seconds: of a launch as the host sees it, of a kernel that
does nothing, and of one in a CUDA graph. They take the place of a table's figures in floors and
predictions.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from ..record import driver
from .device import current
from .outcome import Outcome
from .timing import best_of

GEMM = 8192  # N of the square products
REHEARSED = 32
COPY = 1 << 30  # bytes of the array that is copied
ROUNDS = 5


def measure() -> dict[str, Callable[[], float]]:
    """What each rate is measured by, in this order."""
    return {
        "bf16": lambda: gemm(torch.bfloat16, False),
        "tf32": lambda: gemm(torch.float32, True),
        "fp32": lambda: gemm(torch.float32, False),
        "memory": memory,
        "l2": l2,
        "exp": exponentials,
        "launch": launch,
        "kernel": kernel,
        "graph kernel": graph_kernel,
        "graph launch": graph_launch,
    }


UNITS = {
    "bf16": (1e12, "TFLOP/s"), "tf32": (1e12, "TFLOP/s"), "fp32": (1e12, "TFLOP/s"),
    "memory": (1e12, "TB/s"), "l2": (1e12, "TB/s"), "exp": (1e12, "T/s"),
    "launch": (1e-6, "µs"), "kernel": (1e-6, "µs"), "graph kernel": (1e-6, "µs"),
    "graph launch": (1e-6, "µs"),
}  # fmt: skip


def device() -> Outcome:
    """What it is that is measured."""
    found = current().properties()
    capability = "sm_{}{}".format(*found.capability)
    detail = (
        f"{found.name}, {capability}, {found.processors} processors, "
        f"{found.l2_bytes / 1e6:.0f} MB of L2, {found.memory_bytes / 1e9:.0f} GB, "
        f"{current().count()} of them, driver {driver()}"
    )
    return Outcome(True, detail, {"processors": float(found.processors)})


def shown(name: str, value: float) -> str:
    unit, word = UNITS[name]
    return f"{value / unit:.4g} {word}"


def check(name: str) -> Outcome:
    value = measure()[name]()
    fine = 0 < value < float("inf")
    return Outcome(fine, shown(name, value), {name: value})


def small() -> bool:
    return current().rehearsal


def gemm(dtype: torch.dtype, tf32: bool) -> float:
    n = REHEARSED if small() else GEMM
    a, b = (torch.randn(n, n, device=current().place()).to(dtype) for _ in range(2))
    with allow_tf32(tf32):
        taken = best_of(lambda: torch.mm(a, b), ROUNDS, 2 if dtype == torch.float32 else 8)
    return 2 * n**3 / taken


@contextmanager
def allow_tf32(wanted: bool) -> Iterator[None]:
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "tf32" if wanted else "ieee"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def memory() -> float:
    """Read and written."""
    size = 1 << 12 if small() else COPY
    source = torch.zeros(size, dtype=torch.uint8, device=current().place())
    target = torch.empty_like(source)
    return 2 * size / best_of(lambda: target.copy_(source), ROUNDS, 4)


def programs(each: int) -> int:
    return 1 if small() else each * current().properties().processors


def l2() -> float:
    from .rate_kernels import _read_again_kernel

    count, block, turns = programs(4), 2048, 1 if small() else 64
    steps = 2 if small() else 256  # 2 MiB: far from all of L2, far past what is beside a processor
    x = torch.zeros(steps * block, device=current().place())
    out = torch.empty(count * block, device=x.device)
    taken = best_of(
        lambda: _read_again_kernel[(count,)](
            x, out, turns, STEPS=steps, BLOCK=block, num_warps=8
        ),
        ROUNDS,
        1,
    )  # fmt: skip
    return count * turns * x.nbytes / taken


def exponentials() -> float:
    from .rate_kernels import _exponentials_kernel

    count, block, turns = programs(8), 1024, 2 if small() else 4096
    out = torch.empty(count * block, device=current().place())
    taken = best_of(
        lambda: _exponentials_kernel[(count,)](out, turns, BLOCK=block, num_warps=8), ROUNDS, 1
    )
    return 4 * count * block * turns / taken


def nothing() -> Callable[[], object]:
    from .rate_kernels import _nothing_kernel

    out = torch.empty(1, device=current().place())
    return lambda: _nothing_kernel[(1,)](out, num_warps=1)


def launch() -> float:
    """Of the host, which does not wait: as Triton launches, and so our operators do."""
    step, calls = nothing(), 2 if small() else 200
    step()
    best = float("inf")
    for _ in range(ROUNDS):
        current().synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            step()
        best = min(best, (time.perf_counter() - start) / calls)
    current().synchronize()
    return best


def kernel() -> float:
    """From one to the next in a stream: the larger of what host and device take."""
    return best_of(nothing(), ROUNDS, 2 if small() else 500)


def graph_kernel() -> float:
    """One of many in a CUDA graph."""
    step, many = nothing(), 2 if small() else 100

    def all_of_them() -> torch.Tensor:
        for _ in range(many):
            step()
        return torch.empty(0)

    replay, _ = current().captured(all_of_them)
    return best_of(replay, ROUNDS, 3) / many


def graph_launch() -> float:
    """A CUDA graph of a single kernel, from one launch to the next."""
    step = nothing()

    def one() -> torch.Tensor:
        step()
        return torch.empty(0)

    replay, _ = current().captured(one)
    return best_of(replay, ROUNDS, 2 if small() else 200)
