"""Holds one case to the yardstick.

    error ≤ 2 · (eager's error) + one ulp of the largest true entry + the truth's own rounding

for the value and for every gradient. Of half-precision inputs both are held to what float32 eager
makes of the same numbers, gradients rounded once to the inputs' dtype. Where one draw of eager's
rounding is missed, eager's error is the largest of several draws: the same sums in another order.
A row whose loss is not finite in float64 must not be a plausible number, and what is finite there
must be finite, unless float32 eager's is not or the call raises what its docstring says.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import rkdo_kernels
from rkdo_kernels import launch, one_pass, reference, small
from rkdo_kernels import tiles as machinery

from . import truth
from .cases import DTYPES, Case

FLOAT64_ULPS = 32
DRAWS = 12
EDGE = 2
NEAR = 4096  # ulps, by which the inputs of another draw may differ
SLACK = 1.01  # by which products may pass the bound, as the losses' checks have it
F64 = torch.float64
HALF = (torch.bfloat16, torch.float16)
Results = dict[str, Tensor]


@dataclass(frozen=True)
class Miss:
    """What is wrong: `kind` names the result and the way, which shrinking keeps."""

    kind: str
    detail: str
    factor: float = math.inf  # error ÷ limit

    @property
    def at_the_edge(self) -> bool:
        """Missed by what another CPU's rounding may make a hit."""
        return self.factor <= EDGE


def judge(case: Case) -> Miss | None:
    """The first miss, or None."""
    queries, keys = case.inputs()
    try:
        ours = evaluate(case, ours_of(case), queries, keys, case.temperature_tensor())
    except Exception as error:  # whatever it is: a crash is a miss, unless it is documented
        return None if is_documented(case, error, queries, keys) else crash(error)
    if is_broken(case, queries, keys) > 1.05 and all_finite(ours["value"]):
        return Miss("value: no error", "products pass the bound, and a number came back")
    true, eager = truth_of(case, queries, keys), eager_of(case, queries, keys)
    errors = errors_of(eager, true)
    misses = list(compare(case, ours, eager, true, errors))
    if any("error" in m.kind for m in misses):  # eager may have been lucky, or the truth too coarse
        true = truth_of(case, queries, keys, exact=True)
        for draw in range(DRAWS):
            for name, error in another_draw(case, queries, keys, true, draw).items():
                errors[name] = max(errors[name], error)
        misses = list(compare(case, ours, eager, true, errors))
    return max(misses, key=lambda m: m.factor, default=None)


def crash(error: Exception) -> Miss:
    return Miss(f"raises {type(error).__name__}", str(error).splitlines()[0][:200])


def errors_of(found: Results, true: Results) -> dict[str, float]:
    """The largest error by result, over rows that are finite; of a temperature the norm."""
    errors = {}
    for name, exact in true.items():
        difference = found[name].double() - exact
        difference = difference[torch.isfinite(difference)]
        if name.endswith("temperature"):
            errors[name] = float(torch.linalg.vector_norm(difference))
        else:
            errors[name] = largest(difference)
    return errors


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
        true = evaluate(case, true_loss(case), *(x.double() for x in pair), by_row(case, F64))
        return errors_of(eager_of(case, *pair), true)
    found = eager_of(case, *pair)
    for name in found:
        if name.endswith(("queries", "keys")):
            found[name] = found[name][:, order.argsort()]
    return errors_of(found, true)


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
    backend = "tiled" if case.backend in ("small", "one_pass") else case.backend
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


def true_loss(case: Case) -> Callable[..., Tensor]:
    def loss(queries: Tensor, keys: Tensor, temperature: Any) -> Tensor:
        t = case.temperature if temperature is None else temperature
        return reduced(case, truth.losses(case, queries, keys, t))

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
    loss = true_loss(case) if finite else eager_loss(case)
    return evaluate(case, loss, *pair, by_row(case, F64))


# ---- the yardstick -------------------------------------------------------------------------------


