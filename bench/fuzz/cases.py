"""A case: everything that a call of a loss is made of, drawn at random from a seed.

Rows are drawn once, in their full number, and a case takes a window of them, so that a case can
shrink without its rows becoming others.
"""

from __future__ import annotations

import dataclasses
import math
import random
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

LOSSES = (
    "rkdo_loss", "icon_loss", "info_nce", "nt_xent", "similarity_logsumexp", "similarity_moments",
)  # fmt: skip
ON_CPU = ("tiled", "small", "one_pass", "reference")
EXECUTED = ("sm_90", "sm_80")  # the target's compiled kernels, executed on a CPU
KERNELS = ("triton", *EXECUTED)
BACKENDS = (*ON_CPU, *KERNELS)
DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
PLACES = ("sphere", "collapsed", "plane", "clusters")
PAIRS = ("independent", "correlated", "aligned", "identical", "antipodal", "rolled")
SPECIALS = ("zero", "tiny", "huge", "nan", "inf", "-inf", "twin")
HUGE, HUGE_HALF = 1e18, 1e3  # times a row; the latter in float16
LAYOUTS = (
    "contiguous", "transposed", "strided rows", "strided columns", "offset storage", "wide rows",
    "one row expanded",
)  # fmt: skip
UPSTREAM = ("random", "ones", "one-hot", "zero", "huge")
INTERPRETED = 40  # rows, keys and columns, at most, where Triton's interpreter runs


@dataclass(frozen=True)
class Case:
    """One call; a field that has its default is not shown."""

    seed: int
    loss: str = "rkdo_loss"
    backend: str = "tiled"
    dtype: str = "float32"
    n: int = 8  # queries
    others: int = 0  # keys that are nobody's positive
    d: int = 8
    offset: int = 0  # how many of the others come first
    drawn: tuple[int, int, int] = (8, 0, 8)  # n, others, d as they were drawn
    first: int = 0  # query of the window
    place: str = "sphere"
    pairs: str = "independent"
    length: float = 1.0  # of a row
    centre: float = 0.0  # how far from the origin, for Student's t
    specials: tuple[tuple[str, int, str], ...] = ()  # (queries or keys, row as drawn, what)
    layouts: tuple[str, str] = ("contiguous", "contiguous")
    temperature: float = 0.5
    learnable: str = ""  # dtype of a tensor temperature
    bound: float | None = 1.0
    reduction: str = "none"
    upstream: str = "random"
    frozen: str = ""  # queries or keys
    tiles: tuple[int, int] | None = None  # rows and columns of a tile, where not the house's own
    single: bool = True  # executed: one launch does all, where the batch is small enough
    splits: int = 1  # executed: programs that share a walk
    settings: dict[str, Any] = field(default_factory=dict)
    second: bool = False  # a second derivative too (reference)

    def __repr__(self) -> str:
        shown = [
            f"{f.name}={getattr(self, f.name)!r}"
            for f in dataclasses.fields(self)
            if f.name == "seed" or getattr(self, f.name) != default_of(f)
        ]
        return f"Case({', '.join(shown)})"

    def but(self, **changes: Any) -> Case:
        return dataclasses.replace(self, **changes)

    @property
    def m(self) -> int:
        return self.n + self.others

    @property
    def rows(self) -> int:  # of the loss
        return 2 * self.n if self.loss == "nt_xent" else self.n

    def inputs(self) -> tuple[Tensor, Tensor]:
        """queries [n, d] and keys [m, d], as they lie in memory."""
        generator = torch.Generator().manual_seed(self.seed)
        n, others, d = self.drawn
        queries, keys, rest = placed(self.place, (n, others, d), generator)
        noise = torch.randn(n, d, generator=generator, dtype=torch.float64) / math.sqrt(d)
        if self.pairs == "correlated":
            keys = queries + 0.8 * noise
        elif self.pairs == "aligned":
            keys = queries + 0.03 * noise
        elif self.pairs == "identical":
            keys = queries.clone()
        elif self.pairs == "antipodal":
            keys = -queries
        elif self.pairs == "rolled":
            queries = normalize(keys, dim=1).roll(1, 0) + 0.3 * noise * math.sqrt(d)
        queries, keys, rest = (
            self.length * normalize(x[:, : self.d], dim=1) for x in (queries, keys, rest)
        )
        for name, row, what in self.specials:
            make_special(queries if name == "queries" else keys, row, what, DTYPES[self.dtype])
        window = slice(self.first, self.first + self.n)
        rest = rest[: self.others]
        keys = torch.cat([rest[: self.offset], keys[window], rest[self.offset :]])
        pair = [(x + self.centre).to(DTYPES[self.dtype]) for x in (queries[window], keys)]
        queries, keys = (laid_out(x, name) for x, name in zip(pair, self.layouts, strict=True))
        return queries, keys

    def longest_beside(self, name: str) -> float:
        """What finite special rows of the other argument are longer by than `length`."""
        huge = HUGE_HALF if self.dtype == "float16" else HUGE
        made = [
            row for which, row, what in self.specials
            if what == "huge" and (which != name or self.loss == "nt_xent")
        ]  # fmt: skip
        return huge ** max((made.count(row) for row in made), default=0)

    def temperature_tensor(self) -> Tensor | None:
        if not self.learnable:
            return None
        return torch.tensor(self.temperature, dtype=DTYPES[self.learnable])

    def weights(self) -> Tensor:  # [rows] or [], float64: ∂L/∂value
        shape = [] if self.reduction != "none" else [self.rows]
        if self.loss == "similarity_moments":
            shape = [self.rows, self.settings["degree"] + 1]
        generator = torch.Generator().manual_seed(self.seed + 1)
        w = torch.rand(shape, generator=generator, dtype=torch.float64) * 2 - 1
        if self.upstream == "ones":
            return torch.ones_like(w)
        if self.upstream == "zero":
            return torch.zeros_like(w)
        if self.upstream == "one-hot":
            one = torch.zeros_like(w)
            one.view(-1)[self.seed % max(1, w.numel())] = 1
            return one
        return w * 1e8 if self.upstream == "huge" else w


