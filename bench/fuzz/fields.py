"""Sequences of a response field's calls, beside a field that is a plain matrix or a list of visits.

Every loss is held to the truth twice: given what the field stores (which is all that bfloat16 can
be held to), and, in float32 and float64, given every call since the field was made, where an eager
float32 field is what it may err by.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import normalize

from rkdo_kernels import ResponseField, reference

from .cases import DTYPES, KERNELS
from .compiled import called, executed
from .judge import DRAWS, FIRST, NEAR
from .truth import Rounding, log_softmax
from .yardstick import FLOAT64_ULPS, Miss, alike

F64 = torch.float64
CALLS = ("step", "loss", "update")
ROW_SLACK = {"float32": 1e-6, "bfloat16": 0.02, "float64": 1e-12}  # what rows add up to, about 1


@dataclass(frozen=True)
class Call:
    what: str
    samples: tuple[int, ...]
    alpha: float
    temperature: float
    pairs: str
    seed: int


@dataclass(frozen=True)
class FieldCase:
    seed: int
    kind: str
    stored: str
    backend: str
    dtype: str
    n: int
    d: int
    history: int
    initial: str
    reduction: str
    calls: tuple[Call, ...]

    @property
    def loss(self) -> str:
        return f"field {self.kind}"


def draw(seed: int, backends: tuple[str, ...], largest: int) -> FieldCase:
    r = random.Random(seed)
    kernels = [name for name in KERNELS if name in backends]
    backend = "tiled"
    if kernels and ("tiled" not in backends or r.random() < 0.5):
        backend = kernels[0] if len(kernels) == 1 else r.choice(kernels)
    n = max(1, int(min(largest, 24 if backend == "triton" else largest) ** r.uniform(0.2, 1)))
    kind = r.choice(("dense", "snapshot"))
    stored = r.choice(("float32", "float32", "bfloat16"))
    if backend == "tiled" and kind == "dense" and r.random() < 0.15:
        stored = "float64"
    calls = []
    for k in range(r.randint(1, 4)):
        size = r.randint(1, n)
        start = r.randint(0, n - size)
        chosen = r.sample(range(n), size) if r.random() < 0.6 else range(start, start + size)
        calls.append(
            Call(
                r.choice(CALLS), tuple(chosen), r.choice((0.0, 0.5, 0.9, 1.0, 0.15, 0.01)),
                r.choice((0.5, 0.2, 1 / 30, 0.05, 0.01, 1.0, 5.0)),
                r.choice(("independent", "correlated", "identical", "antipodal", "swapped")), k,
            )
        )  # fmt: skip
    calls.append(replace(calls[-1], what="loss", temperature=1.0))
    dtype = r.choice(("float32", "float32", "bfloat16", "float16"))
    if stored == "float64":
        dtype = "float64"
    return FieldCase(
        seed, kind, stored, backend, dtype, n, r.randint(1, 24), r.randint(1, 4),
        r.choice(("identity", "labels")), r.choice(("none", "mean", "sum")), tuple(calls),
    )  # fmt: skip


def embeddings(case: FieldCase, call: Call, draw: int = 0) -> tuple[Tensor, Tensor]:
    """A draw but the first differs in the last place, or three digits, that eager's dtype has."""
    generator = torch.Generator().manual_seed(1000 * case.seed + call.seed)
    shape = (2, len(call.samples), case.d)
    queries, keys = normalize(torch.randn(shape, generator=generator, dtype=torch.float64), dim=2)
    if call.pairs == "correlated":
        keys = normalize(queries + 0.5 * keys, dim=1)
    elif call.pairs == "identical":
        keys = queries.clone()
    elif call.pairs == "antipodal":
        keys = -queries
    elif call.pairs == "swapped":
        keys = queries.roll(1, 0)
    queries, keys = queries.to(DTYPES[case.dtype]), keys.to(DTYPES[case.dtype])
    if not draw:
        return queries, keys
    generator.manual_seed(draw)
    wide = torch.float64 if case.dtype == "float64" else torch.float32
    near = torch.finfo(wide).eps * (1 if draw % 2 else NEAR)
    queries, keys = (
        x.to(wide) * (1 + near * torch.randn(x.shape, generator=generator)).to(wide)
        for x in (queries, keys)
    )
    return queries, keys


