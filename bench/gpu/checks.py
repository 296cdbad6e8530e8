"""Numbers of every path in compiled form, held to float64 by the yardstick of accuracy.py."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

import rkdo_kernels
from rkdo_kernels import reference

from .. import accuracy, contenders, fields
from ..cases import nt_xent_rows
from ..contenders import Contender, RowLoss
from ..measure import DTYPES
from ..problems import two_views
from .device import current
from .outcome import NotApplicable, Outcome


def paths() -> dict[str, Contender]:
    """Every path through the kernels, as a loss beside its materialised truth."""
    moments, direct = rkdo_kernels.rkdo_loss, partial(rkdo_kernels.rkdo_loss, bound=None)
    both: dict[str, tuple[RowLoss, RowLoss]] = {
        "rkdo, moments": (moments, reference.rkdo_loss),
        "rkdo, depth 8": (
            partial(moments, depth=8),
            partial(reference.rkdo_loss, depth=8),
        ),
        "rkdo, direct": (direct, reference.rkdo_loss),
        "rkdo, τ = 0.01": (
            partial(moments, temperature=0.01),
            partial(reference.rkdo_loss, temperature=0.01),
        ),
        "rkdo, detached": (
            partial(moments, detach_target=True),
            partial(reference.rkdo_loss, detach_target=True),
        ),
        "rkdo, direct, detached": (
            partial(direct, detach_target=True),
            partial(reference.rkdo_loss, detach_target=True),
        ),
        "info_nce": (rkdo_kernels.info_nce, reference.info_nce),
        "info_nce, no bound": (partial(rkdo_kernels.info_nce, bound=None), reference.info_nce),
        "icon, gaussian": (rkdo_kernels.icon_loss, reference.icon_loss),
        "icon, student": (
            partial(rkdo_kernels.icon_loss, kernel="student"),
            partial(reference.icon_loss, kernel="student"),
        ),
    }
    found = {name: contenders.ours(loss, rows) for name, (loss, rows) in both.items()}
    found["info_nce, both ways"] = contenders.ours(
        partial(rkdo_kernels.info_nce, symmetric=True), reference.info_nce, symmetric=True
    )
    found["nt_xent"] = contenders.ours(
        rkdo_kernels.nt_xent, nt_xent_rows, symmetric=True, pooled=True
    )
    found["field, fp32"] = fields.untouched(torch.float32)
    found["field, bf16"] = fields.untouched(torch.bfloat16)
    return found


def views(n: int, d: int, dtype: str = "bf16", seed: int = 0) -> dict[str, Tensor]:
    return two_views(n, d, DTYPES[dtype], str(current().place()), seed=seed)


def loss_of(contender: Contender, inputs: dict[str, Tensor]) -> contenders.Loss:
    queries = inputs["queries"]
    return current().through(contender.make(len(queries), queries.device))


def accurate(path: str, n: int, d: int, dtype: str) -> Outcome:
    contender, inputs = paths()[path], views(n, d, dtype)
    return compare(contender, inputs, accuracy.evaluate(loss_of(contender, inputs), inputs))


def compare(contender: Contender, inputs: dict[str, Tensor], found: dict[str, Tensor]) -> Outcome:
    true = accuracy.truth(contender, inputs, torch.float64)
    eager = accuracy.eager_in(contender, inputs)
    worse = accuracy.on_draws(contender, inputs, true)
    errors = accuracy.judge(found, eager, true, contender.in_float32, worse)
    detail = f"loss {errors.value:.1e}, gradient {errors.gradient:.1e}"
    figures = {"limit used": errors.limit_used}
    fine = errors.limit_used <= 1
    return Outcome(fine, f"{detail}, {errors.limit_used:.2f} of the limit", figures)


def every_loss(names: tuple[str, ...], n: int, d: int, dtype: str) -> Outcome:
    """Every line of the launch tables that this width and dtype lead to: called, and judged."""
    inputs = views(n, d, dtype)
    bad, worst = [], 0.0
    known = paths()
    for name in names:
        contender = known[name]
        try:
            found = accuracy.evaluate(loss_of(contender, inputs), inputs)
            outcome = compare(contender, inputs, found)
            current().synchronize()
        except Exception as error:  # a refused launch; a broken device fails all that follow
            bad.append(f"{name}: {one_line(error)}")
            continue
        worst = max(worst, outcome.figures["limit used"])
        if not outcome.passed:
            bad.append(f"{name}: {outcome.detail}")
    detail = "; ".join(bad) or f"{len(names)} losses, {worst:.2f} of the limit at most"
    return Outcome(not bad, detail, {"limit used": worst})


def one_line(error: BaseException) -> str:
    text = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {text[:160]}"


def far_apart(path: str, n: int = 2305, apart: int = 1 << 20) -> Outcome:
    """Rows of 64, 2²⁰ elements from one to the next: the last of 2305 starts past 2³¹."""
    d, contender, device = 64, paths()[path], current()
    near = views(n, d)
    if not device.rehearsal and device.properties().memory_bytes < 3 * n * apart:
        raise NotApplicable("the rows do not fit into the device's memory")
    room = torch.empty(n * apart, dtype=torch.bfloat16, device=device.place())
    far = room.as_strided((n, d), (apart, 1))
    far.copy_(near["keys"].detach())
    inputs = {"queries": near["queries"], "keys": far}
    found = accuracy.evaluate(loss_of(contender, inputs), inputs)
    return compare(contender, near, found)


def updated(stored_in: str, n: int) -> Outcome:
    """A field after steps over changing samples, two times from the start: the same bits, and what
    the written-out recursion gives, but for rounding, which is stochastic and has no bias."""
    device, stored = current().place(), DTYPES[stored_in]
    states, steps, alpha = [], 20, 0.2
    for _ in range(2):
        field = fields.dense_field(n, device, stored)
        truth = field.rows(slice(0, n)).double()
        for step in range(steps):
            index, batch = some_samples(n, step)
            settings = {"alpha": alpha, "temperature": fields.TEMPERATURE}
            field.step(**batch, index=index, **settings)
            place = index[:, None], index
            exact = {name: x.double() for name, x in batch.items()}
            truth[place] = reference.field_update(truth[place], **exact, **settings)
        states.append(field.rows(slice(0, n)).double())
    same = torch.equal(*states)
    unit = 2.0**-7 if stored == torch.bfloat16 else 2.0**-20
    errors = (states[0] - truth) / (truth + 1 / n)
    error, bias = float(errors.abs().max()), float(errors.mean().abs())
    drift = float((states[0].sum(1) - 1).abs().max())
    fine = same and error <= steps * unit and bias <= unit / 4 and drift <= 1e-3
    detail = f"entries to {error:.1e}, on average {bias:.1e}; rows add up to 1 ± {drift:.1e}"
    return Outcome(fine, detail + ("" if same else ", not the same bits twice"))


def some_samples(n: int, step: int) -> tuple[Tensor, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(step)
    batch = views(max(2, n - 5 * step), 64, "fp32", seed=step)
    index = torch.randperm(n, generator=generator)[: len(batch["queries"])].to(current().place())
    return index, {name: x.detach() for name, x in batch.items()}


def snapshots(n: int, samples: int) -> Outcome:
    inputs = views(n, 64)
    generator = torch.Generator().manual_seed(0)
    index = torch.randperm(samples, generator=generator)[:n].to(current().place())
    field = fields.snapshot_field(n, index.device, samples, index)
    contender = contenders.ours(
        lambda queries, keys: field.loss(queries, keys, index, temperature=fields.TEMPERATURE),
        fields.snapshot_rows,
    )
    return compare(contender, inputs, accuracy.evaluate(loss_of(contender, inputs), inputs))


def bad_row(path: str, n: int, d: int) -> Outcome:
    """A row longer than the bound: NaN where reading would wait for the device, an error on a CPU,
    a number nowhere."""
    contender, inputs = paths()[path], views(n, d, "fp32")
    with torch.no_grad():
        inputs["queries"][n // 2] *= 1.5
    try:
        found: dict[str, Any] = accuracy.evaluate(loss_of(contender, inputs), inputs)
    except ValueError as error:
        on_cpu = current().place().type == "cpu"
        return Outcome(on_cpu, f"refused: {one_line(error)}")
    value = float(found["value"])
    return Outcome(value != value, f"the loss is {value}")