def default_of(f: dataclasses.Field) -> Any:
    return {} if f.name == "settings" else f.default


def placed(
    place: str, shape: tuple[int, int, int], generator: torch.Generator
) -> list[Tensor]:  # [n, d], [n, d], [others, d]
    n, others, d = shape
    x = torch.randn(2 * n + others, d, generator=generator, dtype=torch.float64)
    if place == "collapsed":  # a cosine of about .999 between any two
        x = normalize(x, dim=1) * math.sqrt(0.001)
        x[:, 0] += 1
    elif place == "plane":
        x[:, 2:] = 0
    elif place == "clusters":
        x = x[torch.randint(0, 3, (len(x),), generator=generator).clamp_max(len(x) - 1)] + 0.1 * x
    return list(x.split([n, n, others]))


def make_special(x: Tensor, row: int, what: str, dtype: torch.dtype) -> None:
    wide = dtype in (torch.float32, torch.bfloat16, torch.float64)
    if what == "zero":
        x[row] = 0
    elif what == "tiny":
        x[row] *= 1e-30 if wide else 1e-6
    elif what == "huge":
        x[row] *= HUGE if wide else HUGE_HALF
    elif what == "twin":
        x[row] = x[(row + 1) % len(x)]
    else:
        x[row, row % x.shape[1]] = float(what)


def laid_out(x: Tensor, layout: str) -> Tensor:
    if layout == "transposed":
        return x.T.contiguous().T
    if layout == "strided rows":
        return x.repeat_interleave(2, 0)[::2]
    if layout == "strided columns":
        return x.repeat_interleave(3, 1)[:, ::3]
    if layout == "offset storage":
        return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)
    if layout == "wide rows":  # what lies beside a row is NaN
        return torch.cat([x, x.new_full((len(x), 3), torch.nan)], 1)[:, : x.shape[1]]
    if layout == "one row expanded":
        return x[:1].expand_as(x)
    return x


# ---- at random -----------------------------------------------------------------------------------


def draw(seed: int, losses: tuple[str, ...], backends: tuple[str, ...], largest: int) -> Case:
    """The case of a seed; `largest` bounds its rows and columns."""
    r = random.Random(seed)
    loss, backend = r.choice(losses), r.choice(backends)
    if backend in ("small", "one_pass"):
        loss = "rkdo_loss" if "rkdo_loss" in losses else loss
    dtype = r.choices(list(DTYPES), [5, 2, 1, 1 if backend not in KERNELS else 0])[0]
    if (backend == "one_pass" and dtype == "float64") or backend == "reference":
        dtype = "float32"  # reference.py's half precision is eager's own
    if backend == "triton":
        largest = min(largest, INTERPRETED)
    n, others, d = (size(r, largest) for _ in range(3))
    others = others if r.random() < 0.3 else 0
    square = loss == "nt_xent"
    settings = settings_of(r, loss)
    if square or settings.get("symmetric"):
        others = 0
    offset = r.randint(0, others)
    if settings.get("exclude_self") and loss == "info_nce":
        others, offset = max(others, 1), max(offset, 1)
    case = Case(
        seed, loss, backend, dtype, n, others, d, offset, (n, others, d),
        place=r.choices(PLACES, [6, 2, 1, 1])[0], pairs=r.choices(PAIRS, [4, 3, 2, 1, 1, 2])[0],
        temperature=temperature_of(r), settings=settings,
        reduction="none" if loss.startswith("similarity") else r.choice(("none", "mean", "sum")),
        upstream=r.choices(UPSTREAM, [8, 3, 2, 1, 1])[0],
        frozen=r.choices(("", "queries", "keys"), [6, 1, 1])[0],
        layouts=tuple(r.choices(LAYOUTS, [9, 1, 1, 1, 1, 1, 1])[0] for _ in range(2)),
    )  # fmt: skip
    return suited(lengthened(case, r), r)


