"""Whether every launch fits its device: shared memory, tensor memory, and options that it takes.

    python -m bench fits [--target sm_90] [--kernel PART] [--every N] [--quick]

Public calls are launched as for a target at every width of the launch tables, in every dtype,
aligned and not. A launch is compiled as far as the allocation of shared memory (0.4 s, where the
whole takes ten), and its options are held to those that the target's launcher knows: it refuses
others, which `triton.compile` drops without a word. They are 50,000 programs, five hours of one
processor; with `--every 25` twenty minutes.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn.functional import normalize
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import make_backend

import rkdo_kernels as rk
from rkdo_kernels import ResponseField, launch
from rkdo_kernels.launch_tables import TABLES, tables_for

from .compiled.launches import Launch, launches_for
from .errors import BenchError, Parser, at_least_one

DIMS = (16, 33, 64, 100, 128, 160, 192, 256, 320, 384, 512, 768, 1024, 4096)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SHARED = {  # bytes of shared memory that a device gives a program, as its maker says
    "sm_75": 64 << 10, "sm_80": 163 << 10, "sm_86": 99 << 10, "sm_89": 99 << 10,
    "sm_90": 227 << 10, "sm_100": 227 << 10, "sm_120": 99 << 10,
    "gfx90a": 64 << 10, "gfx942": 64 << 10, "gfx950": 160 << 10, "gfx1100": 64 << 10,
}  # fmt: skip
TENSOR_COLUMNS = 512  # of tensor memory, where there is one
QUICK = (  # target, part of a kernel's name, D, dtype: what devices refused, and each compiler
    ("sm_90", "_moments_bwd", 192, "bf16"),
    ("sm_90", "_moments_bwd", 256, "fp16"),
    ("sm_86", "_both_sums_fwd", 256, "bf16"),
    ("sm_86", "_moments_bwd", 256, "fp16"),
    ("sm_75", "_moments_bwd", 192, "fp16"),
    ("sm_120", "_softmax_sums_fwd", 512, "fp32"),
    ("sm_100", "_moments_fwd", 64, "bf16"),
    ("gfx942", "_both_sums", 64, "bf16"),
    ("gfx942", "_softmax_sums_fwd", 128, "fp16"),
    ("gfx1100", "_both_sums_fwd", 128, "fp32"),
    ("sm_86", "_dense_walk", 128, "fp32"),
    ("sm_90", "_snapshot_walk", 128, "bf16"),
    ("sm_86", "_snapshot_walk", 33, "fp32"),
    ("sm_75", "_snapshot_walk", 64, "fp16"),
)
HISTORIES = 3, 8  # of a snapshot, whose visits a walk holds at once where they fit
DEGREE = 12  # the highest that a loss takes


def table(target: str) -> str:
    return next(x for x in tables_for(target) if TABLES[x].shared <= SHARED[target])


def gpu(target: str) -> GPUTarget:
    if target.startswith("gfx"):
        return GPUTarget("hip", target, 32 if target.startswith("gfx1") else 64)
    return GPUTarget("cuda", int(target.removeprefix("sm_")), 32)


# ---- what is launched ----------------------------------------------------------------------------


def views(n: int, d: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    queries, keys = (normalize(torch.randn(n, d), dim=1).to(dtype) for _ in range(2))
    return queries.requires_grad_(), keys.requires_grad_()


def losses(d: int, dtype: torch.dtype, aligned: bool) -> Iterator[Callable[[], Any]]:
    """Every kernel of a loss: aligned, every size and stride is a multiple of 16."""
    n = 144 if aligned else 149

    def loss(function: Callable[..., Tensor], n: int = n, **settings: Any) -> None:
        function(*views(n, d, dtype), **settings).sum().backward()

    yield partial(loss, rk.rkdo_loss)
    yield partial(loss, rk.rkdo_loss, n=64 if aligned else 61)  # one launch
    yield partial(loss, rk.rkdo_loss, bound=None)
    yield partial(loss, rk.info_nce, reduction="none")
    yield partial(loss, rk.info_nce, n=64 if aligned else 61)
    yield partial(loss, rk.info_nce, symmetric=True)
    yield partial(loss, rk.info_nce, bound=None)
    yield partial(loss, rk.nt_xent)
    yield partial(loss, rk.icon_loss, kernel="student")
    yield partial(loss, rk.similarity_moments, temperature=0.3, degree=DEGREE)


def calls(d: int, dtype: torch.dtype, aligned: bool) -> Iterator[Callable[[], Any]]:
    """Of every kernel."""
    yield from losses(d, dtype, aligned)
    n = 144 if aligned else 149
    index = torch.arange(n).flip(0)
    for stored, where in product((torch.bfloat16, torch.float32), (slice(0, n), index)):
        yield partial(steps, ResponseField.dense(n, dtype=stored), n, d, dtype, where)
    labels = torch.arange(n) % 7
    for kept, history in product((torch.bfloat16, torch.float32), HISTORIES):
        field = ResponseField.snapshot(n, d, history=history, initial=labels, dtype=kept)
        yield partial(steps, field, n, d, dtype, index)


def steps(field: ResponseField, n: int, d: int, dtype: torch.dtype, where: Any) -> None:
    queries, keys = views(n, d, dtype)
    field.step(queries, keys, where).backward()
    field.update(queries, keys, where)
    field.loss(queries, keys, where, reduction="none").sum().backward()


def launched(
    target: str,
    dims: Iterable[int] = DIMS,
    dtypes: Iterable[str] = tuple(DTYPES),
    layouts: Iterable[bool] = (True, False),
) -> dict[str, tuple[str, Launch]]:
    """Every program that the target compiles for them, and where it was met first."""
    found: dict[str, tuple[str, Launch]] = {}
    for d, dtype, aligned in product(dims, dtypes, layouts):
        if target == "sm_75" and dtype == "bf16":  # refused
            continue
        where = f"d={d} {dtype} {'aligned' if aligned else 'not aligned'}"

        def keep(got: Launch, where: str = where) -> None:
            found.setdefault(program(got), (where, got))

        with launches_for(table(target), keep):
            for splits in (1, 2):
                with patch.object(launch, "splits", lambda *_, splits=splits: splits):
                    for call in calls(d, DTYPES[dtype], aligned):
                        call()
    return found


def quick() -> Iterator[Need]:
    """A selection, in a minute: aligned, whose walks are not split."""
    for target, kernel, d, dtype in QUICK:
        found: dict[str, Launch] = {}

        def keep(got: Launch, kernel: str = kernel, found: dict[str, Launch] = found) -> None:
            if kernel in got.name:
                found.setdefault(program(got), got)

        with launches_for(table(target), keep):
            for call in calls(d, DTYPES[dtype], True):
                call()
        for got in found.values():
            yield need(target, f"d={d} {dtype} aligned", got)


def program(got: Launch) -> str:
    """The same for launches that need the same: from three chunks on, a loop runs over them."""
    constants = dict(got.constants)
    constants["CHUNKS"] = min(constants.get("CHUNKS", 1), 3)
    return repr((got.name, got.signature, constants, got.divisible, got.options))


# ---- what it needs -------------------------------------------------------------------------------


class Allocated(Exception):
    """Passes that are left to run are those before the lowering to LLVM."""


def allocation(source: Any, target: GPUTarget, options: dict[str, Any]) -> tuple[int, int]:
    """Bytes of shared memory, and columns of tensor memory, that a program is compiled to need."""
    backend = make_backend(target)
    parsed = backend.parse_options(dict(options))
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    functions, modules = backend.get_codegen_implementation(parsed), backend.get_module_map()
    module = source.make_ir(target, parsed, functions, modules, context)
    stages: dict[str, Any] = {}
    backend.add_stages(stages, parsed, source.language)
    metadata = {"target": target, **parsed.__dict__}
    with patch.object(lowering(target.backend), "add_to_llvmir", allocate):
        for name in ("ttir", "ttgir", "llir"):
            try:
                module = stages[name](module, metadata)
            except Allocated as stopped:
                stopped.args[0].run(module, "allocation")
    shared = module.get_int_attr("ttg.shared")
    if shared is None:
        raise RuntimeError("this Triton allocates shared memory elsewhere: see allocation()")
    return shared, module.get_int_attr("ttg.tensor_memory_size") or 0


def lowering(backend: str) -> Any:
    """Where the pass lives that takes a program to LLVM, after its memory is allocated."""
    if backend == "hip":
        from triton.backends.amd.compiler import amd

        return amd.passes.ttgpuir
    from triton.backends.nvidia.compiler import nvidia

    return nvidia.passes.ttgpuir


def allocate(passes: Any, *_: Any) -> None:
    raise Allocated(passes)


def refused_options(target: str, options: dict[str, Any]) -> set[str]:
    """Those that a launch takes for misspelt arguments: see JITFunction.run."""
    return set(options) - set(vars(make_backend(gpu(target)).parse_options(dict(options))))


@dataclass(frozen=True)
class Need:
    """What a program needs; `wrong` says why the target refuses it, "" if it takes it."""

    target: str
    kernel: str
    where: str
    tile: str
    shared: int
    columns: int
    wrong: str


def need(target: str, where: str, got: Launch) -> Need:
    constants = got.constants
    tile = " ".join(f"{k}={constants[k]}" for k in ("ROWS", "COLS", "WIDTH") if k in constants)
    options = {k: v for k, v in got.options.items() if k.startswith("num_") or k == "maxnreg"}
    tile += "".join(f" {k}={v}" for k, v in options.items())
    shared = columns = 0
    if refused := refused_options(target, got.options):
        wrong = f"a launch refuses {', '.join(sorted(refused))}"
    else:
        try:
            shared, columns = allocation(got.source, gpu(target), got.options)
        except Exception as error:  # of the compiler: it is the answer
            wrong = f"{type(error).__name__}: {root_cause(error)[-160:]}"
        else:
            wrong = excess(target, shared, columns)
    return Need(target, got.name, where, tile, shared, columns, wrong)


def root_cause(error: BaseException) -> str:
    while error.__cause__:
        error = error.__cause__
    return str(error).strip()


def excess(target: str, shared: int, columns: int) -> str:
    if shared > SHARED[target]:
        return f"needs {shared} of {SHARED[target]} bytes of shared memory"
    if columns > TENSOR_COLUMNS:
        return f"needs {columns} of {TENSOR_COLUMNS} columns of tensor memory"
    return ""


# ---- the command ---------------------------------------------------------------------------------


def share(task: tuple[str, str, tuple[int, ...], str, int]) -> list[Need]:
    """A target's programs for one dtype; a process has launches of its own."""
    target, dtype, dims, kernel, every = task
    torch.manual_seed(0)
    found = [x for x in launched(target, dims, (dtype,)).values() if kernel in x[1].name]
    return [need(target, *x) for x in found[::every]]


