"""Loss and gradient from one pass over the tiles: the yardstick, and the same as in two passes."""

import pytest
import torch
from accuracy import DTYPES, assert_as_accurate, evaluate, sample_views

from rkdo_kernels import icon_loss, info_nce, one_pass, ops, reference, rkdo_loss, small, tiles

pytestmark = [
    pytest.mark.usefixtures("poisoned", "in_tiles"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="one pass is the CPU's"),
]
FUNCTIONS = {
    "rkdo": (rkdo_loss, reference.rkdo_loss, {}),
    "rkdo-cold": (rkdo_loss, reference.rkdo_loss, {"temperature": 0.07, "depth": 8}),
    "rkdo-detached": (rkdo_loss, reference.rkdo_loss, {"detach_target": True, "cooling": 0.3}),
    "rkdo-one-hot": (rkdo_loss, reference.rkdo_loss, {"alpha": 0}),
    "rkdo-uncooled": (rkdo_loss, reference.rkdo_loss, {"cooling": 0}),
    "icon": (icon_loss, reference.icon_loss, {}),
    "info_nce": (info_nce, reference.info_nce, {"temperature": 0.2}),
    "info_nce-cold": (info_nce, reference.info_nce, {"temperature": 0.05}),
}


@pytest.fixture
def in_tiles(monkeypatch):
    """Several blocks of several tiles, the last of both cut short."""
    monkeypatch.setattr(small, "MAX_ENTRIES", 0)
    monkeypatch.setattr(tiles, "ROWS", 24)
    monkeypatch.setattr(tiles, "LEAST_ROWS", 24)
    monkeypatch.setattr(tiles, "COLS", 32)


@pytest.fixture
def passes(monkeypatch):
    """How often either way was taken: gradients formed in the forward pass, and in the backward."""
    taken = {"one": 0, "two": 0}
    run, back = one_pass.recursion_moments, ops.tiled.moments_backward

    def forward(*args):
        taken["one"] += any(args[-2])
        return run(*args)

    def backward(*args):
        taken["two"] += 1
        return back(*args)

    monkeypatch.setattr(ops.tiled, "recursion_moments", forward)
    monkeypatch.setattr(ops.tiled, "moments_backward", backward)
    return taken


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("n", "m", "offset", "aligned"),
    [(1, 1, 0, False), (24, 32, 8, True), (70, 100, 30, False), (129, 129, 0, True)],
)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_as_accurate_as_eager(name, n, m, offset, aligned, dtype, passes):
    function, eager, settings = FUNCTIONS[name]
    for reduction in ("mean", "sum"):
        assert_as_accurate(
            lambda r=reduction, **x: function(**x, **settings, reduction=r, positive_offset=offset),
            lambda r=reduction, **x: getattr(eager(**x, **settings, positive_offset=offset), r)(),
            sample_views(n, 24, dtype, m=m, aligned=aligned),
            scale=1 / settings.get("temperature", 0.5),
        )
    assert passes == {"one": 2, "two": 0}


@pytest.mark.parametrize("name", ["rkdo", "info_nce"])
def test_when_two_passes_are_needed(name, passes, monkeypatch):
    function, _, settings = FUNCTIONS[name]
    views = sample_views(40, 8)
    evaluate(lambda **x: function(**x, **settings, reduction="none"), views)
    assert passes == {"one": 0, "two": 1}
    function(**views, **settings)
    assert passes == {"one": 0, "two": 1}, "a gradient that nobody asked for"
    monkeypatch.setattr(tiles, "KEPT_BYTES", 2 * 4 * 24 * 40 - 1)
    evaluate(lambda **x: function(**x, **settings), views)
    assert passes == {"one": 0, "two": 2}


def test_both_ways_agree():
    views = sample_views(70, 24, aligned=True)
    for name, (function, _, settings) in FUNCTIONS.items():
        one = evaluate(lambda f=function, s=settings, **x: f(**x, **s), views)
        two = evaluate(
            lambda f=function, s=settings, **x: f(**x, **s, reduction="none").mean(), views
        )
        for key, x in two.items():
            assert float((one[key] - x).abs().max()) <= 4e-6 * float(x.abs().max()), (name, key)


def test_self_pairs_may_be_left_out():
    views = sample_views(40, 16, m=80)
    settings = {"temperature": 0.2, "exclude_self": True, "positive_offset": 40}
    assert_as_accurate(
        lambda **x: info_nce(**x, **settings),
        lambda **x: reference.info_nce(**x, **settings).mean(),
        views,
        scale=5,
    )


def test_powers_that_would_overflow_are_taken_of_u(monkeypatch):
    assert one_pass.powers_are_safe(2.1, 4, 1 << 20, torch.float32)
    logit, degree, m = 33.0, 12, 1 << 24
    largest = torch.tensor(logit).exp() * torch.tensor(logit) ** degree * m
    assert largest == float("inf")
    assert not one_pass.powers_are_safe(logit, degree, m, torch.float32)
    monkeypatch.setattr(one_pass, "powers_are_safe", lambda *_: False)
    for bound, temperature in ((1.0, 0.06), (1.5, 0.3)):
        assert_as_accurate(
            lambda b=bound, t=temperature, **x: rkdo_loss(**x, temperature=t, bound=b),
            lambda t=temperature, **x: reference.rkdo_loss(**x, temperature=t).mean(),
            sample_views(70, 3, aligned=True, length=1.2 if bound > 1 else 1.0),
            scale=bound / temperature,
        )


def test_a_second_derivative_is_refused():
    views = [x.requires_grad_() for x in sample_views(40, 8).values()]
    (gradient,) = torch.autograd.grad(rkdo_loss(*views), views[0], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated once"):
        gradient.square().sum().backward()


def test_one_operand_may_be_a_constant():
    queries, keys = sample_views(40, 8).values()
    both = evaluate(lambda **x: rkdo_loss(**x), {"queries": queries, "keys": keys})
    alone = evaluate(lambda queries: rkdo_loss(queries, keys), {"queries": queries})
    assert torch.equal(both["queries"], alone["queries"])
