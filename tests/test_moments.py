"""The moments' kernel and the loss it goes on to: splits, tiles, every degree, against float64."""

import pytest
import torch
from accuracy import DEVICE, DTYPES, assert_as_accurate, sample_views

from rkdo_kernels import chebyshev, launch, ops, quadrature, reference, rkdo_loss, small
from rkdo_kernels.needs import NEITHER

pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.fixture
def in_parts(monkeypatch):
    monkeypatch.setattr(small, "MAX_ENTRIES", 0)
    monkeypatch.setattr(launch, "INTERPRETED", launch.Config(16, 32, 1, 1))

    def split(parts):
        monkeypatch.setattr(launch, "splits", lambda *_: parts)

    return split


@pytest.mark.pairs
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("parts", [1, 2, 3])
@pytest.mark.parametrize(("n", "m", "offset"), [(1, 1, 0), (33, 100, 40), (40, 64, 0)])
def test_splits_meet_the_yardstick(n, m, offset, parts, dtype, in_parts):
    in_parts(parts)
    for settings in ({}, {"depth": 8, "cooling": 0.3}, {"detach_target": True}, {"alpha": 0}):
        assert_as_accurate(
            lambda s=settings, **x: rkdo_loss(
                **x, **s, positive_offset=offset, backend="triton", reduction="none"
            ),
            lambda s=settings, **x: reference.rkdo_loss(**x, **s, positive_offset=offset),
            sample_views(n, 20, dtype, m=m, aligned=n == 40),
            scale=2,
        )


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("degree", range(13))
def test_moments_of_every_degree(degree, parts, in_parts):
    in_parts(parts)
    queries, keys = sample_views(20, 24, m=70).values()
    scale = torch.tensor(3.0, dtype=torch.float64, device=DEVICE)
    found = ops.moments(queries, keys, scale, 1.0, degree, [5, 0], "triton")
    s = queries.double() @ keys.double().T
    e = torch.exp(3 * s)
    for diagonal in (0, 5):
        e.diagonal(diagonal).zero_()
    for power in range(degree + 1):
        term = e * s**power
        error = (found[:, power] - term.sum(1)).abs()
        rounding = (power + 4) * torch.finfo(torch.float32).eps
        assert float((error / term.abs().sum(1)).max()) <= rounding


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("detach_target", [False, True])
@pytest.mark.parametrize("depth", [1, 2, 5])
def test_the_kernels_rows_are_quadratures(depth, detach_target, alpha, in_parts):
    """Both in float64 from moments in float32: alike to the moments' rounding."""
    in_parts(1)
    queries, keys = sample_views(37, 24, m=50, aligned=True).values()
    scales = [1 / (0.4 * (1 - 0.3 * t / depth)) for t in range(depth + 1)]
    degree = chebyshev.rkdo_degree(alpha, tuple(scales), 1.0)
    settings = (scales, alpha, 1.0, degree, [7], detach_target, NEITHER, "triton")
    found = ops.recursion_moments(queries, keys, *settings)[:3]
    weight = torch.tensor(chebyshev.middle(scales), dtype=torch.float64, device=DEVICE)
    moments = ops.moments(queries, keys, weight, 1.0, degree, [7], "triton")
    positive = (queries * keys[7:44]).sum(1, dtype=torch.float64)
    table = quadrature.table(degree, tuple(scales), alpha, 1.0, queries.device)
    rule = quadrature.rule(table, degree, scales, alpha)
    wanted = quadrature.recursion(moments, positive, rule, detach_target)
    for x, y in zip(found, wanted, strict=True):
        assert float((x - y).abs().max()) <= 1e-12 * float(y.abs().max())