def normalised(case: FieldCase, p: Tensor) -> Tensor:
    """A row whose mass is no normal number of what the field's rows are kept in has no target."""
    kept = torch.float64 if case.stored == "float64" else torch.float32
    mass = p.sum(1, keepdim=True)
    return torch.where(mass >= torch.finfo(kept).tiny, p / mass, 0)


def labels_of(case: FieldCase) -> Tensor:
    return torch.arange(case.n) % max(1, case.n // 3)


class Plain:
    """The field by its definition, in one dtype."""

    def __init__(self, case: FieldCase, dtype: torch.dtype) -> None:
        self.case, self.dtype = case, dtype
        p = torch.eye(case.n, dtype=dtype)
        if case.initial == "labels":
            labels = labels_of(case)
            p = (labels[:, None] == labels).to(dtype)
            p /= p.sum(1, keepdim=True)
        self.p, self.start = p, p.clone()
        self.visits: list[list[tuple]] = [[] for _ in range(case.n)]

    def block(self, samples: tuple[int, ...]) -> Tensor:  # p̂
        index = torch.tensor(samples)
        dense = self.case.kind == "dense"
        p = self.p[index[:, None], index] if dense else self.mixture(samples)
        return normalised(self.case, p)

    def mixture(self, samples: tuple[int, ...]) -> Tensor:
        """Σ_s α_s Π_{r<s} (1 − α_r) q_i^(s) + what is left of p⁰, row by row."""
        index = torch.tensor(samples)
        p = torch.zeros(len(samples), len(samples), dtype=self.dtype)
        rest = torch.ones(len(samples), 1, dtype=self.dtype)
        for s in range(self.case.history):
            have = [k for k, i in enumerate(samples) if len(self.visits[i]) > s]
            if not have:
                break
            visits = [self.visits[samples[k]][s] for k in have]
            queries, keys = (torch.stack([visit[k] for visit in visits]) for k in (0, 1))
            alpha, tau = torch.tensor([v[2:] for v in visits], dtype=self.dtype).T[:, :, None]
            here = torch.tensor(have)
            q = torch.softmax(queries @ keys.T / tau, 1)
            p[here[:, None], here] += rest[here] * alpha * q
            rest[here] *= 1 - alpha
        start = self.start[index[:, None], index]
        mass = start.sum(1, keepdim=True)
        return p + torch.where(mass > 0, rest * start / mass, 0)

    def update(self, call: Call, queries: Tensor, keys: Tensor) -> None:
        index = torch.tensor(call.samples)
        if self.case.kind == "dense":
            here = index[:, None], index
            self.p[here] = reference.field_update(
                self.p[here], queries, keys, alpha=call.alpha, temperature=call.temperature
            )
            return
        kept = [x.to(DTYPES[self.case.stored]).to(self.dtype) for x in (queries, keys)]
        for i, query, key in zip(call.samples, *kept, strict=True):
            visit = (query, key, call.alpha, call.temperature)
            self.visits[i] = [visit, *self.visits[i]][: self.case.history]


def judge(case: FieldCase) -> Miss | None:
    """The first miss of a sequence; where one draw of eager's rounding is missed, of many."""
    miss = first_miss(case, 1)
    for draws in (FIRST, DRAWS):
        miss = first_miss(case, draws) if miss and "error" in miss.kind else miss
    return miss


def first_miss(case: FieldCase, draws: int) -> Miss | None:
    field = make(case)
    exact = torch.float64 if case.stored == "float64" else torch.float32
    drawn = [(Plain(case, torch.float64), Plain(case, exact)) for _ in range(draws)]
    misses: list[Miss | None] = []
    for call in case.calls:
        index = torch.tensor(call.samples)
        stored = field.rows(index)[:, index].double() if case.kind == "dense" else None
        given = [[plain.block(call.samples) for plain in pair] for pair in drawn]
        try:
            with executed(case.backend) as violated:
                ours = made(case, call, field, index)
        except Exception as error:
            return Miss(f"raises {type(error).__name__}", str(error).splitlines()[0][:200])
        if violation := violated():
            return violation
        if ours and stored is not None:
            same = [[stored, stored.to(exact)]] * draws
            misses.append(held(case, call, ours, same, "given what is stored"))
        if ours and (case.stored != "bfloat16" or case.kind == "snapshot"):
            misses.append(held(case, call, ours, given, "over the sequence"))
        if miss := next((m for m in misses if m and not m.at_the_edge), None):
            return miss
        if call.what == "loss":
            continue
        for draw, pair in enumerate(drawn):
            for plain in pair:
                plain.update(call, *(x.to(plain.dtype) for x in embeddings(case, call, draw)))
        if case.kind == "dense":
            away = float((field.rows(slice(0, case.n)).double().sum(1) - 1).abs().max())
            if not away <= ROW_SLACK[case.stored]:
                return Miss("rows: sum", f"{away:.3g} from 1")
    return next((miss for miss in misses if miss), None)


def made(
    case: FieldCase, call: Call, field: ResponseField, index: Tensor
) -> dict[str, Tensor] | None:
    """What a call returns and its gradients; None of an update."""
    arguments = {"temperature": call.temperature, "backend": called(case.backend)}
    leaves = [x.clone().requires_grad_() for x in embeddings(case, call)]
    if call.what == "update":
        field.update(*leaves, index, alpha=call.alpha, **arguments)
        return None
    more = {"alpha": call.alpha} if call.what == "step" else {}
    function = getattr(field, call.what)
    loss = function(*leaves, index, reduction=case.reduction, **more, **arguments)
    gradients = torch.autograd.grad((weights(case, call, loss) * loss.double()).sum(), leaves)
    return {"value": loss.detach(), "queries": gradients[0], "keys": gradients[1]}


def make(case: FieldCase) -> ResponseField:
    initial = "identity" if case.initial == "identity" else labels_of(case)
    stored = DTYPES[case.stored]
    if case.kind == "dense":
        return ResponseField.dense(case.n, dtype=stored, initial=initial)
    return ResponseField.snapshot(
        case.n, case.d, history=case.history, dtype=stored, initial=initial
    )


def weights(case: FieldCase, call: Call, loss: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(case.seed + call.seed)
    return torch.rand(loss.shape, generator=generator, dtype=torch.float64) * 2 - 1


def held(
    case: FieldCase,
    call: Call,
    ours: dict[str, Tensor],
    blocks: list[list[Tensor]],  # by draw: the true one, and eager's
    which: str,
) -> Miss | None:
    """`ours` against the loss of the true block in float64, beside the eager one's."""
    wide = torch.float64 if case.dtype == "float64" else torch.float32
    draws = [
        (
            plain_loss(case, call, true, F64, draw),
            plain_loss(case, call, eager.to(wide), wide, draw),
        )
        for draw, (true, eager) in enumerate(blocks)
    ]
    for name, exact in draws[0][0].items():
        found = ours[name].double()
        here = torch.isfinite(exact)
        if not bool(torch.isfinite(found[here]).all()):
            return Miss(f"{name}: not finite", which)
        error = largest(found - exact)
        dtype = ours[name].dtype
        eagers = max(largest(x[name].to(dtype).double() - true[name]) for true, x in draws)
        size, info = largest(exact), torch.finfo(ours[name].dtype)
        rounding = FLOAT64_ULPS * torch.finfo(torch.float64).eps * max(1 / call.temperature, size)
        limit = 2 * eagers + info.eps * size + rounding + info.smallest_normal
        if not error <= limit:
            shaken = rounded_once(case, call, blocks[0][0], wide)[name] if len(blocks) > 1 else 0.0
            return Miss(
                f"{name}: error {which}",
                f"error {error:.3g} passes {limit:.3g}; eager {eagers:.3g}, largest {size:.3g}",
                error / limit,
                error / (len(call.samples) if case.reduction == "sum" else 1)
                if name == "value" and dtype == torch.float32
                else math.inf,
                rounding=error <= limit + 2 * (shaken - eagers),
            )
    return None


def rounded_once(case: FieldCase, call: Call, block: Tensor, wide: torch.dtype) -> dict[str, float]:
    """By how much one rounding of every logit, p and q changes the truth, at most over a few."""
    true = plain_loss(case, call, block, F64)
    largest_of = dict.fromkeys(true, 0.0)
    for seed in range(FIRST):
        rounding = Rounding(torch.finfo(wide).eps / 2, seed)
        found = plain_loss(case, call, block, F64, rounding=rounding)
        for name in true:
            largest_of[name] = max(largest_of[name], largest(found[name] - true[name]))
    return largest_of


def plain_loss(
    case: FieldCase,
    call: Call,
    block: Tensor,
    dtype: torch.dtype,
    draw: int = 0,
    rounding: Rounding | None = None,
) -> dict[str, Tensor]:
    leaves = [x.to(dtype).requires_grad_() for x in embeddings(case, call, draw)]
    p = normalised(case, block)
    logits = leaves[0] @ leaves[1].T / call.temperature
    log_q = log_softmax(logits, 1, rounding)
    if rounding is not None:  # p are q of before, by as large logits
        p = p * (1 + rounding.signs(p) * (1 + logits.detach().abs()))
    rows = torch.where(p == 0, 0, p * (torch.where(p == 0, 1, p).log() - log_q)).sum(1)
    loss = rows if case.reduction == "none" else getattr(rows, case.reduction)()
    w = weights(case, call, loss)
    gradients = torch.autograd.grad((w * loss.double()).sum(), leaves)
    return {"value": loss.detach(), "queries": gradients[0], "keys": gradients[1]}


def largest(x: Tensor) -> float:
    return float(x.abs().max()) if x.numel() else 0.0


def shrink(case: FieldCase, miss: Miss, tries: int = 100) -> tuple[FieldCase, Miss]:
    """Fewer calls, fewer samples a call, plainer settings."""
    smaller = True
    while smaller and tries > 0:
        smaller = False
        for candidate in candidates(case):
            tries -= 1
            found = judge(candidate)
            if found is not None and alike(found, miss):
                case, miss, smaller = candidate, found, True
                break
    return case, miss


def candidates(case: FieldCase) -> Iterator[FieldCase]:
    for k in range(len(case.calls)):
        if len(case.calls) > 1:
            yield replace(case, calls=case.calls[:k] + case.calls[k + 1 :])
    for k, call in enumerate(case.calls):
        for size in (1, 2, 3, len(call.samples) // 2):
            if 0 < size < len(call.samples):
                fewer = replace(call, samples=call.samples[:size])
                yield replace(case, calls=(*case.calls[:k], fewer, *case.calls[k + 1 :]))
    for name, value in (("initial", "identity"), ("reduction", "none"), ("dtype", "float32")):
        if getattr(case, name) != value and case.stored != "float64":
            yield replace(case, **{name: value})
    for d in (1, 2, case.d // 2):
        if 0 < d < case.d:
            yield replace(case, d=d)


def snippet(case: FieldCase, miss: Miss) -> str:
    return (
        "from bench.fuzz.fields import Call, FieldCase, judge\n"
        f"print(judge({case!r}))\n# {miss.kind}: {miss.detail}\n"
        f"# python -m bench fuzz --case {case.seed} --loss field"
    )
