"""The loss of a global batch: each rank's own rows against the keys of all ranks."""

from torch import Tensor, nn

from rkdo.config import TrainConfig
from rkdo.field import TrainingField
from rkdo.schedule import alpha_at, temperature_at
from rkdo_kernels import icon_loss, info_nce, rkdo_loss
from rkdo_kernels.distributed import gather_keys


class Objective(nn.Module):
    """`config`'s loss over this rank's queries and every rank's keys; its mean over ranks is the
    loss. With a field, the target comes from there and the field takes up the batch."""

    def __init__(self, config: TrainConfig, field: TrainingField | None = None) -> None:
        super().__init__()
        self.config = config
        self.field = field

    def forward(
        self,
        queries: Tensor,  # [N, D] unit rows: first views
        keys: Tensor,  # [N, D] unit rows: second views
        index: Tensor,  # [N] int64: which images these are
        done: float,  # share of the training that lies behind, 0 to 1
    ) -> Tensor:  # []
        weight, temperature = self.config.icon_weight, temperature_at(self.config, done)
        match self.config.method:
            case "infonce":
                all_keys, offset = gather_keys(keys)
                return info_nce(queries, all_keys, temperature=temperature, positive_offset=offset)
            case "icon":
                return self._icon(queries, keys, temperature)
            case "rkdo":
                alpha = alpha_at(self.config, done)
                if self.field is None:
                    loss = self._rkdo(queries, keys, temperature, alpha)
                else:
                    loss = self.field.loss(queries, keys, index, temperature, alpha)
                if weight:
                    loss = (1 - weight) * loss + weight * self._icon(queries, keys, temperature)
                return loss

    def _rkdo(self, queries: Tensor, keys: Tensor, temperature: float, alpha: float) -> Tensor:
        all_keys, offset = gather_keys(keys)
        return rkdo_loss(
            queries,
            all_keys,
            temperature=temperature,
            alpha=alpha,
            depth=self.config.depth,
            cooling=self.config.cooling,
            detach_target=self.config.detach_target,
            positive_offset=offset,
        )

    def _icon(self, queries: Tensor, keys: Tensor, temperature: float) -> Tensor:
        all_keys, offset = gather_keys(keys)
        return icon_loss(
            queries,
            all_keys,
            temperature=temperature,
            debias=self.config.debias,
            kernel=self.config.kernel,
            positive_offset=offset,
        )


def build_objective(config: TrainConfig, field: TrainingField | None = None) -> Objective:
    return Objective(config, field)
