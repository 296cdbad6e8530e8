"""The launches of public calls as a target gets them, on a machine that has no such device.

    with launches_for("sm_90", received.append):
        rkdo_loss(queries, keys).backward()         # CPU tensors; every launch goes to `received`

Nothing runs but what `receive` does with a launch: without it results are uninitialised memory.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from triton.compiler import ASTSource

from rkdo_kernels import field_ops, launch, ops, small

KINDS = {
    torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64",
    torch.int64: "i64", torch.int32: "i32",
}  # fmt: skip
ALIGNED = [["tt.divisibility", 16]]


@dataclass(frozen=True)
class Launch:
    """A kernel, and what it is launched with as Triton specialises it."""

    kernel: Any  # the jitted function
    grid: tuple[int, int, int]
    signature: dict[str, str]  # Triton's type of every argument
    constants: dict[str, Any]
    divisible: dict[tuple[int], list[list[Any]]]  # by the argument's place
    options: dict[str, Any]
    arguments: tuple[tuple[str, Any], ...]  # (type, value) of those that are no constants

    @property
    def name(self) -> str:
        return self.kernel.fn.__name__

    @property
    def compiled_from(self) -> str:
        """Launches of which this is the same are launches of one program."""
        return repr((self.name, self.signature, self.constants, self.divisible, self.options))

    @property
    def source(self) -> ASTSource:
        return ASTSource(
            fn=self.kernel,
            signature=self.signature,
            constexprs=self.constants,
            attrs=self.divisible,
        )


class Catcher:
    """Stands for a kernel."""

    def __init__(self, kernel: Any, receive: Callable[[Launch], None]) -> None:
        self.kernel, self.receive = kernel, receive

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return partial(self.launch, grid)

    def launch(self, grid: tuple[int, ...], *arguments: Any, **given: Any) -> None:
        names = self.kernel.arg_names
        options = {name: given.pop(name) for name in [*given] if name not in names}
        values = dict(zip(names, arguments, strict=False)) | given
        if set(values) != set(names):
            raise TypeError(f"{self.kernel}: arguments differ in {set(values) ^ set(names)}")
        signature: dict[str, str] = {}
        constants: dict[str, Any] = {}
        divisible: dict[tuple[int], list[list[Any]]] = {}
        for at, name in enumerate(names):
            value = values[name]
            signature[name] = kind_of(name, value)
            if signature[name] == "constexpr":
                constants[name] = value
                continue
            number = value.data_ptr() if isinstance(value, Tensor) else value
            if isinstance(number, int) and number % 16 == 0:
                divisible[(at,)] = ALIGNED
        kept = tuple((signature[x], values[x]) for x in names if x not in constants)
        x, y, z = (*grid, 1, 1)[:3]
        self.receive(Launch(self.kernel, (x, y, z), signature, constants, divisible, options, kept))


def kind_of(name: str, value: Any) -> str:
    if isinstance(value, Tensor):
        return f"*{KINDS[value.dtype]}"
    if name.isupper() or (type(value) is int and value == 1):
        return "constexpr"
    if isinstance(value, float):
        return "fp32"
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def jitted() -> dict[int, tuple[Any, list[tuple[Any, str]]]]:
    """Every kernel that is launched, by its id, and the modules and names that hold it."""
    for operators in (ops, field_ops):
        operators.implementation("triton")  # imports its kernels
    found: dict[int, tuple[Any, list[tuple[Any, str]]]] = {}
    for module in [x for name, x in sys.modules.items() if name.startswith("rkdo_kernels.")]:
        for name, kernel in vars(module).items():
            if name.startswith("_") and hasattr(kernel, "arg_names"):
                found.setdefault(id(kernel), (kernel, []))[1].append((module, name))
    return found


def kernel_names() -> set[str]:
    return {kernel.fn.__name__ for kernel, _ in jitted().values()}


@contextmanager
def launches_for(target: str, receive: Callable[[Launch], None]) -> Iterator[None]:
    """Within, calls on CPU tensors launch kernels as on the target, and `receive` gets each."""

    def backend_for(name: str, x: Tensor) -> str:
        return "triton" if name == "auto" and x.dtype != torch.float64 else name

    with ExitStack() as patches:

        def put(holder: Any, name: str, value: Any) -> None:
            patches.enter_context(patch.object(holder, name, value))

        put(launch, "target", lambda x: target)
        put(launch, "backend_for", backend_for)
        put(small, "MAX_ENTRIES", 0)
        for kernel, places in jitted().values():
            catcher = Catcher(kernel, receive)
            for module, name in places:
                put(module, name, catcher)
        yield
