"""The settings of one training run."""

import math
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args, get_type_hints

from rkdo.errors import UserError

Dataset = Literal["digits", "cifar10", "cifar100", "stl10", "folder"]
Method = Literal["rkdo", "icon", "infonce"]
HISTORY = 4

# What a resumed run may change: how long and where it runs, not what it computes.
CHANGEABLE = frozenset(
    {
        "epochs", "stop_slope", "stop_window", "evaluate_every", "checkpoint_every", "workers",
        "data_dir", "evaluate_dir", "download", "device", "csv", "tensorboard",
    }
)  # fmt: skip
# Settings that are read only beside certain values of other settings.
Needed = dict[str, tuple[str, ...]]
RKDO: Needed = {"method": ("rkdo",)}
IN_BATCH: Needed = {**RKDO, "recursion": ("batch",)}
FIELD: Needed = {"recursion": ("dense", "snapshot")}
NEEDS: dict[str, Needed] = {
    "recursion": RKDO,
    "alpha": RKDO,
    "icon_weight": RKDO,
    "alpha_schedule": RKDO,
    "alpha_final": {"alpha_schedule": ("linear", "cosine")},
    "depth": IN_BATCH,
    "cooling": IN_BATCH,
    "detach_target": IN_BATCH,
    "history": {"recursion": ("snapshot",)},
    "field_dtype": FIELD,
    "update_every": FIELD,
    "data_dir": {"dataset": ("cifar10", "cifar100", "stl10", "folder")},
    "download": {"dataset": ("cifar10", "cifar100", "stl10")},
    "evaluate_dir": {"dataset": ("folder",)},
    "skip_unreadable": {"dataset": ("folder",)},
}
# Settings that came later, which a run from before has at their defaults.
ADDED = frozenset({"evaluate_dir", "skip_unreadable", "precision"})
OF_ICON = ("debias", "kernel")  # read by --method icon and with a share of it
# The most that is not a slip of the finger; what memory and time allow is usually less.
AT_MOST = {
    "image_size": 4096,
    "projection": 65_536,
    "depth": 1000,
    "history": 10_000,
    "epochs": 10**9,
    "steps_per_epoch": 10**9,
    "stop_window": 10**9,
    "batch_size": 10**7,
    "workers": 1024,
    "evaluate_every": 10**9,
    "checkpoint_every": 10**9,
}


