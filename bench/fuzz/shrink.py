"""Makes a failing case smaller while it still fails in the same way, and writes it as a snippet."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from .cases import Case
from .judge import arguments_of, judge
from .yardstick import Miss, alike

TRIES = 200
LITERAL = 48  # numbers that a snippet spells out

PLAIN = {  # what a setting becomes if it does not matter
    "layouts": ("contiguous", "contiguous"), "specials": (), "tiles": None, "learnable": "",
    "frozen": "", "upstream": "ones", "reduction": "none", "length": 1.0, "centre": 0.0,
    "place": "sphere", "pairs": "independent", "bound": 1.0, "temperature": 0.5,
    "dtype": "float32", "second": False, "backend": "tiled", "splits": 1, "single": True,
}  # fmt: skip
SETTINGS = {
    "alpha": 0.5, "depth": 1, "cooling": 0.0, "detach_target": False, "debias": 0.0,
    "kernel": "gaussian", "exclude_self": False, "symmetric": False, "degree": 0,
}  # fmt: skip


def shrink(
    case: Case, miss: Miss, judged: Callable[[Case], Miss | None] = judge, tries: int = TRIES
) -> tuple[Case, Miss]:
    """The smallest case found, and how it fails."""
    smaller = True
    while smaller and tries > 0:
        smaller = False
        for candidate in candidates(case):
            tries -= 1
            if tries < 0:
                break
            try:
                found = judged(candidate)
            except Exception:  # what cannot be judged is no smaller case
                continue
            if found is not None and alike(found, miss):
                case, miss, smaller = candidate, found, True
                break
    return case, miss


def candidates(case: Case) -> Iterator[Case]:
    """Simpler cases, those that save most first."""
    for n in sorted({1, 2, case.n // 4, case.n // 2, case.n - 1}):
        if 0 < n < case.n:
            for first in (case.first, case.first + case.n - n):
                yield case.but(n=n, first=first)
    for others in sorted({0, 1, case.others // 2, case.others - 1}):
        if 0 <= others < case.others and others >= least_others(case):
            yield case.but(others=others, offset=min(case.offset, others))
    for d in sorted({1, 2, case.d // 4, case.d // 2, case.d - 1}):
        if 0 < d < case.d and d > largest_special(case):
            yield case.but(d=d)
    if case.specials:
        for k in range(len(case.specials)):
            yield case.but(specials=case.specials[:k] + case.specials[k + 1 :])
    for name, value in PLAIN.items():
        if getattr(case, name) != value and allowed(case, name):
            yield case.but(**{name: value})
    for name, value in case.settings.items():
        plain = SETTINGS[name]
        if value != plain and not (name == "exclude_self" and case.loss == "info_nce"):
            yield case.but(settings={**case.settings, name: plain})
    if case.settings.get("depth", 1) > 2:
        yield case.but(settings={**case.settings, "depth": case.settings["depth"] // 2})
    if case.offset > least_others(case):
        yield case.but(offset=least_others(case))
    for rounded in (float(f"{case.temperature:.1g}"), float(f"{case.temperature:.2g}")):
        if rounded != case.temperature:
            yield case.but(temperature=rounded)


def least_others(case: Case) -> int:
    return int(case.loss == "info_nce" and bool(case.settings.get("exclude_self")))


def largest_special(case: Case) -> int:
    """A special entry's column must stay."""
    columns = [
        row % case.drawn[2]
        for _, row, what in case.specials
        if what not in ("zero", "tiny", "huge", "twin")
    ]
    return 0 if not columns else max(row for _, row, _ in case.specials)


def allowed(case: Case, name: str) -> bool:
    if name == "reduction":
        return not case.loss.startswith("similarity") and case.backend != "one_pass"
    if name == "bound":
        return case.loss != "similarity_moments" and case.length <= 1 and not case.centre
    return not (name == "backend" and case.backend == "reference")


# ---- as a snippet --------------------------------------------------------------------------------


def snippet(case: Case, miss: Miss) -> str:
    """Python that calls what fails, and says what came out."""
    arguments = {"temperature": case.temperature, **arguments_of(case)}
    if case.learnable:
        arguments["temperature"] = "temperature"
    shown = ", ".join(
        f"{name}={value if value == 'temperature' else repr(value)}"
        for name, value in arguments.items()
    )
    lines = ["import torch", f"from rkdo_kernels import {case.loss}"]
    queries, keys = case.inputs()
    dtype = f"torch.{case.dtype}"
    if queries.numel() + keys.numel() <= LITERAL and set(case.layouts) == {"contiguous"}:
        for name, x in (("queries", queries), ("keys", keys)):
            lines.append(f"{name} = torch.tensor({numbers(x)}, dtype={dtype})")
    else:
        lines += ["from bench.fuzz.cases import Case", f"queries, keys = {case!r}.inputs()"]
    if case.backend != "small" and case.loss == "rkdo_loss":
        lines.append("from rkdo_kernels import small; small.MAX_ENTRIES = 0")
    wanted = [name for name in ("queries", "keys") if name != case.frozen]
    lines += [f"{name}.requires_grad_()" for name in wanted]
    if case.learnable:
        lines.append(
            f"temperature = torch.tensor({case.temperature!r}, dtype=torch.{case.learnable}, "
            "requires_grad=True)"
        )
        wanted.append("temperature")
    lines.append(f"loss = {case.loss}(queries, keys, {shown})")
    upstream = (
        "torch.ones_like(loss)" if case.upstream == "ones" else f"({numbers(case.weights())})"
    )
    if case.upstream != "ones":
        upstream = f"torch.tensor{upstream}.to(loss.dtype)"
    lines.append(f"loss.backward({upstream})")
    lines.append(f"print(loss, {', '.join(f'{name}.grad' for name in wanted)})")
    lines.append(f"# {miss.kind}: {miss.detail}")
    lines.append(f"# python -m bench fuzz --case {case.seed}, or judge({case!r})")
    return "\n".join(lines)


def numbers(x: Tensor) -> str:
    """A nested list whose entries give the same numbers when they are read."""
    text = repr(x.to(torch.float64).tolist())
    return text.replace("nan", "float('nan')").replace("inf", "float('inf')")
