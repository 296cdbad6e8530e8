"""Correctness of every path in compiled form on a GPU: each check answers in a line."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable, Generator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

import rkdo_kernels
from rkdo_kernels import reference

from . import accuracy, contenders, fields, gpu_timing
from .cases import nt_xent_rows
from .contenders import Contender, RowLoss
from .measure import DTYPES, forward_and_backward, release
from .problems import two_views

DEVICE = "cuda"
START = "spawn"  # CUDA does not outlive a fork
SHAPES = (
    (129, 200, "fp32"), (1, 1, "bf16"), (3, 31, "fp16"), (1024, 512, "bf16"), (1024, 64, "fp16"),
    (1, 1, "fp32"), (129, 200, "bf16"), (1024, 512, "fp32"), (129, 200, "fp16"), (3, 31, "bf16"),
    (64, 64, "bf16"), (128, 512, "fp32"), (101, 200, "fp16"),  # in a single launch
)  # fmt: skip
RERUNS = 250
BEYOND = 46_401  # N with N² > 2³¹


@dataclass(frozen=True)
class Check:
    name: str
    passed: bool
    detail: str


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


def run(wait: float = 120.0) -> Generator[Check, None, None]:
    """In a process of their own: one that breaks the device or never ends costs only itself."""
    labels = [label for label, _ in plan()]
    done = 0
    while done < len(labels):
        context: Any = multiprocessing.get_context(START)
        answers, theirs = context.Pipe(duplex=False)
        child = context.Process(target=child_main, args=(theirs, done), daemon=True)
        child.start()
        theirs.close()
        try:
            while done < len(labels):
                if not answers.poll(wait):
                    raise TimeoutError(f"no answer in {wait:.0f} s")
                answer = answers.recv()
                if answer is None:  # the device is broken: on with another process
                    break
                done += 1
                yield answer
        except (EOFError, TimeoutError) as error:
            yield Check(labels[done], False, str(error) or "its process died")
            done += 1
        finally:
            child.kill()
            child.join()


def child_main(answers: Any, first: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends this one
    for label, check in plan()[first:]:
        answer = guarded(label, check)
        answers.send(answer)
        if not answer.passed and broken():
            answers.send(None)
            return


def guarded(name: str, check: Callable[[], Check]) -> Check:
    try:
        return check()
    except Exception as error:  # a crash is a failed check, and the next one still runs
        text = next(iter(str(error).splitlines()), "")
        return Check(name, False, f"{type(error).__name__}: {text[:160]}")
    finally:
        release(DEVICE)


def broken() -> bool:
    """Whether an error stays, as an illegal access does: nothing runs in this process any more."""
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def plan() -> list[tuple[str, Callable[[], Check]]]:
    """The most telling first. Odd N throughout: the checks share their compiled kernels."""
    every = paths()
    checks: list[tuple[str, Callable[..., Check], tuple[Any, ...]]] = []
    for name, contender in every.items():
        label = f"accuracy: {name}, bf16, 1001×64"
        checks.append((label, accurate, (contender, 1001, 64, "bf16")))
        label = f"{RERUNS} reruns bitwise: {name}, bf16, 1001×64"
        checks.append((label, bitwise, (contender,)))
    for name in ("rkdo, moments", "info_nce", "rkdo, direct", "icon, student", "field, bf16"):
        label = f"N·M past 2³¹: {name}, bf16, {BEYOND}×64"
        checks.append((label, accurate, (every[name], BEYOND, 64, "bf16")))
    for name in ("rkdo, moments", "info_nce"):
        label = f"stripes of ∂L/∂S: {name}, bf16, 9001×256"
        checks.append((label, accurate, (every[name], 9001, 256, "bf16")))
    for stored in (torch.float32, torch.bfloat16):
        for n in (1001, 129):
            label = f"the field's update, {str(stored)[6:]}, {n}×64"
            checks.append((label, updated, (stored, n)))
    checks.append(("field of snapshots, 1001 of 5000 × 64", snapshots, ()))
    for name in ("rkdo, moments", "rkdo, direct"):
        label = f"offsets past 2³¹: {name}, bf16, rows 2²⁰ elements apart"
        checks.append((label, far_apart, (every[name],)))
    for name, contender in every.items():
        label = f"accuracy: {name}, fp32, 129×64"
        checks.append((label, accurate, (contender, 129, 64, "fp32")))
        label = f"CUDA graph: {name}, fp32, 129×64"
        checks.append((label, in_a_graph, (contender,)))
    for n, d, dtype in SHAPES:
        for name, contender in every.items():
            label = f"accuracy: {name}, {dtype}, {n}×{d}"
            checks.append((label, accurate, (contender, n, d, dtype)))
    return [(label, partial(check, label, *rest)) for label, check, rest in checks]


def loss_of(contender: Contender, inputs: dict[str, Tensor]) -> contenders.Loss:
    return contender.make(len(inputs["queries"]), torch.device(DEVICE))


def accurate(label: str, contender: Contender, n: int, d: int, dtype: str) -> Check:
    inputs = two_views(n, d, DTYPES[dtype], DEVICE)
    return compare(label, contender, inputs, accuracy.evaluate(loss_of(contender, inputs), inputs))


def compare(
    label: str, contender: Contender, inputs: dict[str, Tensor], found: dict[str, Tensor]
) -> Check:
    true = accuracy.truth(contender, inputs, torch.float64)
    eager = accuracy.eager_in(contender, inputs)
    errors = accuracy.judge(found, eager, true, contender.in_float32)
    detail = f"loss {errors.value:.1e}, gradient {errors.gradient:.1e}"
    return Check(label, errors.limit_used <= 1, f"{detail}, {errors.limit_used:.2f} of the limit")


def far_apart(label: str, contender: Contender) -> Check:
    """2305 rows of 64, 2²⁰ elements from one to the next: the last starts past 2³¹."""
    n, d, apart = 2305, 64, 1 << 20
    near = two_views(n, d, torch.bfloat16, DEVICE)
    room = torch.empty(n * apart, dtype=torch.bfloat16, device=DEVICE)
    far = room.as_strided((n, d), (apart, 1))
    far.copy_(near["keys"].detach())
    inputs = {"queries": near["queries"], "keys": far}
    found = accuracy.evaluate(loss_of(contender, inputs), inputs)
    return compare(label, contender, near, found)


def updated(label: str, stored: torch.dtype, n: int) -> Check:
    """A field after steps over changing samples, two times from the start: the same bits, and what
    the written-out recursion gives, but for rounding, which by chance has no bias."""
    device = torch.device(DEVICE)
    states, steps, alpha = [], 20, 0.2
    for _ in range(2):
        field = fields.dense_field(n, device, stored)
        truth = field.rows(slice(0, n)).double()
        for step in range(steps):
            index, views = some_samples(n, step)
            settings = {"alpha": alpha, "temperature": fields.TEMPERATURE}
            field.step(**views, index=index, **settings)
            place = index[:, None], index
            exact = {name: x.double() for name, x in views.items()}
            truth[place] = reference.field_update(truth[place], **exact, **settings)
        states.append(field.rows(slice(0, n)).double())
    same = torch.equal(*states)
    unit = 2.0**-7 if stored == torch.bfloat16 else 2.0**-20
    errors = (states[0] - truth) / (truth + 1 / n)
    error, bias = float(errors.abs().max()), float(errors.mean().abs())
    drift = float((states[0].sum(1) - 1).abs().max())
    fine = same and error <= steps * unit and bias <= unit / 4 and drift <= 1e-3
    detail = f"entries to {error:.1e}, on average {bias:.1e}; rows add up to 1 ± {drift:.1e}"
    return Check(label, fine, detail + ("" if same else ", not the same bits twice"))


def some_samples(n: int, step: int) -> tuple[Tensor, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(step)
    views = two_views(max(2, n - 5 * step), 64, torch.float32, DEVICE, seed=step)
    index = torch.randperm(n, generator=generator)[: len(views["queries"])].to(DEVICE)
    return index, {name: x.detach() for name, x in views.items()}


def snapshots(label: str) -> Check:
    inputs = two_views(1001, 64, torch.bfloat16, DEVICE)
    n, generator = len(inputs["queries"]), torch.Generator().manual_seed(0)
    index = torch.randperm(5000, generator=generator)[:n].to(DEVICE)
    field = fields.snapshot_field(n, index.device, 5000, index)
    contender = contenders.ours(
        lambda queries, keys: field.loss(queries, keys, index, temperature=fields.TEMPERATURE),
        fields.snapshot_rows,
    )
    return compare(label, contender, inputs, accuracy.evaluate(loss_of(contender, inputs), inputs))


def bitwise(label: str, contender: Contender) -> Check:
    inputs = two_views(1001, 64, torch.bfloat16, DEVICE)
    loss = loss_of(contender, inputs)
    first = accuracy.evaluate(loss, inputs)
    differing = torch.zeros((), dtype=torch.int64, device=DEVICE)
    for _ in range(RERUNS):
        again = accuracy.evaluate(loss, inputs)
        for name, x in first.items():
            differing += (again[name] != x).sum()
    count = int(differing)
    return Check(label, count == 0, f"{count} entries differ")


def in_a_graph(label: str, contender: Contender) -> Check:
    """Captured once, replayed on other numbers: the same bits as without a graph."""
    inputs, others = (two_views(129, 64, torch.float32, DEVICE, seed=seed) for seed in (0, 1))
    loss = loss_of(contender, inputs)
    replay = gpu_timing.replayed(partial(forward_and_backward, loss, inputs))
    with torch.no_grad():
        for name, x in inputs.items():
            x.copy_(others[name])
    for _ in range(3):
        replay()
    torch.cuda.synchronize()
    plain = forward_and_backward(loss, others)
    kept = replay.kept  # type: ignore[attr-defined]
    same = all(torch.equal(a, b) for a, b in zip(plain, kept, strict=True))
    return Check(label, same, "same bits as without" if same else "differs from the call without")