def compare(
    case: Case, ours: Results, eager: Results, true: Results, errors: dict[str, float]
) -> Iterator[Miss]:
    if set(ours) != set(true):
        yield Miss("results: other names", f"{sorted(ours)} for {sorted(true)}")
        return
    refuses = case.loss == "similarity_moments" and case.learnable and case.backend != "reference"
    if refuses and not moments_bear(case):
        if bool(torch.isfinite(ours["value"]).any()):
            yield Miss("value: plausible", "a temperature that moments do not bear gave a number")
        return
    dead = ~row_is_finite(true["value"])
    for name, exact in true.items():
        found = ours[name].double()
        if name.endswith("temperature"):
            yield from one_number(case, name, found, exact, errors[name], all_finite(eager[name]))
            continue
        fine, beside = row_is_finite(exact), row_is_finite(eager[name])
        here = row_is_finite(found)
        gone = fine & beside & ~here
        if name != "value":  # what a lost row pulls at may be lost too
            gone = gone & ~(dead if name == "queries" and dead.shape == gone.shape else dead.any())
        if bool(gone.any()):
            yield Miss(f"{name}: not finite", f"{int(gone.sum())} rows that are finite in float64")
        if name == "value" and bool((here & ~fine).any()):
            yield Miss(
                f"{name}: plausible", f"{int((here & ~fine).sum())} rows that are not finite"
            )
        both = fine & here
        if not bool(both.any()):
            continue
        exact, found = (x[both] if x.dim() else x for x in (exact, found))
        error = largest(found - exact)
        yield from too_far(case, name, error, errors[name], largest(exact), ours[name].dtype)


def one_number(
    case: Case, name: str, found: Tensor, exact: Tensor, eagers: float, finite: bool
) -> Iterator[Miss]:
    """Eager's errors may cancel in a sum: it is held to their norm over the rows."""
    norm = torch.linalg.vector_norm
    if not all_finite(exact) or not finite:
        return
    if not all_finite(found):
        yield Miss(f"{name}: not finite", "eager's is")
        return
    error = float((found - exact.sum()).abs())
    size = float(norm(exact))
    dtype = torch.promote_types(DTYPES[case.learnable], DTYPES[case.dtype])
    rounded = DTYPES[case.learnable]
    ulp = torch.finfo(rounded).eps * abs(float(exact.sum()))  # the sum is rounded to it
    yield from too_far(case, name, max(0.0, error - ulp), eagers, size, dtype)


def too_far(
    case: Case, name: str, error: float, eagers: float, size: float, dtype: torch.dtype
) -> Iterator[Miss]:
    info = torch.finfo(dtype)
    ulp = info.eps * size
    limit = 2 * eagers + ulp + truths_rounding(case, name, size) + info.smallest_normal
    if dtype in HALF:
        limit += info.smallest_normal * info.eps
    if not error <= limit:
        yield Miss(
            f"{name}: error",
            f"{name}: error {error:.3g} passes {limit:.3g}; eager {eagers:.3g}, ulp {ulp:.3g}, "
            f"largest true entry {size:.3g}",
            error / limit if limit else math.inf,
        )


def truths_rounding(case: Case, name: str, size: float) -> float:
    """A few float64 ulps of what the truth was subtracted from."""
    cold = case.temperature * (1 - case.settings.get("cooling", 0))
    scale = max(1.0, case.length**2) / cold
    if name != "value":
        w = float(truth.row_weights(case).abs().max())
        scale = scale * w * case.settings.get("depth", 1) * max(1.0, case.length)
        if name == "keys" or name.endswith("temperature"):
            scale *= math.sqrt(case.rows)
        if name.endswith("temperature"):
            scale /= cold
    return FLOAT64_ULPS * torch.finfo(torch.float64).eps * max(scale, size)


def moments_bear(case: Case) -> bool:
    return launch.fixed_shift_is_safe(case.temperature, case.bound, DTYPES[case.dtype])


def is_broken(case: Case, queries: Tensor, keys: Tensor) -> float:
    """The largest product of lengths ÷ the bound."""
    if case.bound is None:
        return 0.0
    lengths = [torch.linalg.vector_norm(x.double(), dim=1).max() for x in (queries, keys)]
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


def row_is_finite(x: Tensor) -> Tensor:  # [rows] or []
    finite = torch.isfinite(x)
    return finite.flatten(1).all(1) if x.dim() > 1 else finite


def all_finite(x: Tensor) -> bool:
    return bool(torch.isfinite(x).all())


def largest(x: Tensor) -> float:
    return float(x.abs().max()) if x.numel() else 0.0
