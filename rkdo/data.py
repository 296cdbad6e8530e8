"""Images, their augmentations and the order in which training sees them.

Two properties make a run exactly repeatable, on any number of ranks and workers and from any step:
the order is a seeded permutation per epoch of which each rank takes its slice of every batch, and
a sample's augmentations depend on (seed, epoch, index) alone.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol
from urllib.error import URLError

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import datasets
from torchvision.transforms import InterpolationMode, v2

from rkdo.config import TrainConfig
from rkdo.errors import UserError
from rkdo.imports import importing
from rkdo.workers import Loader


class Images(Protocol):
    """Labelled images; `images[i]` is uint8 [1 or 3, H, W]."""

    @property
    def labels(self) -> Tensor: ...  # [n] int64

    def __getitem__(self, index: int) -> Tensor: ...


@dataclass(frozen=True)
class TensorImages:
    """Images held in memory."""

    images: Tensor  # [n, 1 or 3, H, W] uint8
    labels: Tensor  # [n] int64

    def __getitem__(self, index: int) -> Tensor:
        return self.images[index]


class FolderImages:
    """Images read from FOLDER/<class>/* when they are asked for."""

    def __init__(self, folder: Path) -> None:
        try:
            self.files = datasets.ImageFolder(str(folder))
        except OSError as error:  # FileNotFoundError: no class folders, or none with images
            raise UserError(f"--data-dir: {_one_line(error)}") from error
        self.labels: Tensor = torch.tensor(self.files.targets)

    def __getitem__(self, index: int) -> Tensor:
        path = self.files.samples[index][0]
        try:
            return v2.functional.pil_to_tensor(self.files.loader(path))
        except OSError as error:
            raise UserError(f"{path} is not a readable image: {_one_line(error)}") from error


@dataclass(frozen=True)
class Data:
    """What a run trains on and what it is judged on."""

    train: Images
    test: Images
    classes: int


def load_data(config: TrainConfig) -> Data:
    """The images that `config` names.

    Raises:
        UserError: they are not there, not readable, or too few.
    """
    match config.dataset:
        case "digits":
            train, test = _digits(config.size)
        case "folder":
            train, test = _folder(Path(config.data_dir))
        case _:
            train, test = _torchvision(config)
    classes = train.labels.unique()
    if len(classes) < 2 or len(test.labels) < 12:
        raise UserError(
            f"--dataset {config.dataset} must have at least 2 classes and 12 test images, "
            f"got {len(classes)} and {len(test.labels)}"
        )
    return Data(train, test, len(classes))


def _digits(size: int) -> tuple[Images, Images]:
    """scikit-learn's 1,797 handwritten digits, enlarged from 8×8; one in five is for testing."""
    with importing():
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

    bunch = load_digits()
    grey = torch.from_numpy(bunch.images).float()[:, None] * (255 / 16)
    grey = F.interpolate(grey, size=(size, size), mode="bicubic", antialias=True)
    images = grey.round().clamp(0, 255).to(torch.uint8)
    labels = torch.from_numpy(bunch.target).long()
    train, test = train_test_split(
        np.arange(len(labels)), test_size=0.2, stratify=labels.numpy(), random_state=0
    )
    return TensorImages(images[train], labels[train]), TensorImages(images[test], labels[test])


def _folder(root: Path) -> tuple[Images, Images]:
    held_out = "val" if not (root / "test").is_dir() and (root / "val").is_dir() else "test"
    for part in ("train", held_out):
        if not (root / part).is_dir():
            raise UserError(f"--data-dir must hold the folders train and test, no {root / part}")
    train, test = FolderImages(root / "train"), FolderImages(root / held_out)
    if train.files.classes != test.files.classes:
        raise UserError(
            f"--data-dir: train and {held_out} must hold the same classes, "
            f"got {len(train.files.classes)} and {len(test.files.classes)}"
        )
    return train, test


def _torchvision(config: TrainConfig) -> tuple[Images, Images]:
    name, root = config.dataset, config.data_dir
    try:
        if name == "stl10":
            parts = [
                datasets.STL10(root, split=split, download=config.download)
                for split in ("train", "test")
            ]
            arrays = [(part.data, part.labels) for part in parts]
        else:
            kind = datasets.CIFAR10 if name == "cifar10" else datasets.CIFAR100
            loaded = [kind(root, train=train, download=config.download) for train in (True, False)]
            arrays = [(part.data.transpose(0, 3, 1, 2), part.targets) for part in loaded]
    except (RuntimeError, OSError, URLError, EOFError, ValueError) as error:
        if config.download:
            raise UserError(f"--download of {name} failed: {_one_line(error)}") from error
        raise UserError(
            f"--data-dir {root} holds no intact {name}: name another, or pass --download"
        ) from error
    train, test = (
        TensorImages(torch.from_numpy(np.ascontiguousarray(images)), torch.as_tensor(labels).long())
        for images, labels in arrays
    )
    return train, test


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def augmentation(config: TrainConfig) -> nn.Module:
    """uint8 [1 or 3, H, W] to a random view, float32 [3, size, size]."""
    if config.dataset == "digits":  # no flips and no large turns: a digit stays the digit it is
        draw: list[nn.Module] = [
            v2.RandomAffine(
                degrees=15,
                translate=(0.1, 0.1),
                scale=(0.75, 1.1),
                shear=(-12, 12, -6, 6),
                interpolation=InterpolationMode.BILINEAR,
            ),
            v2.RandomApply([v2.GaussianBlur(3, sigma=(0.3, 1.5))], p=0.3),
            v2.ColorJitter(brightness=0.3, contrast=0.3),
        ]
    else:
        draw = [
            v2.RandomResizedCrop(config.size, scale=(0.2, 1.0), antialias=True),
            v2.RandomHorizontalFlip(),
            v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
            v2.RandomGrayscale(0.2),
        ]
    return v2.Compose([*draw, *_to_network()])


def plain_view(config: TrainConfig) -> nn.Module:
    """uint8 [1 or 3, H, W] to the view that evaluation uses, float32 [3, size, size]."""
    return v2.Compose(
        [v2.Resize(config.size, antialias=True), v2.CenterCrop(config.size), *_to_network()]
    )


def _to_network() -> list[nn.Module]:
    return [
        v2.RGB(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(mean=[0.5, 0.5, 0.5], std=[0.5, 0.5, 0.5]),
    ]


class TwoViews(Dataset):
    """`views[epoch, index]`: two random views of an image, always the same ones, and the index."""

    def __init__(self, images: Images, augment: nn.Module, seed: int) -> None:
        self.images = images
        self.augment = augment
        self.seed = seed

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, Tensor, int]:
        epoch, index = key
        image = self.images[index]
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed_of(self.seed, epoch, index))
            return self.augment(image), self.augment(image), index


class PlainViews(Dataset):
    """Every image's evaluation view, in order."""

    def __init__(self, images: Images, view: nn.Module, count: int | None = None) -> None:
        self.images = images
        self.view = view
        self.count = len(images.labels) if count is None else min(count, len(images.labels))

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Tensor:
        return self.view(self.images[index])


@dataclass(frozen=True)
class Batches:
    """The keys of this rank's rows of every batch from step `start` on."""

    n_images: int
    batch_size: int  # over all ranks
    steps_per_epoch: int
    epochs: int
    seed: int
    start: int = 0
    rank: int = 0
    n_ranks: int = 1

    def __len__(self) -> int:
        return self.epochs * self.steps_per_epoch - self.start

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        rows = self.batch_size // self.n_ranks
        for epoch in range(self.start // self.steps_per_epoch, self.epochs):
            order = epoch_order(self.seed, epoch, self.n_images)
            for batch in range(self.steps_per_epoch):
                if epoch * self.steps_per_epoch + batch >= self.start:
                    first = batch * self.batch_size + self.rank * rows
                    yield [(epoch, index) for index in order[first : first + rows].tolist()]


def epoch_order(seed: int, epoch: int, n_images: int) -> Tensor:  # [n_images] int64
    generator = torch.Generator().manual_seed(seed_of(seed, epoch))
    return torch.randperm(n_images, generator=generator)


def seed_of(*parts: int) -> int:
    """One well-mixed seed from several numbers."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0])


def training_loader(images: Images, config: TrainConfig, batches: Batches) -> DataLoader:
    """Batches of (first views, second views, which images they are of).

    The views are float32 [rows, 3, size, size], the images' places in `images` int64 [rows].
    """
    return Loader(
        TwoViews(images, augmentation(config), config.seed),
        batch_sampler=batches,  # type: ignore[arg-type]  # any iterable of lists will do
        num_workers=config.workers,
        generator=torch.Generator(),  # its own, so that starting it draws nothing from the run's
    )


def evaluation_loader(images: Images, config: TrainConfig, count: int | None = None) -> DataLoader:
    """Batches of evaluation views of the first `count` images, float32 [≤ 256, 3, size, size]."""
    return Loader(
        PlainViews(images, plain_view(config), count),
        batch_size=256,
        num_workers=config.workers,
        generator=torch.Generator(),
    )
