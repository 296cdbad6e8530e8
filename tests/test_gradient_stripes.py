"""Wide gradients by stripes of ∂L/∂S: the yardstick, and the same whatever the stripes."""

import pytest
import torch
from accuracy import DEVICE, assert_as_accurate, evaluate, sample_views
from test_moments_gradient import DIAGONALS, check, inputs

pytest.importorskip("triton")
from rkdo_kernels import (
    gradient_stripes,
    info_nce,
    launch,
    moments_gradient,
    reference,
    rkdo_loss,
)

pytestmark = pytest.mark.usefixtures("poisoned")
BF16 = torch.bfloat16


@pytest.fixture
def parts(monkeypatch):
    """The parts of ∂L/∂S that were formed; embeddings of any width."""
    formed = []
    stripe = gradient_stripes.Stripes.stripe

    def watched(self, room, *ends):
        formed.append(ends)
        room.fill_(torch.nan)
        return stripe(self, room, *ends)

    monkeypatch.setattr(gradient_stripes.Stripes, "stripe", watched)
    monkeypatch.setattr(launch, "STRIPE_DIM", 1)
    return formed


@pytest.fixture(params=[20, 48, 1000])
def height(request, monkeypatch):
    """Of a stripe; the last is cut short."""
    monkeypatch.setattr(launch, "stripe", lambda count, _: min(count, request.param))
    return request.param


@pytest.mark.parametrize("positive", [False, True], ids=["without positives", "positives"])
@pytest.mark.parametrize(("n", "m", "d"), [(1, 1, 1), (37, 70, 20), (64, 64, 64), (33, 49, 140)])
def test_gradient(n, m, d, positive, parts, height, tiles):
    queries, keys, weights, at_positive = inputs(n, m, d, BF16)
    for exclude in ([0], [m - n, 0]) if positive else ([], [m - n, 0]):
        del parts[:]
        check(queries, keys, weights, at_positive if positive else None, exclude)
        wanted = [(k, min(k + height, n), 0, m) for k in range(0, n, height)]
        if height < n:  # else formed once, for both gradients
            wanted += [(0, n, k, min(k + height, m)) for k in range(0, m, height)]
        assert parts == len(parts) // len(wanted) * wanted
        assert parts


@pytest.mark.pairs
@pytest.mark.parametrize("exclude", DIAGONALS, ids=str)
def test_diagonals_wherever_they_are(exclude, parts, height, tiles):
    queries, keys, weights, at_positive = inputs(100, 150, 20, BF16)
    check(queries, keys, weights, at_positive if exclude else None, exclude)


@pytest.mark.parametrize("degree", [0, 1, 5])
def test_degrees(degree, parts, height):
    queries, keys, weights, at_positive = inputs(37, 70, 20, BF16, degree)
    check(queries, keys, weights, at_positive, [3])


def test_rows_far_apart(parts, height):
    queries, keys, weights, at_positive = inputs(37, 70, 64, BF16)
    apart = torch.full((70, 2, 64), torch.nan, device=DEVICE, dtype=BF16)
    apart[:, 0] = keys
    check(queries, apart[:, 0], weights, at_positive, [1])


@pytest.mark.parametrize(("n", "m"), [(130, 140), (140, 300)])
@pytest.mark.parametrize("name", ["rkdo", "rkdo-detached", "info_nce"])
def test_losses(name, n, m, monkeypatch):
    function, eager, settings = {
        "rkdo": (rkdo_loss, reference.rkdo_loss, {}),
        "rkdo-detached": (rkdo_loss, reference.rkdo_loss, {"detach_target": True, "depth": 8}),
        "info_nce": (info_nce, reference.info_nce, {"temperature": 0.2}),
    }[name]
    settings = settings | {"positive_offset": m - n}
    monkeypatch.setattr(launch, "STRIPE_BYTES", 1)  # stripes of 128
    assert_as_accurate(
        lambda **x: function(**x, **settings, backend="triton", reduction="none"),
        lambda **x: eager(**x, **settings),
        sample_views(n, 256, BF16, m=m, aligned=name == "rkdo"),
        scale=1 / settings.get("temperature", 0.5),
    )


def test_what_goes_by_stripes(parts, monkeypatch):
    monkeypatch.setattr(launch, "STRIPE_DIM", 256)
    for dtype, d, by_stripes in (
        (BF16, 256, True), (BF16, 255, False), (torch.float16, 256, False),
        (torch.float32, 512, False),
    ):  # fmt: skip
        assert gradient_stripes.pays(torch.empty(1, d, dtype=dtype)) == by_stripes
        views = sample_views(9, d, dtype)
        evaluate(lambda **x: rkdo_loss(**x, backend="triton", reduction="none"), views)
        assert bool(parts) == by_stripes
        del parts[:]


def test_the_same_as_without_stripes(parts, height):
    queries, keys, weights, at_positive = inputs(37, 70, 40, BF16)
    call = queries, keys, torch.tensor(2.0, device=DEVICE), 1.5, weights, [0], at_positive
    found = moments_gradient.moments_backward(*call)
    assert parts
    launch.STRIPE_DIM = 41  # which `parts` sets right again
    wanted = moments_gradient.moments_backward(*call)
    for a, b in zip(found, wanted, strict=True):
        assert float((a - b).abs().max()) <= 2e-2 * float(b.abs().max())


def test_a_nan_row(parts, height):
    queries, keys, weights, at_positive = inputs(37, 70, 20, BF16)
    call = keys, torch.tensor(2.0, device=DEVICE), 1.5, weights, [0], at_positive
    room = queries.new_empty(37 * 70)
    clean = gradient_stripes.Stripes(queries, *call).stripe(room, 0, 37, 0, 70).clone()
    queries[3] = torch.nan
    g = gradient_stripes.Stripes(queries, *call).stripe(room, 0, 37, 0, 70)
    others = torch.arange(37, device=DEVICE) != 3
    assert torch.equal(g[others], clean[others])
    assert g[3].isnan().sum() == 69  # the positive's gradient is given
    d_queries, d_keys = gradient_stripes.moments_backward(queries, *call)
    assert d_queries[3].isnan().all()
    assert d_keys.isnan().all()  # 0 · NaN too


def test_stripes_fit_the_cache(monkeypatch):
    assert launch.stripe(1024, 1024) == 1024
    assert launch.stripe(65_536, 65_536) == 256
    assert launch.stripe(10_000, 10_000) * 10_000 * 2 <= launch.STRIPE_BYTES
    assert launch.stripe(1 << 20, 1 << 20) == 128  # at least a tile
    assert launch.stripe(100, 1 << 20) == 100
    monkeypatch.setattr(launch, "STRIPE_BYTES", 1 << 20)
    assert launch.stripe(4096, 1024) == 512
