"""A CUDA machine's one command: what it does at best, whether every path is right, how fast it is,
and a verdict for each claim.

    python -m bench gpu --out DIR [--minutes M]

From a bare checkout. DIR gets checks.jsonl, results.jsonl and summary.md as they come, so that a
command that is killed leaves what it had, and pictures. `--rehearse` runs every step on a stand-in
for a GPU, on any machine: that says whether the command works, and nothing else.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from ..errors import BenchError, Parser, positive
from ..record import Result, Writer, make_folder
from . import clocks, plan, summary
from .claims import MISSED, Known
from .outcome import FAILED, LEFT_OUT, Found, Setup
from .runner import Runner
from .sizes import FULL, REHEARSED
from .summary import Run

MINUTES = 10.0
INTERRUPTED = 130
FILES = ("checks.jsonl", "results.jsonl", "summary.md")


@dataclass(frozen=True)
class Settings:
    folder: Path
    minutes: float = MINUTES
    stages: tuple[str, ...] = plan.STAGES
    setup: Setup = field(default_factory=Setup)
    only: Callable[[plan.Check], bool] = lambda check: True  # of the plan's checks


def main(arguments: list[str]) -> int:
    parser = Parser(prog="python -m bench gpu", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--minutes", type=positive, default=MINUTES, help="how much is run; 10")
    parser.add_argument("--only", action="append", choices=plan.STAGES, help="only these stages")
    parser.add_argument("--rehearse", action="store_true", help="on a stand-in, without a GPU")
    chosen = parser.parse_args(arguments)
    stages = tuple(x for x in plan.STAGES if x in (chosen.only or plan.STAGES))
    setup = Setup(rehearsal=chosen.rehearse)
    if chosen.rehearse:
        os.environ["TRITON_INTERPRET"] = "1"  # of the processes that it starts
    else:
        need_a_gpu()
    return execute(Settings(chosen.out, chosen.minutes, stages, setup))


def need_a_gpu() -> None:
    if not torch.cuda.is_available():
        raise BenchError("no GPU that PyTorch can use (--rehearse runs the command without one)")
    from rkdo_kernels import launch

    if (status := launch.triton_status()) != "compiled":
        raise BenchError(f"Triton is {status}: the kernels would not run on this GPU")


def execute(settings: Settings) -> int:
    """0 if every check passed and every claim that was measured is held, else 1."""
    rehearsal, start = settings.setup.rehearsal, time.monotonic()
    sizes = REHEARSED if rehearsal else FULL
    known = Known(scale=sizes.scale, widest=sizes.widest)
    run = Run(known, settings.stages, settings.minutes, rehearsal)
    journal = Journal(settings.folder, run)
    wanted = [x for x in plan.every(rehearsal) if x.stage in settings.stages and settings.only(x)]
    chosen, others = plan.fitting(wanted, settings.minutes)
    for check in others:
        journal.keep(Found(check.name, check.stage, LEFT_OUT,
                           f"does not fit into {settings.minutes:g} minutes",
                           rehearsal=rehearsal))  # fmt: skip
    watch = clocks.Watch(None if rehearsal else clocks.sensor())
    runner = Runner(settings.setup, watch, start + 60 * settings.minutes)
    ends = plan.deadlines(chosen, start, settings.minutes)
    try:
        for stage in settings.stages:
            checks = [x for x in chosen if x.stage == stage]
            for message in runner.stage(checks, ends[stage]):
                journal.keep(message)
            runner.setup = replace(runner.setup, rates=known.rates)
        run.state = "complete"
    except KeyboardInterrupt:
        run.state = "interrupted"
    finally:
        watch.close()
        runner.close()
    if runner.lost:
        run.remarks.append(f"the device is lost: {runner.lost}")
    journal.close()
    if known.results and not rehearsal:
        run.remarks += pictures(settings.folder)
    print("\n" + "\n".join(summary.closing(run, time.monotonic() - start, settings.folder)),
          flush=True)  # fmt: skip
    return status(run, runner, journal)


def status(run: Run, runner: Runner, journal: Journal) -> int:
    if run.state == "interrupted":
        return INTERRUPTED
    broken = run.count(FAILED) or runner.lost or journal.trouble
    if run.rehearsal:  # the claims are no concern of a CPU's, but every step has to run
        return 1 if broken or run.count(LEFT_OUT) else 0
    return 1 if broken or any(x.word == MISSED for x in run.verdicts()) else 0


class Journal:
    """Keeps what is found: in memory, and line by line on the disk, as long as that takes it."""

    def __init__(self, folder: Path, run: Run) -> None:
        make_folder(folder)
        for name in FILES:
            if (folder / name).exists():
                raise BenchError(f"{folder / name} exists already: pass another --out")
        self.folder, self.run = folder, run
        self.trouble: list[str] = []
        self.writer = Writer(folder / "results.jsonl")
        self.checks = (folder / "checks.jsonl").open("x")

    def keep(self, message: Result | Found) -> None:
        if isinstance(message, Found):
            self.keep_found(message)
        else:
            self.run.known.results.append(message)
            self.attempt("results.jsonl", lambda: self.writer.write(message))
        if not isinstance(message, Found) or message.verdict != LEFT_OUT:
            self.summarise()

    def keep_found(self, found: Found) -> None:
        known = self.run.known
        known.found.append(found)
        if found.stage == "rates" and found.ran and found.name.startswith("rate: "):
            known.rates |= found.figures
        self.attempt("checks.jsonl", lambda: self.write_line(asdict(found)))
        quiet = found.name.startswith("accuracy") and found.verdict != FAILED
        if found.ran and not quiet:
            shown = f" ({clocks.shown(found.sensors)})" if found.stage != "correctness" else ""
            print(f"{found.verdict}  {found.name}: {found.detail}{shown}", flush=True)

    def write_line(self, values: dict[str, Any]) -> None:
        self.checks.write(json.dumps(values) + "\n")
        self.checks.flush()

    def summarise(self) -> None:
        self.attempt("summary.md", self.write_summary)

    def write_summary(self) -> None:
        """Whole or not at all."""
        path = self.folder / "summary.md"
        part = path.with_suffix(".part")
        part.write_text(summary.markdown(self.run), encoding="utf-8")
        os.replace(part, path)

    def attempt(self, what: str, write: Callable[[], None]) -> None:
        """A full disk ends nothing: it is said once, and what is found is printed at the end."""
        try:
            write()
        except OSError as error:
            if not any(x.startswith(what) for x in self.trouble):
                self.trouble.append(f"{what} cannot be written: {error.strerror}")
                self.run.remarks.append(self.trouble[-1])
                print(f"bench: {self.trouble[-1]}", file=sys.stderr, flush=True)

    def close(self) -> None:
        self.summarise()
        self.attempt("checks.jsonl", self.checks.close)
        self.attempt("results.jsonl", self.writer.close)


def pictures(folder: Path) -> list[str]:
    from .. import plot

    try:
        found = plot.draw([folder / "results.jsonl"], folder)
    except (BenchError, ImportError, OSError) as error:
        return [f"no pictures: {error}"]
    return [f"pictures: {', '.join(x.name for x in found)}"]
