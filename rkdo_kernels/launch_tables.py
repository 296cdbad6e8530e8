"""The launch tables: tiles of every kernel, by what a device is and what it has.

Which lines hold for a device: those of its own table, those of the tables that it names, then
CONFIGS. `python -m bench fits` proves that every line fits every device that gets it, at any width.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

WIDTHS = {4: 64, 2: 128}  # columns of an operand held at once, by bytes an element


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
    # no matrix instruction, on no architecture
    ("student_sums", 2, False): Config(64, 32, 8, 1),
    ("student_sums", 2, True): Config(64, 32, 8, 1),
    ("student_sums", 4, False): Config(64, 32, 8, 1),
    ("student_sums", 4, True): Config(64, 32, 8, 1),
    ("student_sums_dq", 2, False): Config(64, 32, 4, 1),
    ("student_sums_dq", 2, True): Config(64, 16, 4, 1, width=64),
    ("student_sums_dq", 4, False): Config(64, 32, 4, 1),
    ("student_sums_dq", 4, True): Config(64, 16, 4, 1, width=64),
    ("student_sums_dk", 2, False): Config(32, 64, 4, 1),
    ("student_sums_dk", 2, True): Config(16, 64, 4, 1, width=64),
    ("student_sums_dk", 4, False): Config(32, 64, 4, 1),
    ("student_sums_dk", 4, True): Config(16, 64, 4, 1, width=64),
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
    ("gfx942", "both_sums", 2, True): Config(64, 128, 8, 1),
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
    ("sm_80", "softmax_sums_dk", 4, False): Config(32, 16, 4, 1),
    ("sm_80", "softmax_sums_dk", 4, True): Config(16, 64, 4, 1, width=32),
    ("sm_80", "recursion", 2, False): Config(64, 16, 4, 2),
    ("sm_80", "recursion_dq", 2, True): Config(64, 16, 4, 2),
    ("sm_80", "recursion_dq", 4, False): Config(64, 16, 4, 2),
    ("sm_80", "recursion_dq", 4, True): Config(64, 16, 4, 1, width=32),
    ("sm_80", "recursion_dk", 2, True): Config(32, 32, 4, 1),
    ("sm_80", "recursion_dk", 4, False): Config(32, 16, 4, 1),
    ("sm_100", "softmax_sums", 2, True): Config(64, 64, 8, 2),
    ("sm_100", "softmax_sums", 4, False): Config(64, 32, 4, 1, width=32),
    ("sm_100", "softmax_sums", 4, True): Config(64, 32, 4, 1, width=32),
    ("sm_100", "softmax_sums_dk", 2, False): Config(32, 64, 4, 2),
    ("sm_100", "softmax_sums_dk", 4, False): Config(16, 64, 4, 1, width=32),
    ("sm_100", "softmax_sums_dq", 4, True): Config(64, 16, 4, 1, width=32),
    ("sm_100", "softmax_sums_dk", 4, True): Config(16, 64, 4, 1, width=32),
    ("sm_100", "recursion", 4, False): Config(64, 16, 4, 1),
    ("sm_100", "recursion", 4, True): Config(64, 16, 4, 1, width=32),
    ("sm_100", "recursion_dq", 2, True): Config(64, 16, 4, 1, width=64),
    ("sm_100", "recursion_dq", 4, False): Config(64, 16, 4, 2),
    ("sm_100", "recursion_dq", 4, True): Config(64, 16, 4, 1, width=32),
    ("sm_100", "recursion_dk", 4, False): Config(16, 64, 4, 1, width=32),
    ("gfx942", "softmax_sums_dq", 2, True): Config(64, 32, 8, 2),
    ("gfx942", "softmax_sums_dq", 4, False): Config(64, 32, 4, 1),
    ("gfx942", "softmax_sums_dk", 2, True): Config(32, 64, 4, 1),
    ("gfx942", "recursion_dq", 2, True): Config(64, 16, 4, 2),
    ("gfx942", "recursion_dq", 4, False): Config(64, 32, 4, 1),
    ("gfx942", "recursion_dk", 2, True): Config(16, 64, 2, 2, width=64),
    ("gfx942", "recursion_dk", 4, True): Config(16, 64, 4, 1),
    ("sm_80", "field_walk", 2, False): Config(128, 32, 8, 2),
    ("sm_80", "field_walk", 4, False): Config(64, 16, 4, 1),
    ("sm_80", "field_keys", 4, False): Config(32, 32, 4, 1),
    ("sm_90", "field_walk", 2, False): Config(128, 32, 8, 3, width=64),
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
    # 99 KB of shared memory
    ("sm_86", "both_sums", 2, True): Config(64, 64, 4, 2),
    ("sm_86", "field_walk", 2, True): Config(64, 32, 4, 2),
    ("sm_86", "field_walk", 4, True): Config(64, 16, 4, 1),
    ("sm_86", "field_walk_gathered", 4, True): Config(64, 16, 4, 1),
    # 64 KB of it
    ("gfx942", "logsumexp", 2, False): Config(128, 64, 8, 2),
    ("gfx942", "softmax_sums", 2, False): Config(128, 64, 8, 2),
    ("gfx942", "softmax_sums", 2, True): Config(64, 64, 4, 1),
}
# Where an embedding has two chunks: a loop of one turn is none to the compiler, which then holds
# the second chunk in shared memory for every stage of the loop around it.
TWO_CHUNKS = {
    ("sm_90", "moments_dk", 2): Config(128, 64, 8, 1),
    ("sm_86", "moments_dk", 2): Config(64, 64, 8, 1),
}
# Where these releases of Triton spill what later ones keep in registers.
BEFORE_39 = {
    ("sm_90", "moments_dk", 4, False): Config(32, 64, 4, 1),
    ("sm_90", "softmax_sums_dk", 4, False): Config(16, 64, 4, 1),
    ("sm_80", "single_launch", 4, True): Config(64, 32, 8, 1, width=32),
    ("sm_100", "single_launch", 2, False): Config(64, 32, 4, 1),
}
BEFORE_37 = {
    ("sm_100", "single_launch", 4, False): Config(64, 32, 8, 1, width=32),
}


@dataclass(frozen=True)
class Table:
    shared: int  # bytes of shared memory that a device gives a program, at least
    first: tuple[str, ...]  # whose lines come before CONFIGS', the nearest first
    registers: bool = True  # whether a launch may limit them
    tf32: bool = True  # whether the matrix units have it
    most: Config | None = None  # of rows, columns, warps and stages
    widths: dict[int, int] = field(default_factory=lambda: WIDTHS)


SMALL = Config(64, 64, 4, 1)
HALF_WIDTHS = {size: width // 2 for size, width in WIDTHS.items()}
TABLES = {
    "sm_75": Table(
        64 << 10, ("sm_75", "sm_86", "sm_80"), tf32=False, most=SMALL, widths=HALF_WIDTHS
    ),
    "sm_80": Table(163 << 10, ("sm_80",)),
    "sm_86": Table(99 << 10, ("sm_86", "sm_80")),
    "sm_90": Table(227 << 10, ("sm_90",)),
    "sm_100": Table(227 << 10, ("sm_100",)),
    "gfx942": Table(64 << 10, ("gfx942",), registers=False, tf32=False),
    "gfx1100": Table(
        64 << 10, ("gfx1100", "gfx942"), registers=False, tf32=False, most=SMALL,
        widths=HALF_WIDTHS,
    ),
    "interpreted": Table(0, (), registers=False, tf32=False),
}  # fmt: skip


def tables_for(architecture: str) -> tuple[str, ...]:
    """The tables of devices of an architecture, that for the most shared memory first."""
    if architecture.startswith("gfx"):
        return ("gfx1100",) if architecture.startswith(("gfx11", "gfx12")) else ("gfx942",)
    version = int(architecture.removeprefix("sm_"))
    if version < 75:
        return ()
    if version < 80:
        return ("sm_75",)
    if version < 90 or version >= 120:  # without the asynchronous products of those between
        return ("sm_80", "sm_86")
    return ("sm_90",) if version < 100 else ("sm_100",)


@cache
def line(table: str, kernel: str, size: int, dim: int) -> Config:
    """For elements of `size` bytes and an embedding of `dim`."""
    found = TABLES[table]
    width = found.widths[size]
    wide = dim > width
    config = CONFIGS[kernel, size, wide]
    for name in reversed(found.first):
        config = ARCH_CONFIGS.get((name, kernel, size, wide), config)
        if width < dim <= 2 * width:
            config = TWO_CHUNKS.get((name, kernel, size), config)
        for release, lines in (((3, 9), BEFORE_39), ((3, 7), BEFORE_37)):
            if triton_before(*release):
                config = lines.get((name, kernel, size, wide), config)
    if found.most:
        config = within(config, found.most)
    return config if found.registers else replace(config, registers=None)


def within(config: Config, most: Config) -> Config:
    return replace(
        config,
        rows=min(config.rows, most.rows),
        cols=min(config.cols, most.cols),
        warps=min(config.warps, most.warps),
        stages=min(config.stages, most.stages),
    )


@cache
def triton_before(*release: int) -> bool:
    from triton import __version__

    return tuple(map(int, __version__.split(".")[:2])) < release
