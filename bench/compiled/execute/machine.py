"""Executes a launch of compiled PTX on CPU tensors, and says what it did that a GPU forbids.

The interpreter is C, made by this machine's compiler once a version, processor and compiler, and
kept in a cache folder. Several processes may use it at the same time.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import struct
import subprocess
import tempfile
import threading
import time
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from ...errors import BenchError
from .generate import operations
from .program import Program, assemble

HERE = Path(__file__).parent
C_FILES = ("values.h", "warp.h", "memory.h", "matrix.h", "launch.c")
# fma must be one rounding, a product and a sum two: nothing is contracted.
FLAGS = ("-std=gnu11", "-O2", "-ftree-vectorize", "-march=native", "-ffp-contract=off", "-fPIC",
         "-fno-strict-aliasing", "-shared")  # fmt: skip
LIMIT = 64  # violations kept, warp.h
MOST = 200_000_000  # instructions of warps a program: about a second
COPY_UNSEEN = (
    "shared memory that cp.async has filled, and wgmma reads with no fence.proxy.async between"
)
KINDS = (  # warp.h: enum Kind
    "global read outside the tensors",
    "global write outside the tensors",
    "shared memory: outside of what the program has",
    "misaligned address",
    "race: written while others read",
    "race: written twice",
    "race: read while another writes",
    "race between programs",
    "shared memory that an unfinished cp.async writes",
    "shared memory stored, and read by wgmma, with no fence.proxy.async between",
    COPY_UNSEEN,
    "shared memory overwritten while wgmma reads it",
    "register of a wgmma under way",
    "register used after the last wgmma.fence before wgmma",
    "address that depends on what was never written",
    "condition that depends on what was never written",
    "stored value that depends on what was never written",
    "operand that depends on what was never written",
    "lane that is absent",
    "not executed by all lanes of the warp",
    "barrier that not all threads reach alike",
    "no end",
    "trap",
)
SHARED_LIMIT = "more shared memory than the device has"
UNEVEN = "sum over lanes that round it differently"
_lock = threading.Lock()


@dataclass(frozen=True)
class Violation:
    kind: str
    kernel: str
    line: int  # of the PTX
    detail: int  # an address, lanes or a number, as the kind has it

    def __str__(self) -> str:
        return f"{self.kernel}, line {self.line} of the PTX: {self.kind} ({self.detail:#x})"


@dataclass
class Execution:
    kernel: str
    grid: tuple[int, int, int]
    threads: int
    instructions: int  # of warps
    seconds: float
    violations: list[Violation] = field(default_factory=list)
    reached: frozenset[int] = frozenset()  # lines of the PTX that were executed
    masked: frozenset[int] = frozenset()  # and of those, some lanes did not take part


class _Range(ctypes.Structure):
    _fields_ = (
        ("low", ctypes.c_uint64),
        ("high", ctypes.c_uint64),
        ("pitch", ctypes.c_int64),
        ("length", ctypes.c_int64),
        ("item", ctypes.c_int64),
        ("written", ctypes.c_void_p),
        ("read", ctypes.c_void_p),
    )


def execute(
    ptx: str,
    kernel: str,
    grid: tuple[int, int, int],
    warps: int,
    shared: int,  # bytes
    arguments: list[tuple[str, Any]],  # (Triton's type, value), without constants
    shared_limit: int,  # bytes a program of the device
    most: int = MOST,
) -> Execution:
    """Runs the launch; its tensors, on the CPU, are changed in place.

    Raises:
        BenchError: no C compiler, an operation that the interpreter lacks, arguments that are not
            the kernel's.
    """
    program = _assembled(ptx, kernel)
    if shared > shared_limit:
        return Execution(
            kernel, grid, 32 * warps, 0, 0.0, [Violation(SHARED_LIMIT, kernel, 0, shared)]
        )
    values, tensors = _values(kernel, program, arguments)
    initial = [(slot, size, bits) for slot, size, bits in program.constants]
    initial += [
        (slot, size, _extended(values[number], kind, size))
        for slot, size, number, kind in program.parameters
    ]
    flat = [x - (1 << 64) if x >= 1 << 63 else x for row in initial for x in row]
    bounds = _ranges(tensors)
    ranges = (_Range * max(len(bounds), 1))(*(_Range(*bound) for bound in bounds))
    found, executed = (ctypes.c_int64 * (3 * LIMIT))(), ctypes.c_int64()
    run = _library().run_launch
    flags = (ctypes.c_uint8 * program.count)()
    start = time.perf_counter()
    with _lock:
        count = run(
            bytes(program.code), ctypes.c_int64(program.count), program.operands.tobytes(),
            program.slots, program.grain, int(program.products),
            (ctypes.c_int64 * max(len(flat), 1))(*flat),
            len(initial), (ctypes.c_int32 * 3)(*grid), 32 * warps, shared, ranges, len(bounds),
            ctypes.c_int64(most), found, ctypes.byref(executed), flags,
        )  # fmt: skip
    seconds = time.perf_counter() - start
    violations = [Violation(UNEVEN, kernel, line, 0) for line in program.uneven]
    violations += [
        Violation(KINDS[found[3 * k]], kernel, found[3 * k + 1], found[3 * k + 2])
        for k in range(count)
    ]
    reached, masked = (
        frozenset(line for line, flag in zip(program.lines, flags, strict=True) if flag & bit)
        for bit in (1, 2)
    )
    return Execution(kernel, grid, 32 * warps, executed.value, seconds, violations, reached, masked)


@lru_cache(maxsize=256)
def _assembled(ptx: str, kernel: str) -> Program:
    return assemble(ptx, kernel)


def _values(
    kernel: str, program: Program, arguments: list[tuple[str, Any]]
) -> tuple[list[int], list[torch.Tensor]]:
    """Arguments as bits. Triton adds up to two pointers to scratch memory, which are null here."""
    missing = program.parameter_count - len(arguments)
    if not 0 <= missing <= 2:
        raise BenchError(
            f"{kernel} has {program.parameter_count} parameters, and {len(arguments)} arguments"
        )
    values, tensors = [], []
    for kind, value in arguments:
        if isinstance(value, torch.Tensor):
            if value.device.type != "cpu":
                raise BenchError(f"{kernel}: a tensor on {value.device}, not on the CPU")
            values.append(value.data_ptr())
            tensors.append(value)
        elif kind == "fp32":
            values.append(struct.unpack("<I", struct.pack("<f", value))[0])
        elif kind == "fp64":
            values.append(struct.unpack("<Q", struct.pack("<d", value))[0])
        elif kind in ("i1", "u1", "i8", "u8", "i16", "u16", "i32", "u32", "i64", "u64"):
            values.append(int(value) & ((1 << max(int(kind[1:]), 8)) - 1))
        else:
            raise BenchError(f"{kernel}: an argument of type {kind}: {value!r}")
    return values + [0] * missing, [x for x in tensors if x.numel()]


def _extended(bits: int, kind: str, size: int) -> int:
    """A parameter in its register: signed ones keep their sign."""
    own = int(kind[1:])
    bits &= (1 << own) - 1
    if kind[0] == "s" and bits >> own - 1:
        bits |= -1 << own
    return bits & ((1 << 8 * size) - 1)


def _ranges(tensors: list[torch.Tensor]) -> list[tuple[int, int, int, int, int]]:
    """The bytes that a launch may touch: low, high, bytes between rows, bytes of a row, an item's.

    A tensor's own and no other part of its storage: the gaps between its rows are outside. Where
    several arguments are views of one storage the kernel divides that up itself, and has it whole.
    """
    storages: dict[int, dict[object, torch.Tensor]] = {}
    for x in tensors:
        views = storages.setdefault(x.untyped_storage().data_ptr(), {})
        views[x.data_ptr(), x.shape, x.stride(), x.dtype] = x  # once, if it is given twice
    return [_range(list(views.values())) for views in storages.values()]


def _range(views: list[torch.Tensor]) -> tuple[int, int, int, int, int]:
    x = views[0]
    item = min(view.element_size() for view in views)
    if len(views) > 1:
        storage = x.untyped_storage()
        return storage.data_ptr(), storage.data_ptr() + storage.nbytes(), 0, 0, item
    last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    pitch = length = 0
    if x.dim() == 2 and x.stride(1) == 1 and x.stride(0) > x.shape[1]:
        pitch, length = x.stride(0) * item, x.shape[1] * item
    return x.data_ptr(), x.data_ptr() + (last + 1) * item, pitch, length, item


# ---- the interpreter


def cache_folder() -> Path:
    """Where what is compiled is kept: $RKDO_EXECUTE_CACHE, or a folder of the user's cache."""
    if chosen := os.environ.get("RKDO_EXECUTE_CACHE"):
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "rkdo-execute"


