"""Settings at the ends of their ranges, where sums cancel and logarithms run away."""

import pytest
import torch
from accuracy import DEVICE, assert_as_accurate, sample_views

from rkdo_kernels import icon_loss, info_nce, nt_xent, reference, rkdo_loss, small
from test_half_precision import collapsed, nt_xent_rows

pytestmark = pytest.mark.usefixtures("poisoned")
PATHS = {
    "small": {"backend": "tiled"},
    "moments-tiled": {"backend": "tiled"},
    "moments-triton": {"backend": "triton"},
    "direct-tiled": {"backend": "tiled", "bound": None},
    "direct-triton": {"backend": "triton", "bound": None},
    "reference": {"backend": "reference"},
}


@pytest.fixture(params=[x for x in PATHS if DEVICE == "cpu" or x != "small"])
def path(request, monkeypatch):
    if request.param != "small":
        monkeypatch.setattr(small, "MAX_ENTRIES", 0)
    return PATHS[request.param]


def hold(views, path, temperature, **settings):
    settings |= {"temperature": temperature}
    assert_as_accurate(
        lambda **x: rkdo_loss(**x, **settings, **path, reduction="none"),
        lambda **x: reference.rkdo_loss(**x, **settings),
        views,
        scale=1 / temperature / (1 - settings.get("cooling", 0)),
    )


ALPHAS = [5e-324, 1e-310, 1e-200, 1e-60, 1e-42, 1 - 1e-3, 1 - 2**-53]


@pytest.mark.parametrize("alpha", ALPHAS)
def test_an_alpha_that_is_all_but_0_or_1(alpha, path):
    for temperature in (0.004, 0.05, 0.5):
        hold(sample_views(9, 6, aligned=True), path, temperature, alpha=alpha)
        if path["backend"] == "tiled":
            views = sample_views(9, 6, torch.float64, aligned=True)
            hold(views, path, temperature, alpha=alpha)


@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_a_cooling_that_is_all_but_1(alpha, path):
    """The last temperature is 1 − cooling of the first: (cooling t) / depth would round it off."""
    for temperature in (0.05, 0.5):
        hold(sample_views(9, 6, aligned=True), path, temperature, alpha=alpha, cooling=1 - 1e-6)
        if path["backend"] == "tiled":
            cooling = {"alpha": alpha, "cooling": 1 - 1e-12}
            hold(sample_views(9, 6, aligned=True), path, temperature, **cooling)
            views = sample_views(9, 6, torch.float64, aligned=True)
            hold(views, path, temperature, **cooling)


TEMPERATE = {
    "rkdo": (rkdo_loss, reference.rkdo_loss, {}),
    "icon": (icon_loss, reference.icon_loss, {}),
    "student": (icon_loss, reference.icon_loss, {"kernel": "student"}),
    "info_nce": (info_nce, reference.info_nce, {}),
    "symmetric": (info_nce, reference.info_nce, {"symmetric": True}),
    "nt_xent": (nt_xent, nt_xent_rows, {}),
}


@pytest.mark.parametrize("name", TEMPERATE)
def test_a_temperature_in_fewer_digits_than_the_inputs(name):
    """Its gradient is rounded once, after its parts have cancelled: to half an ulp of the truth."""
    function, eager, settings = TEMPERATE[name]
    views = collapsed(33, 24, torch.float64, cosine=0.99999)
    for dtype in (torch.float32, torch.bfloat16):
        given = torch.tensor(0.1, dtype=dtype, device=DEVICE, requires_grad=True)
        exact = given.detach().double().requires_grad_()
        (found,) = torch.autograd.grad(function(**views, **settings, temperature=given), given)
        (true,) = torch.autograd.grad(
            eager(**views, **settings, temperature=exact).mean(), exact
        )
        assert found.dtype == dtype
        assert abs(float(found) - float(true)) <= torch.finfo(dtype).eps * abs(float(true))
