"""The static analysis as a table, compiled in several processes, beside what a GPU measured."""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from itertools import groupby
from pathlib import Path

from .errors import BenchError, Parser, at_least_one
from .gates import failures
from .record import FOLDER, Result, newest, read
from .report import aligned, duration
from .static import Entry, Resources, entries, examine
from .targets import TARGETS

HEADER = (
    "target", "kernel", "dtype", "d", "integers", "tile", "regs", "spills", "shared", "tmem",
    "warps", "slots", "special", "matrix", "work", "global", "shared ", "ps", "binds", "gates",
)  # fmt: skip
LOSSES = {  # kernels of one forward and backward, by case
    "rkdo_loss": ("moments_fwd k=4", "moments_bwd k=4 dq", "moments_bwd k=4 dk"),
    "info_nce": ("moments_fwd k=0", "moments_bwd k=0 dq", "moments_bwd k=0 dk"),
    "clip": ("both_sums", "both_sums_bwd", "both_sums_bwd"),
    "icon_student": ("student_sums", "student_sums_bwd dq", "student_sums_bwd dk"),
    "rkdo_direct": (
        "softmax_sums", "recursion", "recursion_bwd dq", "recursion_bwd dk",
        "softmax_sums_bwd dq", "softmax_sums_bwd dk",
    ),
}  # fmt: skip
BATCH = 6  # kernels that one run of the disassembler takes
LEGEND = """\
slots, special and matrix: instructions a thread executes in the hot loop ÷ entries of S it owns,
in a tile that meets no edge; work: multiply-adds ÷ those needed (above 1 some are done twice);
global and shared: accesses an entry × bytes; ps: predicted picoseconds an entry on the device."""


def compile_entries(batch: Sequence[Entry]) -> list[tuple[Entry, Resources | str]]:
    """For one target."""
    results: dict[Entry, Resources | str] = {}
    built = {}
    for entry in batch:
        try:
            built[entry] = entry.build()
        except Exception as error:  # of the compiler: it belongs into the table
            text = str(error).strip().splitlines()
            results[entry] = f"{type(error).__name__}: {text[0][:120] if text else ''}"
    if built:
        found = examine(list(built.values()))
        results |= {e: replace(x, assembly="") for e, x in zip(built, found, strict=True)}
    return list(results.items())


def compile_all(wanted: Iterable[Entry], processes: int) -> Iterator[tuple[Entry, Resources | str]]:
    """As they come, a target's slowest first."""
    batches = []
    for _, group in groupby(wanted, key=lambda entry: entry.target):
        slowest = sorted(group, key=lambda e: (e.dim, e.dtype == "fp32"), reverse=True)
        batches += [slowest[k : k + BATCH] for k in range(0, len(slowest), BATCH)]
    with multiprocessing.Pool(processes) as pool:
        for found in pool.imap_unordered(compile_entries, batches):
            yield from found


def line(entry: Entry, found: Resources | str) -> tuple[str, ...]:
    names = (entry.target, entry.case, entry.dtype, str(entry.dim), entry.variant)
    if isinstance(found, str):
        return (*names, *[""] * (len(HEADER) - len(names) - 1), f"compile: {found}")
    config, loop = found.config, found.loop
    assert config is not None
    resources = (
        f"{config.rows}×{config.cols} {config.warps}w {config.stages}s",
        str(found.registers),
        str(found.spill_bytes),
        f"{found.shared_bytes / 1024:.0f}/{TARGETS[found.target].shared_limit >> 10}",
        str(found.tensor_columns),
        str(found.warps),
    )
    counts = [""] * 8
    if loop and found.seconds:
        unit = max(found.seconds, key=lambda name: found.seconds[name])  # type: ignore[index]
        counts = [
            f"{loop.slots:.1f}",
            f"{loop.special:.2f}",
            f"{loop.matrix:.3f} {'+'.join(loop.kinds)}",
            f"{loop.multiply_adds:.2f}",
            accesses(loop.loads),
            accesses(loop.shared),
            f"{1e12 * found.seconds[unit]:.2f}",
            unit,
        ]
    return (*names, *resources, *counts, "; ".join(f"{k}: {v}" for k, v in failures(found).items()))


