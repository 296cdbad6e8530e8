"""The objectives get the settings that they are named for."""

import pytest
import torch
from torch.nn.functional import normalize

from rkdo.config import TrainConfig
from rkdo.objective import build_objective
from rkdo_kernels import IConLoss, InfoNCELoss, RKDOLoss

CASES = [
    ({}, RKDOLoss()),
    ({"alpha": 0.2}, RKDOLoss(alpha=0.2)),
    ({"depth": 2}, RKDOLoss(depth=2)),
    ({"cooling": 0.3}, RKDOLoss(cooling=0.3)),
    ({"temperature": 0.3}, RKDOLoss(temperature=0.3)),
    ({"detach_target": True}, RKDOLoss(detach_target=True)),
    ({"method": "icon"}, IConLoss()),
    ({"method": "icon", "debias": 0.5}, IConLoss(debias=0.5)),
    ({"method": "icon", "kernel": "student"}, IConLoss(kernel="student")),
    ({"method": "icon", "temperature": 0.3}, IConLoss(temperature=0.3)),
    ({"method": "infonce"}, InfoNCELoss()),
    ({"method": "infonce", "temperature": 0.3}, InfoNCELoss(temperature=0.3)),
]


def value_and_gradient(loss):
    generator = torch.Generator().manual_seed(0)
    queries, keys = torch.randn(2, 8, 16, generator=generator, dtype=torch.float64)
    queries.requires_grad_()
    value = loss(normalize(queries, dim=1), normalize(keys, dim=1))
    value.backward()
    return value.item(), queries.grad


@pytest.mark.parametrize("settings", [case[0] for case in CASES], ids=str)
def test_each_setting_reaches_its_loss(settings):
    given = value_and_gradient(build_objective(TrainConfig(**settings)))
    for other, loss in CASES:
        wanted = value_and_gradient(loss)
        same = given[0] == wanted[0] and torch.equal(given[1], wanted[1])
        assert same == (other == settings), other
