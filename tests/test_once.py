"""Forward-mode and second derivatives are not there: an error, and never a part of them."""

import pytest
import torch
from accuracy import DEVICE, sample_views
from torch.autograd import forward_ad

from rkdo_kernels import (
    ResponseField,
    icon_loss,
    info_nce,
    nt_xent,
    one_pass,
    rkdo_loss,
    similarity_logsumexp,
    similarity_moments,
    small,
)
from rkdo_kernels.once import REFUSAL

LOSSES = {
    "rkdo": rkdo_loss,
    "icon": icon_loss,
    "student": lambda *views, **settings: icon_loss(*views, kernel="student", **settings),
    "info_nce": info_nce,
    "symmetric": lambda *views, **settings: info_nce(*views, symmetric=True, **settings),
    "nt_xent": nt_xent,
    "logsumexp": lambda *views, **settings: similarity_logsumexp(
        *views, **{"temperature": 0.5} | settings
    ).mean(),
    "moments": lambda *views, bound=1.0, **settings: similarity_moments(
        *views, degree=2, bound=bound or 1.0, **{"temperature": 0.5} | settings
    ).mean(),
}
SETTINGS = {
    "small": {},
    "tiles": {},
    "two passes": {},
    "cold": {"temperature": 0.03},
    "direct": {"bound": None},
    "triton": {"backend": "triton"},
    "triton direct": {"backend": "triton", "bound": None},
}


@pytest.fixture(params=["small", "tiles"])
def path(request, monkeypatch):
    if request.param == "tiles":
        monkeypatch.setattr(small, "MAX_ENTRIES", 0)


@pytest.fixture(params=SETTINGS)
def settings(request, monkeypatch):
    if request.param != "small":
        monkeypatch.setattr(small, "MAX_ENTRIES", 0)
    if request.param == "two passes":
        monkeypatch.setattr(one_pass, "fits", lambda *_: False)
    return SETTINGS[request.param]


def views(dtype=torch.float64):
    return [x.requires_grad_() for x in sample_views(6, 4, dtype).values()]


def twice(loss, queries, keys):
    (gradient,) = torch.autograd.grad(loss(queries, keys), queries, create_graph=True)
    torch.autograd.grad(gradient.float().square().sum(), [queries, keys])


def twice_by_the_keys(loss, queries, keys):
    (gradient,) = torch.autograd.grad(loss(queries, keys), keys, create_graph=True)
    gradient.float().square().sum().backward()


def in_forward_mode(loss, queries, keys):
    with forward_ad.dual_level():
        loss(queries, forward_ad.make_dual(keys.detach(), keys.detach()))


def by(transform):
    return lambda loss, queries, keys: transform(lambda x: loss(x, keys))(queries)