def size(r: random.Random, largest: int) -> int:
    """1 to `largest`, small ones and powers of two ± 1 more often."""
    if r.random() < 0.25:
        near = 2 ** r.randint(0, max(1, int(math.log2(largest)))) + r.randint(-1, 1)
        return min(max(1, near), largest)
    return max(1, int(largest ** r.random()))


def temperature_of(r: random.Random) -> float:
    if r.random() < 0.5:
        return r.choice((0.5, 0.2, 0.1, 0.07, 0.05, 0.03, 0.025, 0.01, 1.0, 1e-3, 50.0))
    return float(f"{10 ** r.uniform(-3, 1.7):.3g}")


def settings_of(r: random.Random, loss: str) -> dict[str, Any]:
    if loss == "rkdo_loss":
        return {
            "alpha": r.choice((0.0, 1.0, 0.5, 1e-3, 1e-30, 1e-310, 5e-324, round(r.random(), 3))),
            "depth": r.choices((1, 2, 3, 5, 8, 16), [2, 2, 4, 2, 1, 1])[0],
            "cooling": r.choice((0.0, 0.1, 0.3, 0.9, 0.999, round(r.random() * 0.9, 3))),
            "detach_target": r.random() < 0.3,
        }
    if loss == "icon_loss":
        return {
            "debias": r.choice((0.0, 0.2, 0.99, 0.999, 1.0, round(r.random(), 3))),
            "kernel": r.choice(("gaussian", "student")),
        }
    if loss == "info_nce":
        kind = r.choice(("", "", "exclude_self", "symmetric"))
        return {kind: True} if kind else {}
    if loss == "similarity_moments":
        return {"degree": r.choice((0, 1, 2, 4, 7)), "exclude_self": r.random() < 0.3}
    if loss == "similarity_logsumexp":
        return {"exclude_self": r.random() < 0.4}
    return {}


def lengthened(case: Case, r: random.Random) -> Case:
    """With rows of other lengths, special ones, and a bound that goes with them."""
    length = r.choices((1.0, 1.2, 3.0, 0.01, 1e-5), [12, 2, 1, 1, 1])[0]
    specials: tuple[tuple[str, int, str], ...] = ()
    if r.random() < 0.25:
        specials = tuple(
            (r.choice(("queries", "keys")), r.randrange(case.n), r.choice(SPECIALS))
            for _ in range(r.randint(1, 2))
        )
    bound: float | None = 1.0
    if length > 1:
        bound = round(length**2 * r.choice((1.0, 1.5)), 6)
        if r.random() < 0.15:
            bound = 1.0  # which the rows break
    if r.random() < 0.3 or any(s[2] in ("huge", "inf", "-inf") for s in specials):
        bound = None
    centre = 0.0
    if case.settings.get("kernel") == "student" and r.random() < 0.3:
        length, centre, bound = r.choice((1.0, 5.0)), r.choice((3.0, 30.0)), None
    learnable = ""
    if r.random() < 0.25:
        learnable = "float32" if r.random() < 0.5 or case.dtype != "float64" else "float64"
    return case.but(
        length=length, specials=specials, bound=bound, centre=centre, learnable=learnable
    )


def suited(case: Case, r: random.Random) -> Case:
    """What the functions do not take, and what would take too long, is changed."""
    if case.loss == "similarity_moments" and case.bound is None:
        case = case.but(bound=round(1.1 * case.length**2, 12), specials=())
    if case.backend == "one_pass":
        bound = case.bound or 1.0
        case = case.but(
            temperature=max(case.temperature, 0.05 * bound), learnable="", reduction="mean",
            bound=bound, specials=(), frozen="",
        )  # fmt: skip
    if case.backend in ("tiled", "one_pass", "triton") and r.random() < 0.5:
        case = case.but(tiles=r.choice(((16, 32), (32, 16))))
    if case.settings.get("kernel") == "student":  # whose truth takes n · m · d numbers
        most = max(1, int(3e5 / (case.n * case.m)))
        if case.d > most:
            case = case.but(d=most, drawn=(*case.drawn[:2], most))
    if case.backend in EXECUTED:
        case = case.but(single=r.random() < 0.5, splits=r.choice((1, 1, 2, 3)))
    if case.backend == "reference" and r.random() < 0.3 and bears_second(case):
        case = case.but(second=True, specials=(), centre=0.0)
    return case


def bears_second(case: Case) -> bool:
    """Whether RKDO's second derivative is a number, and not 0, in the reference's float32: it takes
    ∂L/∂loss · ∂² (p log p) = 1 / p, of p down to 1e-38; and with alpha=1 and cooling=0 p is q."""
    nothing = case.settings.get("alpha") == 1 and case.settings.get("cooling") == 0
    return not nothing and not (case.loss == "rkdo_loss" and case.upstream == "huge")
