"""Settings at the ends of their ranges, where sums cancel and logarithms run away."""

import pytest
import torch
from accuracy import DEVICE, assert_as_accurate, sample_views
from test_half_precision import collapsed, nt_xent_rows
from torch.nn.functional import normalize

from rkdo_kernels import (
    ResponseField,
    icon_loss,
    info_nce,
    nt_xent,
    reference,
    rkdo_loss,
    similarity_logsumexp,
    similarity_moments,
    small,
)

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
        settings = {"alpha": alpha, "cooling": 1 - 1e-6}
        hold(sample_views(9, 6, aligned=True), path, temperature, **settings)
        settings["cooling"] = 1 - 1e-12
        hold(sample_views(9, 6, aligned=True), path, temperature, **settings)
        if path["backend"] == "tiled":
            views = sample_views(9, 6, torch.float64, aligned=True)
            hold(views, path, temperature, **settings)


@pytest.mark.parametrize("backend", ["tiled", "triton"])
def test_the_temperature_s_gradient_at_a_cooling_that_is_all_but_1(backend):
    """Entries that do not count have an infinite e there, and weigh nothing."""
    views = sample_views(9, 6, aligned=True)
    settings = {"cooling": 1 - 1e-12}
    for temperature in (0.05, 0.5):
        assert_as_accurate(
            lambda **x: rkdo_loss(**x, **settings, backend=backend, reduction="none"),
            lambda **x: reference.rkdo_loss(**x, **settings),
            views | {"temperature": torch.tensor(temperature, device=DEVICE)},
            scale=1 / temperature,
        )


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
        (true,) = torch.autograd.grad(eager(**views, **settings, temperature=exact).mean(), exact)
        assert found.dtype == dtype
        assert abs(float(found) - float(true)) <= torch.finfo(dtype).eps * abs(float(true))


