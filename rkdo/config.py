"""The settings of one training run."""

import math
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args, get_type_hints

from rkdo.errors import UserError

Dataset = Literal["digits", "cifar10", "cifar100", "stl10", "folder"]
Method = Literal["rkdo", "icon", "infonce"]

# What a resumed run may change: how long and where it runs, not what it computes.
CHANGEABLE = frozenset(
    {"epochs", "evaluate_every", "checkpoint_every", "workers", "data_dir", "download", "device"}
)


@dataclass(frozen=True)
class TrainConfig:
    """Settings of one training run. The defaults train on handwritten digits on a small CPU.

    The protocol of the paper: --dataset cifar10 --download --steps-per-epoch 11 --epochs 2
    (its "epoch" is 11 batches; for stl10 also --batch-size 32).
    """

    dataset: Dataset = "digits"
    """Images to train on. digits comes with scikit-learn; folder is DATA_DIR/train/<class>/*.png
    and DATA_DIR/test/<class>/*.png (or val)."""
    data_dir: str = "data"
    """Where the images are, or go with --download. Not used by digits."""
    download: bool = False
    """Download the data set if it is not in DATA_DIR."""
    image_size: int | None = None
    """Side of the square images. None: 32; 64 for stl10 and folder."""

    stem: Literal["imagenet", "cifar"] = "imagenet"
    """ResNet-18's first layers: 7×7 stride 2 and max-pool, or 3×3 stride 1 without pooling."""
    projection: int = 64
    """Length of the projector's output."""

    method: Method = "rkdo"
    """The objective."""
    temperature: float | None = None
    """Temperature of the similarities. None: 0.5 for rkdo and icon, 0.1 for infonce."""
    alpha: float = 0.5
    """rkdo: share of the learned distribution in the next target, 0 to 1."""
    depth: int = 3
    """rkdo: number of recursions."""
    cooling: float = 0.1
    """rkdo: by how much the temperature has fallen at the last recursion, 0 to below 1."""
    detach_target: bool = False
    """rkdo: no gradient through the target."""
    debias: float = 0.2
    """icon: share of the uniform distribution in the target, 0 to 1."""
    kernel: Literal["gaussian", "student"] = "gaussian"
    """icon: the learned distribution's kernel."""

    epochs: int = 12
    """Passes over the training images, or over STEPS_PER_EPOCH batches."""
    steps_per_epoch: int | None = None
    """Batches in an epoch. None: all the training images; the paper has 11."""
    batch_size: int = 64
    """Images in a batch, over all ranks together."""
    lr: float = 1e-3
    """Adam's learning rate."""
    weight_decay: float = 1e-5
    """Adam's weight decay."""
    seed: int = 42
    """Decides the initial weights, the order of the images and their augmentations."""
    dtype: Literal["float32", "float64"] = "float32"
    """Precision of the parameters and of all arithmetic."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute. auto: a GPU if there is one."""
    workers: int = 0
    """Processes that prepare images, per rank. 0: the training process itself."""

    evaluate_every: int = 5
    """Epochs between evaluations. 0: only before and after training."""
    checkpoint_every: int = 100
    """Steps between checkpoints."""

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(type(self)).items():
            _check_type(name, getattr(self, name), hint)
        _check(self, "image_size", "at least 8", lambda v: v is None or v >= 8)
        _check(self, "temperature", "at least 1e-6", lambda v: v is None or 1e-6 <= v < math.inf)
        _check(self, "alpha", "between 0 and 1", lambda v: 0 <= v <= 1)
        _check(self, "cooling", "between 0 and 0.999", lambda v: 0 <= v <= 0.999)
        _check(self, "debias", "between 0 and 1", lambda v: 0 <= v <= 1)
        _check(self, "steps_per_epoch", "at least 1", lambda v: v is None or v >= 1)
        _check(self, "batch_size", "at least 2", lambda v: v >= 2)
        _check(self, "lr", "above 0", lambda v: 0 < v < math.inf)
        _check(self, "weight_decay", "at least 0", lambda v: 0 <= v < math.inf)
        _check(self, "seed", "between 0 and 2**63 - 1", lambda v: 0 <= v < 2**63)
        for name in ("projection", "depth", "epochs", "checkpoint_every"):
            _check(self, name, "at least 1", lambda v: v >= 1)
        for name in ("workers", "evaluate_every"):
            _check(self, name, "at least 0", lambda v: v >= 0)

    @property
    def size(self) -> int:
        """Side of the square images."""
        return self.image_size or (64 if self.dataset in ("stl10", "folder") else 32)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Any, source: str) -> "TrainConfig":
        """The configuration that `to_dict` wrote to `source`."""
        names = {field.name for field in fields(cls)}
        if not isinstance(values, dict) or set(values) != names:
            raise UserError(f"{source} is not the configuration of an rkdo run of this version")
        return cls(**values)


def check_resumable(old: TrainConfig, new: TrainConfig) -> None:
    """A run goes on as it began: only `CHANGEABLE` settings may differ."""
    for field in fields(TrainConfig):
        was, now = getattr(old, field.name), getattr(new, field.name)
        if was != now and field.name not in CHANGEABLE:
            raise UserError(
                f"{flag(field.name)} {now} conflicts with the run being resumed, which has {was}: "
                f"leave {flag(field.name)} out, or start another run"
            )


def flag(name: str) -> str:
    """`batch_size` as it is spelled on the command line."""
    return "--" + name.replace("_", "-")


def _check(config: TrainConfig, name: str, wanted: str, holds: Any) -> None:
    value = getattr(config, name)
    if not holds(value):
        raise UserError(f"{flag(name)} must be {wanted}, got {value}")


def _check_type(name: str, value: Any, hint: Any) -> None:
    options = get_args(hint) or (hint,)
    if isinstance(options[0], str):  # a Literal
        if value not in options:
            raise UserError(f"{flag(name)} must be one of {', '.join(options)}, got {value}")
    elif float in options and type(value) is int:  # 1 is a fine 1.0
        return
    elif type(value) not in options:
        kinds = " or ".join(option.__name__ for option in options)
        raise UserError(f"{flag(name)} must be {kinds}, got {value!r}")
