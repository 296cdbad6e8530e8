"""A run over the cases: what was asked for, measured one problem at a time, kept line by line."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch

from .cases import CASES, Case, listed
from .errors import BenchError
from .measure import DTYPES, Effort, measure
from .record import Result, Writer, device_name, environment


@dataclass(frozen=True)
class Problem:
    case: Case
    n: int
    d: int
    dtype: str
    skip: frozenset[str] = frozenset()


def prepare(chosen: argparse.Namespace) -> tuple[list[Problem], str]:
    """What was asked for, and the device; raises BenchError for what there is not."""
    device = pick_device(chosen.device)
    if chosen.threads is not None:
        torch.set_num_threads(chosen.threads)
    return pick_problems(chosen, device), device


def hardware(device: str) -> tuple[str, int]:
    """What has to be the same for times to be compared: the device's name and its threads."""
    return device_name(device), torch.get_num_threads()


def at_fault(results: Iterable[Result]) -> list[Result]:
    """Ours, where it was wrong or broke; a machine too small is no fault."""
    return [
        x for x in results if x.contender.startswith("ours") and x.status in ("wrong", "failed")
    ]


def pick_device(name: str | None) -> str:
    there = torch.cuda.is_available()
    if name is None:
        return "cuda" if there else "cpu"
    if name not in ("cpu", "cuda"):
        raise BenchError(f"unknown device {name!r}: cpu or cuda")
    if name == "cuda" and not there:
        raise BenchError("no GPU that PyTorch can use: --device cpu")
    return name


def pick_problems(chosen: argparse.Namespace, device: str) -> list[Problem]:
    known = {case.name: case for case in CASES}
    for name in chosen.case or ():
        if name not in known:
            raise BenchError(f"unknown case {name!r}: {', '.join(known)}")
    for dtype in chosen.dtype or ():
        if dtype not in DTYPES:
            raise BenchError(f"unknown dtype {dtype!r}: {', '.join(DTYPES)}")
    cases = [known[name] for name in chosen.case or known]
    if chosen.contender:
        cases = [only(case, chosen.contender) for case in cases]
    names = {contender.name for case in cases for contender in case.contenders}
    for name in chosen.contender or ():
        if name not in names:
            every = {x.name for case in CASES for x in case.contenders}
            raise BenchError(f"no contender {name!r} in these cases: {', '.join(sorted(every))}")
    problems = []
    for case in cases:
        shapes = case.gpu_shapes if device == "cuda" else case.shapes
        if chosen.quick:
            shapes = case.quick if not chosen.case else case.quick or shapes[:1]
        for dtype in chosen.dtype or (case.gpu_dtypes if device == "cuda" else case.dtypes):
            problems += [
                Problem(case, n, d, dtype) for n, d in shapes if not chosen.n or n in chosen.n
            ]
    if not problems:
        raise BenchError("nothing to measure: no case has a shape like that")
    return problems


def only(case: Case, names: Iterable[str]) -> Case:
    kept = tuple(x for x in case.contenders if x.name in names or not x.judged)
    return replace(case, contenders=kept)


def measure_all(
    problems: list[Problem],
    device: str,
    effort: Effort,
    writer: Writer,
    until: float = float("inf"),
) -> bool:
    """False if Ctrl-C ended the run; passing `until` ends it too. The writer has the results."""
    import threading
    import time

    from tqdm import tqdm

    tqdm.set_lock(threading.RLock())  # its own is a semaphore that forks would leak
    about = environment(device)
    bar = tqdm(problems, unit="problem", file=sys.stderr)
    try:
        for problem in bar:
            if time.monotonic() > until:
                bar.write("out of time: the rest is not measured", file=sys.stderr)
                break
            bar.set_description(f"{problem.case.name} {problem.n}×{problem.d} {problem.dtype}")
            for result in measure(
                problem.case, problem.n, problem.d, problem.dtype, device, effort, about,
                problem.skip, apart=device == "cpu" and listed(problem.case),
            ):  # fmt: skip
                writer.write(result)
    except KeyboardInterrupt:
        kept = f"{len(writer.results)} results are kept in {writer.path}"
        bar.write(f"interrupted: {kept if writer.results else 'nothing was measured'}",
                  file=sys.stderr)  # fmt: skip
        return False
    finally:
        bar.close()
        writer.close()
    return True
