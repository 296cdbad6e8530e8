"""The yardstick measures: it passes eager itself and fails what is off by more."""

from functools import partial

import pytest
import torch
from accuracy import DEVICE, assert_as_accurate, cast, errors_of, evaluate, sample_views

from bench import draws
from rkdo_kernels import reference

UPSET = {
    "a factor": lambda x: x * 1.00001,
    "a shift": lambda x: x + 1e-5,
    "one entry": lambda x: torch.cat([x[:-1], x[-1:] * 1.001]),
    "NaN": lambda x: torch.cat([x[:-1], x[-1:] * float("nan")]),
    "no gradient": lambda x: x.detach() + 0 * x,
    "a wrong gradient": lambda x: x.detach() + 1.0001 * (x - x.detach()),
}
COLD = partial(reference.rkdo_loss, temperature=0.01, depth=1)


def test_eager_is_as_accurate_as_eager():
    assert_as_accurate(reference.rkdo_loss, reference.rkdo_loss, sample_views(33, 24))


@pytest.mark.parametrize("upset", UPSET)
def test_the_yardstick_catches(upset):
    def wrong(**views):
        return UPSET[upset](reference.rkdo_loss(**views))

    with pytest.raises(AssertionError, match=r"passes|^$"):
        assert_as_accurate(wrong, reference.rkdo_loss, sample_views(33, 24))


def one_by_one(order):
    """Each row's similarity to its key, added up in an order, which rounds alike on any machine."""

    def loss(queries, keys):
        total = torch.zeros_like(queries[:, 0])
        for k in order:
            total = total + queries[:, k] * keys[:, k]
        return total

    return loss


def test_no_order_of_the_sums_fails_by_chance():
    """Of three rows one order's error is several times another's; no order is the right one."""
    views = sample_views(3, 24)
    truth = one_by_one(range(24))(**cast(views, torch.float64))
    orders = [
        torch.randperm(24, generator=torch.Generator().manual_seed(k)) for k in range(100, 130)
    ]
    errors = [float((one_by_one(x)(**views) - truth).abs().max()) for x in orders]
    exactest, worst = (orders[errors.index(f(errors))] for f in (min, max))
    ulp = torch.finfo(torch.float32).eps * float(truth.abs().max())
    assert max(errors) > 2 * min(errors) + ulp, "one draw would do"
    assert_as_accurate(one_by_one(worst), one_by_one(exactest), views)


def test_a_similarity_that_rounds_by_more_than_any_order_fails():
    """Errors of 5e-7 in S, where float32's are of 1e-7; those of 2e-7 fail 9 times of 10."""
    views = sample_views(19, 24)
    for seed in range(3):
        noise = torch.randn(19, 24, generator=torch.Generator().manual_seed(seed)).to(DEVICE)
        with pytest.raises(AssertionError, match="passes"):
            assert_as_accurate(
                lambda queries, e=noise, **x: COLD(queries + 5e-7 * e, **x), COLD, views
            )


def test_draws_are_of_the_same_problem():
    """In another order: the same truth. Moved: another, by about as many ulps as were asked for."""
    views = {"queries": sample_views(5, 7)["queries"], "past keys": torch.randn(2, 4, 7)}
    taken = list(draws.draws(views, ulps=(1, 1000)))
    assert len(taken) == draws.DRAWS
    assert [x.moved for x in taken] == [False, True] * (draws.DRAWS // 2)
    assert len({tuple(x.order.tolist()) for x in taken}) == draws.DRAWS
    for number, draw in enumerate(taken):
        ulps = (0, 1, 0, 1000)[number % 4] * torch.finfo(torch.float32).eps
        for name, x in draw.in_order(views).items():
            share = float((draw.inputs[name] / x - 1).abs().max())
            assert 0.5 * ulps <= share <= 5 * ulps


def test_the_worst_error_is_eagers_own():
    """Not below the one that is known, and one that eager has on some draw; NaN is none."""
    views = sample_views(3, 31)
    truth = evaluate(COLD, cast(views, torch.float64))
    none, much = dict.fromkeys(truth, 0.0), dict.fromkeys(truth, 1.0)

    def exact(inputs):
        return evaluate(COLD, cast(inputs, torch.float64))

    def errors(inputs, true):
        return errors_of(evaluate(COLD, inputs), true)

    found = draws.worst(none, views, truth, exact, errors)
    each = [
        errors(x.inputs, exact(x.inputs) if x.moved else x.in_order(truth))
        for x in draws.draws(views)
    ]
    assert found == {name: max(x[name] for x in each) for name in truth}
    assert all(error > 0 for error in found.values())
    assert draws.worst(much, views, truth, exact, errors) == much
    nothing = dict.fromkeys(truth, float("nan"))
    assert draws.worst(none, views, truth, exact, lambda *_: nothing) == none


@pytest.mark.usefixtures("poisoned")
def test_uninitialised_memory_is_poisoned():
    x = torch.zeros(1, device=DEVICE)
    assert torch.empty(3, device=DEVICE).isnan().all()
    assert x.new_empty(3, 5).isnan().all()
    assert torch.empty_like(x).isnan().all()
