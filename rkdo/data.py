"""The images that a run trains on, and those that its encoder is judged on."""

import hashlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol
from urllib.error import URLError

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision import datasets

from rkdo.config import TrainConfig
from rkdo.errors import UserError
from rkdo.images import find_files, find_images, is_image, read_image, unreadable
from rkdo.imports import importing

NAMED = 5  # unreadable files that an error names


class Images(Protocol):
    """`images[i]` is uint8 [1 or 3, H, W]."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Tensor: ...


class LabelledImages(Images, Protocol):
    @property
    def labels(self) -> Tensor: ...  # [n] int64


@dataclass(frozen=True)
class TensorImages:
    """Images held in memory."""

    images: Tensor  # [n, 1 or 3, H, W] uint8
    labels: Tensor  # [n] int64

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        return self.images[index]


@dataclass(frozen=True)
class FileImages:
    """Images that are read when they are asked for."""

    paths: Sequence[Path]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        try:
            return read_image(self.paths[index])
        except UserError as error:  # it was readable when the run began
            raise UserError(
                f"{error}: put it back, or another image in its place, and go on with --resume"
            ) from error


@dataclass(frozen=True)
class LabelledFiles(FileImages):
    """Class by class, as their folders come."""

    labels: Tensor  # [n] int64

    def shuffled(self, seed: int) -> "LabelledFiles":
        order = np.random.default_rng(seed).permutation(len(self))
        return LabelledFiles([self.paths[i] for i in order], self.labels[order])


@dataclass(frozen=True)
class Data:
    """Labelled images: what is learned on some is judged on others."""

    train: LabelledImages
    test: LabelledImages
    classes: int


@dataclass(frozen=True)
class TrainingData:
    """What a run trains on, and what its encoder is judged on: None if nothing has labels."""

    images: Images
    labels: Tensor | None  # [n] int64
    judged: Data | None


@dataclass(frozen=True)
class Skipped:
    """Files that a run does without, because they are unreadable: by their path in a folder."""

    data_dir: tuple[str, ...] = ()
    evaluate_dir: tuple[str, ...] = ()


def load_training(config: TrainConfig, skipped: Skipped = Skipped()) -> TrainingData:
    """The images that a run with this configuration trains on.

    Raises:
        UserError: they are not there, not readable, or too few.
    """
    if config.dataset != "folder":
        data = load_data(config)
        return TrainingData(data.train, data.train.labels, data)
    root = Path(config.data_dir)
    judged = load_data(config, skipped) if is_labelled(root) or config.evaluate_dir else None
    if is_labelled(root):
        data = judged if judged and not config.evaluate_dir else _folder(root, skipped.data_dir)
        return TrainingData(data.train, data.train.labels, judged)
    paths = _without(find_images(root), root, skipped.data_dir)
    return TrainingData(FileImages(paths), None, judged)


def load_data(config: TrainConfig, skipped: Skipped = Skipped()) -> Data:
    """The labelled images that an encoder is judged on.

    Raises:
        UserError: they are not there, not readable, or too few; or there are no labels.
    """
    name = "--evaluate-dir" if config.evaluate_dir else f"--dataset {config.dataset}"
    match config.dataset:
        case "digits":
            data = _digits(config.size)
        case "folder" if config.evaluate_dir:
            root = Path(config.evaluate_dir)
            if not is_labelled(root):
                raise UserError(
                    f"--evaluate-dir must hold the folders train and test (or val), one folder a "
                    f"class in each, {root} does not"
                )
            data = _folder(root, skipped.evaluate_dir)
        case "folder":
            root = Path(config.data_dir)
            if not is_labelled(root):
                find_images(root)
                raise UserError(
                    f"--data-dir {root} has no labels (no folders train and test or val): "
                    "--evaluate-dir names a folder that has"
                )
            data = _folder(root, skipped.data_dir)
        case _:
            data = _torchvision(config)
    if len(data.train) < 5:  # neighbours that evaluation asks
        raise UserError(f"{name} must have at least 5 training images, got {len(data.train)}")
    if data.classes < 2 or len(data.test) < 12:
        raise UserError(
            f"{name} must have at least 2 classes and 12 test images, "
            f"got {data.classes} and {len(data.test)}"
        )
    return data


def find_unreadable(config: TrainConfig) -> Skipped:
    """The image files of a run that cannot be read, after all have been looked at.

    Raises:
        UserError: there are some, and the configuration does not say to go on without them; or
            there are no images.
    """
    if config.dataset != "folder":
        return Skipped()
    found = []
    for name, folder, paths in _folders(config, load_training(config)):
        faults = unreadable(paths)
        if faults and not config.skip_unreadable:
            named = "; ".join(f"{path} {why}" for path, why in list(faults.items())[:NAMED])
            more = f"; and {len(faults) - NAMED} more" if len(faults) > NAMED else ""
            raise UserError(
                f"{name}: {len(faults)} of {len(paths)} images cannot be used: {named}{more} "
                f"(--skip-unreadable goes on without them, rkdo check-data {folder} lists them)"
            )
        found.append(tuple(path.relative_to(folder).as_posix() for path in faults))
    return Skipped(*found)


def used_files(config: TrainConfig, data: TrainingData) -> list[Path]:
    """The image files of a run."""
    return [path for _, _, paths in _folders(config, data) for path in paths]


def left_out(config: TrainConfig, data: TrainingData, skipped: Skipped) -> list[Path]:
    """Files below the folders of a run that it makes no use of, hidden and unreadable ones aside:
    they have no image's name, or lie beside the folders of the classes."""
    found = []
    for (name, folder, paths), names in zip(
        _folders(config, data), (skipped.data_dir, skipped.evaluate_dir), strict=False
    ):
        used = {*paths, *(folder / skipped_name for skipped_name in names)}
        found += [path for path in find_files(folder, name) if path not in used]
    return found