def main(arguments: list[str]) -> int:
    parser = Parser(prog="python -m bench fits", description=__doc__)
    parser.add_argument("--target", action="append", metavar="NAME", help=", ".join(SHARED))
    parser.add_argument("--kernel", metavar="PART", default="", help="only kernels named so")
    parser.add_argument("--dtype", action="append", metavar="NAME", help="bf16, fp16 or fp32")
    parser.add_argument("--dim", action="append", type=int, metavar="D")
    parser.add_argument("--every", type=at_least_one, default=1, help="of the programs every N-th")
    parser.add_argument("--quick", action="store_true", help="a selection, in a minute")
    parser.add_argument("--processes", type=at_least_one, default=os.cpu_count() or 1)
    parser.add_argument("--out", type=Path, help="JSON lines")
    chosen = parser.parse_args(arguments)
    for target in chosen.target or ():
        if target not in SHARED:
            raise BenchError(f"unknown target {target!r}: {', '.join(SHARED)}")
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise BenchError("TRITON_INTERPRET=1 is set: there is nothing to compile")
    dims, dtypes = tuple(chosen.dim or DIMS), tuple(chosen.dtype or DTYPES)
    tasks = [
        (target, dtype, dims, chosen.kernel, chosen.every)
        for target, dtype in product(chosen.target or SHARED, dtypes)
    ]
    if chosen.quick:
        return verdict(list(quick()), chosen.out)
    every: list[Need] = []
    with multiprocessing.Pool(min(chosen.processes, len(tasks)), maxtasksperchild=1) as pool:
        for found in pool.imap_unordered(share, tasks):
            every += found
            print(f"{len(every)} programs", file=sys.stderr)
    return verdict(every, chosen.out)


def verdict(every: list[Need], out: Path | None) -> int:
    for x in every:
        if x.wrong:
            print(x.target, x.kernel, x.where, x.tile, x.wrong, sep="  ")
    if out:
        out.write_text("".join(json.dumps(asdict(x)) + "\n" for x in every), encoding="utf-8")
    wrong = sum(bool(x.wrong) for x in every)
    print(f"{len(every)} programs, {wrong} refused")
    return 1 if wrong else 0
