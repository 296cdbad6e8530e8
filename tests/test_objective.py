"""The objectives get the settings that they are named for."""

import pytest
import torch
from torch.nn.functional import normalize

from rkdo.config import TrainConfig
from rkdo.field import TrainingField
from rkdo.objective import build_objective
from rkdo.ranks import Ranks
from rkdo_kernels import IConLoss, InfoNCELoss, ResponseField, RKDOLoss

N, DIM, IMAGES = 8, 16, 20
ALONE = Ranks(0, 1, torch.device("cpu"))
INDEX = torch.arange(N) * 2


def hybrid(weight, icon):
    def loss(queries, keys):
        return (1 - weight) * RKDOLoss()(queries, keys) + weight * icon(queries, keys)

    return loss


def second_step(field, temperature=0.5, alpha=0.5):
    """A loss whose field has taken up one batch, at alpha."""

    def loss(queries, keys):
        with torch.no_grad():
            field.update(*embeddings(1), INDEX, alpha=alpha, temperature=temperature)
        return field.loss(queries, keys, INDEX, temperature=temperature)

    return loss


def dense():
    return ResponseField.dense(IMAGES, dtype=torch.float64)


def snapshot(history, dtype=torch.bfloat16):
    return ResponseField.snapshot(IMAGES, DIM, history=history, dtype=dtype)


# Settings, and the loss that they stand for when half of the training is done.
CASES = [
    ({}, RKDOLoss()),
    ({"alpha": 0.2}, RKDOLoss(alpha=0.2)),
    ({"alpha_schedule": "linear", "alpha_final": 0.3}, RKDOLoss(alpha=0.4)),
    ({"depth": 2}, RKDOLoss(depth=2)),
    ({"cooling": 0.3}, RKDOLoss(cooling=0.3)),
    ({"temperature": 0.3}, RKDOLoss(temperature=0.3)),
    ({"temperature_decay": 0.5}, RKDOLoss(temperature=0.375)),
    ({"detach_target": True}, RKDOLoss(detach_target=True)),
    ({"icon_weight": 0.3}, hybrid(0.3, IConLoss())),
    ({"icon_weight": 0.4, "debias": 0.5}, hybrid(0.4, IConLoss(debias=0.5))),
    ({"method": "icon"}, IConLoss()),
    ({"method": "icon", "debias": 0.5}, IConLoss(debias=0.5)),
    ({"method": "icon", "kernel": "student"}, IConLoss(kernel="student")),
    ({"method": "icon", "temperature": 0.3}, IConLoss(temperature=0.3)),
    ({"method": "icon", "temperature_decay": 0.2}, IConLoss(temperature=0.45)),
    ({"method": "infonce"}, InfoNCELoss()),
    ({"method": "infonce", "temperature": 0.3}, InfoNCELoss(temperature=0.3)),
]
FIELDS = [
    ({}, second_step(dense())),
    ({"alpha": 0.2}, second_step(dense(), alpha=0.2)),
    ({"temperature": 0.3}, second_step(dense(), temperature=0.3)),
    ({"temperature_decay": 0.5}, second_step(dense(), temperature=0.375)),
    ({"alpha_schedule": "cosine"}, second_step(dense(), alpha=0.25)),
    ({"recursion": "snapshot"}, second_step(snapshot(4))),
    ({"recursion": "snapshot", "field_dtype": "float64"}, second_step(snapshot(4, torch.float64))),
]


def embeddings(seed):
    generator = torch.Generator().manual_seed(seed)
    return normalize(torch.randn(2, N, DIM, generator=generator, dtype=torch.float64), dim=2)


def value_and_gradient(loss):
    queries, keys = embeddings(0)
    queries.requires_grad_()
    value = loss(queries, keys)
    value.backward()
    return value.item(), queries.grad


def same(a, b):
    return a[0] == pytest.approx(b[0], rel=1e-14) and torch.allclose(a[1], b[1], rtol=1e-12)


@pytest.mark.parametrize("settings", [case[0] for case in CASES], ids=str)
def test_each_setting_reaches_its_loss(settings):
    objective = build_objective(TrainConfig(**settings))
    given = value_and_gradient(lambda queries, keys: objective(queries, keys, INDEX, 0.5))
    for other, loss in CASES:
        assert same(given, value_and_gradient(loss)) == (other == settings), other


@pytest.mark.parametrize(("settings", "loss"), FIELDS, ids=[str(case[0]) for case in FIELDS])
def test_each_setting_reaches_the_field(settings, loss):
    config = TrainConfig(
        **{"recursion": "dense", "dtype": "float64", "projection": DIM, **settings}
    )
    field = TrainingField(config, IMAGES, torch.arange(IMAGES) % 2, ALONE)
    objective = build_objective(config, field)
    objective(*embeddings(1), INDEX, 0.5)
    given = value_and_gradient(lambda queries, keys: objective(queries, keys, INDEX, 0.5))
    assert same(given, value_and_gradient(loss))
    assert not same(given, value_and_gradient(second_step(dense(), 0.6, 0.6)))


def test_a_field_and_icon_share_the_loss():
    config = TrainConfig(recursion="dense", dtype="float64", icon_weight=0.25)
    field = TrainingField(config, IMAGES, torch.arange(IMAGES) % 2, ALONE)
    objective = build_objective(config, field)
    given = value_and_gradient(lambda queries, keys: objective(queries, keys, INDEX, 0.0))
    parts = [
        value_and_gradient(lambda queries, keys: dense().loss(queries, keys, INDEX)),
        value_and_gradient(IConLoss()),
    ]
    wanted = [0.75 * a + 0.25 * b for a, b in zip(*parts, strict=True)]
    assert same(given, wanted)
