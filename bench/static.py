"""Every kernel cross-compiled for every target on any machine, and what its machine code needs.

    python -m bench static

One row a kernel, dtype, launch-table entry and target: registers, spills, shared and tensor memory,
resident warps; then, per entry of S in the hot loop (see sass.py), issue slots, special functions,
matrix instructions and memory accesses; and the time that follows on the target's device.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch
import triton
from triton.compiler import ASTSource, CompiledKernel

from rkdo_kernels import (
    field_gradient,
    field_walk,
    gradient_stripes,
    launch,
    moments,
    moments_gradient,
    recursion,
    single_launch,
    softmax_sums,
    symmetric,
)

from . import cubin, sass
from .targets import TARGETS, predict, resident_warps

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
OPERANDS = ("queries", "keys", "stripe")
FLOATS = ("unit", "alpha", "scale", "longest")
INTEGERS = {"rows": "i64", "cols": "i64", "own": "i64", "clock": "i64", "noise": "i32"}
AWKWARD = ("sm_90", "gfx942")  # a target of each compiler backend for the odd specialisations
VARIANTS = ("aligned", "unaligned", "ones")  # of the integer arguments; see `specialise`


@dataclass(frozen=True)
class Case:
    """A kernel at one specialisation; `constants` without the embedding's and the tile's."""

    name: str
    function: Any
    table: str  # its name in launch.CONFIGS
    constants: dict[str, Any]
    doubles: tuple[str, ...] = ()  # float64 tables, as the launchers pass them
    field: str = ""  # what the response field is stored in
    loop: str = "rows"  # of the hot loop: rows, or "chunks" of the embedding; "" if there is none
    dtypes: tuple[str, ...] = tuple(DTYPES)
    dims: tuple[int, ...] = (64, 512)


def cases() -> list[Case]:
    fwd, bwd = moments._moments_fwd, moments_gradient._moments_bwd
    rows = {"EXCLUDE": 1, "UNIT": True}
    paired = {**rows, "POSITIVE": True, "SPLIT": False}
    sums = {"SCALES": 4, "STUDENT": False, "EXCLUDE": 1}
    student = {"SCALES": 1, "STUDENT": True, "EXCLUDE": 0}
    steps = {"DEPTH": 3, "DETACH": False}
    one, many = ("scale",), ("scales",)
    out = ("table", "loss", "weights", "at_positive", "pasts")
    info_nce = {"DEGREE": 0, "DETACH": False}
    rkdo = {"DEGREE": 4, "DETACH": False}
    whole = {**rows, "SPLIT": False, "LOSS": True}
    both = {"EXCLUDE": 1, "SPLIT": False, "AGAIN": True}
    both_bwd = {"EXCLUDE": 1, "POSITIVE": True, "BY_KEY": True, "SPLIT": False}
    softmax, softmax_bwd = softmax_sums._softmax_sums_fwd, softmax_sums._softmax_sums_bwd
    result = [
        Case("moments_fwd k=0", fwd, "logsumexp", {**whole, **info_nce}, one + out),
        Case("moments_fwd k=4", fwd, "moments_fwd", {**whole, **rkdo}, one + out),
        Case("both_sums", symmetric._both_sums_fwd, "both_sums", both),
        Case("both_sums_bwd", symmetric._both_sums_bwd, "both_sums_bwd", both_bwd),
        *(
            Case(
                f"single_launch k={degree['DEGREE']}",
                single_launch._single_launch,
                "single_launch",
                {"EXCLUDE": 1, "MOST": launch.SINGLE, **degree},
                ("table", "loss", "room"),
                loop="",
                dims=(64, 512, 16),
            )
            for degree in (info_nce, rkdo)
        ),
        *(
            Case(
                f"gradient_stripe k={degree}",
                gradient_stripes._gradient_stripe,
                "gradient_stripe",
                {"DEGREE": degree, **rows},
                one,
                loop="chunks",
                dtypes=("bf16",),
                dims=(512,),
            )
            for degree in (0, 4)
        ),
        Case("softmax_sums", softmax, "softmax_sums", sums, many),
        Case("student_sums", softmax, "student_sums", student, many, loop=""),
        Case("recursion", recursion._recursion_fwd, "recursion", steps),
    ]
    for by_own, side in ((True, "dq"), (False, "dk")):
        own, ours = {"QUERIES": by_own}, f"moments_{side}"
        result += [
            Case(
                name,
                function,
                table,
                {**constants, **own},
                doubles,
                loop="" if table.startswith("student") else Case.loop,  # has no product
            )
            for name, function, table, constants, doubles in (
                (f"moments_bwd k=0 {side}", bwd, ours, {"DEGREE": 0, **paired}, one),
                (f"moments_bwd k=4 {side}", bwd, ours, {"DEGREE": 4, **paired}, one),
                (f"softmax_sums_bwd {side}", softmax_bwd, f"softmax_sums_{side}", sums, many),
                (f"student_sums_bwd {side}", softmax_bwd, f"student_sums_{side}", student, many),
                (f"recursion_bwd {side}", recursion._recursion_bwd, f"recursion_{side}", steps, ()),
            )
        ]
    return result


def field_cases() -> list[Case]:
    """`step` is loss, gradient to the queries and update; `dq` and `dk` are one gradient alone."""
    walk, keys = field_walk._dense_walk, field_gradient._dense_keys
    doubles = ("row_sum", "mass", "loss")
    result = []
    for stored, gathered in product(("bf16", "fp32"), (False, True)):
        index = dict.fromkeys(("BY_ROW", "BY_COL", "BY_OWN"), gathered)
        kind, table = (f"gathered {stored}", "_gathered") if gathered else (stored, "")
        for name, dtypes, dims, does in (
            ("step", tuple(DTYPES), (64,), {"LOSS", "UPDATE", "GRADIENT"}),
            ("update", ("bf16", "fp32"), (64, 512), {"LOSS", "UPDATE"}),
            ("dq", ("bf16", "fp32"), (64, 512), {"GRADIENT"}),
        ):
            constants = {what: what in does for what in ("LOSS", "UPDATE", "GRADIENT")}
            constants |= {"NOISE": stored == "bf16" and "UPDATE" in does, **index}
            result.append(
                Case(
                    f"field_{name} {kind}",
                    walk,
                    f"field_walk{table}",
                    constants,
                    doubles,
                    field=stored,
                    dtypes=dtypes,
                    dims=dims,
                )
            )
        result.append(
            Case(
                f"field_dk {kind}",
                keys,
                f"field_keys{table}",
                {"QUERIES": False, **index},
                field=stored,
                dtypes=("bf16", "fp32"),
                dims=(64, 512),
            )
        )
    return result


@dataclass(frozen=True)
class Resources:
    """Of one compiled kernel. `loop` is None where no loop holds a matrix instruction."""

    kernel: str
    dtype: str
    dim: int
    target: str
    registers: int  # a thread
    spill_bytes: int  # a thread, the stack it uses
    shared_bytes: int  # a program
    fits: bool
    assembly: str
    variant: str = "aligned"
    config: launch.Config | None = None
    tensor_columns: int = 0
    warps: int = 0  # resident on a processor
    loop: sass.Loop | None = None
    tile: sass.Tile | None = None
    seconds: dict[str, float] | None = None  # an entry of S, by unit
    atomics: tuple[str, ...] = ()
    traps: tuple[str, ...] = ()
    stripes: int = 1  # times that the loop runs for an entry: stripes of the gradient, or chunks


def compile_case(*arguments: Any, **settings: Any) -> Resources:
    return examine([build(*arguments, **settings)])[0]


@dataclass(frozen=True)
class Built:
    """A compiled kernel that nobody has looked at yet."""

    compiled: CompiledKernel
    tile: sass.Tile
    loop: bool  # whether it should have one
    target: str
    fields: dict[str, Any]  # of Resources


def build(
    case: Case,
    dtype: str,
    dim: int,
    target: str,
    aligned: bool = True,
    variant: str | None = None,
    config: launch.Config | None = None,
) -> Built:
    """Raises what the compiler raises."""
    variant = variant or ("aligned" if aligned else "unaligned")
    like = torch.empty(1, 1 if variant == "ones" else dim, dtype=DTYPES[dtype], device="meta")
    config = config or launch.launch_config(case.table, like, target)
    names = case.function.arg_names
    amd = TARGETS[target].amd
    dims = launch.dims_for(like, not amd, config.width)
    constants = {"SPLIT": False, **dims, **case.constants}
    constants |= {"ROWS": config.rows, "COLS": config.cols}
    if "STEPS" in names:
        constants["STEPS"] = config.steps
    if "DENSE" in names:
        constants["DENSE"] = variant == "aligned" and constants["WIDTH"] == dim
        gradient_needs = (constants.get(x, 0) for x in ("WIDTH", "DEGREE", "DENSE"))
        config = launch.limited(config, DTYPES[dtype], *gradient_needs)
    gradient = "GRADIENT_PRECISION" in names and constants.get("GRADIENT", True)
    if gradient:
        nvidia = "tf32" if dtype == "fp16" else "tf32x3"
        constants["GRADIENT_PRECISION"] = "ieee" if amd else nvidia
    elif "GRADIENT_PRECISION" in names:
        constants["GRADIENT_PRECISION"] = "ieee"
    if "LEVEL" in names:
        constants["LEVEL"] = dtype != "fp32"
    source = specialise(case, dtype, constants, variant)
    compiled = triton.compile(source, target=TARGETS[target].gpu, options=config.options)
    tile = tile_of(constants, dtype, config, amd, gradient)
    if case.field:
        size = DTYPES[case.field].itemsize
        tile = replace(tile, read=size, written=size if constants.get("UPDATE") else 0)
    again = constants["CHUNKS"] if gradient or case.loop == "chunks" else 1
    if case.loop == "chunks":
        one = sass.Product(constants["WIDTH"], 1, tile.similarity.size)
        tile = replace(tile, similarity=one, chunks=1, both=True)
    fields = {
        "kernel": case.name, "dtype": dtype, "dim": like.shape[1], "variant": variant,
        "config": config, "stripes": again,
    }  # fmt: skip
    return Built(compiled, tile, bool(case.loop), target, fields)


def specialise(case: Case, dtype: str, constants: dict[str, Any], variant: str) -> ASTSource:
    """As Triton specialises a call at run time.

    aligned    every integer a multiple of 16: N, M, D and the strides; offsets are 0
    unaligned  no integer is
    ones       every integer is 1, which makes it a constant
    """
    signature: dict[str, str] = {}
    attributes: dict[tuple[int], list[list[Any]]] = {}
    constants = {k: v for k, v in constants.items() if k in case.function.arg_names}
    for index, name in enumerate(case.function.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            base = name.removesuffix("_ptr")
            kind = "fp64" if base in case.doubles else dtype if base in OPERANDS else "fp32"
            if base == "levels":
                kind = "bf16" if constants["LEVEL"] else dtype  # any tensor where there are none
            if case.field:
                kind = {"matrix": case.field, **INTEGERS}.get(base, kind)
            signature[name] = f"*{kind}"
            attributes[(index,)] = [["tt.divisibility", 16]]
        elif name in FLOATS:
            signature[name] = "fp32"
        elif variant == "ones":
            signature[name] = "constexpr"
            constants[name] = 1
        else:
            signature[name] = "i32"
            if variant == "aligned":
                attributes[(index,)] = [["tt.divisibility", 16]]
    return ASTSource(fn=case.function, signature=signature, constexprs=constants, attrs=attributes)


def tile_of(
    constants: dict[str, Any], dtype: str, config: launch.Config, amd: bool, gradient: bool
) -> sass.Tile:
    size = DTYPES[dtype].itemsize
    wide = size == 4 or (dtype == "fp16" and gradient)  # see primitives.into
    passes = {"tf32x3": 3 if size == 4 else 1}
    width, chunks = constants["WIDTH"], constants["CHUNKS"]
    keeps_queries = constants.get("QUERIES", True)
    return sass.Tile(
        own=config.rows if keeps_queries else config.cols,
        other=(config.cols if keeps_queries else config.rows) * constants.get("STEPS", 1),
        threads=config.warps * (64 if amd else 32),
        wave=64 if amd else 32,
        similarity=sass.Product(width * chunks, passes.get(constants["PRECISION"], 1), size),
        gradient=sass.Product(
            width, passes.get(constants["GRADIENT_PRECISION"], 1), 4 if wide else 2
        )
        if gradient
        else None,
        chunks=chunks,
        steps=constants.get("STEPS", 1),
    )


def examine(built: Sequence[Built]) -> list[Resources]:
    """Of kernels for one target."""
    codes = machine_code([x.compiled for x in built], built[0].target)
    return [judge(x, *code) for x, code in zip(built, codes, strict=True)]


def judge(built: Built, registers: int, spills: int, assembly: str) -> Resources:
    compiled, tile, device = built.compiled, built.tile, TARGETS[built.target]
    program = sass.parse_amdgcn(assembly) if device.amd else sass.parse_sass(assembly)
    loop = sass.hot_loop(program, tile) if built.loop else None
    atomics, traps = sass.forbidden(program)
    shared = compiled.metadata.shared
    columns = int(getattr(compiled.metadata, "tmem_size", 0) or 0)
    return Resources(
        target=built.target,
        registers=registers,
        spill_bytes=spills,
        shared_bytes=shared,
        fits=shared <= device.shared_limit and columns <= device.tensor_memory,
        assembly=assembly,
        tensor_columns=columns,
        warps=resident_warps(device, tile.threads // tile.wave, registers, shared, columns),
        loop=loop,
        tile=tile if built.loop else None,
        seconds=predict(device, tile, loop) if loop else None,
        atomics=tuple(atomics),
        traps=tuple(traps),
        **built.fields,
    )


def machine_code(kernels: Sequence[CompiledKernel], target: str) -> list[tuple[int, int, str]]:
    """Registers a thread, bytes of stack (spills) a thread, and the machine code as text."""
    if not TARGETS[target].amd:
        cubins = [kernel.asm["cubin"] for kernel in kernels]
        texts = cubin.disassemble(cubins, TARGETS[target].gpu.arch)
        return [(*cubin.resources(x), text) for x, text in zip(cubins, texts, strict=True)]
    found = []
    for kernel in kernels:
        text = kernel.asm["amdgcn"]
        numbers = dict(re.findall(r"\.(vgpr_count|private_segment_fixed_size):\s+(\d+)", text))
        vectors, stack = int(numbers["vgpr_count"]), int(numbers["private_segment_fixed_size"])
        found.append((vectors, stack, text))
    return found


@dataclass(frozen=True)
class Entry:
    """What to compile: a line of the table."""

    case: str
    dtype: str
    dim: int
    target: str
    variant: str = "aligned"

    def build(self) -> Built:
        case = next(case for case in cases() + field_cases() if case.name == self.case)
        return build(case, self.dtype, self.dim, self.target, variant=self.variant)


def entries(targets: tuple[str, ...] = tuple(TARGETS)) -> Iterator[Entry]:
    """Every kernel × launch-table entry × dtype × target, then the awkward specialisations."""
    for target in targets:
        for case in cases() + field_cases():
            for dtype in case.dtypes:
                for dim in case.dims:
                    yield Entry(case.name, dtype, dim, target)
            for variant in VARIANTS[1:] if target in AWKWARD else ():
                if variant != "ones" or 64 in case.dims:
                    yield Entry(case.name, "bf16", case.dims[0], target, variant)