@dataclass(frozen=True)
class TrainConfig:
    """Settings of one training run. The defaults train on handwritten digits on a small CPU.

    The protocol of the paper: --dataset cifar10 --download --steps-per-epoch 11 --epochs 2
    (its "epoch" is 11 batches; for stl10 also --batch-size 32).
    """

    dataset: Dataset = "digits"
    """Images to train on. digits comes with scikit-learn; folder is all the images below DATA_DIR,
    or if it holds labels, DATA_DIR/train/<class>/* to train on and DATA_DIR/test/<class>/* (or
    val) to evaluate on."""
    data_dir: str = "data"
    """Where the images are, or go with --download. Not used by digits."""
    evaluate_dir: str | None = None
    """folder: where labelled images to evaluate on are, as in DATA_DIR. None: in DATA_DIR, and
    nothing is evaluated if that has no labels."""
    skip_unreadable: bool = False
    """folder: go on without the images that cannot be read, which are all found at the start."""
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
    temperature_decay: float = 0.0
    """b in temperature (1 - b t/T) at step t = 0..T-1 of the whole training, 0 to below 1."""
    recursion: Literal["batch", "dense", "snapshot"] = "batch"
    """rkdo: what the target recurs over. batch: DEPTH times in every batch, from the identity.
    dense, snapshot: the steps of training, in a response field over all training images, whole or
    made anew from the embeddings of each image's last HISTORY visits."""
    alpha: float = 0.5
    """rkdo: share of the learned distribution in the next target, 0 to 1."""
    alpha_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """rkdo: how alpha goes from ALPHA, at step 0 of the whole training's T, to ALPHA_FINAL, which
    step T would have."""
    alpha_final: float | None = None
    """rkdo: what a schedule of alpha goes to, 0 to 1. None: 0."""
    depth: int = 3
    """rkdo, recursion in the batch: number of recursions."""
    cooling: float = 0.1
    """rkdo, recursion in the batch: by how much the temperature has fallen at the last recursion,
    0 to below 1."""
    detach_target: bool = False
    """rkdo, recursion in the batch: no gradient through the target (through a field's none ever
    flows)."""
    history: int | None = None
    """snapshot: visits of an image that are kept. None: 4."""
    field_dtype: Literal["auto", "float32", "bfloat16", "float64"] = "auto"
    """dense, snapshot: how the field is stored. auto: bfloat16 for snapshot, else DTYPE."""
    update_every: Literal["step", "epoch"] = "step"
    """dense, snapshot: when the field takes up what was learned: every batch at once, or an
    epoch's images together at its end."""
    icon_weight: float = 0.0
    """rkdo: share w of I-Con in the loss, (1 - w) RKDO + w I-Con, 0 to 1."""
    debias: float = 0.2
    """icon, and ICON_WEIGHT's part: share of the uniform distribution in the target, 0 to 1."""
    kernel: Literal["gaussian", "student"] = "gaussian"
    """icon, and ICON_WEIGHT's part: the learned distribution's kernel."""

    epochs: int = 12
    """Passes over the training images, or over STEPS_PER_EPOCH batches."""
    steps_per_epoch: int | None = None
    """Batches in an epoch. None: all the training images; the paper has 11."""
    stop_slope: float | None = None
    """Stop when the loss falls by less than this an epoch: the least-squares slope over the last
    STOP_WINDOW epochs. None: never."""
    stop_window: int = 5
    """Epochs that the slope is taken over, at least 2."""
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
    precision: Literal["full", "bf16"] = "full"
    """What the encoder is evaluated in while it trains. full: DTYPE. bf16: bfloat16 where that is
    safe (autocast), which is faster on GPUs and new CPUs; parameters and the loss stay float32."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute. auto: a GPU if there is one."""
    workers: int | None = None
    """Processes that prepare images, per rank. 0: the training process itself. None: 0 on a CPU,
    beside a GPU the cores' number, at most 8."""

    evaluate_every: int = 5
    """Epochs between evaluations. 0: only before and after training."""
    checkpoint_every: int = 100
    """Steps between checkpoints."""
    csv: bool = False
    """Keep metrics.csv beside metrics.jsonl, with the same lines."""
    tensorboard: bool = False
    """Write events for TensorBoard into the run's folder."""

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
        _check(self, "temperature_decay", "between 0 and 0.999", lambda v: 0 <= v <= 0.999)
        _check(self, "alpha_final", "between 0 and 1", lambda v: v is None or 0 <= v <= 1)
        _check(self, "history", "at least 1", lambda v: v is None or v >= 1)
        _check(self, "icon_weight", "between 0 and 1", lambda v: 0 <= v <= 1)
        _check(self, "stop_slope", "at least 0", lambda v: v is None or 0 <= v < math.inf)
        _check(self, "stop_window", "at least 2", lambda v: v >= 2)
        for name in ("projection", "depth", "epochs", "checkpoint_every"):
            _check(self, name, "at least 1", lambda v: v >= 1)
        for name in ("workers", "evaluate_every"):
            _check(self, name, "at least 0", lambda v: v is None or v >= 0)
        if self.precision == "bf16" and self.dtype != "float32":
            raise UserError(f"--precision bf16 needs --dtype float32, got {self.dtype}")
        for name, most in AT_MOST.items():
            _check(self, name, f"at most {most}", lambda v, most=most: v is None or v <= most)
        self.check_read({f.name for f in fields(self) if getattr(self, f.name) != f.default})

    def check_read(self, given: Collection[str]) -> None:
        """That each of the settings `given`, at its default or not, is one that the run reads.

        Raises:
            UserError: one belongs to another value of another setting.
        """
        for name, needed in NEEDS.items():
            for other, wanted in needed.items() if name in given else ():
                _check_needed(self, name, other, wanted)
        for name in OF_ICON:
            if name in given and self.method != "icon" and not self.icon_weight:
                raise UserError(
                    f"{flag(name)} {getattr(self, name)} needs --method icon or a part of it, "
                    f"--icon-weight, got --method {self.method}"
                )

    @property
    def size(self) -> int:
        """Side of the square images."""
        return self.image_size or (64 if self.dataset in ("stl10", "folder") else 32)

    @property
    def first_temperature(self) -> float:
        """The temperature that training begins with."""
        return self.temperature or (0.1 if self.method == "infonce" else 0.5)

    @property
    def storage(self) -> str:
        """The dtype that a response field is stored in."""
        if self.field_dtype != "auto":
            return self.field_dtype
        return "bfloat16" if self.recursion == "snapshot" else self.dtype

    @property
    def scheduled(self) -> bool:
        """Whether a step depends on how long the whole training is."""
        return self.alpha_schedule != "constant" or self.temperature_decay > 0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Any, source: str) -> "TrainConfig":
        """The configuration that `to_dict` wrote to `source`."""
        names = {field.name for field in fields(cls)}
        if not isinstance(values, dict) or not names - ADDED <= set(values) <= names:
            raise UserError(f"{source} is not the configuration of an rkdo run of this version")
        try:
            return cls(**values)
        except UserError as error:
            raise UserError(f"{source}: {error}") from None


