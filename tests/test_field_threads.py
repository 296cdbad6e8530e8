"""Threads that share a field: its calls are whole, as if they had come one after the other."""

import copy
import os
import pickle
import sys
import threading

import pytest
import torch
from accuracy import DEVICE, sample_views
from test_field_ops import same_bytes

from rkdo_kernels import ResponseField

N, D, B, THREADS, STEPS = 64, 4, 48, 4, 25
KINDS = {
    "float32": lambda: ResponseField.dense(N, device=DEVICE),
    "bfloat16": lambda: ResponseField.dense(N, dtype=torch.bfloat16, device=DEVICE),
    "float64": lambda: ResponseField.dense(N, dtype=torch.float64, device=DEVICE),
    "snapshot": lambda: ResponseField.snapshot(N, D, history=2, device=DEVICE),
}


@pytest.fixture
def hasty():
    """Threads that lose the interpreter as often as they may."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


def at_once(*tasks):
    """Runs functions of no arguments together; an error in one is an error."""
    barrier, errors = threading.Barrier(len(tasks)), []

    def run(task):
        barrier.wait()
        try:
            task()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(task,)) for task in tasks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def some(thread, step):
    seed = STEPS * thread + step
    order = torch.randperm(N, generator=torch.Generator().manual_seed(seed))
    return order[:B].to(DEVICE), sample_views(B, D, seed=seed)


@pytest.mark.parametrize("kind", KINDS)
def test_a_shared_field_is_what_some_order_makes_of_it(kind, hasty, monkeypatch):
    """The order in which the steps' batches came, one by one again, makes the same field."""
    field, order = KINDS[kind](), []
    jobs = [[some(thread, step) for step in range(STEPS)] for thread in range(THREADS)]
    inner = field._state.evaluate

    def noted(batch, alpha, needs):
        order.append(batch.index)
        return inner(batch, alpha, needs)

    def work(job):
        for index, views in job:
            field.step(**views, index=index, alpha=0.2)

    monkeypatch.setattr(field._state, "evaluate", noted)
    at_once(*(lambda job=job: work(job) for job in jobs))
    assert len(order) == field.updates == THREADS * STEPS
    if kind != "snapshot":
        assert float((field.rows(slice(0, N)).double().sum(1) - 1).abs().max()) <= 1e-6
        assert_whole(field.state_dict())
    again = KINDS[kind]()
    for index in order:
        views = next(x for job in jobs for i, x in job if torch.equal(i, index))
        again.step(**views, index=index, alpha=0.2)
    same_bytes(field.state_dict(), again.state_dict())


def assert_whole(state):
    stored = state["matrix"].double().sum(1) + state["diagonal"].double()
    assert float((stored - state["row_sum"]).abs().max()) <= 1e-5


@pytest.mark.parametrize("kind", ["bfloat16", "snapshot"])
def test_what_is_saved_copied_and_loaded_meanwhile_is_whole(kind, hasty):
    """The loss of a copy, and of a state, is that of the field after a number of steps."""
    field, start, jobs = KINDS[kind](), KINDS[kind](), [some(0, step) for step in range(STEPS)]
    index, views = some(1, 0)
    wanted, taken = [], []

    def of(field):
        return float(field.loss(**views, index=index))

    wanted.append(of(start))
    for at, x in jobs:
        start.step(**x, index=at, alpha=0.2)
        wanted.append(of(start))

    def step():
        for at, x in jobs:
            field.step(**x, index=at, alpha=0.2)

    def take():
        for turn in range(STEPS):
            if turn % 3 == 0:
                other = copy.deepcopy(field)
            elif turn % 3 == 1:
                other = pickle.loads(pickle.dumps(field))
            else:
                other = KINDS[kind]()
                other.load_state_dict(field.state_dict())
            taken.append(other)

    at_once(step, take)
    for other in taken:
        assert of(other) == wanted[other.updates]
    same_bytes(field.state_dict(), start.state_dict())
    loaded = KINDS[kind]()
    states = [x.state_dict() for x in taken[-2:]] + [start.state_dict()]
    at_once(*(lambda s=s: [loaded.load_state_dict(s) for _ in range(STEPS)] for s in states))
    assert any(of(loaded) == wanted[state["clock"][1]] for state in states)


def test_a_gradient_by_row_reads_a_whole_field(hasty):
    """Or says that the field has been updated since."""
    field, (index, views) = KINDS["float32"](), some(0, 0)
    refused, found = [], []

    def step():
        for at in range(STEPS):
            other, x = some(1, at)
            field.step(**x, index=other, alpha=0.2)

    def differentiate():
        for _ in range(STEPS):
            leaves = [x.clone().requires_grad_() for x in views.values()]
            loss = field.loss(*leaves, index=index, reduction="none")
            try:
                loss.sum().backward()
            except RuntimeError as error:
                refused.append(str(error))
            else:
                found.append((loss.sum().detach(), leaves[0].grad))

    at_once(step, differentiate)
    assert all("modified by an inplace operation" in words for words in refused)
    again, wanted = KINDS["float32"](), {}
    for at in range(STEPS + 1):
        leaves = [x.clone().requires_grad_() for x in views.values()]
        loss = again.loss(*leaves, index=index, reduction="none").sum()
        loss.backward()
        wanted[float(loss)] = leaves[0].grad
        if at < STEPS:
            other, x = some(1, at)
            again.step(**x, index=other, alpha=0.2)
    for loss, gradient in found:
        assert torch.equal(gradient, wanted[float(loss)])


def test_a_forked_process_does_not_wait_for_a_thread_it_has_not(monkeypatch):
    field, (index, views) = KINDS["float32"](), some(0, 0)
    entered, left, lock = threading.Event(), threading.Event(), field._turns._lock

    def hold():
        with lock:
            entered.set()
            left.wait()

    holder = threading.Thread(target=hold)
    holder.start()
    entered.wait()
    monkeypatch.setattr(os, "getpid", lambda: -1)
    child = threading.Thread(target=lambda: field.step(**views, index=index), daemon=True)
    child.start()
    child.join(20)
    waits = child.is_alive()
    left.set()
    holder.join()
    assert not waits


CALLS = {
    "loss": lambda field, index, pair: field.loss(*pair, index=index),
    "update": lambda field, index, pair: field.update(*pair, index=index),
    "step": lambda field, index, pair: field.step(*pair, index=index),
    "block": lambda field, index, pair: field.block(index),
    "rows": lambda field, index, pair: field.rows(index),
    "state_dict": lambda field, index, pair: field.state_dict(),
    "load_state_dict": lambda field, index, pair: field.load_state_dict(
        {"kind": "dense", "n": N, "held": [0, N], **field._tensors}
    ),
    "to": lambda field, index, pair: field.to(field.device),
    "copy": lambda field, index, pair: copy.deepcopy(field),
    "pickle": lambda field, index, pair: pickle.dumps(field),
}


@pytest.mark.parametrize("call", [*CALLS, "backward"])
def test_a_call_waits_for_its_turn(call):
    """Whatever the machine's threads happen to do."""
    field, (index, views) = KINDS["float32"](), some(0, 0)
    pair = [x.clone().requires_grad_() for x in views.values()]
    if call == "backward":
        task = field.loss(*pair, index=index, reduction="none").sum().backward
    else:
        task = lambda: CALLS[call](field, index, pair)  # noqa: E731
    other = threading.Thread(target=task, daemon=True)
    with field._turns:
        other.start()
        other.join(0.3)
        assert other.is_alive()
    other.join(20)
    assert not other.is_alive()
