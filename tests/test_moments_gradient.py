"""The kernels of the moments' gradient: positives, splits, diagonals, and what they compile to."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from accuracy import DEVICE, DTYPES, compare, sample_views

pytest.importorskip("triton")
from test_bench_static import run

from rkdo_kernels import launch
from rkdo_kernels.moments_gradient import moments_backward

pytestmark = pytest.mark.usefixtures("poisoned")
SCALE, BOUND = 2.0, 1.5
DIAGONALS = [[], [0], [7, 0], [0, 40], [69], [3, 4], [32, 0], [80, 16], [16, 200], [-20, 5]]


def inputs(n, m, d, dtype, degree=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    views = sample_views(n, d, dtype, m=m, seed=seed)
    weights = torch.randn(n, degree + 1, generator=generator).to(DEVICE)
    return *views.values(), weights, torch.randn(n, generator=generator).to(DEVICE)


def materialised(queries, keys, weights, at_positive, exclude):
    """G whole, in the embeddings' dtype."""
    weights = weights.to(queries.dtype)
    s = queries @ keys.T
    g = torch.exp(SCALE * s) * sum(
        weights[:, k, None] * (s / BOUND) ** k for k in range(weights.shape[1])
    )
    i, j = (torch.arange(count, device=s.device) for count in s.shape)
    for diagonal in reversed(exclude):
        on = j - i[:, None] == diagonal
        value = torch.zeros_like(s)
        if at_positive is not None and diagonal == exclude[0]:
            value = at_positive.to(s.dtype)[:, None].expand_as(s)
        g = torch.where(on, value, g)
    return {"queries": g @ keys, "keys": g.T @ queries}


def check(queries, keys, weights, at_positive, exclude):
    scale = torch.tensor(SCALE, device=queries.device)
    found = moments_backward(queries, keys, scale, BOUND, weights, exclude, at_positive)
    assert [x.dtype for x in found] == 2 * [torch.float32]  # to be rounded once, where all meet
    compare(
        {k: x.to(queries.dtype) for k, x in zip(("queries", "keys"), found, strict=True)},
        lambda x: materialised(**x, weights=weights, at_positive=at_positive, exclude=exclude),
        {"queries": queries, "keys": keys},
    )


@pytest.fixture(params=[1, 2, 3])
def splits(request, monkeypatch):
    monkeypatch.setattr(launch, "splits", lambda *_: request.param)


@pytest.mark.pairs
@pytest.mark.parametrize("positive", [False, True], ids=["without positives", "positives"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "m", "d"), [(1, 1, 1), (37, 70, 20), (33, 49, 140)])
def test_gradient(n, m, d, dtype, positive, splits, tiles):
    queries, keys, weights, at_positive = inputs(n, m, d, dtype)
    for exclude in ([0], [m - n, 0]) if positive else ([], [m - n, 0]):
        check(queries, keys, weights, at_positive if positive else None, exclude)


@pytest.mark.pairs
@pytest.mark.parametrize("exclude", DIAGONALS, ids=str)
@pytest.mark.parametrize(("parts", "steps", "rows", "cols"), [(1, 1, 32, 16), (2, 2, 16, 32)])
def test_diagonals_wherever_they_are(exclude, parts, steps, rows, cols, monkeypatch):
    """Before, across and past the passes of a split; both in one pass, or in either order."""
    monkeypatch.setattr(launch, "splits", lambda *_: parts)
    monkeypatch.setattr(launch, "INTERPRETED", launch.Config(rows, cols, 1, 1, steps))
    queries, keys, weights, at_positive = inputs(70, 150, 16, torch.float32)
    check(queries, keys, weights, at_positive if exclude else None, exclude)


def test_the_same_bits_every_time(splits, tiles):
    queries, keys, weights, at_positive = inputs(37, 70, 20, torch.float32)
    scale = torch.tensor(SCALE, device=DEVICE)
    first, second = (
        moments_backward(queries, keys, scale, BOUND, weights, [0], at_positive) for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("degree", [0, 1, 5])
def test_degrees(degree, splits, tiles):
    queries, keys, weights, at_positive = inputs(37, 70, 20, torch.float32, degree)
    check(queries, keys, weights, at_positive, [3])


def test_rows_far_apart(splits, tiles):
    queries, keys, weights, at_positive = inputs(37, 70, 64, torch.float32)
    apart = torch.full((70, 2, 64), torch.nan, device=DEVICE)
    apart[:, 0] = keys
    check(queries, apart[:, 0], weights, at_positive, [1])


# ---- how a walk is split -------------------------------------------------------------------------


def test_splits_fill_the_multiprocessors(monkeypatch):
    monkeypatch.setattr(launch, "triton_status", lambda: "compiled")
    monkeypatch.setattr(launch, "multiprocessors", lambda device: 132)

    def splits(n, d=64, rows=64, step=128, warps=4, size=2, fit=16):
        result = SimpleNamespace(
            device=torch.device("cuda", 0), numel=lambda: n * d, element_size=lambda: size
        )
        return launch.splits(-(-n // rows), n, step, warps, result, fit)

    assert splits(4096) == 8  # 512 programs of 4 warps, 4 steps each, 8 MiB
    assert splits(64) == splits(256) == 1  # too few steps to share
    assert splits(2048) == 4  # of 4 steps each
    assert (splits(16384), splits(65536)) == (2, 1)
    assert (splits(16384, fit=8), splits(8192, fit=8)) == (1, 2)
    assert splits(8192, step=64) == 4  # 128 blocks
    assert splits(8192, d=512, step=64) == 1  # one part in float32 is already 16 MiB
    monkeypatch.setattr(launch, "triton_status", lambda: "interpreted")
    assert splits(4096) == 1


def test_spans_cover_the_walk_once():
    for count, step, parts in itertools.product((1, 63, 64, 65, 1000), (16, 64), (1, 2, 3, 7)):
        span = launch.span(count, step, parts)
        assert span % step == 0
        assert -(-count // span) <= parts
        assert (-(-count // span) - 1) * span < count


# ---- what they compile to ------------------------------------------------------------------------

FIGURES = """
import json
from dataclasses import replace
from bench import gates, static

found = {}
for case in static.cases():
    for split in (False, True) if case.name.startswith("moments_bwd") else ():
        case = replace(case, constants={**case.constants, "SPLIT": split})
        x = static.compile_case(case, "bf16", 64, "sm_90")
        found[f"{case.name}, {split}"] = {
            "slots": x.loop.slots, "special": x.loop.special, "spills": x.spill_bytes,
            "warps": x.warps, "gates": gates.failures(x),
        }
print(json.dumps(found))
"""
SLOTS = {  # an entry of S: whole walks, and parts of one; the most that Triton 3.6, 3.8 or 3.9 has
    "moments_bwd k=0 dq": 5.7,  # 1.0 of it the level's subtraction: the products take longer still
    "moments_bwd k=0 dk": 6.7,
    "moments_bwd k=4 dq": 9.7,
    "moments_bwd k=4 dk": 12.0,
}


def test_figures_on_sm_90(tmp_path):
    found = run(FIGURES, folder=tmp_path)
    assert len(found) == 2 * len(SLOTS)
    for name, figures in found.items():
        assert figures.pop("slots") <= SLOTS[name.split(",")[0]], name
        assert figures == {"special": 1, "spills": 0, "warps": 16, "gates": {}}, name