def check_resumable(old: TrainConfig, new: TrainConfig) -> None:
    """A run goes on as it began: only `CHANGEABLE` settings may differ."""
    for field in fields(TrainConfig):
        was, now = getattr(old, field.name), getattr(new, field.name)
        if was != now and field.name not in CHANGEABLE:
            raise UserError(
                f"{flag(field.name)} {now} conflicts with the run being resumed, which has {was}: "
                f"leave {flag(field.name)} out, or start another run"
            )
    if new.scheduled and new.epochs != old.epochs:
        name = "temperature_decay" if new.temperature_decay else "alpha_schedule"
        raise UserError(
            f"--epochs {new.epochs} conflicts with the run being resumed, whose {flag(name)} "
            f"ends with its {old.epochs} epochs: leave --epochs out, or start another run"
        )


def shown(value: Any, as_text: Callable[[Any], str] = str) -> str:
    """A value as an error shows it: on one line, and not all of it if it is long."""
    text = " ".join(as_text(value).split())
    return text if len(text) <= 80 else f"{text[:77]}..."


def flag(name: str) -> str:
    """`batch_size` as it is spelled on the command line."""
    return "--" + name.replace("_", "-")


def _check(config: TrainConfig, name: str, wanted: str, holds: Any) -> None:
    value = getattr(config, name)
    if not holds(value):
        raise UserError(f"{flag(name)} must be {wanted}, got {shown(value)}")


def _check_needed(config: TrainConfig, name: str, other: str, wanted: tuple[str, ...]) -> None:
    found = getattr(config, other)
    if found not in wanted:
        raise UserError(
            f"{flag(name)} {getattr(config, name)} needs {flag(other)} {' or '.join(wanted)}, "
            f"got {found}"
        )


def _check_type(name: str, value: Any, hint: Any) -> None:
    options = get_args(hint) or (hint,)
    if isinstance(options[0], str):  # a Literal
        if value not in options:
            raise UserError(f"{flag(name)} must be one of {', '.join(options)}, got {shown(value)}")
    elif float in options and type(value) is int:  # 1 is a fine 1.0
        return
    elif type(value) not in options:
        kinds = " or ".join(option.__name__ for option in options)
        raise UserError(f"{flag(name)} must be {kinds}, got {shown(value, repr)}")
