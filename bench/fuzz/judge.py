"""Holds one case to the yardstick.

Of half-precision inputs both are held to what float32 eager makes of the same numbers,
gradients rounded once to the inputs' dtype. Where one draw of eager's rounding is missed, eager's
error is the largest of several: the same sums in another order, and on inputs nearby.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import rkdo_kernels
from rkdo_kernels import launch, one_pass, reference, small
from rkdo_kernels import tiles as machinery

from . import truth
from .cases import DTYPES, EXECUTED, Case
from .compiled import called, executed
from .yardstick import (
    HALF,
    Miss,
    Results,
    all_finite,
    compare,
    errors_of,
    largest,
    moments_bear,
)

FIRST, DRAWS = 12, 48  # draws of eager's rounding; the others where the first leave a miss
NEAR = 4096  # ulps, by which the inputs of another draw may differ

F64 = torch.float64


def judge(case: Case) -> Miss | None:
    """The first miss, or None."""
    queries, keys = case.inputs()
    try:
        with executed(case.backend) as violated:
            ours = evaluate(case, ours_of(case), queries, keys, case.temperature_tensor())
    except Exception as error:  # whatever it is: a crash is a miss, unless it is documented
        return None if is_documented(case, error, queries, keys) else crash(error)
    if violation := violated():
        return violation
    if is_broken(case, queries, keys) > 1.05 and all_finite(ours["value"]):
        return Miss("value: no error", "products pass the bound, and a number came back")
    true, eager = truth_of(case, queries, keys), eager_of(case, queries, keys)
    errors = errors_of(eager, true)
    misses = list(compare(case, ours, eager, true, errors))
    if any("error" in m.kind for m in misses):  # eager may have been lucky, or the truth too coarse
        true = truth_of(case, queries, keys, exact=True)
        inside = rounded_inside(case, queries, keys)
        for draw in range(DRAWS):
            for name, error in another_draw(case, queries, keys, true, draw).items():
                errors[name] = max(errors[name], error)
            if draw == FIRST - 1 or draw == DRAWS - 1:
                allowed = {name: x + inside.get(name, 0.0) / 2 for name, x in errors.items()}
                misses = list(compare(case, ours, eager, true, allowed))
                if not misses:
                    break
        shaken = rounded_once(case, queries, keys) if misses else {}
        allowed = {name: max(x, shaken.get(name, 0.0)) for name, x in allowed.items()}
        beyond = list(compare(case, ours, eager, true, allowed)) if shaken else misses
        misses = beyond or [replace(miss, rounding=True) for miss in misses]
    return max(misses, key=lambda m: (not m.at_the_edge, m.factor), default=None)


def crash(error: Exception) -> Miss:
    return Miss(f"raises {type(error).__name__}", str(error).splitlines()[0][:200])


def another_draw(
    case: Case, queries: Tensor, keys: Tensor, true: Results, draw: int
) -> dict[str, float]:
    """Eager's errors where its sums run in another order, or (for every second draw) on inputs that
    differ in the last place or the last three digits: where rows are alike, its errors are too, and
    cancel; and a small loss next to 1 may lie on float32's grid."""
    generator = torch.Generator().manual_seed(draw)
    order = torch.randperm(case.d, generator=generator)
    wide = working(case)
    pair = [x.to(wide)[:, order].clone() for x in (queries, keys)]
    if draw % 2:
        near = torch.finfo(wide).eps * (1 if draw % 4 == 1 else NEAR)
        for x in pair:
            x *= 1 + near * torch.randn(x.shape, generator=generator).to(wide)
        true = truth_of(case, *pair, exact=wide == F64)
        return errors_of(eager_of(case, *pair), true) | as_one(case, *pair, true)
    one, found = as_one(case, *pair, true), eager_of(case, *pair)
    for name in found:
        if name.endswith(("queries", "keys")):
            found[name] = found[name][:, order.argsort()]
    return errors_of(found, true) | one


def rounded_once(case: Case, queries: Tensor, keys: Tensor) -> dict[str, float]:
    """By how much one rounding of every logit, p and q changes the truth, at most over a few."""
    pair = queries.double(), keys.double()
    true = evaluate(case, true_loss(case), *pair, by_row(case, F64))
    largest: dict[str, float] = {}
    for seed in range(FIRST):
        rounding = truth.Rounding(torch.finfo(working(case)).eps / 2, seed)
        found = evaluate(case, true_loss(case, rounding), *pair, by_row(case, F64))
        for name, error in errors_of(found, true).items():
            if name.endswith("temperature"):  # rows' roundings may agree
                error = max(error, float((found[name] - true[name]).sum().abs()))
            largest[name] = max(largest.get(name, 0.0), error)
    return largest