def fingerprint(config: TrainConfig, images: Images) -> str | None:
    """What tells a folder's images from others, of their names below it: one that was damaged may
    have been replaced. None of images that are no files."""
    if not isinstance(images, FileImages):
        return None
    digest = hashlib.sha256()
    for path in images.paths:
        name = path.relative_to(config.data_dir).as_posix()
        digest.update(f"{name}\0".encode(errors="surrogateescape"))
    return digest.hexdigest()


def _folders(config: TrainConfig, data: TrainingData) -> list[tuple[str, Path, list[Path]]]:
    """The folders of a run's images by their settings, with those that it uses of each."""
    if config.dataset != "folder":
        return []
    judged = _paths(data.judged.train, data.judged.test) if data.judged else []
    if config.evaluate_dir:
        own = [("--data-dir", Path(config.data_dir), _paths(data.images))]
        return [*own, ("--evaluate-dir", Path(config.evaluate_dir), judged)]
    paths = list(dict.fromkeys(_paths(data.images) + judged))
    return [("--data-dir", Path(config.data_dir), paths)]


def _paths(*images: Images) -> list[Path]:
    return [path for some in images if isinstance(some, FileImages) for path in some.paths]


def is_labelled(root: Path) -> bool:
    """Whether there is a folder `train`, and one of `test` or `val`."""
    return (root / "train").is_dir() and any((root / name).is_dir() for name in ("test", "val"))


def _digits(size: int) -> Data:
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
    first, second = (TensorImages(images[part], labels[part]) for part in (train, test))
    return Data(first, second, 10)


def _folder(root: Path, skipped: Collection[str]) -> Data:
    held_out = "test" if (root / "test").is_dir() else "val"
    (train, classes), (test, others) = (
        _classes(root, part, skipped) for part in ("train", held_out)
    )
    for part, own, missing in (("train", classes, others), (held_out, others, classes)):
        alone = sorted(set(own) - set(missing))
        if alone:
            more = f" and {len(alone) - NAMED} more" if len(alone) > NAMED else ""
            raise UserError(
                f"--data-dir: train and {held_out} must hold the same classes, only {part} has "
                f"{', '.join(alone[:NAMED])}{more}"
            )
    return Data(train, test, len(train.labels.unique()))


def _classes(root: Path, part: str, skipped: Collection[str]) -> tuple[LabelledFiles, list[str]]:
    """The images in `part`, and what its class folders are called."""
    try:
        found = _ClassFolders(str(root / part), is_valid_file=lambda path: is_image(Path(path)))
    except OSError as error:  # FileNotFoundError: no class folders, or none with images
        raise UserError(
            f"--data-dir: {_one_line(error)} (images without labels: --data-dir {root / part})"
        ) from error
    labels = {Path(path): label for path, label in found.samples}
    paths = _without(list(labels), root, skipped)
    targets = torch.tensor([labels[path] for path in paths], dtype=torch.int64)
    return LabelledFiles(paths, targets), found.classes


class _ClassFolders(datasets.ImageFolder):
    def find_classes(self, directory: str) -> tuple[list[str], dict[str, int]]:
        """But hidden folders."""
        classes = [name for name in super().find_classes(directory)[0] if name[0] != "."]
        return classes, {name: i for i, name in enumerate(classes)}


def _without(paths: Sequence[Path], root: Path, skipped: Collection[str]) -> list[Path]:
    gone = {root / name for name in skipped}
    return [path for path in paths if path not in gone]


def _torchvision(config: TrainConfig) -> Data:
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
    return Data(train, test, len(train.labels.unique()))


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