@pytest.mark.parametrize("debias", [0.2, 0.25, 0.5, 0.9, 0.99, 0.999, 1])
@pytest.mark.parametrize("kernel", ["gaussian", "student"])
def test_a_target_that_is_all_but_even(kernel, debias, path):
    """Its gradient is what the softmax lacks of being even: two sums would cancel."""
    settings = {"kernel": kernel, "debias": debias}
    for views, temperature in (
        (collapsed(40, 24, torch.float32, cosine=0.99), 0.5),
        (collapsed(70, 24, torch.bfloat16, cosine=0.99), 0.1),
        (sample_views(40, 16), 2.0),
        (sample_views(33, 8, aligned=True), 0.5),
    ):
        settings["temperature"] = temperature
        assert_as_accurate(
            lambda **x: icon_loss(**x, **settings, **path, reduction="none"),
            lambda **x: reference.icon_loss(**x, **settings),
            views,
            scale=1 / temperature,
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cold_softmax_of_keys_that_are_alike(dtype):
    """What S was rounded to cancels between the mean of S and the softmax's sum, if both have it:
    1/τ multiplies it otherwise, and the loss is next to nothing."""
    misses = []
    for seed in range(8):
        for temperature in (0.01, 0.05):
            views = sample_views(4, 3, torch.float64, m=6, seed=seed)
            views = {key: normalize(0.03 * x + 1, dim=1) for key, x in views.items()}
            try:
                assert_as_accurate(
                    lambda t=temperature, **x: icon_loss(
                        **x, temperature=t, debias=1, positive_offset=0, bound=None,
                        reduction="none", backend="tiled",
                    ),
                    lambda t=temperature, **x: reference.icon_loss(**x, temperature=t, debias=1),
                    {key: x.to(DEVICE, dtype) for key, x in views.items()},
                    scale=1 / temperature,
                )  # fmt: skip
            except AssertionError as miss:
                misses.append(f"{seed}, {temperature}: {miss}")
    assert not misses, "\n".join(misses)


@pytest.mark.parametrize("backend", ["tiled", "triton"])
def test_cold_sums_of_few_keys_keep_their_digits(backend):
    """A fixed shift rounds exponents at b/τ: past a limit a running maximum takes over."""
    for name in ("info_nce", "symmetric", "nt_xent"):
        function, eager, settings = TEMPERATE[name]
        settings = settings | {"temperature": 0.03}
        for seed in range(6):
            assert_as_accurate(
                lambda f=function, s=settings, **x: f(**x, **s, backend=backend, reduction="none"),
                lambda f=eager, s=settings, **x: f(**x, **s),
                sample_views(3, 17, seed=seed),
                scale=1 / 0.03,
            )


@pytest.mark.parametrize("backend", ["tiled", "triton"])
@pytest.mark.parametrize("learnable", [False, True])
def test_moments_of_a_key_at_the_bound_are_one(learnable, backend):
    """exp((S − b) / τ) of S = b, whatever 1/τ is rounded to."""
    queries, keys = torch.tensor([[1.0, 0.0]], device=DEVICE), torch.eye(2, device=DEVICE)
    for temperature in (0.026, 0.03, 0.037, 0.11, 0.3):
        given = torch.tensor(temperature, device=DEVICE) if learnable else temperature
        true = reference.similarity_moments(
            queries.double(), keys.double(), temperature=float(given), degree=1
        )
        found = similarity_moments(queries, keys, temperature=given, degree=1, backend=backend)
        assert float((found - true).abs().max()) <= 5 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("backend", ["tiled", "triton"])
def test_a_positive_whose_product_is_rounded_by_more_than_the_temperature(backend, monkeypatch):
    """It weighs all there is, and no exponential of what it was rounded by is ∞."""
    monkeypatch.setattr(small, "MAX_ENTRIES", 0)
    for seed in range(6):
        views = sample_views(6, 7, m=9, seed=seed)
        views["keys"][:6] = 1e17 * (views["queries"] + 0.1 * views["keys"][:6])
        for settings in ({"depth": 1}, {"cooling": 0.9}, {"alpha": 1.0}):
            loss = rkdo_loss(
                **views, **settings, bound=None, positive_offset=0, reduction="none",
                backend=backend, temperature=0.03,
            )  # fmt: skip
            true = reference.rkdo_loss(
                **{key: x.double() for key, x in views.items()}, **settings, temperature=0.03
            )
            numbers = torch.isfinite(true) & (true < 1)
            assert numbers.any()
            assert float((loss.double() - true)[numbers].abs().max()) <= 1e-6


@pytest.mark.parametrize("backend", ["tiled", "triton"])
@pytest.mark.parametrize("far", [1.0, 1e13, 1e16])
@pytest.mark.parametrize("temperature", [1e30, 1e33])
def test_what_is_left_out_weighs_nothing(temperature, far, backend):
    """However low all the products of a row are, and however hot its softmax is."""
    views = sample_views(5, 7, m=9)
    views["queries"], views["keys"] = far * views["queries"].abs(), -far * views["keys"].abs()
    given = {"temperature": temperature, "bound": None}
    paired = {**given, "positive_offset": 1}
    cast = {name: x.double() for name, x in views.items()}
    for function, settings in (
        (similarity_logsumexp, {**given, "exclude_self": True}), (info_nce, paired),
        (icon_loss, {**paired, "debias": 0.5}), (rkdo_loss, paired),
        (icon_loss, {**paired, "kernel": "student"}),
    ):  # fmt: skip
        settings |= {} if function is similarity_logsumexp else {"reduction": "none"}
        found = function(**views, **settings, backend=backend)
        true = function(**cast, **settings, backend="reference")
        assert torch.allclose(found.double(), true, rtol=1e-5, atol=1e-6)
    field, index = ResponseField.dense(9, device=DEVICE), torch.arange(5, device=DEVICE)
    views["keys"], cast["keys"] = views["keys"][:5], cast["keys"][:5]
    found = field.loss(
        *views.values(), index, temperature=temperature, reduction="none", backend=backend
    )
    true = info_nce(**cast, **given, reduction="none", backend="reference")
    assert torch.allclose(found.double(), true, rtol=1e-5, atol=1e-6)


def test_an_alpha_below_float32_with_half_precision():
    """The kernels' arithmetic stays in float32, and a matrix product takes no float64."""
    hold(sample_views(3, 4, torch.float16), PATHS["direct-triton"], 0.5, alpha=5e-324)
