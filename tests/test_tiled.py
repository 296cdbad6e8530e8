"""The tiled path never holds an N × M matrix."""

import os
import subprocess
import sys
import weakref

import pytest
import torch
from accuracy import sample_views
from torch.utils._python_dispatch import TorchDispatchMode

from rkdo_kernels import (
    icon_loss,
    info_nce,
    nt_xent,
    reference,
    rkdo_loss,
    similarity_logsumexp,
    similarity_moments,
    tiled,
    tiles,
)


def square(views):
    """As many queries as keys."""
    n = max(len(x) for x in views.values())
    return {name: x.repeat(-(-n // len(x)), 1)[:n] for name, x in views.items()}


LOSSES = {
    "rkdo": lambda **x: rkdo_loss(**x, positive_offset=0),
    "rkdo-direct": lambda **x: rkdo_loss(**x, bound=None, positive_offset=0),
    "rkdo-deep": lambda **x: rkdo_loss(**x, bound=None, positive_offset=0, depth=8),
    "rkdo-detached": lambda **x: rkdo_loss(**x, detach_target=True, positive_offset=0),
    "icon": lambda **x: icon_loss(**x, positive_offset=0),
    "icon-student": lambda **x: icon_loss(**x, kernel="student", positive_offset=0),
    "info_nce": lambda **x: info_nce(**x, positive_offset=0),
    "clip": lambda **x: info_nce(**square(x), symmetric=True),
    "nt_xent": lambda **x: nt_xent(**square(x)),
    "info_nce-direct": lambda **x: info_nce(**x, bound=None, positive_offset=0),
    "logsumexp": lambda **x: similarity_logsumexp(**x, temperature=0.5, exclude_self=True).mean(),
    "moments": lambda **x: similarity_moments(**x, temperature=0.5, degree=4).mean(),
}
MEGABYTE = 1 << 20


class Watch(TorchDispatchMode):
    """The largest storage that any operator returns, and how many bytes are alive at most."""

    def __init__(self):
        super().__init__()
        self.largest = self.alive = self.peak = 0
        self.seen = weakref.WeakKeyDictionary()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in torch.utils._pytree.tree_leaves(result):
            if isinstance(x, torch.Tensor):
                self.note(x)
        return result

    def note(self, x):
        storage = x.untyped_storage()
        self.largest = max(self.largest, storage.nbytes() // x.element_size())
        if storage not in self.seen:
            self.seen[storage] = True
            self.alive += storage.nbytes()
            self.peak = max(self.peak, self.alive)
            weakref.finalize(storage, self.free, storage.nbytes())

    def free(self, size):
        self.alive -= size


@pytest.fixture
def watch(monkeypatch):
    """Looks into the operators too: a mode is off while it handles one."""
    watch = Watch()

    def watched(function):
        def run(*args):
            with watch:
                return function(*args)

        return run

    names = ("moments", "both_sums", "self_sums", "softmax_sums", "recursion", "recursion_moments")
    for name in names:
        for function in {name, f"{name.removesuffix('_moments')}_backward"}:
            monkeypatch.setattr(tiled, function, watched(getattr(tiled, function)))
    return watch


@pytest.mark.parametrize(("n", "m"), [(512, 512), (1000, 1000), (129, 20_000)])
@pytest.mark.parametrize("name", LOSSES)
def test_nothing_of_n_by_m_entries(name, n, m, watch, monkeypatch):
    if n * m * 4 < tiles.STRIP_BYTES:  # all buffers of a strip together, whatever the problem
        monkeypatch.setattr(tiles, "STRIP_BYTES", n * m)
    views = {key: x.requires_grad_() for key, x in sample_views(n, 8, m=m).items()}
    with watch:
        LOSSES[name](**views).backward()
    assert 0 < watch.largest < n * m
    assert watch.peak < max(4 * n * m, 8 * tiles.STRIP_BYTES)


def test_the_watch_sees_a_materialised_loss(watch):
    views = {key: x.requires_grad_() for key, x in sample_views(512, 8).items()}
    with watch:
        reference.rkdo_loss(**views).sum().backward()
    assert watch.largest == 512 * 512
    assert watch.peak >= 10 * 512 * 512 * 4


MEASURE = """
import resource, torch
from rkdo_kernels import rkdo_loss
torch.set_num_threads(1)
def peak(n, **settings):
    generator = torch.Generator().manual_seed(0)
    views = [torch.nn.functional.normalize(torch.randn(n, 64, generator=generator)).requires_grad_()
             for _ in range(2)]
    rkdo_loss(*views, **settings).backward()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
for settings in ({}, {"bound": None}):
    print(-peak(512, **settings) + peak(4096, **settings))
"""


def test_peak_memory_at_4096_rows():
    """In a process of its own: what the largest resident size grows by, in MB; S alone has 64."""
    lines = subprocess.run(
        [sys.executable, "-c", MEASURE], env=os.environ, capture_output=True, text=True, check=True
    ).stdout.split()
    assert all(0 <= float(grown) <= 40 for grown in lines), lines


def test_tiles_cover_every_entry_once():
    for n, m, buffers in ((1, 1, 2), (128, 9000, 3), (129, 300, 20), (1000, 17, 3), (300, 2100, 0)):
        seen = torch.zeros(n, m)
        for tile in tiles.tiles(torch.zeros(n, 2), torch.zeros(m, 2), buffers):
            covered = []
            for strip in tile.strips():
                seen[strip.rows, strip.cols] += 1
                covered += range(strip.rows.start, strip.rows.stop)
                assert len(strip.buffers) == buffers
                assert strip.memory.numel() * 4 <= max(tiles.STRIP_BYTES, buffers * tiles.COLS * 4)
            assert covered == list(range(tile.rows.start, tile.rows.stop))
        assert (seen == 1).all()
