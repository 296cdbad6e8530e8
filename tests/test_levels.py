"""A row's level: any number leaves a gradient as it is. Interpreted kernels round none of it."""

import pytest
import torch
from accuracy import DEVICE
from test_moments_gradient import inputs

pytest.importorskip("triton")
from rkdo_kernels import gradient_stripes, kernels, launch, levels

pytestmark = pytest.mark.usefixtures("poisoned")
BOTH = (True, True)
DIAGONALS = ([], [0], [7, 0], [-3], [200])


def rows(n, *more, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(n, *more, generator=generator) - 0.5).to(DEVICE)


@pytest.fixture(params=[1, 3], ids=["whole", "in parts"])
def split(request, monkeypatch):
    monkeypatch.setattr(launch, "splits", lambda *_: request.param)


def check(call, *leveled):
    """The same to float32's rounding, of sums that cancel levels as large as G."""
    for found, wanted in zip(call(*leveled), call(), strict=True):
        assert float((found - wanted).abs().max()) <= 1e-5 * float(wanted.abs().max())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("degree", [0, 3])
@pytest.mark.parametrize("exclude", DIAGONALS, ids=str)
def test_moments(exclude, degree, dtype, split):
    queries, keys, weights, at_positive = inputs(70, 150, 20, dtype, degree)
    scale = torch.tensor(2.0, device=DEVICE)
    given = (queries, keys, scale, 1.5, weights, exclude, at_positive if exclude else None, BOTH)
    check(lambda *x: kernels.moments_backward(*given, *x), rows(70).bfloat16())


@pytest.mark.parametrize("exclude", DIAGONALS, ids=str)
def test_stripes(exclude, monkeypatch):
    monkeypatch.setattr(launch, "STRIPE_DIM", 1)
    monkeypatch.setattr(launch, "stripe", lambda count, _: min(count, 40))
    queries, keys, weights, at_positive = inputs(70, 150, 20, torch.bfloat16, 2)
    scale = torch.tensor(2.0, device=DEVICE)
    given = (queries, keys, scale, 1.5, weights, exclude, at_positive if exclude else None, BOTH)
    # a stripe is bfloat16 in the interpreter too
    monkeypatch.setattr(
        gradient_stripes.Stripes, "stripe", in_float32(gradient_stripes.Stripes.stripe)
    )
    check(lambda *x: kernels.moments_backward(*given, *x), rows(70).bfloat16())


def in_float32(stripe):
    return lambda run, room, *ends: stripe(run, torch.empty_like(room, dtype=torch.float32), *ends)


@pytest.mark.parametrize("exclude", DIAGONALS, ids=str)
def test_both_sums(exclude, split):
    queries, keys, weights, _ = inputs(70, 150, 20, torch.bfloat16, 0)
    at_positive = rows(70, seed=2) if exclude == [0] else None
    given = (queries, keys, 2.0, weights[:, 0], rows(150), exclude, at_positive, BOTH)
    check(lambda *x: kernels.both_sums_backward(*given, *x), rows(70, seed=3), rows(150, seed=4))
    check(lambda *x: [kernels.self_sums_backward(keys, 2.0, rows(150), *x)], rows(150, seed=4))


@pytest.mark.parametrize("exclude", DIAGONALS, ids=str)
def test_softmax_sums(exclude, split):
    queries, keys, *_ = inputs(70, 150, 20, torch.bfloat16, 0)
    scales = torch.tensor([2.0, 2.5], device=DEVICE)
    peak, weights, total = rows(70), rows(70, 2), rows(70, seed=2)
    given = (queries, keys, scales, False, exclude, peak, weights, total, BOTH)
    check(lambda *x: kernels.softmax_sums_backward(*given, *x), rows(70, seed=3).bfloat16())


@pytest.mark.parametrize("offset", [0, 80])
def test_recursion(offset, split):
    queries, keys, *_ = inputs(70, 150, 20, torch.bfloat16, 0)
    scales = torch.tensor([2.0, 2.5, 3.0], device=DEVICE)
    peak, log_mass, pull = 1 + rows(70), 3 + rows(70, 3), rows(70, 2)
    given = (
        queries, keys, scales, 0.5, offset, False, peak, log_mass, pull, rows(70), rows(70, seed=2),
        BOTH,
    )  # fmt: skip
    check(lambda *x: kernels.recursion_backward(*given, *x), rows(70, seed=3).bfloat16())


def test_sums_in_parts(monkeypatch):
    x, weights = rows(150, 70).bfloat16(), rows(150, seed=2)
    for most in (1, 4, 64):
        monkeypatch.setattr(levels, "PARTS", most)
        sums = levels.column_sums(x, weights)
        assert len(sums) == min(most, 5) - (most == 4)  # three parts of two blocks of 32
        plain, weighted = sums.sum(0)
        torch.testing.assert_close(plain, x.float().sum(0))
        torch.testing.assert_close(weighted, weights @ x.float())
