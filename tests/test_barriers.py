"""Memory that a program stores to and loads from again lies behind a barrier.

Which thread holds an entry is the compiler's choice, and where threads outnumber rows several hold
one: the interpreter, which has one thread, is watched for a load of what was stored since the last
barrier.
"""

from unittest.mock import patch

import pytest
import torch
from accuracy import sample_views

pytest.importorskip("triton")
from triton.runtime.interpreter import InterpreterBuilder

from rkdo_kernels import rkdo_loss

CALLS = {
    "rkdo": {"temperature": 0.5},
    "detached": {"temperature": 0.5, "detach_target": True},
    "deep": {"temperature": 0.3, "depth": 5},
}


class Watch:
    """Keeps the addresses stored to and loaded from since a barrier."""

    def __init__(self):
        self.stored, self.loaded = set(), set()
        self.barriers, self.found = 0, []

    def load(self, addresses, mask):
        here = addresses[mask].tolist()
        if self.stored.intersection(here):
            self.found.append("load of what was stored")
        self.loaded.update(here)

    def store(self, addresses, mask):
        here = addresses[mask].tolist()
        # Perhaps by another thread that has the same row; a tile's entry is nobody else's to use.
        if addresses.ndim == 1 and self.loaded.intersection(here):
            self.found.append("store to what was loaded")
        self.stored.update(here)

    def barrier(self):
        self.program()
        self.barriers += 1

    def program(self):
        self.stored.clear()
        self.loaded.clear()


@pytest.fixture
def watch():
    if torch.cuda.is_available():
        pytest.fail("the interpreter is watched: hide the GPU (CUDA_VISIBLE_DEVICES=)")
    seen = Watch()
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store
    barrier, place = InterpreterBuilder.create_barrier, InterpreterBuilder.set_grid_idx

    def watched_load(self, ptrs, mask, *others):
        seen.load(ptrs.data, mask.data.astype(bool))
        return load(self, ptrs, mask, *others)

    def watched_store(self, ptrs, value, mask, *others):
        seen.store(ptrs.data, mask.data.astype(bool))
        return store(self, ptrs, value, mask, *others)

    def watched_barrier(self):
        seen.barrier()
        return barrier(self)

    def watched_place(self, *at):
        seen.program()
        return place(self, *at)

    with (
        patch.object(InterpreterBuilder, "create_masked_load", watched_load),
        patch.object(InterpreterBuilder, "create_masked_store", watched_store),
        patch.object(InterpreterBuilder, "create_barrier", watched_barrier),
        patch.object(InterpreterBuilder, "set_grid_idx", watched_place),
    ):
        yield seen


@pytest.mark.parametrize("n", [5, 130], ids=["one launch", "several"])
@pytest.mark.parametrize("call", CALLS)
def test_what_is_stored_is_loaded_behind_a_barrier(call, n, watch):
    views = {name: x.requires_grad_() for name, x in sample_views(n, 16, torch.float32).items()}
    rows = rkdo_loss(**views, **CALLS[call], backend="triton", reduction="mean")
    rows.backward()
    assert watch.barriers > 0
    assert watch.found == []