def accesses(by_width: dict[int, float]) -> str:
    return " ".join(f"{n:.2f}×{width}" for width, n in by_width.items())


def predictions(
    found: dict[Entry, Resources], results: Iterable[Result]
) -> Iterator[tuple[str, ...]]:
    """Our losses on a GPU: predicted from the kernels' loops, and measured."""
    devices = {target.device: name for name, target in TARGETS.items()}
    for result in newest(results).values():
        target = next((devices[x] for x in devices if x in result.device), None)
        if result.contender != "ours" or not result.p50 or not target:
            continue
        width = {64: 64, 512: 512}.get(result.d)
        kernels = LOSSES.get(result.case)
        if kernels is None or width is None:
            continue
        parts = [found.get(Entry(name, result.dtype, width, target)) for name in kernels]
        if not all(part and part.seconds for part in parts):
            continue
        predicted = sum(max(x.seconds.values()) * x.stripes for x in parts if x and x.seconds)
        predicted *= result.n**2
        yield (
            result.case, str(result.n), str(result.d), result.dtype, result.device,
            duration(predicted), duration(result.p50), f"{result.p50 / predicted:.2f}",
        )  # fmt: skip


def gpu_results() -> list[Result]:
    return [x for path in sorted(FOLDER.glob("*.jsonl")) for x in read_if_ours(path) if x.driver]


def read_if_ours(path: Path) -> list[Result]:
    try:
        return read(path)
    except BenchError:
        return []


def main(arguments: list[str]) -> int:
    parser = Parser(prog="python -m bench static", description=__doc__)
    parser.add_argument("--target", action="append", metavar="NAME", help=", ".join(TARGETS))
    parser.add_argument("--kernel", metavar="PART", default="", help="only kernels named so")
    parser.add_argument("--dtype", metavar="NAME", help="bf16, fp16 or fp32")
    parser.add_argument("--processes", type=at_least_one, default=min(4, os.cpu_count() or 1))
    parser.add_argument("--out", type=Path, help="JSON lines")
    chosen = parser.parse_args(arguments)
    for target in chosen.target or ():
        if target not in TARGETS:
            raise BenchError(f"unknown target {target!r}: {', '.join(TARGETS)}")
    wanted = [
        entry
        for entry in entries(tuple(chosen.target or TARGETS))
        if chosen.kernel in entry.case and chosen.dtype in (None, entry.dtype)
    ]
    if not wanted:
        kernels = sorted({entry.case for entry in entries(tuple(chosen.target or TARGETS))})
        raise BenchError(
            f"nothing to compile for --kernel {chosen.kernel} --dtype {chosen.dtype}; kernels: "
            f"{', '.join(kernels)}"
        )
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise BenchError("TRITON_INTERPRET=1 is set: there is nothing to compile")
    if chosen.out and chosen.out.exists():
        raise BenchError(f"{chosen.out} exists already: pass another --out")
    from tqdm import tqdm

    every: list[tuple[Entry, Resources | str]] = []
    for pair in tqdm(
        compile_all(wanted, chosen.processes), total=len(wanted), unit="kernel", file=sys.stderr
    ):
        every.append(pair)
    every.sort(key=lambda pair: wanted.index(pair[0]))
    print(aligned([HEADER, *(line(*pair) for pair in every)]))
    print(f"\n{LEGEND}")
    found = {entry: x for entry, x in every if not isinstance(x, str)}
    rows = list(predictions(found, gpu_results()))
    if rows:
        header = ("case", "N", "d", "dtype", "device", "predicted", "measured", "÷")
        print("\n" + aligned([header, *rows]))
    if chosen.out:
        chosen.out.write_text(
            "".join(json.dumps(as_record(x)) + "\n" for x in found.values()), encoding="utf-8"
        )
    failing = sum(1 for _, x in every if isinstance(x, str) or failures(x))
    print(f"\n{len(every)} compiled, {failing} fail a gate")
    return 1 if failing else 0


def as_record(found: Resources) -> dict[str, object]:
    values = asdict(found)
    del values["assembly"]
    return {**values, "gates": failures(found)}
