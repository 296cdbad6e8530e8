"""The yardstick measures: it passes eager itself and fails what is off by more."""

import pytest
import torch
from accuracy import DEVICE, assert_as_accurate, evaluate, sample_views, worst_of_draws

from rkdo_kernels import reference

UPSET = {
    "a factor": lambda x: x * 1.00001,
    "a shift": lambda x: x + 1e-5,
    "one entry": lambda x: torch.cat([x[:-1], x[-1:] * 1.001]),
    "NaN": lambda x: torch.cat([x[:-1], x[-1:] * float("nan")]),
    "no gradient": lambda x: x.detach() + 0 * x,
    "a wrong gradient": lambda x: x.detach() + 1.0001 * (x - x.detach()),
}


def test_eager_is_as_accurate_as_eager():
    assert_as_accurate(reference.rkdo_loss, reference.rkdo_loss, sample_views(33, 24))


@pytest.mark.parametrize("draws", [1, 4])
@pytest.mark.parametrize("upset", UPSET)
def test_the_yardstick_catches(upset, draws):
    def wrong(**views):
        return UPSET[upset](reference.rkdo_loss(**views))

    with pytest.raises(AssertionError, match=r"passes|^$"):
        assert_as_accurate(wrong, reference.rkdo_loss, sample_views(33, 24), draws=draws)


def test_eagers_worst_draw_is_one_of_its_own():
    """At least the one error, and no error that eager does not have in some order."""
    views = sample_views(3, 31)
    found = [evaluate(reference.rkdo_loss, views) for _ in range(2)]
    truth = evaluate(reference.rkdo_loss, {k: x.double() for k, x in views.items()})
    naive = worst_of_draws(reference.rkdo_loss, views, found[0], truth, 4)
    for name, x in naive.items():
        once, worst = (float((y[name] - truth[name]).abs().max()) for y in (found[1], naive))
        assert once <= worst <= 1e-6
        assert x.dtype == torch.float32
    assert any(not torch.equal(naive[name], found[1][name]) for name in naive)


@pytest.mark.usefixtures("poisoned")
def test_uninitialised_memory_is_poisoned():
    x = torch.zeros(1, device=DEVICE)
    assert torch.empty(3, device=DEVICE).isnan().all()
    assert x.new_empty(3, 5).isnan().all()
    assert torch.empty_like(x).isnan().all()
