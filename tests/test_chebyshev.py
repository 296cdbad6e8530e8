"""Interpolation, the degree that RKDO needs, and both paths on either side of the switch."""

import pytest
import torch
from accuracy import assert_as_accurate, sample_views

from rkdo_kernels import chebyshev, launch, reference, rkdo_loss, small


def scales_for(temperature, cooling, depth):
    return tuple(1 / (temperature * (1 - cooling * t / depth)) for t in range(depth + 1))


@pytest.mark.parametrize("degree", [1, 2, 4, 7, 12])
def test_polynomials_are_interpolated_exactly(degree):
    generator = torch.Generator().manual_seed(degree)
    wanted = torch.randn(degree + 1, generator=generator, dtype=torch.float64)
    powers = torch.arange(degree + 1)
    values = (chebyshev.nodes(degree)[:, None] ** powers) @ wanted
    found = values @ chebyshev.monomials(degree)
    assert float((found - wanted).abs().max()) <= 2e-16 * 4**degree


def test_nodes_are_the_zeros_of_the_next_polynomial():
    for degree in range(1, 13):
        x = chebyshev.nodes(degree)
        assert float(torch.cos((degree + 1) * torch.acos(x)).abs().max()) <= 1e-13
        assert len(set(x.tolist())) == degree + 1


def test_the_middle_makes_the_tilts_opposite():
    scales = scales_for(0.5, 0.3, 4)
    tilts = chebyshev.tilts(scales, 1.5)
    assert abs(tilts[0] + tilts[-1]) <= 1e-15
    assert abs(tilts[-1] - tilts[0] - 1.5 * (scales[-1] - scales[0])) <= 1e-14


@pytest.mark.parametrize(("depth", "degree"), [(1, 4), (2, 4), (3, 4), (8, 4), (20, 4), (100, 4)])
def test_the_default_temperature_needs_no_more_for_more_depth(depth, degree):
    assert chebyshev.rkdo_degree(0.5, scales_for(0.5, 0.1, depth), 1.0) == degree


def test_the_degree_is_the_least_within_the_tolerance():
    settings = (
        (0.5, 0.5, 0.1, 1.0),
        (0.25, 0.3, 0.3, 1.0),
        (0.5, 0.9, 0.3, 1.5),
        (0.1, 0.5, 0.1, 1.0),
    )
    for temperature, alpha, cooling, bound in settings:
        scales = scales_for(temperature, cooling, 3)
        degree = chebyshev.rkdo_degree(alpha, scales, bound)
        error = [
            chebyshev.interpolation_error(k, alpha, scales, bound) for k in (degree - 1, degree)
        ]
        assert error[1] <= chebyshev.tolerance(alpha) < error[0]


def test_degrees_grow_with_what_is_harder():
    degrees = [chebyshev.rkdo_degree(0.5, scales_for(0.5, c, 3), 1.0) for c in (0, 0.1, 0.3, 0.45)]
    assert degrees == sorted(degrees)
    assert degrees[0] < degrees[-1]
    assert chebyshev.rkdo_degree(0.5, scales_for(0.05, 0.5, 3), 1.0) is None
    assert chebyshev.rkdo_degree(0.5, scales_for(0.5, 0.1, 3), 50.0) is None


