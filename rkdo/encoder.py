"""ResNet-18 and a two-layer projector."""

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import resnet18

from rkdo.config import TrainConfig

FEATURES = 512  # length of ResNet-18's features


class Encoder(nn.Module):
    """Images to unit embeddings; `backbone` alone gives the features that outlive training."""

    def __init__(self, stem: str = "imagenet", projection: int = 64) -> None:
        super().__init__()
        self.backbone = resnet18(weights=None)
        self.backbone.fc = nn.Identity()
        if stem == "cifar":
            self.backbone.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
            nn.init.kaiming_normal_(self.backbone.conv1.weight, mode="fan_out")
            self.backbone.maxpool = nn.Identity()
        self.projector = nn.Sequential(
            nn.Linear(FEATURES, FEATURES), nn.ReLU(), nn.Linear(FEATURES, projection)
        )

    def forward(self, images: Tensor) -> Tensor:  # [N, 3, H, W] -> [N, projection], unit rows
        projected = self.projector(self.backbone(images))
        # Under autocast it comes in bfloat16, whose rounding would leave rows that are not unit.
        return F.normalize(projected.to(self.projector[0].weight.dtype), dim=1)


def build_encoder(config: TrainConfig) -> Encoder:
    return Encoder(config.stem, config.projection)
