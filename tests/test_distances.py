"""Student's t, wherever the rows are and however far apart, against differences in float64."""

import pytest
import torch
from accuracy import DTYPES, assert_as_accurate, sample_views

from rkdo_kernels import distances, icon_loss, reference, tiled


def spread(n, d, generator):
    return 50 * torch.randn(n, d, generator=generator)


def offset(n, d, generator):
    return 1e5 + torch.randn(n, d, generator=generator)


def clusters(n, d, generator):
    """Two, far apart."""
    sides = torch.arange(n)[:, None] % 2 * 2 - 1.0
    return 1000 * sides + torch.randn(n, d, generator=generator)


def outlier(n, d, generator):
    """One so far away that float64's squares, too, hide the others' distances."""
    rows = torch.randn(n, d, generator=generator)
    rows[n // 2] = 1e9
    return rows


def duplicates(n, d, generator):
    """Each close to another and far from the mean, most by less than float32's squares tell."""
    rows = 50 * torch.randn((n + 1) // 2, d, generator=generator)
    rows = rows.repeat(2, 1)[:n]
    return rows + 1e-3 * torch.randn(n, d, generator=generator)


def near(n, d, generator):
    return torch.nn.functional.normalize(torch.randn(n, d, generator=generator), dim=1)


MAPS = {f.__name__: f for f in (spread, offset, clusters, outlier, duplicates, near)}


def views(name, n, d, dtype=torch.float32):
    generator = torch.Generator().manual_seed(3)
    queries = MAPS[name](n, d, generator)
    keys = queries + 0.1 * torch.randn(n, d, generator=generator)
    return {"queries": queries.to(dtype), "keys": keys.to(dtype)}


@pytest.mark.parametrize("backend", ["tiled", "triton"])
@pytest.mark.parametrize(("n", "d"), [(40, 2), (33, 9)])
@pytest.mark.parametrize("name", MAPS)
def test_as_accurate_as_differences(name, n, d, backend, tiles):
    assert_as_accurate(
        lambda **x: icon_loss(**x, kernel="student", bound=None, backend=backend, reduction="none"),
        lambda **x: reference.icon_loss(**x, kernel="student"),
        views(name, n, d),
        scale=2 * torch.log1p(torch.tensor(1e19)).item(),
    )


@pytest.mark.parametrize("name", MAPS)
def test_float64(name, tiles):
    assert_as_accurate(
        lambda **x: icon_loss(**x, kernel="student", bound=None, reduction="none"),
        lambda **x: reference.icon_loss(**x, kernel="student"),
        views(name, 40, 3, torch.float64),
    )


@pytest.mark.parametrize("backend", ["tiled", "triton"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(dtype, backend, tiles):
    assert_as_accurate(
        lambda **x: icon_loss(**x, kernel="student", bound=None, backend=backend),
        lambda **x: reference.icon_loss(**x, kernel="student").mean(),
        views("spread", 40, 3, dtype),
        scale=10,
    )


def test_what_cannot_be_wide_is_formed_by_differences(monkeypatch, tiles):
    """As on MPS, which has no float64, and for any number of dimensions."""
    monkeypatch.setattr(distances, "is_wide", lambda x: False)
    for name, d in (("spread", 2), ("duplicates", 20)):
        assert_as_accurate(
            lambda **x: icon_loss(**x, kernel="student", bound=None, reduction="none"),
            lambda **x: reference.icon_loss(**x, kernel="student"),
            views(name, 40, d),
            scale=20,
        )


def test_rows_far_apart_are_subtracted():
    rows = [slice(0, 40)] * 2
    for name, size in (("near", 1.0), ("outlier", 1e9)):
        pairs = views(name, 40, 3)
        form = distances.Distances(**pairs)
        assert form.near == (name == "near")
        found = torch.empty(40, 40)
        form(*rows, found)
        wanted = reference.squared_distances(*(x.double() for x in pairs.values()))
        error = (found - wanted).abs() / (1 + wanted)
        assert float(error.max()) <= 1e-6, (name, size)


@pytest.mark.parametrize("away", range(6, 24))
def test_distances_are_as_exact_however_far_the_rows_are_from_their_mean(away):
    """Two clusters at ± 2^away, about 1 wide: squares of float64 cancel to what NEAR promises."""
    generator = torch.Generator().manual_seed(3)
    sides = torch.arange(64)[:, None] % 2 * 2 - 1.0
    queries = 2.0**away * sides + torch.randn(64, 3, generator=generator)
    keys = queries + 0.1 * torch.randn(64, 3, generator=generator)
    found = torch.empty(64, 64, dtype=torch.float64)
    distances.Distances(queries, keys)(slice(0, 64), slice(0, 64), found)
    wanted = reference.squared_distances(queries.double(), keys.double())
    assert float(((found - wanted).abs() / (1 + wanted)).max()) <= 2**-26


def test_the_reference_is_by_differences(monkeypatch):
    pairs = views("clusters", 40, 3)
    truth = (pairs["queries"][:, None].double() - pairs["keys"].double()).square().sum(2)
    for most in (0, 1 << 24):
        monkeypatch.setattr(reference, "MOST_DIFFERENCES", most)
        found = reference.squared_distances(**pairs)
        assert float(((found - truth) / (1 + truth)).abs().max()) <= 1e-6


def test_nothing_is_needed_of_a_constant():
    pairs = views("spread", 40, 3)
    both = tiled.softmax_sums_backward(
        *pairs.values(), torch.ones(1, dtype=torch.float64), True, [0], torch.zeros(40),
        torch.ones(40, 1), torch.ones(40),
    )  # fmt: skip
    for needs in ((True, False), (False, True)):
        found = tiled.softmax_sums_backward(
            *pairs.values(), torch.ones(1, dtype=torch.float64), True, [0], torch.zeros(40),
            torch.ones(40, 1), torch.ones(40), needs,
        )  # fmt: skip
        for x, y, need in zip(found, both, needs, strict=True):
            assert torch.equal(x, y) if need else not x.numel()


@pytest.mark.parametrize("far", [1e5, 1e12, 1e18])
def test_one_key_far_away_leaves_the_other_gradients_their_digits(far):
    """It moves the keys' mean, from which the other rows are then as far."""
    views = sample_views(6, 4)
    views["keys"][3] *= far
    results = []
    for function, more in (
        (icon_loss, {"bound": None, "backend": "tiled"}),
        (reference.icon_loss, {}),
    ):
        dtype = torch.float32 if more else torch.float64
        pair = {key: x.to(dtype, copy=True).requires_grad_() for key, x in views.items()}
        loss = function(**pair, kernel="student", temperature=0.4, **more).sum()
        loss = loss if not more else loss * 6  # the mean, else
        results.append([x.double() for x in torch.autograd.grad(loss, list(pair.values()))])
    for found, true in zip(*results, strict=True):
        assert float((found - true).abs().max()) <= 1e-5


@pytest.mark.parametrize("nearest", [1e-3, 1.0, 1e6, 1e30])
def test_students_logits_less_the_nearest_keep_their_digits_far_away(nearest):
    """Of two logarithms the difference has the roundings of both, which 1/τ multiplies."""
    away = nearest * (1 + torch.logspace(-5, 1, 50))[None]
    exact = away.double(), torch.tensor([[nearest]]).double()
    true = torch.log1p(exact[1]) - torch.log1p(exact[0])
    found = distances.below_peak(away.clone(), torch.tensor([[nearest]]))
    assert ((found.double() - true).abs() <= 4e-7 * true.abs() + 1e-7 * (exact[1] > 1)).all()
