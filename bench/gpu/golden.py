"""Golden values: float64 truths that were made elsewhere, of tests/golden/truths.npz."""

from __future__ import annotations

import json
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rkdo_kernels import icon_loss, info_nce, reference, rkdo_loss

from .. import accuracy, draws
from .device import current
from .outcome import NotApplicable, Outcome

FILE = Path(__file__).parent.parent.parent / "tests" / "golden" / "truths.npz"
LOSSES = {
    "rkdo": (rkdo_loss, reference.rkdo_loss),
    "icon": (icon_loss, reference.icon_loss),
    "info_nce": (info_nce, reference.info_nce),
}
NONE = "none can be read"


@lru_cache(maxsize=1)
def stored() -> Any:
    """The file; raises NotApplicable where it cannot be read."""
    try:
        import numpy
    except ImportError:
        raise NotApplicable("NumPy is not installed") from None
    if not FILE.exists():
        raise NotApplicable("tests/golden/truths.npz is not there")
    return numpy.load(FILE)


def cases() -> list[dict[str, Any]]:
    return [{"case": k, **case} for k, case in enumerate(json.loads(str(stored()["cases"])))]


def label(case: dict[str, Any]) -> str:
    settings = {k: v for k, v in case.items() if k not in ("case", "loss", "shape")}
    words = ", ".join(f"{k} {v}" for k, v in settings.items())
    return f"{case['case']} {case['loss']}, {words}, inputs {case['shape']}"


def names(limit: int | None) -> list[str]:
    try:
        return [label(case) for case in cases()][:limit]
    except NotApplicable:
        return [NONE]


def check(name: str) -> Outcome:
    """The rows' losses and the gradients of Σ_i w_i loss_i, w from −1 to 1, held to float64."""
    (case,) = (x for x in cases() if label(x) == name)
    loss, plain = LOSSES[case["loss"]]
    settings = {k: v for k, v in case.items() if k not in ("case", "loss", "shape", "detach")}
    if "detach" in case:
        settings["detach_target"] = case["detach"]
    inputs = {x: load(f"{x}_{case['shape']}") for x in ("queries", "keys")}
    files = {"value": "rows", "queries": "dq", "keys": "dk"}
    files = {x: f"{stem}_{case['case']}" for x, stem in files.items()}
    true = {x: load(file) for x, file in files.items() if file in stored()}
    ours = evaluate(partial(loss, **settings, reduction="none"), inputs)
    rows = partial(plain, **settings)
    eager = evaluate(rows, inputs)
    only_value = "queries" not in true
    if only_value:
        true |= {x: ours[x].double() for x in ("queries", "keys")}

    def worse(errors: accuracy.Errors) -> accuracy.Errors:
        return draws.worst(
            errors, inputs, true, lambda x: evaluate(rows, {k: t.double() for k, t in x.items()}),
            lambda x, exact: accuracy.errors_of(evaluate(rows, x), exact),
        )  # fmt: skip

    errors = accuracy.judge(current_results(ours), {True: eager}, true, True, worse)
    gradient = "no golden gradient" if only_value else f"gradient {errors.gradient:.1e}"
    detail = f"loss {errors.value:.1e}, {gradient}, {errors.limit_used:.2f} of the limit"
    return Outcome(errors.limit_used <= 1, detail, {"limit used": errors.limit_used})


def current_results(ours: dict[str, Tensor]) -> dict[str, Tensor]:
    """Where a rehearsal's faults come in."""
    value = current().through(lambda queries, keys: ours["value"])(ours["queries"], ours["keys"])
    return {**ours, "value": value}


def evaluate(rows: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    leaves = {x: t.detach().requires_grad_() for x, t in inputs.items()}
    value = rows(leaves["queries"], leaves["keys"])
    weights = torch.linspace(-1, 1, len(value), dtype=torch.float64, device=value.device)
    if len(value) == 1:
        weights = torch.ones_like(weights)
    gradients = torch.autograd.grad((weights * value.double()).sum(), list(leaves.values()))
    return {"value": value.detach(), **dict(zip(leaves, gradients, strict=True))}


def load(name: str) -> Tensor:
    return torch.from_numpy(stored()[name]).to(current().place())
