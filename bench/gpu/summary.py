"""What a run comes to, as Markdown: rates, failures, speed, and a verdict for each claim last."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from .. import report
from ..record import Result, newest, revision, versions
from . import clocks
from .claims import HELD, MISSED, UNKNOWN, Known, Verdict, verdicts
from .outcome import FAILED, LEFT_OUT, NOT_APPLICABLE, PASSED, Found
from .plan import STAGES

REHEARSAL = "REHEARSAL on a stand-in: no figure here is a result"


@dataclass
class Run:
    """All that a summary tells."""

    known: Known = field(default_factory=Known)
    stages: tuple[str, ...] = STAGES
    minutes: float = 0.0
    rehearsal: bool = False
    state: str = "under way"  # or complete, interrupted, and what broke
    remarks: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.commit, self.dirty = revision()
        self.versions = versions()

    def verdicts(self) -> list[Verdict]:
        return verdicts(self.known, self.stages)

    def count(self, verdict: str) -> int:
        return sum(x.verdict == verdict for x in self.known.found)


def markdown(run: Run) -> str:
    known = run.known
    device = next((x.detail for x in known.found if x.name == "device"), "device unknown")
    parts = [
        f"# {REHEARSAL if run.rehearsal else 'bench gpu'}",
        f"{device}  \n{', '.join(f'{k} {v}' for k, v in run.versions.items())}, commit "
        f"{run.commit[:10]}{' with changes' if run.dirty else ''}  \n"
        f"{run.minutes:g} minutes, {run.state}",
        *(f"- {x}" for x in run.remarks),
    ]
    for title, lines in (
        ("Rates", list(rate_lines(known.found))),
        ("Failed", list(lines_of(known.found, FAILED))),
        ("Checks", list(counts(known.found))),
        ("Not applicable", list(grouped(known.found, NOT_APPLICABLE))),
        ("Left out", list(grouped(known.found, LEFT_OUT))),
        ("Throttled", list(throttled(known))),
        ("Kernels", list(kernels(known.found))),
    ):
        if lines:
            parts += [f"## {title}", "\n".join(lines)]
    if known.results:
        parts += ["## Speed", f"```\n{report.table(known.results)}\n```"]
        parts += ["\n".join(f"- {x}" for x in [*report.ratios(known.results), *floors(known)])]
    parts += ["## Verdicts", "\n".join(f"- {x}" for x in verdict_lines(run))]
    if run.rehearsal:
        parts.append(REHEARSAL)
    return "\n\n".join(part for part in parts if part) + "\n"


def verdict_lines(run: Run) -> Iterator[str]:
    marks = {HELD: "held", MISSED: "MISSED", UNKNOWN: "not measured"}
    for verdict in run.verdicts():
        mark = "rehearsed" if run.rehearsal else marks[verdict.word]
        yield f"{mark}: {verdict.claim}: {verdict.detail}"


def rate_lines(found: Iterable[Found]) -> Iterator[str]:
    for x in found:
        if x.stage == "rates" and x.ran and x.name != "device":
            yield f"- {x.name.removeprefix('rate: ')}: {x.detail} ({clocks.shown(x.sensors)})"


def lines_of(found: Iterable[Found], verdict: str) -> Iterator[str]:
    return (f"- {x.name}: {x.detail}" for x in found if x.verdict == verdict)


def counts(found: list[Found]) -> Iterator[str]:
    for stage in STAGES:
        words = Counter(x.verdict for x in found if x.stage == stage)
        if words:
            told = ", ".join(f"{words[x]} {x}" for x in (PASSED, FAILED, NOT_APPLICABLE, LEFT_OUT)
                             if words[x])  # fmt: skip
            worst = max((x.figures.get("limit used", 0.0) for x in found if x.stage == stage),
                        default=0.0)  # fmt: skip
            yield f"- {stage}: {told}" + (f"; {worst:.2f} of the limit used" if worst else "")


def grouped(found: list[Found], verdict: str) -> Iterator[str]:
    """By why: many have one reason."""
    reasons: dict[str, list[str]] = {}
    for x in found:
        if x.verdict == verdict:
            reasons.setdefault(x.detail, []).append(x.name)
    for why, names in reasons.items():
        shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        yield f"- {why}: {shown}"


def throttled(known: Known) -> Iterator[str]:
    reasons = Counter(x.sensors["throttled"] for x in known.found if "throttled" in x.sensors)
    for reason, count in reasons.items():
        yield f"- {reason}, during {count} checks: their times are of a slower clock"


def floors(known: Known) -> Iterator[str]:
    for x in newest(known.results).values():
        if x.contender.startswith("ours") and x.floor and x.p50:
            yield (
                f"{x.case} {x.contender} N={x.n} d={x.d} {x.dtype}: {report.duration(x.p50)}, "
                f"{x.p50 / x.floor:.2f} × the floor, wall {report.duration(x.wall)}, "
                f"{report.size(x.peak_bytes)}, at {clocks.shown(x.sensors)}"
            )


def kernels(found: list[Found]) -> Iterator[str]:
    """Each kernel's own time beside its prediction."""
    per_entry = {x.name: x.figures for x in found if x.name.startswith("predicted: ") and x.ran}
    for x in found:
        if not x.name.startswith("kernels: ") or not x.figures:
            continue
        case, dtype, shape = x.name.removeprefix("kernels: ").split(", ")
        n, d = map(int, shape.split("×"))
        predicted = per_entry.get(f"predicted: {case}, {dtype}, d={512 if d == 512 else 64}", {})
        yield (
            f"- {case} {dtype} {shape}: host {report.duration(x.figures['host'])}, "
            f"{x.figures['launches']:.0f} launches ({clocks.shown(x.sensors)})"
        )
        own = {k: v for k, v in x.figures.items() if k.startswith("kernel ")}
        for name, taken in sorted(own.items(), key=lambda pair: -pair[1])[:6]:
            line = f"  - {name.removeprefix('kernel ')[:70]}: {report.duration(taken)}"
            if predicted.get(name):
                expected = predicted[name] * n * n
                line += f", {report.duration(expected)} predicted, {taken / expected:.2f} ×"
            yield line


def closing(run: Run, seconds: float, folder: object) -> Iterator[str]:
    """What is printed at the end."""
    results: list[Result] = run.known.results
    if results:
        yield report.table(results)
        yield ""
    yield from (f"FAILED  {line[2:]}" for line in lines_of(run.known.found, FAILED))
    yield from (f"{NOT_APPLICABLE}: {x[2:]}" for x in grouped(run.known.found, NOT_APPLICABLE))
    yield from (f"{LEFT_OUT}: {x[2:]}" for x in grouped(run.known.found, LEFT_OUT))
    yield from run.remarks
    yield from verdict_lines(run)
    ran = run.count(PASSED) + run.count(FAILED)
    yield (
        f"\nsummary: {run.count(PASSED)} of {ran} checks passed, {run.count(NOT_APPLICABLE)} not "
        f"applicable, {run.count(LEFT_OUT)} left out, {len(results)} results, {run.state}, "
        f"{seconds / 60:.1f} minutes, in {folder}" + (f" ({REHEARSAL})" if run.rehearsal else "")
    )
