"""The modules: functions with settings kept, checked early, and a temperature to learn."""

import pickle

import pytest
import torch
from accuracy import DEVICE, sample_views
from torch import nn

from rkdo_kernels import (
    IConLoss,
    InfoNCELoss,
    NTXentLoss,
    RKDOLoss,
    icon_loss,
    info_nce,
    nt_xent,
    rkdo_loss,
)

MODULES = [
    (RKDOLoss, rkdo_loss, {"temperature": 0.3, "alpha": 0.2, "depth": 2, "cooling": 0.2}),
    (RKDOLoss, rkdo_loss, {"detach_target": True, "bound": None, "reduction": "sum"}),
    (IConLoss, icon_loss, {"debias": 0.4, "kernel": "student", "temperature": 0.7}),
    (InfoNCELoss, info_nce, {"temperature": 0.2, "backend": "tiled", "reduction": "none"}),
    (InfoNCELoss, info_nce, {}),
]


@pytest.mark.parametrize(("module", "function", "settings"), MODULES)
def test_a_module_is_its_function(module, function, settings):
    loss, views = module(**settings), sample_views(20, 8)
    assert torch.equal(loss(**views), function(**views, **settings))
    assert torch.equal(pickle.loads(pickle.dumps(loss))(**views), function(**views, **settings))
    assert list(loss.parameters()) == []
    more = sample_views(10, 8, m=20)
    assert torch.equal(
        loss(**more, positive_offset=7), function(**more, **settings, positive_offset=7)
    )


@pytest.mark.parametrize(
    ("module", "function", "settings"),
    [(InfoNCELoss, info_nce, {"symmetric": True}), (NTXentLoss, nt_xent, {"temperature": 0.2})],
)
def test_modules_of_as_many_keys_as_queries(module, function, settings):
    loss, views = module(**settings), sample_views(20, 8)
    assert torch.equal(loss(**views), function(**views, **settings))
    with pytest.raises(ValueError, match="needs as many keys as queries"):
        loss(*sample_views(10, 8, m=20).values())
    with pytest.raises((TypeError, ValueError), match="positive_offset"):
        module(**settings, positive_offset=1)


def test_symmetric_goes_without_exclude_self():
    with pytest.raises(ValueError, match="do not go together"):
        InfoNCELoss(symmetric=True, exclude_self=True)


def test_exclude_self_is_a_setting():
    loss, views = InfoNCELoss(exclude_self=True), sample_views(10, 8, m=20)
    wanted = info_nce(**views, exclude_self=True, positive_offset=10)
    assert torch.equal(loss(**views, positive_offset=10), wanted)
    kept = InfoNCELoss(exclude_self=True, positive_offset=10)
    assert torch.equal(kept(**views), wanted)
    with pytest.raises(ValueError, match="positive_offset must not be 0"):
        loss(**sample_views(10, 8))


@pytest.mark.parametrize("module", [RKDOLoss, IConLoss, InfoNCELoss])
def test_a_parameter_is_learned(module):
    loss = module(temperature=nn.Parameter(torch.tensor(0.5))).to(DEVICE)
    assert [name for name, _ in loss.named_parameters()] == ["temperature"]
    optimizer = torch.optim.SGD(loss.parameters(), lr=0.01)
    views, history = sample_views(20, 8, aligned=True), []
    for _ in range(5):
        optimizer.zero_grad()
        value = loss(**views)
        value.backward()
        optimizer.step()
        history.append(value.item())
    assert sorted(history, reverse=True) == history
    assert history[-1] < history[0]
    assert set(loss.state_dict()) == {"temperature"}


def test_a_tensor_that_is_no_parameter_is_a_buffer():
    loss = RKDOLoss(temperature=torch.tensor(0.4)).to(DEVICE)
    assert list(loss.parameters()) == []
    assert set(loss.state_dict()) == {"temperature"}
    views = sample_views(20, 8)
    wanted = rkdo_loss(**views, temperature=torch.tensor(0.4, device=DEVICE))
    assert torch.equal(loss(**views), wanted)


@pytest.mark.parametrize(
    ("module", "settings", "error", "words"),
    [
        (RKDOLoss, {"alpha": 2}, ValueError, "alpha must be in"),
        (RKDOLoss, {"depth": 0}, ValueError, "depth must be at least 1"),
        (RKDOLoss, {"temperature": 0}, ValueError, "temperature must be positive"),
        (RKDOLoss, {"debias": 0.2}, TypeError, "debias"),
        (IConLoss, {"kernel": "cauchy"}, ValueError, "kernel must be one of"),
        (InfoNCELoss, {"backend": "gpu"}, ValueError, "backend must be one of"),
        (InfoNCELoss, {"reduction": "max"}, ValueError, "reduction must be one of"),
        (InfoNCELoss, {"bound": 0}, ValueError, "bound must be positive"),
    ],
)
def test_settings_are_checked_when_they_are_given(module, settings, error, words):
    with pytest.raises(error, match=words):
        module(**settings)


def test_settings_show():
    assert "alpha=0.2" in repr(RKDOLoss(alpha=0.2))
    assert "temperature=0.3" in repr(IConLoss(temperature=0.3))


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.02}], ids=["warm", "cold"])
@pytest.mark.parametrize("module", [RKDOLoss, IConLoss, InfoNCELoss, NTXentLoss])
def test_an_exported_module_takes_batches_of_other_sizes(module, settings):
    loss, rows = module(**settings), torch.export.Dim("rows", min=2, max=1000)
    pair = tuple(sample_views(20, 4).values())
    exported = torch.export.export(loss, pair, dynamic_shapes=({0: rows}, {0: rows})).module()
    for n in (7, 140):
        pair = tuple(sample_views(n, 4).values())
        torch.testing.assert_close(exported(*pair), loss(*pair))