WAYS = {
    "twice": twice,
    "twice by the keys": twice_by_the_keys,
    "functional.hessian": lambda loss, *x: torch.autograd.functional.hessian(loss, tuple(x)),
    "functional.jvp": lambda loss, *x: torch.autograd.functional.jvp(loss, tuple(x), tuple(x)),
    "forward mode": in_forward_mode,
    "grad": by(torch.func.grad),
    "vjp": lambda loss, *x: torch.func.vjp(loss, *x),
    "jvp": lambda loss, *x: torch.func.jvp(loss, tuple(x), tuple(x)),
    "jacrev": by(torch.func.jacrev),
    "jacfwd": by(torch.func.jacfwd),
    "hessian": by(torch.func.hessian),
    "vmap": lambda loss, *x: torch.func.vmap(loss)(*(v[None] for v in x)),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", LOSSES)
def test_what_is_refused_is_refused_in_the_same_words(name, way, settings):
    def loss(queries, keys):
        return LOSSES[name](queries, keys, **settings)

    with pytest.raises(NotImplementedError) as refused:
        WAYS[way](loss, *views(torch.float32))
    assert str(refused.value) == REFUSAL


@pytest.mark.parametrize("name", LOSSES)
def test_half_precision_and_temperatures_too(name, settings):
    def loss(queries, keys):
        return LOSSES[name](queries, keys, **settings)

    with pytest.raises(NotImplementedError) as refused:
        twice(loss, *views(torch.bfloat16))
    assert str(refused.value) == REFUSAL
    temperature = torch.tensor(0.5, device=DEVICE, requires_grad=True)
    loss = LOSSES[name](*views(torch.float32), **settings | {"temperature": temperature})
    (gradient,) = torch.autograd.grad(loss, temperature, create_graph=True)
    with pytest.raises(NotImplementedError) as refused:
        torch.autograd.grad(gradient, temperature)
    assert str(refused.value) == REFUSAL


def by_temperature_then(to, loss, temperature):
    (gradient,) = torch.autograd.grad(loss, temperature, create_graph=True)
    torch.autograd.grad(gradient, to)


def then_by_temperature(to, loss, temperature):
    (gradient,) = torch.autograd.grad(loss, to, create_graph=True)
    torch.autograd.grad(gradient.square().sum(), temperature)


@pytest.mark.parametrize("order", [by_temperature_then, then_by_temperature])
@pytest.mark.parametrize("name", LOSSES)
def test_mixed_derivatives_with_the_temperature(name, order, settings):
    """A part of one would be a number like any other."""
    pair = views(torch.float32)
    for to in pair:
        temperature = torch.tensor(0.5, device=DEVICE, requires_grad=True)
        loss = LOSSES[name](*pair, **settings | {"temperature": temperature})
        with pytest.raises(NotImplementedError) as refused:
            order(to, loss, temperature)
        assert str(refused.value) == REFUSAL


BY_TEMPERATURE = {
    "vmap": lambda loss, t: torch.func.vmap(loss)(torch.stack([t, 2 * t])),
    "grad": lambda loss, t: torch.func.grad(loss)(t),
    "jvp": lambda loss, t: torch.func.jvp(loss, (t,), (t,)),
}


@pytest.mark.parametrize("way", BY_TEMPERATURE)
@pytest.mark.parametrize("name", LOSSES)
def test_transforms_of_the_temperature(name, way, settings):
    pair, temperature = views(torch.float32), torch.tensor(0.5, device=DEVICE)
    with pytest.raises(NotImplementedError) as refused:
        BY_TEMPERATURE[way](
            lambda t: LOSSES[name](*pair, **settings | {"temperature": t}), temperature
        )
    assert str(refused.value) == REFUSAL


@pytest.mark.parametrize("method", ["loss", "step", "update"])
@pytest.mark.parametrize("way", BY_TEMPERATURE)
def test_transforms_of_a_field_s_temperature_and_index(way, method):
    pair, index = [x.detach() for x in views(torch.float32)], torch.arange(6, device=DEVICE)
    field = ResponseField.dense(6, device=DEVICE)
    before = field.state_dict()
    temperature = torch.tensor(0.5, device=DEVICE)
    with pytest.raises(NotImplementedError) as refused:
        BY_TEMPERATURE[way](
            lambda t: getattr(field, method)(*pair, index, temperature=t), temperature
        )
    assert str(refused.value) == REFUSAL
    with pytest.raises(NotImplementedError) as refused:
        torch.func.vmap(lambda i: getattr(field, method)(*pair, i))(index[None])
    assert str(refused.value) == REFUSAL
    for read in (field.block, field.rows):
        with pytest.raises(NotImplementedError) as refused:
            torch.func.vmap(read)(index[None])
        assert str(refused.value) == REFUSAL
    assert all(torch.equal(x, before[name]) for name, x in field.state_dict().items()
               if isinstance(x, torch.Tensor))  # fmt: skip


@pytest.mark.parametrize("name", LOSSES)
def test_several_gradients_at_once(name, settings):
    """torch.autograd maps the backward pass over them, which is no second derivative."""
    pair, temperature = views(torch.float32), torch.tensor(0.5, device=DEVICE, requires_grad=True)
    for given in ({}, {"temperature": temperature}):
        inputs = *pair, *given.values()
        loss = LOSSES[name](*pair, **settings | given)
        scales = torch.tensor([1.0, -2.0, 0.5], device=DEVICE)
        found = torch.autograd.grad(loss, inputs, scales, is_grads_batched=True, retain_graph=True)
        one = torch.autograd.grad(loss, inputs)
        for several, x in zip(found, one, strict=True):
            assert torch.allclose(several, scales.view(-1, *[1] * x.dim()) * x, rtol=1e-5)


REFERENCE = {
    **{name: (LOSSES[name], {}) for name in LOSSES},
    "more keys": (info_nce, {"positive_offset": 1, "exclude_self": True}),
    "a row without keys": (LOSSES["logsumexp"], {"exclude_self": True}),
    "moments without a row's own": (LOSSES["moments"], {"exclude_self": True}),
    "detached": (rkdo_loss, {"detach_target": True}),
}


@pytest.mark.parametrize("name", REFERENCE)
def test_the_reference_has_second_derivatives(name):
    function, settings = REFERENCE[name]
    for temperature in (0.01, 0.03, 0.5) if "moments" not in name else (0.03, 0.5):
        for dtype in (torch.float32, torch.float64):
            queries, keys = views(dtype)
            m = 5 if name == "more keys" else 6
            queries, keys = (x.detach()[:m] for x in (queries, keys))
            queries = queries[: m - settings.get("positive_offset", 0)]
            pair = queries.clone().requires_grad_(), keys.clone().requires_grad_()

            def loss(*pair, temperature=temperature):
                return function(*pair, backend="reference", temperature=temperature, **settings)

            first = torch.autograd.grad(loss(*pair), pair, create_graph=True)
            second = torch.autograd.grad(sum(x.sum() for x in first), pair)
            assert all(x.isfinite().all() for x in (*first, *second))
        if temperature == 0.5 and "detached" not in name:
            assert torch.autograd.gradgradcheck(loss, pair, rtol=1e-4)
            hessian = torch.func.hessian(lambda x, keys=pair[1], loss=loss: loss(x, keys))
            assert hessian(pair[0].detach()).isfinite().all()


@pytest.mark.parametrize("name", LOSSES)
def test_the_reference_takes_vmap(name):
    """Of embeddings and of the temperature, neither of which can be read then."""
    queries, keys = (x.detach() for x in views(torch.float64))
    pairs, temperatures = torch.stack([queries, keys]), torch.tensor([0.5, 0.6], device=DEVICE)

    def loss(x, temperature):
        return LOSSES[name](x, keys, backend="reference", temperature=temperature)

    found = torch.func.vmap(loss)(pairs, temperatures)
    each = torch.stack([loss(*x) for x in zip(pairs, temperatures, strict=True)])
    assert torch.allclose(found, each, rtol=1e-12)
    assert torch.func.vmap(loss)(2 * pairs, temperatures).isnan().all()  # past the bound


@pytest.mark.parametrize("learnable", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", LOSSES)
def test_backward_inside_autocast_keeps_float32(name, dtype, learnable, settings):
    """The same bits: to queries, keys and a learnable temperature, on every path but reference's,
    whose gradients are autograd's own products."""
    leaves = [x.detach().to(dtype).requires_grad_() for x in views()]
    queries, keys = leaves
    more = {**settings}
    if learnable:
        leaves.append(torch.tensor(0.5, device=DEVICE, requires_grad=True))
        more["temperature"] = leaves[-1]
    outside = torch.autograd.grad(LOSSES[name](queries, keys, **more), leaves)
    loss = LOSSES[name](queries, keys, **more)
    with torch.autocast(DEVICE, torch.bfloat16):
        inside = torch.autograd.grad(loss, leaves)
    torch.testing.assert_close(inside, outside, rtol=0, atol=0)


@pytest.mark.parametrize("name", LOSSES)
def test_forward_inside_autocast_keeps_float32(name, settings):
    for more in (settings, {**settings, "backend": "reference"}):
        leaves = [x.detach().float().requires_grad_() for x in views()]
        outside = LOSSES[name](*leaves, **more)
        with torch.autocast(DEVICE, torch.bfloat16):
            inside = LOSSES[name](*leaves, **more)
        results = (
            (loss, *torch.autograd.grad(loss, leaves)) for loss in (inside, outside)
        )  # the backward pass outside: PyTorch's advice, and the reference's need
        torch.testing.assert_close(*results, rtol=0, atol=0)


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
