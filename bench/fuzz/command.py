"""Random cases of every loss and field, on every backend, against the truth.

python -m bench fuzz --minutes 5             for so long
python -m bench fuzz --cases 3000 --seed 0   so many, the same ones every time
python -m bench fuzz --case 1234             one, again, with the options that found it

A miss by less than a factor of 2 is counted as one at the edge: eager's error over some draws is no
bound of what a correct kernel's rounding may be on another CPU. So is one that a single rounding of
every logit, p and q explains.
"""

from __future__ import annotations

import argparse
import os
import time
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..errors import BenchError, Parser, at_least_one, positive

SHOWN = 20  # failures that are shrunk and printed, and of one kind:
OF_A_KIND = 2
FIELDS = "field"


@dataclass
class Outcome:
    cases: Counter[tuple[str, str]] = field(default_factory=Counter)  # by loss and backend
    misses: Counter[tuple[str, str]] = field(default_factory=Counter)
    edges: Counter[tuple[str, str]] = field(default_factory=Counter)  # missed by less than a factor
    kinds: Counter[tuple[str, str]] = field(default_factory=Counter)  # by loss and kind
    snippets: list[str] = field(default_factory=list)

    def table(self) -> str:
        lines = [f"{'loss':<24}{'backend':<12}{'cases':>8}{'misses':>8}{'at the edge':>13}"]
        for key, count in sorted(self.cases.items()):
            found = f"{self.misses[key] or '–':>8}{self.edges[key] or '–':>13}"
            lines.append(f"{key[0]:<24}{key[1]:<12}{count:>8}{found}")
        total, misses, edges = (sum(x.values()) for x in (self.cases, self.misses, self.edges))
        lines.append(f"{'':<36}{total:>8}{misses or '–':>8}{edges or '–':>13}")
        lines += [f"{n:>8} × {loss}, {kind}" for (loss, kind), n in self.kinds.most_common()]
        return "\n".join(lines)


@dataclass(frozen=True)
class Choice:
    losses: tuple[str, ...]
    backends: tuple[str, ...]
    largest: int
    fields: bool  # whether fields are among the losses


def run(
    choice: Choice,
    seeds: Sequence[int] | range,
    until: float | None = None,
    shown: int = SHOWN,
    log: Any = print,
) -> Outcome:
    """Judges the cases of the seeds, until the time is over if one is given."""
    outcome = Outcome()
    for seed in seeds:
        if until is not None and time.monotonic() > until:
            break
        one(seed, choice, outcome, shown, log)
    return outcome


def one(seed: int, choice: Choice, outcome: Outcome, shown: int, log: Any) -> None:
    from . import cases, fields, judge, shrink

    every = len(choice.losses) + 2 * choice.fields
    if choice.fields and seed % every < 2:
        case: Any = fields.draw(seed, choice.backends, choice.largest)
        tools: Any = fields
    else:
        case = cases.draw(seed, choice.losses, choice.backends, choice.largest)
        tools = judge
    outcome.cases[case.loss, case.backend] += 1
    miss = tools.judge(case)
    if miss is None:
        return
    if miss.at_the_edge:
        outcome.edges[case.loss, case.backend] += 1
        return
    outcome.misses[case.loss, case.backend] += 1
    outcome.kinds[case.loss, miss.kind] += 1
    log(f"# seed {seed}: {case.loss}, {case.backend}, {miss.kind}: {miss.detail}", flush=True)
    if len(outcome.snippets) < shown and outcome.kinds[case.loss, miss.kind] <= OF_A_KIND:
        smaller = fields if tools is fields else shrink
        outcome.snippets.append(smaller.snippet(*smaller.shrink(case, miss)))
        log(f"\n{outcome.snippets[-1]}\n", flush=True)


def chosen(options: argparse.Namespace) -> Choice:
    from . import cases

    for name in options.loss:
        if name not in (*cases.LOSSES, FIELDS):
            raise BenchError(f"unknown loss {name!r}: {', '.join((*cases.LOSSES, FIELDS))}")
    for name in options.backend:
        if name not in cases.BACKENDS:
            raise BenchError(f"unknown backend {name!r}: {', '.join(cases.BACKENDS)}")
    wanted = tuple(options.loss) or (*cases.LOSSES, FIELDS)
    losses = tuple(name for name in wanted if name != FIELDS)
    backends = tuple(options.backend) or cases.ON_CPU
    return Choice(losses, backends, options.largest, FIELDS in wanted)


def interpret(backends: Sequence[str]) -> None:
    """Sets Triton to what the backends need, before anything imports it."""
    from .cases import EXECUTED

    executed = [name for name in backends if name in EXECUTED]
    if "triton" in backends and not torch.cuda.is_available():
        if executed:
            raise BenchError(f"triton, which is interpreted here, and {executed[0]}: one at a time")
        os.environ["TRITON_INTERPRET"] = "1"
    if executed and os.environ.get("TRITON_INTERPRET") == "1":
        raise BenchError(
            f"TRITON_INTERPRET=1 is set: there is nothing to compile for {executed[0]}"
        )


def main(arguments: list[str]) -> int:
    parser = Parser(
        prog="python -m bench fuzz", description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--minutes", type=positive, help="stop after so long")
    parser.add_argument("--cases", type=at_least_one, help="stop after so many (3000)")
    parser.add_argument("--seed", type=int, default=0, help="of the first case")
    parser.add_argument("--case", type=int, metavar="SEED", help="this one alone")
    parser.add_argument("--loss", action="append", default=[], metavar="NAME")
    parser.add_argument(
        "--backend", action="append", default=[], metavar="NAME",
        help="tiled, small, one_pass, reference; triton runs in Triton's interpreter on a CPU;\n"
        "sm_90, sm_80: the compiled kernels, executed on a CPU",
    )  # fmt: skip
    parser.add_argument("--largest", type=at_least_one, default=64, help="rows, keys and columns")
    options = parser.parse_args(arguments)
    interpret(options.backend)
    warnings.simplefilter("ignore")  # NaN and infinity are what some cases are about
    choice = chosen(options)
    if options.case is not None:
        outcome = run(choice, [options.case])
    else:
        count = options.cases or (2**62 if options.minutes else 3000)
        until = time.monotonic() + 60 * options.minutes if options.minutes else None
        outcome = run(choice, range(options.seed, options.seed + count), until)
    print("\n" + outcome.table())
    return 1 if outcome.misses else 0
