"""The same numbers in every situation that a GPU program can be in: run again, in a CUDA graph, on
another stream, on another device, compiled, on dirty memory, watched for what it must not do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from .. import accuracy
from ..measure import forward_and_backward
from .checks import compare, loss_of, paths, views
from .device import current
from .outcome import NotApplicable, Outcome


def bitwise(path: str, n: int, d: int, dtype: str, reruns: int) -> Outcome:
    contender, inputs = paths()[path], views(n, d, dtype)
    loss = loss_of(contender, inputs)
    first = accuracy.evaluate(loss, inputs)
    differing = torch.zeros((), dtype=torch.int64, device=current().place())
    for _ in range(reruns):
        again = accuracy.evaluate(loss, inputs)
        for name, x in first.items():
            differing += (again[name] != x).sum()
    count = int(differing)
    return Outcome(count == 0, f"{count} entries differ in {reruns} reruns")


def stripes(path: str, n: int, d: int, reruns: int) -> Outcome:
    """Where ∂L/∂S is formed by stripes their products are PyTorch's: the same bits again, with and
    without reductions in lower precision allowed, and the setting is left as it was."""
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_bf16_reduced_precision_reduction
    contender, inputs = paths()[path], views(n, d)
    loss = loss_of(contender, inputs)
    found, kept = [], True
    try:
        for allowed in (True, False):
            matmul.allow_bf16_reduced_precision_reduction = allowed
            for _ in range(reruns):
                found.append(accuracy.evaluate(loss, inputs))
            kept = kept and matmul.allow_bf16_reduced_precision_reduction == allowed
    finally:
        matmul.allow_bf16_reduced_precision_reduction = before
    same = all(torch.equal(x[name], found[0][name]) for x in found for name in x)
    return Outcome(
        same and kept,
        ("the same bits" if same else "not the same bits")
        + ("" if kept else ", and a setting of PyTorch's is left changed"),
    )


def in_a_graph(path: str, n: int, d: int, dtype: str) -> Outcome:
    """Captured once, replayed on other numbers: the same bits as without a graph."""
    contender = paths()[path]
    inputs, others = (views(n, d, dtype, seed=seed) for seed in (0, 1))
    loss = loss_of(contender, inputs)
    replay, kept = current().captured(partial(forward_and_backward, loss, inputs))
    with torch.no_grad():
        for name, x in inputs.items():
            x.copy_(others[name])
    for _ in range(3):
        replay()
    current().synchronize()
    return same_bits(forward_and_backward(loss, others), kept)


def same_bits(wanted: tuple[Tensor, ...], found: tuple[Tensor, ...]) -> Outcome:
    same = all(torch.equal(a, b) for a, b in zip(wanted, found, strict=True))
    return Outcome(same, "the same bits" if same else "differs from the plain call")


def side_stream(path: str, n: int, d: int, turns: int) -> Outcome:
    """On a stream that is not the default one, while memory that it frees is taken and filled
    again: the same bits as on the default stream."""
    device, contender, inputs = current(), paths()[path], views(n, d)
    loss = loss_of(contender, inputs)
    plain = forward_and_backward(loss, inputs)
    side = device.stream()
    side.wait_stream(device.current_stream())
    found = []
    with device.on(side):
        for turn in range(turns):
            found.append(forward_and_backward(loss, inputs))
            for size in (n, n * d, n * (turn + 1)):  # freed at once: the next call's memory
                torch.full((size,), float("nan"), device=device.place())
    device.current_stream().wait_stream(side)
    outcomes = [same_bits(plain, x) for x in found]
    return next((x for x in outcomes if not x.passed), outcomes[0])


def second_gpu(path: str, n: int, d: int, dtype: str) -> Outcome:
    """Tensors on GPU 1 while GPU 0 is current: as exact, and still current afterwards."""
    device = current()
    if device.count() < 2:
        raise NotApplicable("one GPU")
    contender, there = paths()[path], device.place(1)
    inputs = {name: x.detach().to(there).requires_grad_() for name, x in views(n, d, dtype).items()}
    before = device.current_index()
    outcome = compare(contender, inputs, accuracy.evaluate(loss_of(contender, inputs), inputs))
    device.synchronize()
    if device.current_index() != before:
        return Outcome(False, f"GPU {device.current_index()} is current, it was {before}")
    return outcome


def compiled_first(path: str, n: int, d: int, dtype: str) -> Outcome:
    """reduce-overhead, as the first call of its process and again: what is cached in the first
    must not live in a graph's memory."""
    contender, inputs = paths()[path], views(n, d, dtype)
    device = current()
    loss = device.compiled(loss_of(contender, inputs))
    found = {}
    for _ in range(4):  # a warm-up, a recording, replays
        found = {k: x.clone() for k, x in accuracy.evaluate(loss, inputs).items()}
    device.synchronize()
    outcome = compare(contender, inputs, found)
    if not outcome.passed:
        return outcome
    plain = loss_of(contender, inputs)  # outside of the graph, on what the first call has cached
    return compare(contender, inputs, accuracy.evaluate(plain, inputs))


@contextmanager
def dirty_memory() -> Iterator[None]:
    """torch.empty is full of NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        torch.utils.deterministic.fill_uninitialized_memory = fill


def poisoned(path: str, n: int, d: int, dtype: str) -> Outcome:
    contender, inputs = paths()[path], views(n, d, dtype)
    with dirty_memory():
        found = accuracy.evaluate(loss_of(contender, inputs), inputs)
    return compare(contender, inputs, found)


def no_waiting(path: str, n: int, d: int) -> Outcome:
    """Warm: what the first call measures or makes on the host is made."""
    contender, inputs = paths()[path], views(n, d)
    loss = loss_of(contender, inputs)
    forward_and_backward(loss, inputs)
    with current().refusing_to_wait():
        forward_and_backward(loss, inputs)
    return Outcome(True, "the host waits for nothing")


def little_memory(path: str, n: int, d: int) -> Outcome:
    """Far from N² numbers: at most an eighth of a byte an entry."""
    contender, inputs = paths()[path], views(n, d)
    step = partial(forward_and_backward, loss_of(contender, inputs), inputs)
    step()
    peak = current().peak(step)
    detail = f"{peak / 1e6:.1f} MB above the inputs, of {4e-6 * n * n:.0f} MB a float32 matrix has"
    return Outcome(peak <= n * n / 8 or current().rehearsal, detail, {"peak": peak})