def compiler() -> str:
    """The C compiler: $CC, or gcc, or cc."""
    names = [os.environ["CC"]] if os.environ.get("CC") else ["gcc", "cc"]
    for name in names:
        if found := shutil.which(name):
            return found
    raise BenchError(f"executing PTX needs a C compiler, and there is no {' and no '.join(names)}")


def _processor() -> str:
    """What -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    wanted = ("model name", "flags", "Features", "CPU part")
    return "\n".join(dict.fromkeys(line for line in lines if line.startswith(wanted)))


@lru_cache(maxsize=1)
def _library() -> ctypes.CDLL:
    return ctypes.CDLL(str(build()))


def build(flags: tuple[str, ...] = FLAGS) -> Path:
    """The interpreter's library, compiled if it is not there yet."""
    made_by = compiler()
    version = subprocess.run([made_by, "--version"], capture_output=True, text=True).stdout
    generated = operations()
    sources = [(HERE / name).read_text() for name in C_FILES]
    parts = [*sources, generated, *flags, version, platform.machine(), _processor()]
    name = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]
    folder = cache_folder()
    path = folder / f"interpreter-{name}.so"
    if path.exists():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        (Path(scratch) / "operations.h").write_text(generated)
        made = Path(scratch) / "interpreter.so"
        command = [made_by, *flags, f"-I{scratch}", f"-I{HERE}", "-o", str(made),
                   str(HERE / "launch.c"), "-lm"]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            first = next((x for x in done.stderr.splitlines() if "error" in x), done.stderr)
            raise BenchError(f"{made_by} cannot compile the PTX interpreter: {first}")
        os.replace(made, path)  # whole or not at all, whoever else builds it
    return path