@pytest.mark.parametrize("alpha", [0.05, 0.5, 1.0])
@pytest.mark.parametrize(
    ("temperature", "cooling", "depth"), [(0.5, 0.1, 3), (0.1, 0.1, 1), (0.25, 0.3, 5)]
)
def test_the_bound_holds_for_rows_of_any_kind(temperature, cooling, depth, alpha):
    """A row's loss and gradient, with its own normalisers, densely, against the interpolants."""
    scales = scales_for(temperature, cooling, depth)
    degree = chebyshev.rkdo_degree(alpha, scales, 1.0)
    tilts = torch.tensor(chebyshev.tilts(scales, 1.0), dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    u = torch.linspace(-1, 1, 501, dtype=torch.float64)
    for sharpness in (0.0, 1.0, 10.0):
        for _ in range(10):
            shape = torch.randn(200, generator=generator, dtype=torch.float64)
            s = torch.tanh(shape * sharpness + torch.randn(1, generator=generator))
            weight = torch.softmax(chebyshev.middle(scales) * s, 0)
            log_z = torch.log((weight * torch.exp(tilts[:, None] * s)).sum(1))

            def rows(u, log_z=log_z):
                r = y = f = g = torch.zeros_like(u)
                e = torch.exp(tilts[0] * u - log_z[0])
                for t in range(1, depth + 1):
                    r, y = (1 - alpha) * r + alpha * e, (1 - alpha) * y + alpha * scales[t - 1] * e
                    log_e = tilts[t] * u - log_z[t]
                    w, e = r.log() - log_e, log_e.exp()
                    f, g = f + r * w, g + scales[t] * (e - r) + y * w
                return f, g / chebyshev.middle(scales), r

            *at_nodes, _ = rows(chebyshev.nodes(degree))
            *values, r = rows(u)
            for at_node, value in zip(at_nodes, values, strict=True):
                a = at_node @ chebyshev.monomials(degree)
                off = ((u[:, None] ** torch.arange(degree + 1)) @ a - value).abs() / r
                assert float(off.max()) <= chebyshev.tolerance(alpha)
            assert float((weight * rows(s)[2]).sum()) <= 1 + 1e-9


def test_the_switch_between_the_paths():
    """Temperatures on both sides of where moments give way, and the yardstick on each."""
    around = {}
    for temperature in torch.linspace(0.04, 0.4, 40, dtype=torch.float64).tolist():
        scales = list(scales_for(temperature, 0.3, 3))
        around[temperature] = launch.rkdo_degree(scales, 0.5, 1.0, torch.float32)
    direct = [t for t, degree in around.items() if degree is None]
    moments = [t for t, degree in around.items() if degree is not None]
    assert max(direct) < min(moments)
    tilt = chebyshev.tilts(scales_for(min(moments), 0.3, 3), 1.0)[-1]
    assert 0.9 < tilt / chebyshev.MAX_TILT <= 1


@pytest.mark.parametrize("aligned", [False, True], ids=["independent", "aligned"])
@pytest.mark.parametrize("cooling", [0.1, 0.3])
def test_both_sides_of_the_switch_meet_the_yardstick(cooling, aligned, monkeypatch):
    monkeypatch.setattr(small, "MAX_ENTRIES", 0)
    low, high = 0.02, 1.0  # the direct path's, the moments'
    for _ in range(20):
        middle = (low + high) / 2
        on_moments = launch.rkdo_degree(
            list(scales_for(middle, cooling, 3)), 0.5, 1.0, torch.float32
        )
        low, high = (low, middle) if on_moments else (middle, high)
    for temperature in (0.5 * low, 0.99 * low, low, high, 1.01 * high, 1.5 * high, 3 * high):
        settings = {"temperature": temperature, "cooling": cooling}
        for dim in (2, 24):  # in 2 dimensions rows gather near S = 1
            assert_as_accurate(
                lambda s=settings, **x: rkdo_loss(**x, **s, reduction="none"),
                lambda s=settings, **x: reference.rkdo_loss(**x, **s),
                sample_views(50, dim, aligned=aligned),
                scale=1 / temperature,
            )


@pytest.mark.parametrize("alpha", [0.7, 0.9, 0.99, 1.0])
@pytest.mark.parametrize("aligned", [False, True], ids=["independent", "aligned"])
def test_small_losses_keep_their_digits(aligned, alpha):
    """Where p_t is almost q_{t−1}; a mean averages eager's errors, and not an interpolant's."""
    for temperature, depth, cooling in ((1, 1, 0.1), (0.5, 1, 0.05), (0.2, 1, 0.05), (2, 3, 0.2)):
        settings = {"temperature": temperature, "depth": depth, "cooling": cooling}
        assert_as_accurate(
            lambda s=settings, **x: rkdo_loss(**x, **s, alpha=alpha),
            lambda s=settings, **x: reference.rkdo_loss(**x, **s, alpha=alpha).mean(),
            sample_views(200, 32, aligned=aligned),
            scale=1 / temperature,
        )


@pytest.mark.parametrize("tiles", [False, True], ids=["small", "tiles"])
def test_cooling_may_be_next_to_1(tiles, monkeypatch):
    monkeypatch.setattr(small, "MAX_ENTRIES", 0 if tiles else 1 << 14)
    views = {name: x.double() for name, x in sample_views(8, 4).items()}
    settings = {"cooling": 1 - 2**-53, "reduction": "none"}
    found = rkdo_loss(**views, **settings)
    wanted = reference.rkdo_loss(**views, cooling=1 - 2**-53)
    assert torch.allclose(found, wanted, rtol=1e-12)


def test_what_moments_cannot_do_takes_the_direct_path():
    scales = list(scales_for(0.5, 0.1, 3))
    assert launch.rkdo_degree(scales, 0.5, 1.0, torch.float32) == 4
    assert launch.rkdo_degree(None, 0.5, 1.0, torch.float32) is None
    assert launch.rkdo_degree(scales, 0.5, None, torch.float32) is None
    assert launch.rkdo_degree(scales, 0.5, 1.0, torch.float64) is None
    steep = list(scales_for(0.0501, 0.0, 3))
    assert launch.rkdo_degree(steep, 0.5, 1.0, torch.float32) is not None
    assert launch.rkdo_degree(list(scales_for(0.0499, 0.0, 3)), 0.5, 1.0, torch.float32) is None
