"""Every kernel cross-compiled for every target on any machine, and what its machine code needs.

    python -m bench static

One row a kernel, dtype, embedding dimension and target, with the launch tables' own tiles:
registers, bytes of spills, shared memory, and whether that fits the target.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

from rkdo_kernels import direct, launch, moments

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SHARED_LIMIT = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
FLOAT_ARGUMENTS = ("unit", "alpha")


@dataclass(frozen=True)
class Case:
    """A kernel at one specialisation; `constants` without the embedding's and the tile's."""

    name: str
    function: Any
    table: str  # its name in launch.CONFIGS
    constants: dict[str, Any]


def cases() -> list[Case]:
    fwd, bwd = moments._moments_fwd, moments._moments_bwd
    rows = {"EXCLUDE": 1, "UNIT": True}
    sums = {"SCALES": 4, "STUDENT": False, "EXCLUDE": 1}
    student = {"SCALES": 1, "STUDENT": True, "EXCLUDE": 0}
    steps = {"DEPTH": 3, "DETACH": False}
    result = [
        Case("moments_fwd k=0", fwd, "moments_fwd", {"DEGREE": 0, **rows}),
        Case("moments_fwd k=4", fwd, "moments_fwd", {"DEGREE": 4, **rows}),
        Case("softmax_sums", direct._softmax_sums_fwd, "softmax_sums", sums),
        Case("student_sums", direct._softmax_sums_fwd, "softmax_sums", student),
        Case("recursion", direct._recursion_fwd, "recursion", steps),
    ]
    for by_own, side in ((True, "dq"), (False, "dk")):
        own = {"BY_OWN": by_own}
        result += [
            Case(f"moments_bwd k=0 {side}", bwd, "moments_bwd", {"DEGREE": 0, **rows, **own}),
            Case(f"moments_bwd k=4 {side}", bwd, "moments_bwd", {"DEGREE": 4, **rows, **own}),
            Case(
                f"softmax_sums_bwd {side}",
                direct._softmax_sums_bwd,
                "softmax_sums_bwd",
                {**sums, **own},
            ),
            Case(
                f"student_sums_bwd {side}",
                direct._softmax_sums_bwd,
                "softmax_sums_bwd",
                {**student, **own},
            ),
            Case(f"recursion_bwd {side}", direct._recursion_bwd, "recursion_bwd", {**steps, **own}),
        ]
    return result


@dataclass(frozen=True)
class Resources:
    kernel: str
    dtype: str
    dim: int
    target: str
    registers: int
    spill_bytes: int
    shared_bytes: int
    fits: bool
    assembly: str


def compile_case(case: Case, dtype: str, dim: int, target: str, aligned: bool = True) -> Resources:
    """Raises what the compiler raises."""
    like = torch.empty(1, dim, dtype=DTYPES[dtype], device="meta")
    config = launch.launch_config(case.table, like)
    names = case.function.arg_names
    constants = {
        **launch.dims_for(like, nvidia=target != "gfx942"),
        **case.constants,
        "ROWS": config.rows,
        "COLS": config.cols,
    }
    if "GRADIENT_PRECISION" in names:
        nvidia = "tf32" if dtype == "fp16" else "tf32x3"
        constants["GRADIENT_PRECISION"] = "ieee" if target == "gfx942" else nvidia
    signature, attributes = {}, {}
    for index, name in enumerate(names):
        if name in constants:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            operand = name.removesuffix("_ptr") in ("queries", "keys", "own", "other", "gradient")
            signature[name] = f"*{dtype if operand else 'fp32'}"
            attributes[(index,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32" if name in FLOAT_ARGUMENTS else "i32"
            if aligned and (name.endswith("_stride") or name == "dim"):
                attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(
        fn=case.function, signature=signature, constexprs=constants, attrs=attributes
    )
    compiled = triton.compile(source, target=TARGETS[target], options=config.options)
    registers, spills, assembly = inspect(compiled, target)
    shared = compiled.metadata.shared
    return Resources(
        case.name, dtype, dim, target, registers, spills, shared,
        shared <= SHARED_LIMIT[target], assembly,
    )  # fmt: skip


def inspect(compiled: CompiledKernel, target: str) -> tuple[int, int, str]:
    """Registers a thread, bytes of stack (spills) a thread, and the machine code as text."""
    if target == "gfx942":
        text = compiled.asm["amdgcn"]
        numbers = dict(re.findall(r"\.(vgpr_count|private_segment_fixed_size):\s+(\d+)", text))
        return int(numbers["vgpr_count"]), int(numbers["private_segment_fixed_size"]), text
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()

        def dump(what: str) -> str:
            command = [str(tool), what, file.name]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout

        usage = re.search(r"REG:(\d+) STACK:(\d+)", dump("--dump-resource-usage"))
        assert usage is not None
        return int(usage[1]), int(usage[2]), dump("--dump-sass")


def table(targets: tuple[str, ...] = tuple(TARGETS)) -> Iterator[Resources]:
    for target in targets:
        for case in cases():
            for dtype in DTYPES:
                for dim in (64, 512):
                    yield compile_case(case, dtype, dim, target)
