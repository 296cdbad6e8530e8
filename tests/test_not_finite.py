"""Rows that hold ∞ or NaN: no plausible number where eager code in float64 has none.

A query poisons its own row alone. A key may poison every row, as every row meets it: a similarity
of −∞ is a weight of 0 in eager code, and may be NaN in ours, but it is never another number.
"""

import pytest
import torch
from accuracy import sample_views

from rkdo_kernels import (
    icon_loss,
    info_nce,
    nt_xent,
    reference,
    rkdo_loss,
    similarity_logsumexp,
    small,
)

OPEN = {"bound": None}
LOSSES = {
    "rkdo": (rkdo_loss, reference.rkdo_loss, {}),
    "rkdo, one-hot": (rkdo_loss, reference.rkdo_loss, {"alpha": 0}),
    "rkdo, detached": (rkdo_loss, reference.rkdo_loss, {"detach_target": True}),
    "icon": (icon_loss, reference.icon_loss, {}),
    "icon, one-hot": (icon_loss, reference.icon_loss, {"debias": 0}),
    "icon, student": (icon_loss, reference.icon_loss, {"kernel": "student"}),
    "info_nce": (info_nce, reference.info_nce, {}),
    "clip": (info_nce, reference.info_nce, {"symmetric": True}),
    "nt_xent": (nt_xent, reference.nt_xent, {}),
    "logsumexp": (similarity_logsumexp, reference.similarity_logsumexp, {"temperature": 0.5}),
}
N, M, AT = 6, 8, 2  # row AT, or its positive, or the last key, which is nobody's positive
WHERE = {"query": ("queries", AT), "positive": ("keys", AT), "other": ("keys", -1)}


def poisoned_views(where, value, whole, square):
    views = sample_views(N, 5, m=N if square else M)
    side, at = WHERE[where]
    if whole:
        views[side][at] = value
    else:  # S is then ±∞, not NaN, in most rows
        views[side][at, 1] = value
    return views


@pytest.mark.parametrize("kept", ["small", "tiles"])
@pytest.mark.parametrize("backend", ["tiled", "triton", "reference"])
@pytest.mark.parametrize("name", LOSSES)
def test_as_in_eager_code(name, backend, kept, monkeypatch):
    if kept == "tiles":
        monkeypatch.setattr(small, "MAX_ENTRIES", 0)
    function, eager, settings = LOSSES[name]
    square = name in ("clip", "nt_xent")
    given = settings | OPEN | ({} if square or name == "logsumexp" else {"positive_offset": 0})
    misses = []
    for value in (float("inf"), -float("inf"), float("nan")):
        for where in WHERE:
            for whole in (True, False):
                views = poisoned_views(where, value, whole, square)
                everywhere = where if not square else "all"  # every image is a key there
                truth = eager(**{key: x.double() for key, x in views.items()}, **settings)
                reductions = {"none": truth}
                if name != "logsumexp":
                    reductions["mean"] = truth.mean()
                for reduction, true in reductions.items():
                    more = {} if name == "logsumexp" else {"reduction": reduction}
                    found = function(**views, **given, **more, backend=backend).double()
                    if not agree(found, true, everywhere):
                        misses.append((value, where, whole, reduction, found, true))
    assert not misses, "\n".join(map(str, misses))


def agree(found, true, where):
    numbers = torch.isfinite(true)
    if torch.isfinite(found[~numbers]).any():
        return False
    if where != "query":
        numbers = numbers & ~found.isnan()
    return torch.allclose(found[numbers], true[numbers], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["info_nce", "clip", "nt_xent", "icon, one-hot"])
@pytest.mark.parametrize("backend", ["tiled", "triton"])
def test_a_row_with_one_product_that_is_infinite(name, backend):
    """No loss of 0, which one finite product would give, whatever its sign."""
    function, eager, settings = LOSSES[name]
    for value in (float("inf"), -float("inf")):
        queries, keys = torch.tensor([[value, 0.5]]), torch.tensor([[0.5, 0.5]])
        assert not torch.isfinite(eager(queries.double(), keys.double(), **settings)).any()
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            if dtype == torch.float64 and backend == "triton":
                continue
            found = function(queries.to(dtype), keys.to(dtype), **settings, **OPEN, backend=backend)
            assert not torch.isfinite(found)


@pytest.mark.parametrize("backend", ["tiled", "triton"])
@pytest.mark.parametrize("value", [float("inf"), -float("inf")])
def test_a_positive_alone_and_infinite(backend, value):
    """All other keys left out."""
    queries, keys = torch.tensor([[1.0]]), torch.tensor([[1.0], [value]])
    found = info_nce(queries, keys, exclude_self=True, positive_offset=1, **OPEN, backend=backend)
    assert not torch.isfinite(found)


@pytest.mark.parametrize("alpha", [0.0, 5e-324, 0.5, 1.0])
@pytest.mark.parametrize("temperature", [0.5, "learnable"])
def test_a_key_that_weighs_nothing_costs_no_row_where_all_of_s_is_small(alpha, temperature):
    """A product of −∞: 0 · log 0. The others' losses and gradients are those without that key."""
    generator = torch.Generator().manual_seed(0)
    queries = torch.rand(N, 5, generator=generator) + 0.1
    keys = torch.rand(M, 5, generator=generator)
    keys[-1, 1] = -float("inf")
    settings = {"alpha": alpha, "positive_offset": 0}
    given = 0.5 if temperature == 0.5 else torch.tensor(0.5, requires_grad=True)
    leaf, most = keys.clone().requires_grad_(), keys[:-1].double().requires_grad_()
    loss = rkdo_loss(
        queries, leaf, temperature=given, **settings, **OPEN, reduction="none", backend="tiled"
    )
    true = reference.rkdo_loss(queries.double(), most, temperature=0.5, **settings)
    gradient, of_most = (
        torch.autograd.grad(x.sum(), y)[0] for x, y in ((loss, leaf), (true, most))
    )
    assert torch.allclose(loss.double(), true, rtol=1e-5)
    assert torch.allclose(gradient[:-1].double(), of_most, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("hot", [1e-3, 0.5, 1e30, 1e35])
@pytest.mark.parametrize("name", ["logsumexp", "info_nce", "rkdo", "icon, one-hot"])
def test_a_key_of_weight_0_leaves_the_temperature_its_gradient(name, hot, monkeypatch):
    """By tiles, where its product is −∞: as if it were not there."""
    monkeypatch.setattr(small, "MAX_ENTRIES", 0)
    function, _, settings = LOSSES[name]
    given = settings | OPEN | ({} if name == "logsumexp" else {"positive_offset": 0})
    queries = torch.tensor([[1.0], [2.0]])
    found = []
    for keys in ([1.0, 3.0, 0.5], [1.0, 3.0, 0.5, -float("inf")]):
        temperature = torch.tensor(hot, requires_grad=True)
        given["temperature"] = temperature
        value = function(queries, torch.tensor(keys)[:, None], **given, backend="tiled").sum()
        value.backward()
        found.append((float(value.detach()), float(temperature.grad)))
    assert found[1] == pytest.approx(found[0], rel=1e-6)


def test_a_row_of_nan_does_not_hide_how_far_apart_others_are(monkeypatch):
    """Row 1 meets a product of −∞, of numbers that are finite; row 0 is NaN."""
    monkeypatch.setattr(small, "MAX_ENTRIES", 0)
    queries, keys = torch.tensor([[float("nan")], [1e30]]), torch.tensor([[-1e10], [1.0]])
    loss = rkdo_loss(queries, keys, bound=None, reduction="none", backend="tiled")
    assert loss[0].isnan()
    assert loss[1] == 0
