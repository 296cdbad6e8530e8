"""A CUDA machine's one command: correctness of every path, then speed, then a summary.

    python -m bench gpu --out DIR

From a bare checkout, in under nine minutes. DIR gets checks.jsonl, results.jsonl and pictures.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch

from .cases import CASES, Case
from .errors import BenchError
from .measure import Effort
from .record import Result, Writer

MINUTES = 8.3
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
    ("rkdo_loss", "fp32", ((64, 64), (4096, 64), (65536, 64)), SLOW),
    ("info_nce", "bf16", ((65536, 64), (16384, 64), (4096, 64)), SLOW),
    ("rkdo_direct", "bf16", ((4096, 64), (16384, 64), (65536, 64)), SLOW),
    ("icon_student", "bf16", ((4096, 64), (16384, 64), (65536, 64)), SLOW),
    ("icon_gaussian", "bf16", ((4096, 64), (65536, 64)), SLOW),
    ("rkdo_loss", "bf16", ((256, 64), (4096, 512), (16384, 512)), SLOW),
    ("info_nce", "fp32", ((16384, 64), (65536, 64)), SLOW),
    ("rkdo_loss", "fp32", ((16384, 64), (4096, 512), (65536, 512)), SLOW),
    ("rkdo_direct", "fp32", ((4096, 64), (65536, 64)), SLOW),
)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench gpu", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--minutes", type=float, default=MINUTES)
    parser.add_argument("--skip-checks", action="store_true")
    parser.add_argument("--skip-speed", action="store_true")
    chosen = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        raise BenchError("no GPU that PyTorch can use")
    start = time.monotonic()
    chosen.out.mkdir(parents=True, exist_ok=True)
    for name in ("checks.jsonl", "results.jsonl"):
        if (chosen.out / name).exists():
            raise BenchError(f"{chosen.out / name} exists already: pass another --out")
    allowed = 60 * chosen.minutes
    failed, counted = 0, 0
    if not chosen.skip_checks:
        failed, counted = check(chosen.out / "checks.jsonl", start + CHECKS_SHARE * allowed)
    results: list[Result] = []
    if not chosen.skip_speed:
        results = speed(chosen.out / "results.jsonl", start + allowed)
    summarise(results, failed, counted, time.monotonic() - start, chosen.out)
    return 1 if failed or any(x.status == "wrong" for x in ours(results)) else 0


def check(path: Path, until: float) -> tuple[int, int]:
    """How many checks failed, of how many; each is printed and kept as it ends."""
    from . import gpu_checks

    failed = counted = 0
    with path.open("x") as file:
        for result in gpu_checks.run():
            counted += 1
            failed += not result.passed
            file.write(json.dumps(asdict(result)) + "\n")
            file.flush()
            if not result.passed or not result.name.startswith("accuracy"):
                word = "passed" if result.passed else "FAILED"
                print(f"{word}  {result.name}: {result.detail}", flush=True)
            if time.monotonic() > until:
                print("out of time for checks: the rest is not run")
                break
    print(f"{counted - failed} of {counted} checks passed\n", flush=True)
    return failed, counted


def speed(path: Path, until: float) -> list[Result]:
    from . import session

    known: dict[str, Case] = {case.name: case for case in CASES}
    problems = [
        session.Problem(known[name], n, d, dtype, skip)
        for name, dtype, shapes, skip in PLAN
        for n, d in shapes
    ]
    return session.measure_all(problems, "cuda", EFFORT, Writer(path), until)


def ours(results: list[Result]) -> list[Result]:
    return [x for x in results if x.contender.startswith("ours")]


def summarise(
    results: list[Result], failed: int, counted: int, seconds: float, folder: Path
) -> None:
    from . import plot, report

    if results:
        print("\n" + report.table(results) + "\n")
        print("\n".join(report.ratios(results)))
        try:
            pictures = plot.draw([folder / "results.jsonl"], folder)
            print(f"pictures: {', '.join(x.name for x in pictures)}")
        except (BenchError, ImportError) as error:
            print(f"no pictures: {error}", file=sys.stderr)
    for result in ours(results):
        if result.floor and result.p50:
            print(
                f"{result.case} {result.contender} N={result.n} d={result.d} {result.dtype}: "
                f"{report.duration(result.p50)}, {result.p50 / result.floor:.2f} × the floor, "
                f"wall {report.duration(result.wall)}, {report.size(result.peak_bytes)}"
            )
    bad = [x for x in ours(results) if x.status != "ok"]
    for result in bad:
        print(f"{result.status}: {result.case} {result.contender} N={result.n} {result.detail}")
    print(
        f"\nsummary: {counted - failed} of {counted} checks passed, {len(results)} results, "
        f"{len(bad)} of ours not ok, {seconds / 60:.1f} minutes, in {folder}"
    )
