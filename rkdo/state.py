"""What changes while training, and its way into a checkpoint and back."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rkdo.checkpoint import size_of
from rkdo.config import TrainConfig, check_resumable
from rkdo.encoder import Encoder
from rkdo.errors import UserError
from rkdo.field import TrainingField

# What a foreign or damaged checkpoint makes PyTorch or this file raise.
UNFIT = (
    ArithmeticError, AssertionError, AttributeError, LookupError, RecursionError, RuntimeError,
    TypeError, ValueError,
)  # fmt: skip

# What the run's settings say of Adam; the rest of a parameter group is PyTorch's own business.
ADAM = ("params", "lr", "betas", "eps", "weight_decay", "amsgrad")


@dataclass
class State:
    """All that changes while training; a checkpoint is this and nothing else."""

    encoder: Encoder
    optimizer: torch.optim.Optimizer
    field: TrainingField | None = None
    losses: tuple[float, ...] = ()  # the epochs' means
    loss_sum: float = 0.0  # over this epoch's steps
    step: int = 0
    evaluated: int = -1  # the last step whose evaluation is in the metrics
    metrics_size: int = 0
    images: int = 0  # in the training set
    files: str | None = None  # fingerprint of those files, if they are some

    @property
    def dtype(self) -> torch.dtype:
        return next(self.encoder.parameters()).dtype

    def to_dict(self, config: TrainConfig) -> dict[str, Any]:
        """Of all ranks, for the first to save: every rank calls it."""
        return {
            "config": config.to_dict(),
            "encoder": self.encoder.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "field": self.field and self.field.state_dict(),
            "losses": self.losses,
            "loss_sum": self.loss_sum,
            "step": self.step,
            "evaluated": self.evaluated,
            "metrics_size": self.metrics_size,
            "images": self.images,
            "files": self.files,
            "rng": {
                "cpu": torch.get_rng_state(),
                "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
            },
        }

    def size(self) -> int:
        """Bytes that a checkpoint takes at least, once Adam has its moments: this rank's share."""
        parameters = list(self.encoder.parameters())
        field = self.field and self.field.field.state_dict(copy=False)
        return 2 * sum(p.nbytes for p in parameters) + size_of([self.encoder.state_dict(), field])

    def restore(
        self, saved: Mapping[str, Any], config: TrainConfig, path: Path, steps_per_epoch: int
    ) -> None:
        """Take what `to_dict` gave and `path` held.

        Raises:
            UserError: it is of other settings or other images, or not what `to_dict` gives.
        """
        try:
            check_resumable(TrainConfig.from_dict(saved["config"], str(path)), config)
            self._take(saved)
        except UNFIT as error:
            raise UserError(f"{path} does not fit {path.parent / 'config.json'}") from error
        if saved["images"] != self.images:
            raise UserError(
                f"--data-dir must hold the {saved['images']} training images that the run began "
                f"with, got {self.images}"
            )
        if saved.get("files", self.files) != self.files:  # of before there were fingerprints: none
            raise UserError(
                "--data-dir must hold the training images that the run began with: its "
                f"{self.images} have other names"
            )
        if config.epochs * steps_per_epoch < self.step:
            raise UserError(
                f"--epochs must be at least the {math.ceil(self.step / steps_per_epoch)} already "
                f"begun, got {config.epochs}"
            )

    def _take(self, saved: Mapping[str, Any]) -> None:
        if not all(isinstance(saved[name], dict) for name in ("encoder", "optimizer", "rng")):
            raise ValueError("other parts")
        counts = [saved[name] for name in ("step", "metrics_size", "images")]
        self.step, self.metrics_size, _ = counts
        self.evaluated = saved["evaluated"]
        self.losses, self.loss_sum = saved["losses"], saved["loss_sum"]
        if not all(type(count) is int and count >= 0 for count in (*counts, self.evaluated + 1)):
            raise ValueError("counts that are not")
        if type(self.losses) is not tuple or not all(
            type(loss) is float for loss in (*self.losses, self.loss_sum)
        ):
            raise ValueError("losses that are not")
        _require_like(saved["encoder"], self.encoder.state_dict())
        self.encoder.load_state_dict(saved["encoder"])
        self._take_optimizer(saved["optimizer"])
        if (saved["field"] is None) != (self.field is None):
            raise ValueError("a field where none was, or none")
        if self.field is not None:
            self.field.load_state_dict(saved["field"])
        torch.set_rng_state(saved["rng"]["cpu"])
        cuda = saved["rng"]["cuda"]
        if torch.cuda.is_available() and len(cuda) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all(cuda)

    def _take_optimizer(self, saved: Mapping[str, Any]) -> None:
        """`load_state_dict` looks at neither the moments' shapes nor the settings."""
        own = self.optimizer.state_dict()["param_groups"]
        for group, wanted in zip(saved["param_groups"], own, strict=True):
            for name in ADAM:
                if type(group[name]) is not type(wanted[name]) or group[name] != wanted[name]:
                    raise ValueError(f"another {name}")
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        held = saved["state"]
        if held.keys() != (set(range(len(parameters))) if self.step else set()):
            raise ValueError("moments of other steps or parameters")
        for number, moments in held.items():
            like = {"exp_avg": parameters[number], "exp_avg_sq": parameters[number]}
            _require_like(moments, {**like, "step": torch.tensor(0.0)})
        self.optimizer.load_state_dict({"state": held, "param_groups": own})


def _require_like(found: Mapping[str, Any], wanted: Mapping[str, Tensor]) -> None:
    if not isinstance(found, Mapping) or found.keys() != wanted.keys():
        raise ValueError("other tensors")
    for name, tensor in wanted.items():
        if found[name].shape != tensor.shape or found[name].dtype != tensor.dtype:
            raise ValueError(f"another shape or dtype of {name}")
