"""ResNet-18 and its projector."""

import pytest
import torch

from rkdo.config import TrainConfig
from rkdo.encoder import build_encoder


@pytest.mark.parametrize(
    ("stem", "side", "parameters"), [("imagenet", 1, 11_176_512), ("cifar", 4, 11_168_832)]
)
def test_stems_differ_where_they_should(stem, side, parameters):
    encoder = build_encoder(TrainConfig(stem=stem, projection=16))
    maps = []
    encoder.backbone.layer4.register_forward_hook(lambda *call: maps.append(call[-1].shape))
    rows = encoder(torch.randn(4, 3, 32, 32))
    assert rows.shape == (4, 16)
    assert torch.allclose(rows.norm(dim=1), torch.ones(4))
    assert maps == [(4, 512, side, side)]
    assert sum(p.numel() for p in encoder.backbone.parameters()) == parameters


def test_the_projector_is_the_papers():
    projector = build_encoder(TrainConfig()).projector
    assert [type(layer).__name__ for layer in projector] == ["Linear", "ReLU", "Linear"]
    assert [layer.out_features for layer in projector if hasattr(layer, "out_features")] == [
        512,
        64,
    ]
