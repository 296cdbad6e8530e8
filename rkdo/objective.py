"""The loss of a global batch: each rank's own rows against the keys of all ranks."""

from typing import Any

from torch import Tensor, nn

from rkdo.config import TrainConfig
from rkdo_kernels import IConLoss, InfoNCELoss, RKDOLoss
from rkdo_kernels.distributed import gather_keys


class Objective(nn.Module):
    """`loss` over this rank's queries and every rank's keys; its mean over ranks is the loss."""

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, queries: Tensor, keys: Tensor) -> Tensor:  # [N, D] both, unit rows -> []
        all_keys, offset = gather_keys(keys)
        return self.loss(queries, all_keys, positive_offset=offset)


def build_objective(config: TrainConfig) -> Objective:
    given: dict[str, Any] = {}
    if config.temperature is not None:
        given["temperature"] = config.temperature
    match config.method:
        case "rkdo":
            loss: nn.Module = RKDOLoss(
                alpha=config.alpha,
                depth=config.depth,
                cooling=config.cooling,
                detach_target=config.detach_target,
                **given,
            )
        case "icon":
            loss = IConLoss(debias=config.debias, kernel=config.kernel, **given)
        case "infonce":
            loss = InfoNCELoss(**given)
    return Objective(loss)
