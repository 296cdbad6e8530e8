"""A launch's PTX, kept by all that it follows from.

Triton's own `compile` ends with ptxas, which takes half of the time and whose output nobody here
reads. Its stages are run one by one, up to PTX: nothing of Triton is changed.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import triton
from triton._C.libtriton import ir
from triton.compiler.compiler import make_backend

from ...targets import TARGETS
from ..launches import Launch
from .machine import cache_folder

LAST = "ptx"


@dataclass(frozen=True)
class Program:
    name: str  # of the entry
    warps: int
    shared: int  # bytes, of a program
    ptx: str


def default_cache() -> Path:
    return cache_folder() / "programs"


def program(launch: Launch, target: str, cache: Path) -> Program:
    """From the cache, or compiled and kept there.

    Raises:
        Whatever Triton's compiler does for a kernel that it refuses.
    """
    path = cache / f"{key(launch, target)}.json"
    try:
        return Program(**json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        pass
    found = compiled(launch, target)
    keep(path, json.dumps(asdict(found)))
    return found


def key(launch: Launch, target: str) -> str:
    """Of Triton, the target, the kernel's source and that of all it calls, and how it is launched.

    The kernel's `cache_key` is a hash of its source, its callees' and the globals that they read.
    """
    parts = (
        triton.__version__,
        repr(TARGETS[target].gpu),
        launch.kernel.cache_key,
        launch.compiled_from,
        repr(sorted(environment().items())),
    )
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def environment() -> dict[str, str]:
    """Variables that Triton's compiler takes into account."""
    return {k: v for k, v in os.environ.items() if k.startswith(("TRITON_", "LLVM_", "MLIR_"))
            and "CACHE" not in k and "DIR" not in k}  # fmt: skip


def compiled(launch: Launch, target: str) -> Program:
    gpu = TARGETS[target].gpu
    backend = make_backend(gpu)
    options = backend.parse_options(dict(launch.options))
    source = launch.source
    stages: dict[str, Any] = {}
    backend.add_stages(stages, options, source.language)
    if LAST not in stages:
        raise ValueError(f"{target} has no stage {LAST}, but {', '.join(stages)}")
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    built = source.make_ir(
        gpu, options, backend.get_codegen_implementation(options), backend.get_module_map(), context
    )
    metadata: dict[str, Any] = {"target": gpu, **vars(options)}
    names = list(stages)
    for name in names[names.index(source.ext) : names.index(LAST) + 1]:
        built = stages[name](built, metadata)
    return Program(metadata["name"], metadata["num_warps"], metadata["shared"], built)


def keep(path: Path, text: str) -> None:
    """Whole or not at all: other processes read the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(
        "w", dir=path.parent, suffix=".part", delete=False, encoding="utf-8"
    ) as file:
        file.write(text)
    os.replace(file.name, path)
