"""The processors that kernels are compiled for: their limits and their rates.

Rates are per second of the whole device: H200 figures as measured, the others their makers' peak
figures for dense matrices.
"""

from __future__ import annotations

from dataclasses import dataclass

from triton.backends.compiler import GPUTarget

from .sass import Loop, Tile


@dataclass(frozen=True)
class Target:
    gpu: GPUTarget
    device: str  # whose rates these are
    processors: int
    clock: float  # Hz
    lanes: int  # threads whose instruction issues, a clock and processor
    special: int  # special-function results a clock and processor
    shared_rate: int  # bytes of shared memory a clock and processor
    memory_rate: float  # bytes of global memory a second
    matrix: dict[str, float]  # multiply-adds · 2 a second, by what the products run in
    matrix_kind: str  # of the matrix instructions that reach those rates
    shared_limit: int  # bytes a program
    tensor_memory: int  # columns
    registers: int  # 32-bit ones a processor
    warps: int  # most resident

    @property
    def amd(self) -> bool:
        return self.gpu.backend == "hip"


TARGETS = {
    "sm_80": Target(
        GPUTarget("cuda", 80, 32), "A100", 108, 1.41e9, 128, 16, 128, 2.0e12,
        {"2": 312e12, "tf32": 156e12}, "mma", 163 << 10, 0, 65536, 64,
    ),
    "sm_90": Target(
        GPUTarget("cuda", 90, 32), "H200", 132, 1.755e9, 128, 16, 128, 4.3e12,
        {"2": 790e12, "tf32": 395e12}, "wgmma", 227 << 10, 0, 65536, 64,
    ),
    "sm_100": Target(
        GPUTarget("cuda", 100, 32), "B200", 148, 1.85e9, 128, 16, 128, 8.0e12,
        {"2": 2250e12, "tf32": 1125e12}, "tcgen05", 227 << 10, 512, 65536, 64,
    ),
    "gfx942": Target(
        GPUTarget("hip", "gfx942", 64), "MI300X", 304, 2.1e9, 64, 16, 128, 5.3e12,
        {"2": 1307e12, "ieee": 163e12}, "mfma", 64 << 10, 0, 131072, 32,
    ),
}  # fmt: skip


def resident_warps(target: Target, warps: int, registers: int, shared: int, columns: int) -> int:
    """Warps of a processor that registers, shared and tensor memory leave room for."""
    wave = 64 if target.amd else 32
    granule = 8 * wave
    a_warp = -(-max(registers, 1) * wave // granule) * granule
    by_registers = target.registers // a_warp // 4 * 4
    programs = min(by_registers, target.warps) // warps
    if shared:
        whole = target.shared_limit + (0 if target.amd else 1024)
        programs = min(programs, whole // (shared + (0 if target.amd else 1024)))
    if columns:
        programs = min(programs, target.tensor_memory // columns)
    return programs * warps


def predict(target: Target, tile: Tile, loop: Loop) -> dict[str, float]:
    """Seconds an entry of S that each unit needs; the largest binds."""
    each = target.processors * target.clock
    matrix = 0.0
    for product in (tile.similarity, tile.gradient):
        if product:
            rate = target.matrix[rate_name(target, product.size)]
            matrix += loop.multiply_adds * 2 * product.inner * product.passes / rate
    shared = sum(size * n for size, n in loop.shared.items())
    return {
        "issue": loop.slots / (each * target.lanes),
        "special": loop.special / (each * target.special),
        "matrix": matrix,
        "shared": shared / (each * target.shared_rate),
        "memory": (tile.read + tile.written) / target.memory_rate,
    }


def rate_name(target: Target, size: int) -> str:
    if size == 2:
        return "2"
    return "ieee" if target.amd else "tf32"