def as_one(case: Case, queries: Tensor, keys: Tensor, true: Results) -> dict[str, float]:
    """Eager's errors in the gradient of one temperature, where the rows' roundings may agree."""
    temperature = case.temperature_tensor()
    if temperature is None:
        return {}
    found = evaluate(case, eager_loss(case), queries, keys, temperature.to(queries.dtype))
    rows = eager_of(case, queries, keys)
    names = [name for name in true if name.endswith("temperature")]
    errors = errors_of({x: rows[x] for x in names}, {x: true[x] for x in names})
    alone = {x: float((found[x].double() - true[x].sum()).abs()) for x in names}
    return {x: max(errors[x], e) if math.isfinite(e) else errors[x] for x, e in alone.items()}


def rounded_inside(case: Case, queries: Tensor, keys: Tensor) -> dict[str, float]:
    """What compiled kernels' rounding of G = ∂L/∂S to half precision's digits may cost at most:
    u Σ_j |G_ij zk_j| and u Σ_i |G_ij zq_i|. G is the gradient to columns that S does not see."""
    dtype = DTYPES[case.dtype]
    student = case.settings.get("kernel") == "student"  # which has no product with G
    if case.backend not in EXECUTED or dtype not in HALF or student:
        return {}
    (n, d), m = queries.shape, len(keys)
    square = case.loss == "nt_xent"  # whose S has pairs of two queries and of two keys too
    before = torch.eye(n, n + m if square else m, dtype=F64) * square
    behind = torch.eye(m, dtype=F64)
    if square:
        behind = torch.cat([torch.zeros(m, n, dtype=F64), behind], 1)
    pair = torch.cat([queries.double(), before], 1), torch.cat([keys.double(), behind], 1)
    free = case.but(frozen="")
    found = evaluate(free, true_loss(free), *pair, by_row(free, F64))
    to_queries, to_keys = (found[name][:, d:].abs().nan_to_num(0.0) for name in ("queries", "keys"))
    q, k = (x.double().abs().nan_to_num(0.0, 0.0, 0.0) for x in (queries, keys))
    if square:
        pulls = to_queries @ torch.cat([q, k]), to_keys @ torch.cat([q, k])
    else:
        pulls = to_queries @ k, to_queries.T @ q
    unit = torch.finfo(dtype).eps / 2
    names = [name for name in ("queries", "keys") if name != case.frozen]
    return {x: unit * largest(pulls[x == "keys"]) for x in names}


# ---- ours ----------------------------------------------------------------------------------------


def ours_of(case: Case) -> Callable[..., Tensor]:
    function = getattr(rkdo_kernels, case.loss)
    arguments = arguments_of(case)

    def loss(queries: Tensor, keys: Tensor, temperature: Tensor | None) -> Tensor:
        with house(case):
            return function(
                queries, keys, temperature=case.temperature if temperature is None else temperature,
                **arguments,
            )  # fmt: skip

    return loss


def arguments_of(case: Case) -> dict[str, Any]:
    backend = "tiled" if case.backend in ("small", "one_pass") else called(case.backend)
    arguments = {**case.settings, "bound": case.bound, "backend": backend}
    if case.loss in ("rkdo_loss", "icon_loss", "info_nce") and not case.settings.get("symmetric"):
        arguments["positive_offset"] = case.offset
    if not case.loss.startswith("similarity"):
        arguments["reduction"] = case.reduction
    return arguments


@contextlib.contextmanager
def house(case: Case) -> Iterator[None]:
    """With the path and the tiles that the case wants."""
    changed: list[tuple[Any, str, Any]] = []
    if case.backend != "small":
        changed.append((small, "MAX_ENTRIES", 0))
    if case.splits > 1:
        changed.append((launch, "splits", lambda *_: case.splits))
    if not case.single:
        changed.append((launch, "SINGLE", 0))
    if case.tiles:
        rows, cols = case.tiles
        changed += [
            (launch, "INTERPRETED", launch.Config(rows, cols, 1, 1)), (one_pass, "ROWS", rows),
            (machinery, "TILE_COLS", cols), (machinery, "TILE_ROWS", 1),
            (machinery, "TILE_BYTES", 3000), (one_pass, "LEAST_ROWS", rows),
            (one_pass, "COLS", cols), (machinery, "ROWS", rows), (machinery, "COLS", cols),
            (machinery, "LEAST_ROWS", rows), (machinery, "STRIP_BYTES", 3000),
        ]  # fmt: skip
        changed = [(module, name, x) for module, name, x in changed if hasattr(module, name)]
    before = [(module, name, getattr(module, name)) for module, name, _ in changed]
    try:
        for module, name, value in changed:
            setattr(module, name, value)
        yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)


