"""The emulator's and the fuzzer's cases on the device, in compiled form, by their own yardsticks.

Those are written for a CPU's tensors. Here the public functions are replaced by ones that take a
CPU's tensors to the device, laid out as they are, and bring results and gradients back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from importlib.util import find_spec
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

import rkdo_kernels

from .device import current
from .outcome import NotApplicable, Outcome

MISSING = "there are none in this checkout"
LARGEST = 600  # rows and keys of a fuzzer's case
BATCH = 25  # cases
BOUND = 1.009  # by which products may pass their bound before the losses object
FUNCTIONS = (
    "rkdo_loss", "icon_loss", "info_nce", "nt_xent", "similarity_logsumexp", "similarity_moments",
)  # fmt: skip


class Moved(torch.autograd.Function):
    """x at another place, with its strides and its offset; its gradient comes back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, place: torch.device) -> Tensor:
        ctx.place = x.device
        whole = torch.empty(0, dtype=x.dtype, device=x.device).set_(x.untyped_storage())
        return (
            whole.detach().to(place, copy=True).as_strided(x.shape, x.stride(), x.storage_offset())
        )

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        return upstream[0].to(ctx.place), None


def moved(x: Any, place: torch.device) -> Any:
    if isinstance(x, Tensor):
        return Moved.apply(x, place) if x.layout == torch.strided else x.to(place)
    return x


def on_the_device(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*arguments: Any, **settings: Any) -> Any:
        place = current().place()
        arguments = tuple(moved(x, place) for x in arguments)
        settings = {name: moved(x, place) for name, x in settings.items()}
        if function.__name__ in FUNCTIONS:  # where a rehearsal's faults come in
            queries, keys = (
                arguments[k] if k < len(arguments) else settings[name]
                for k, name in enumerate(("queries", "keys"))
            )
            rest = {k: v for k, v in settings.items() if k not in ("queries", "keys")}
            found = current().through(lambda q, k: function(q, k, **rest))(queries, keys)
        else:
            found = function(*arguments, **settings)
        return found.cpu() if isinstance(found, Tensor) else found

    return call


class FieldOnTheDevice:
    """A ResponseField whose methods take a CPU's tensors."""

    def __init__(self, field: Any) -> None:
        self.field = field

    @staticmethod
    def dense(*arguments: Any, **settings: Any) -> FieldOnTheDevice:
        made = rkdo_kernels.response.ResponseField.dense
        return FieldOnTheDevice(made(*arguments, device=current().place(), **settings))

    @staticmethod
    def snapshot(*arguments: Any, **settings: Any) -> FieldOnTheDevice:
        made = rkdo_kernels.response.ResponseField.snapshot
        return FieldOnTheDevice(made(*arguments, device=current().place(), **settings))

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.field, name)
        return on_the_device(found) if callable(found) else found


@contextmanager
def public_names(*modules: ModuleType) -> Iterator[dict[str, Callable[..., Any]]]:
    """rkdo_kernels' functions, and the fields of `modules`, on the device."""
    wrapped = {name: on_the_device(getattr(rkdo_kernels, name)) for name in FUNCTIONS}
    with ExitStack() as stack:
        for name, function in wrapped.items():
            stack.enter_context(patch.object(rkdo_kernels, name, function))
        for module in (rkdo_kernels, *modules):
            if hasattr(module, "ResponseField"):
                stack.enter_context(patch.object(module, "ResponseField", FieldOnTheDevice))
        yield wrapped


# ---- the emulator's ------------------------------------------------------------------------------


def there(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:  # nor is its folder
        return False


def emulated(limit: int | None) -> list[tuple[str, bool]]:
    """Names, and whether a case is one of the few that show every kernel: those come first."""
    if not there("bench.call_list"):
        return [(MISSING, True)]
    from ..call_list import every, label

    return [(label(call), call.quick) for call in sorted(every(), key=lambda x: not x.quick)][
        :limit
    ]


def emulator_case(name: str) -> Outcome:
    if name == MISSING:
        raise NotApplicable(MISSING)
    from ..call_list import every, label
    from ..compiled.execute.judge import scored

    (call,) = (x for x in every() if label(x) == name)
    originals = {getattr(rkdo_kernels, x): x for x in FUNCTIONS}
    with public_names() as wrapped:
        if hasattr(call, "function"):
            call = replace(call, function=wrapped[originals[call.function]])
        scores = scored(call, call.ours())
    used = {k: x.error / x.allowed for k, x in scores.items()}
    worst = max(used, key=lambda k: used[k])
    bad = [k for k, x in scores.items() if not x.passed]
    detail = f"{', '.join(bad)} too far: " if bad else ""
    return Outcome(bool(scores) and not bad, f"{detail}{worst} {used[worst]:.2f} of the limit",
                   {"limit used": used[worst]})  # fmt: skip


# ---- the fuzzer's --------------------------------------------------------------------------------


def fuzzed(batches: int) -> list[str]:
    return [str(k) for k in range(batches)] if there("bench.fuzz.judge") else [MISSING]


def fuzz_batch(name: str) -> Outcome:
    """Cases as they are drawn for the tiles, of any size, on whatever the device runs."""
    if name == MISSING:
        raise NotApplicable(MISSING)
    from ..fuzz import cases, judge

    first, misses, judged, edges = int(name) * BATCH, [], 0, 0
    count = 4 if current().rehearsal else BATCH
    with public_names():
        for seed in range(first, first + count):
            case = drawn(cases, seed)
            if judge.is_broken(case, *case.inputs()) > BOUND:
                continue  # an error on a CPU, NaN here: a check of its own
            judged += 1
            miss = judge.judge(case)
            if miss and miss.at_the_edge:
                edges += 1
            elif miss:
                misses.append(f"{miss.kind}, {miss.detail}: {case!r}")
    detail = f"{judged} cases, {edges} missed at the edge"
    if misses:
        detail = f"{len(misses)} of {judged}: {misses[0]}"
    return Outcome(judged > 0 and not misses, detail[:600], {"misses": float(len(misses))})


def drawn(cases: Any, seed: int) -> Any:
    case = cases.draw(seed, cases.LOSSES, ("tiled",), 40 if current().rehearsal else LARGEST)
    if case.dtype == "float64":  # which no kernel takes
        case = case.but(dtype="float32", learnable=case.learnable and "float32")
    return case.but(backend="tiled" if current().rehearsal else "triton")
