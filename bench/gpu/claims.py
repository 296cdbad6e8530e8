"""What the losses are said to reach on a GPU, as data, and what the results say to that.

The figures are those of the design for an H200. A slower device misses a claim by as much as it is
slower: the rates measured on it stand beside.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from ..record import Result
from .outcome import FAILED, PASSED, Found

HELD, MISSED, UNKNOWN = "held", "missed", "not measured"


@dataclass(frozen=True)
class Verdict:
    claim: str
    word: str  # HELD, MISSED or UNKNOWN
    detail: str


@dataclass
class Known:
    """All that has been found; `scale` is by which a rehearsal divides every N."""

    results: list[Result] = field(default_factory=list)
    found: list[Found] = field(default_factory=list)
    rates: dict[str, float] = field(default_factory=dict)
    scale: int = 1
    widest: int = 1 << 20

    def result(self, case: str, contender: str, n: int, d: int, dtype: str) -> Result | None:
        key = (case, contender, max(8, n // self.scale), min(d, self.widest), dtype)
        return next((x for x in reversed(self.results) if x.key == key), None)


Figure = Callable[["Claim", Known], "float | str"]  # a number, or why there is none


@dataclass(frozen=True)
class Claim:
    name: str
    case: str
    n: int
    d: int
    dtype: str
    figure: Figure
    limit: float
    unit: str
    least: bool = False  # the limit is the least that it may be, not the most


def of(contender: str, attribute: str) -> Figure:
    """A number of a result."""

    def figure(claim: Claim, known: Known) -> float | str:
        return number(known, claim, contender, attribute)

    return figure


def number(known: Known, claim: Claim, contender: str, attribute: str) -> float | str:
    result = known.result(claim.case, contender, claim.n, claim.d, claim.dtype)
    if result is None:
        return f"{contender} was not run"
    if result.status != "ok":
        return f"{contender}: {result.status}, {result.detail}"
    value = getattr(result, attribute)
    return f"{contender} has no {attribute}" if value is None else float(value)


def ratio(over: str, under: str) -> Figure:
    """Of two times."""

    def figure(claim: Claim, known: Known) -> float | str:
        a, b = (number(known, claim, who, "p50") for who in (over, under))
        if isinstance(a, str):
            return a
        return b if isinstance(b, str) else a / b

    return figure


def of_copy_bandwidth(claim: Claim, known: Known) -> float | str:
    """The block in bfloat16 read once and written once, of what a copy reaches."""
    taken = number(known, claim, "ours", "p50")
    if isinstance(taken, str):
        return taken
    if "memory" not in known.rates:
        return "the bandwidth of a copy was not measured"
    n = max(8, claim.n // known.scale)
    return 4.0 * n * n / taken / known.rates["memory"]


RKDO, TIME = "rkdo_loss", of("ours", "p50")
CLAIMS = (
    Claim("RKDO 64×64: a call", RKDO, 64, 64, "bf16", of("ours", "wall"), 40e-6, "s"),
    Claim("RKDO 64×64: in a CUDA graph", RKDO, 64, 64, "bf16", of("ours, graph", "p50"),
          6e-6, "s"),
    Claim("RKDO 4096×64: time", RKDO, 4096, 64, "bf16", TIME, 0.06e-3, "s"),
    Claim("RKDO 4096×64: memory", RKDO, 4096, 64, "bf16", of("ours", "peak_bytes"), 10e6, "B"),
    Claim("RKDO 65536×64: time", RKDO, 65536, 64, "bf16", TIME, 9e-3, "s"),
    Claim("RKDO 65536×512: time", RKDO, 65536, 512, "bf16", TIME, 50e-3, "s"),
    Claim("RKDO 65536×512: memory", RKDO, 65536, 512, "bf16", of("ours", "peak_bytes"),
          0.3e9, "B"),
    Claim("depth 8 ÷ depth 1, 16384×64", "depth", 16384, 64, "bf16",
          ratio("ours depth 8", "ours depth 1"), 1.15, "×"),
    Claim("CLIP 65536×512 against Inf-CL", "clip", 65536, 512, "bf16", ratio("inf-cl", "ours"),
          8.0, "×", least=True),
    Claim("dense field in bf16, 16384×64: of a copy's bandwidth", "field_dense_bf16", 16384, 64,
          "bf16", of_copy_bandwidth, 0.85, "", least=True),
)  # fmt: skip


def judged(claim: Claim, known: Known) -> Verdict:
    """The factor that it is missed by is how much worse it is than its limit."""
    value = claim.figure(claim, known)
    if isinstance(value, str):
        return Verdict(claim.name, UNKNOWN, value)
    missed_by = claim.limit / value if claim.least else value / claim.limit
    sign = "≥" if claim.least else "≤"
    detail = f"{quantity(value, claim.unit)}, {sign} {quantity(claim.limit, claim.unit)} wanted"
    if missed_by <= 1:
        return Verdict(claim.name, HELD, detail)
    return Verdict(claim.name, MISSED, f"by {missed_by:.2f} ×: {detail}")


def quantity(value: float, unit: str) -> str:
    if unit in ("", "×"):
        return f"{value:.2f} {unit}".strip()
    for scale, prefix in ((1e9, "G"), (1e6, "M"), (1.0, ""), (1e-3, "m"), (1e-6, "µ")):
        if abs(value) >= scale:
            return f"{value / scale:.3g} {prefix}{unit}"
    return f"{value:.1e} {unit}"


def of_checks(stage: str, found: Iterable[Found]) -> Verdict:
    """That every check of a stage passes is a claim too."""
    among = [x for x in found if x.stage == stage]
    ran = [x for x in among if x.verdict in (PASSED, FAILED)]
    failed = [x for x in ran if x.verdict == FAILED]
    name = f"{stage}: every check passes"
    if not ran:
        why = next((x.detail for x in among if x.detail), "none was run")
        return Verdict(name, UNKNOWN, why)
    detail = f"{len(ran) - len(failed)} of {len(ran)} passed"
    if rest := len(among) - len(ran):
        detail += f", {rest} not run or not applicable"
    return Verdict(name, MISSED if failed else HELD, detail)


def verdicts(known: Known, stages: Iterable[str]) -> list[Verdict]:
    return [
        *(of_checks(stage, known.found) for stage in stages),
        *(judged(claim, known) for claim in CLAIMS),
    ]
