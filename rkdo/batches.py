"""The order in which training sees images, and the batches that it sees.

Two properties make a run exactly repeatable, on any number of ranks and workers and from any step:
the order is a seeded permutation per epoch of which each rank takes its slice of every batch, and
a sample's random views depend on (seed, epoch, index) alone.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from rkdo.augment import Augment, augmentation, draws
from rkdo.config import TrainConfig
from rkdo.data import Images
from rkdo.workers import Loader, hand_over

WORKERS = 8  # beside a GPU, at most


def plain_view(config: TrainConfig) -> nn.Module:
    """uint8 [1 or 3, H, W] to the view that evaluation uses, float32 [3, size, size]."""
    return v2.Compose(
        [
            v2.Resize(config.size, antialias=True),
            v2.CenterCrop(config.size),
            v2.RGB(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(mean=[0.5, 0.5, 0.5], std=[0.5, 0.5, 0.5]),
        ]
    )


class TwoViews(Dataset):
    """Batches of two random views of images, always the same ones, and which images they are of."""

    def __init__(self, images: Images, augment: Augment, seed: int) -> None:
        self.images = images
        self.augment = augment
        self.seed = seed

    def __getitems__(self, keys: Sequence[tuple[int, int]]) -> tuple[Tensor, Tensor, Tensor]:
        """Of the images `keys`, (epoch, index): both float32 [rows, 3, size, size], [rows]."""
        index = [index for _, index in keys]
        images = [self.images[i] for i in index]
        first, second = (self.augment(images, draws(self.seed, keys, view)) for view in (0, 1))
        return first, second, torch.tensor(index)


class PlainViews(Dataset):
    """Every image's evaluation view, in order."""

    def __init__(self, images: Images, view: nn.Module, count: int | None = None) -> None:
        self.images = images
        self.view = view
        self.count = len(images) if count is None else min(count, len(images))

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


def training_loader(
    images: Images, config: TrainConfig, batches: Batches, device: torch.device
) -> DataLoader:
    """Batches of (first views, second views, which images they are of).

    The views are float32 [rows, 3, size, size], the images' places in `images` int64 [rows].
    """
    return Loader(
        TwoViews(images, augmentation(config), config.seed),
        batch_sampler=batches,  # type: ignore[arg-type]  # any iterable of lists will do
        collate_fn=_hand_over,
        generator=torch.Generator(),  # its own, so that starting it draws nothing from the run's
        **loading(config, device),
    )


def evaluation_loader(
    images: Images, config: TrainConfig, device: torch.device, count: int | None = None
) -> DataLoader:
    """Batches of evaluation views of the first `count` images, float32 [≤ 256, 3, size, size]."""
    return Loader(
        PlainViews(images, plain_view(config), count),
        batch_size=256,
        generator=torch.Generator(),
        **loading(config, device),
    )


def loading(config: TrainConfig, device: torch.device) -> dict[str, Any]:
    """How images are prepared: beside a GPU by processes of their own, in memory that it reads."""
    gpu = device.type == "cuda"
    workers = config.workers
    if workers is None:
        here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # ranks that share the cores
        workers = min(WORKERS, (os.cpu_count() or 1) // here) if gpu else 0
    return {"num_workers": workers, "pin_memory": gpu}


def _hand_over(batch: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(map(hand_over, batch))
