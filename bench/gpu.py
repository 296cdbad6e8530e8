"""A CUDA machine's one command: correctness of every path, then speed, then a summary.

    python -m bench gpu --out DIR

From a bare checkout, in under nine minutes. DIR gets checks.jsonl, results.jsonl and pictures.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import torch

from .cases import CASES, Case
from .errors import BenchError, Parser
from .measure import Effort
from .record import Result, Writer, make_folder
from .session import Problem, at_fault, measure_all

MINUTES = 8.0  # the problem under way is brought to its end
CHECKS_SHARE = 0.55  # of the time, at most
EFFORT = Effort(seconds=0.5, rounds=30, least=5)
SLOW = frozenset({"compiled"})  # half a minute of compiling a shape
PLAN: tuple[
    tuple[str, str, tuple[tuple[int, int], ...], frozenset[str]], ...
] = (  # the most telling first: case, dtype, (N, d), what is left out
    ("rkdo_loss", "bf16", ((64, 64), (4096, 64)), frozenset[str]()),
    ("rkdo_loss", "bf16", ((65536, 64), (65536, 512), (16384, 64), (1024, 64)), SLOW),
    ("depth", "bf16", ((2048, 64), (16384, 64)), SLOW),
    ("clip", "bf16", ((65536, 512), (4096, 512)), SLOW),
    ("field_dense_bf16", "bf16", ((16384, 64), (4096, 64)), SLOW),
    ("rkdo_loss", "fp32", ((64, 64), (4096, 64), (65536, 64)), SLOW),
    ("info_nce", "bf16", ((65536, 64), (16384, 64), (4096, 64)), SLOW),
    ("rkdo_direct", "bf16", ((4096, 64), (16384, 64), (65536, 64)), SLOW),
    ("icon_student", "bf16", ((4096, 64), (16384, 64), (65536, 64)), SLOW),
    ("icon_gaussian", "bf16", ((4096, 64), (65536, 64)), SLOW),
    ("field_snapshot", "bf16", ((1024, 64), (4096, 64)), SLOW),
    ("field_dense", "fp32", ((16384, 64),), SLOW),
    ("rkdo_loss", "bf16", ((256, 64), (4096, 512), (16384, 512)), SLOW),
    ("info_nce", "fp32", ((16384, 64), (65536, 64)), SLOW),
    ("rkdo_loss", "fp32", ((16384, 64), (4096, 512), (65536, 512)), SLOW),
    ("rkdo_direct", "fp32", ((4096, 64), (65536, 64)), SLOW),
)


def main(arguments: list[str]) -> int:
    parser = Parser(prog="python -m bench gpu", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--minutes", type=float, default=MINUTES)
    parser.add_argument("--skip-checks", action="store_true")
    parser.add_argument("--skip-speed", action="store_true")
    chosen = parser.parse_args(arguments)
    need_a_gpu()
    make_folder(chosen.out)
    for name in ("checks.jsonl", "results.jsonl"):
        if (chosen.out / name).exists():
            raise BenchError(f"{chosen.out / name} exists already: pass another --out")
    found = Found(chosen.out)
    start = time.monotonic()
    allowed = 60 * chosen.minutes
    try:
        if not chosen.skip_checks:
            guarded(found, "checks", partial(check, found, start + CHECKS_SHARE * allowed))
        if not chosen.skip_speed and not found.interrupted:
            guarded(found, "speed", partial(speed, found, start + allowed))
        guarded(found, "summary", partial(summarise, found))
    except KeyboardInterrupt:
        found.interrupted = True
    seconds = time.monotonic() - start
    print(
        f"\nsummary: {found.passed} of {found.counted} checks passed, "
        f"{len(found.results)} results, {len(unwell(found.results))} of ours not ok, "
        f"{len(found.broken)} parts broken off, {seconds / 60:.1f} minutes, in {found.folder}",
        flush=True,
    )
    if found.interrupted:
        return 130
    return 1 if found.passed < found.counted or found.broken or at_fault(found.results) else 0


@dataclass
class Found:
    """What is known so far, whatever comes next."""

    folder: Path
    counted: int = 0  # checks
    passed: int = 0
    results: list[Result] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)  # parts that ended with an error
    interrupted: bool = False


def need_a_gpu() -> None:
    if not torch.cuda.is_available():
        raise BenchError("no GPU that PyTorch can use")
    from rkdo_kernels import launch

    if (status := launch.triton_status()) != "compiled":
        raise BenchError(f"Triton is {status}: the kernels would not run on this GPU")


def guarded(found: Found, part: str, run: Callable[[], None]) -> None:
    """A part that breaks off is said and counted; the next one still runs."""
    try:
        run()
    except Exception as error:
        text = next(iter(str(error).splitlines()), "")
        print(f"{part} broke off: {type(error).__name__}: {text[:160]}", flush=True)
        found.broken.append(part)


def check(found: Found, until: float) -> None:
    """Every check is printed and kept as it ends."""
    from . import gpu_checks

    with (found.folder / "checks.jsonl").open("x") as file, closing(gpu_checks.run()) as results:
        try:
            for result in results:
                found.counted += 1
                found.passed += result.passed
                file.write(json.dumps(asdict(result)) + "\n")
                file.flush()
                if not result.passed or not result.name.startswith("accuracy"):
                    word = "passed" if result.passed else "FAILED"
                    print(f"{word}  {result.name}: {result.detail}", flush=True)
                if time.monotonic() > until:
                    print("out of time for checks: the rest is not run")
                    break
        except KeyboardInterrupt:
            found.interrupted = True
    print(f"{found.passed} of {found.counted} checks passed\n", flush=True)


def speed(found: Found, until: float) -> None:
    known: dict[str, Case] = {case.name: case for case in CASES}
    problems = [
        Problem(known[name], n, d, dtype, skip)
        for name, dtype, shapes, skip in PLAN
        for n, d in shapes
    ]
    writer = Writer(found.folder / "results.jsonl")
    found.results = writer.results  # whatever comes in between
    found.interrupted = not measure_all(problems, "cuda", EFFORT, writer, until)


def unwell(results: list[Result]) -> list[Result]:
    return [x for x in results if x.contender.startswith("ours") and x.status != "ok"]


def summarise(found: Found) -> None:
    from . import plot, report

    if not found.results:
        return
    print("\n" + report.table(found.results) + "\n")
    print("\n".join(report.ratios(found.results)))
    for result in found.results:
        if result.contender.startswith("ours") and result.floor and result.p50:
            print(
                f"{result.case} {result.contender} N={result.n} d={result.d} {result.dtype}: "
                f"{report.duration(result.p50)}, {result.p50 / result.floor:.2f} × the floor, "
                f"wall {report.duration(result.wall)}, {report.size(result.peak_bytes)}"
            )
    for result in unwell(found.results):
        print(f"{result.status}: {result.case} {result.contender} N={result.n} {result.detail}")
    try:
        pictures = plot.draw([found.folder / "results.jsonl"], found.folder)
        print(f"pictures: {', '.join(x.name for x in pictures)}")
    except (BenchError, ImportError) as error:
        print(f"no pictures: {error}")
