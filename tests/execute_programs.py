"""Small PTX programs for the tests of the interpreter, and how they are run."""

from __future__ import annotations

import torch

from bench.compiled.execute.machine import Execution, execute

REGISTERS = """.reg .pred %p<40>; .reg .b16 %rs<40>; .reg .b32 %r<200>; .reg .f32 %f<200>;
.reg .b64 %rd<40>; .reg .f64 %fd<20>;"""
LIMIT = 227 << 10


def program(body: str, tensors: int, threads: int = 32) -> str:
    """An entry of so many pointers, in %rd0, %rd1, ..; %r0 is the thread."""
    parameters = ",\n".join(
        f"\t.param .u64 .ptr .global .align 1 k_param_{i}" for i in range(tensors)
    )
    loads = "\n".join(f"ld.param.b64 %rd{i}, [k_param_{i}];" for i in range(tensors))
    return f""".version 8.8
.target sm_90a
.address_size 64
.extern .shared .align 16 .b8 global_smem[];
.visible .entry k(
{parameters}
)
.reqntid {threads}
{{
{REGISTERS}
{loads}
mov.u32 %r0, %tid.x;
{body}
ret;
}}
"""


def run(body: str, *tensors: torch.Tensor, warps: int = 1, shared: int = 0, **options) -> Execution:
    arguments = [("*", x) for x in tensors]
    text = program(body, len(tensors), 32 * warps)
    grid = options.pop("grid", (1, 1, 1))
    return execute(text, "k", grid, warps, shared, arguments, LIMIT, **options)


def kinds(execution: Execution) -> set[str]:
    return {violation.kind for violation in execution.violations}


def clean(body: str, *tensors: torch.Tensor, **options) -> None:
    execution = run(body, *tensors, **options)
    assert not execution.violations, [str(x) for x in execution.violations]


def each(count: int, line: str) -> str:
    """The line for i = 0, 1, .."""
    return "\n".join(line.replace("{i}", str(i)) for i in range(count))


def listed(register: str, first: int, count: int) -> str:
    return "{" + ", ".join(f"{register}{i}" for i in range(first, first + count)) + "}"