def evaluate(
    case: Case,
    loss: Callable[..., Tensor],
    queries: Tensor,
    keys: Tensor,
    temperature: Tensor | None,
) -> Results:
    """The value and the gradients of Σ w · value that the case asks for."""
    leaves = {"queries": queries.detach(), "keys": keys.detach()}
    if temperature is not None:
        leaves["temperature"] = temperature
    wanted = [name for name in leaves if name != case.frozen]
    for name in wanted:
        leaves[name] = leaves[name].detach().requires_grad_()
    with house(case):
        value = loss(leaves["queries"], leaves["keys"], leaves.get("temperature"))
        total = (case.weights() * value.double()).sum()
        inputs = [leaves[name] for name in wanted]
        gradients = torch.autograd.grad(
            total, inputs, materialize_grads=True, create_graph=case.second
        )
        found = {"value": value.detach(), **dict(zip(wanted, gradients, strict=True))}
        if case.second:
            generator = torch.Generator().manual_seed(case.seed + 2)
            along = sum(
                (g * torch.randn(g.shape, generator=generator).to(g.dtype)).double().sum()
                for name, g in zip(wanted, gradients, strict=True)
                if name != "temperature"
            )
            second = torch.autograd.grad(along, inputs, materialize_grads=True)
            found |= {f"second {k}": g for k, g in zip(wanted, second, strict=True)}
    return {name: x.detach() for name, x in found.items()}


# ---- eager and the truth -------------------------------------------------------------------------


def eager_loss(case: Case) -> Callable[..., Tensor]:
    """reference.py's, reduced; distances by differences."""
    if case.settings.get("kernel") == "student" or case.second:
        return true_loss(case)
    settings = dict(case.settings)
    if case.loss in ("rkdo_loss", "icon_loss", "info_nce") and not settings.get("symmetric"):
        settings["positive_offset"] = case.offset
    if case.loss == "similarity_moments":
        settings["bound"] = case.bound
    function = getattr(reference, case.loss)

    def loss(queries: Tensor, keys: Tensor, temperature: Any) -> Tensor:
        t = case.temperature if temperature is None else temperature
        return reduced(case, function(queries, keys, temperature=t, **settings))

    return loss


def true_loss(case: Case, rounding: truth.Rounding | None = None) -> Callable[..., Tensor]:
    def loss(queries: Tensor, keys: Tensor, temperature: Any) -> Tensor:
        t = case.temperature if temperature is None else temperature
        return reduced(case, truth.losses(case, queries, keys, t, rounding))

    return loss


def reduced(case: Case, rows: Tensor) -> Tensor:
    return rows if case.reduction == "none" else getattr(rows, case.reduction)()


def by_row(case: Case, dtype: torch.dtype) -> Tensor | None:
    """A learnable temperature for every row, whose gradients tell how large they are."""
    t = case.temperature_tensor()
    return None if t is None else t.to(dtype).repeat(case.rows, 1)


def working(case: Case) -> torch.dtype:
    return torch.float32 if DTYPES[case.dtype] in HALF else DTYPES[case.dtype]


def eager_of(case: Case, queries: Tensor, keys: Tensor) -> Results:
    """In float32 for half precision, gradients rounded once."""
    wide = working(case)
    found = evaluate(case, eager_loss(case), queries.to(wide), keys.to(wide), by_row(case, wide))
    for name in found:
        if name.endswith(("queries", "keys")):
            found[name] = found[name].to(DTYPES[case.dtype])
    return found


def truth_of(case: Case, queries: Tensor, keys: Tensor, exact: bool = False) -> Results:
    pair = queries.double(), keys.double()
    finite = all(all_finite(x) for x in pair)
    wanted = finite and not case.second and (exact or case.dtype == "float64")
    if wanted and truth.fits_80_digits(case):
        values, *gradients = truth.in_80_digits(case, *pair, case.temperature_tensor())
        found = {"value": reduced(case, values)}
        found |= dict(zip(("queries", "keys", "temperature"), gradients, strict=True))
        found["temperature"] = found["temperature"][:, None]
        for name in (case.frozen, "" if case.learnable else "temperature"):
            found.pop(name, None)
        return found
    shifted = case.loss == "similarity_logsumexp"  # torch.logsumexp's gradient has few digits
    loss = true_loss(case) if finite or shifted else eager_loss(case)
    return evaluate(case, loss, *pair, by_row(case, F64))


def is_broken(case: Case, queries: Tensor, keys: Tensor) -> float:
    """The largest product of lengths ÷ the bound."""
    if case.bound is None:
        return 0.0
    lengths = [  # of a row that is not NaN
        torch.linalg.vector_norm(x.double(), dim=1).nan_to_num(0.0).max() for x in (queries, keys)
    ]
    pairs = [lengths[0] * lengths[1]]
    if case.loss == "nt_xent":
        pairs += [x**2 for x in lengths]
    return max(float(x) for x in pairs) / case.bound


def is_documented(case: Case, error: Exception, queries: Tensor, keys: Tensor) -> bool:
    text = str(error)
    if isinstance(error, ValueError) and "must not pass bound" in text:
        return is_broken(case, queries, keys) > 1
    if isinstance(error, ValueError) and "for moments with bound" in text:
        return not moments_bear(case)
    return False
