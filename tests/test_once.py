"""Forward-mode and second derivatives are not there: an error, and never a part of them."""

import pytest
import torch
from accuracy import DEVICE, sample_views

from rkdo_kernels import icon_loss, info_nce, rkdo_loss, similarity_logsumexp, small

LOSSES = {
    "rkdo": rkdo_loss,
    "icon": icon_loss,
    "student": lambda *views, **settings: icon_loss(*views, kernel="student", **settings),
    "info_nce": info_nce,
}


@pytest.fixture(params=["small", "tiles"])
def path(request, monkeypatch):
    if request.param == "tiles":
        monkeypatch.setattr(small, "MAX_ENTRIES", 0)


def views():
    pair = sample_views(6, 4, torch.float64).values()
    return [x.requires_grad_() for x in pair]


@pytest.mark.parametrize("name", LOSSES)
def test_twice_by_the_queries(name, path):
    queries, keys = views()

    def twice():
        (gradient,) = torch.autograd.grad(LOSSES[name](queries, keys), queries, create_graph=True)
        torch.autograd.grad(gradient.square().sum(), [queries, keys])

    with pytest.raises(RuntimeError, match=r"once, not twice|no autograd formula"):
        twice()


@pytest.mark.parametrize("name", LOSSES)
def test_twice_by_the_temperature(name, path):
    temperature = torch.tensor(0.5, dtype=torch.float64, device=DEVICE, requires_grad=True)
    loss = LOSSES[name](*views(), temperature=temperature)
    (gradient,) = torch.autograd.grad(loss, temperature, create_graph=True)
    with pytest.raises(RuntimeError, match="once, not twice"):
        torch.autograd.grad(gradient, temperature)


@pytest.mark.parametrize("name", LOSSES)
def test_forward_mode(name, path):
    queries, keys = (x.detach() for x in views())
    with pytest.raises(NotImplementedError, match="forward-mode"):
        torch.func.jvp(lambda x: LOSSES[name](x, keys), (queries,), (queries,))


def test_forward_mode_of_the_primitive():
    queries, keys = (x.detach() for x in views())
    with pytest.raises(NotImplementedError, match="forward-mode"):
        torch.func.jvp(
            lambda x: similarity_logsumexp(x, keys, temperature=0.5), (queries,), (queries,)
        )


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_backward_inside_autocast_keeps_float32(backend, path):
    if DEVICE != "cpu" and backend == "auto":
        backend = "tiled"
    queries, keys = (x.detach().float().requires_grad_() for x in views())
    outside = torch.autograd.grad(rkdo_loss(queries, keys, backend=backend), queries)
    with torch.autocast(DEVICE, torch.bfloat16):
        loss = rkdo_loss(queries, keys, backend=backend)
        inside = torch.autograd.grad(loss, queries) if backend != "reference" else outside
    torch.testing.assert_close(inside, outside, rtol=0, atol=0)
    assert loss == rkdo_loss(queries, keys, backend=backend)


def test_a_nan_row_is_nan_in_the_reference_too():
    queries, keys = (x.detach() for x in views())
    queries[2, 0] = torch.nan
    rows = rkdo_loss(queries, keys, backend="reference", reduction="none")
    assert rows.isnan().tolist() == [i == 2 for i in range(6)]


@pytest.mark.parametrize("temperature", [1e-8, 1e-12])
def test_temperatures_far_below_any_use(temperature, path):
    pair = [x.detach() for x in views()]
    ours = rkdo_loss(*pair, temperature=temperature, bound=None)
    truth = rkdo_loss(*pair, temperature=temperature, bound=None, backend="reference")
    torch.testing.assert_close(ours, truth, rtol=1e-12, atol=0)
