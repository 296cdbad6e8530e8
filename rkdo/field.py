"""The response field of a run: what RKDO's target recurs over from step to step."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from rkdo.config import HISTORY, TrainConfig
from rkdo.data import load_training
from rkdo.errors import UserError
from rkdo.ranks import Ranks
from rkdo.record import Run
from rkdo.report import draw_field
from rkdo_kernels import ResponseField

# What is looked at of a field: so many images of so many classes.
CLASSES = 10
IMAGES = 30


class TrainingField:
    """A `ResponseField` over the training images, and what it takes up at the epoch's end.

    Every rank holds its share of the rows, and all call the same methods in the same order.
    """

    def __init__(self, config: TrainConfig, n: int, labels: Tensor | None, ranks: Ranks) -> None:
        group = dist.group.WORLD if ranks.size > 1 else None
        self.field = _build(config, n, ranks.device, group)
        self.config, self.ranks = config, ranks
        self.every_step = config.update_every == "step"
        self.shown = sample(n, labels, CLASSES, IMAGES)
        self.shown_labels = None if labels is None else labels[self.shown]
        self.waiting: list[tuple[Tensor, ...]] = []  # queries, keys and index of each batch

    def loss(
        self, queries: Tensor, keys: Tensor, index: Tensor, temperature: float, alpha: float
    ) -> Tensor:  # []
        """Of a batch, [N, D] embeddings of the images `index`; the field takes it up."""
        if self.every_step:
            # Loss and update in one pass over the field. That is exact here: no forward pass is
            # done again, added to another or left without its optimizer step; a loss that is not
            # finite ends the run, and the field in the checkpoint is from before.
            return self.field.step(queries, keys, index, alpha=alpha, temperature=temperature)
        self.waiting.append((queries.detach(), keys.detach(), index))
        return self.field.loss(queries, keys, index, temperature=temperature)

    def end_epoch(self, temperature: float, alpha: float) -> None:
        """Take up what has waited for the epoch's end, as one batch."""
        if self.waiting:
            queries, keys, index = map(torch.cat, zip(*self.waiting, strict=True))
            self.field.update(queries, keys, index, alpha=alpha, temperature=temperature)
            self.waiting = []

    def measures(self) -> dict[str, float]:
        """Entropy and, if there are labels, mass on the own class: means over the rows of the
        shown images' block."""
        block = self.field.block(self.shown.to(self.ranks.device)).double().cpu()
        found = {"field_entropy": torch.special.entr(block).sum(1).mean().item()}
        if self.shown_labels is not None:
            same = self.shown_labels[:, None] == self.shown_labels
            found["field_purity"] = (block * same).sum(1).mean().item()
        return found

    def state_dict(self) -> dict[str, Any] | None:
        """Of all ranks, on the first; None on the others. To be saved at once: with one rank the
        tensors are the field's own."""
        field, waiting = self.field.state_dict(copy=False), self.waiting
        if self.ranks.size == 1:
            return {"field": field, "waiting": waiting}
        field = {name: x.cpu() if isinstance(x, Tensor) else x for name, x in field.items()}
        shares = self.ranks.gather((field, [tuple(x.cpu() for x in batch) for batch in waiting]))
        if shares is None:
            return None
        whole = _build(self.config, len(self.field), torch.device("meta")).state_dict()
        for name, x in whole.items():
            if isinstance(x, Tensor):
                whole[name] = _joined([held[name] for held, _ in shares], x.shape)
        batches = zip(*(waiting for _, waiting in shares), strict=True)
        return {
            "field": whole,
            "waiting": [tuple(map(torch.cat, zip(*batch, strict=True))) for batch in batches],
        }

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """What `state_dict` gave on the first rank, of any number of ranks."""
        field, ranks = saved["field"], self.ranks
        if ranks.size > 1:
            mine = self.field.state_dict(copy=False)
            for name, x in mine.items():
                if isinstance(x, Tensor):
                    mine[name] = _share(field[name], x.shape, *mine["held"])
            field = {**field, **mine}
        self.field.load_state_dict(field)
        self.waiting = [
            tuple(x.chunk(ranks.size)[ranks.rank].to(ranks.device) for x in batch)
            for batch in saved["waiting"]
        ]


def sample(n: int, labels: Tensor | None, classes: int, images: int) -> Tensor:
    """The first `images` images of `classes` classes spread over all, in the order of labels; as
    many of all `n` images if there are none. int64 [≤ classes · images]."""
    if labels is None:
        return torch.linspace(0, n - 1, min(n, classes * images)).round().long()
    found = labels.unique()
    places = torch.linspace(0, len(found) - 1, min(classes, len(found))).round().long()
    return torch.cat([(labels == found[i]).nonzero()[:images, 0] for i in places])


def picture(
    folder: Path, out: Path | None, *, classes: int, images: int, data_dir: str | None
) -> Path:
    """Draw the field of the run in `folder`; the picture's path.

    Raises:
        UserError: the folder holds no run, no usable checkpoint or no field, or the images are
            missing.
    """
    if out is not None and out.suffix.lower() != ".png":
        raise UserError(f"--out must end in .png, got {out}")
    run = Run(folder)
    config = run.read_config()
    if config.recursion == "batch":
        raise UserError(f"{folder} has no field: it was trained with --recursion batch")
    if data_dir is not None:
        config = replace(config, data_dir=data_dir)
    saved = run.load_checkpoint()
    if saved is None:
        raise UserError(f"{folder} has no checkpoint yet: let it train first")
    data = load_training(config, run.read_skipped())
    n, labels = len(data.images), data.labels
    trained = TrainingField(config, n, labels, Ranks(0, 1, torch.device("cpu")))
    try:
        trained.load_state_dict(saved["field"])
        step = int(saved["step"])
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"{run.checkpoint} does not fit {folder / 'config.json'}") from error
    shown = sample(n, labels, classes, images)
    shown_labels = None if labels is None else labels[shown]
    title = f"{config.recursion} field on {config.dataset}, step {step}"
    path = run.field if out is None else out
    try:
        draw_field(trained.field.block(shown), shown_labels, run.read_metrics(), title, path)
    except OSError as error:
        raise UserError(f"--out {path} cannot be written: {error.strerror}") from error
    return path


def _build(config: TrainConfig, n: int, device: torch.device, group: Any = None) -> ResponseField:
    given: dict[str, Any] = {
        "dtype": getattr(torch, config.storage), "device": device, "process_group": group,
    }  # fmt: skip
    if config.recursion == "snapshot":
        history = config.history or HISTORY
        return ResponseField.snapshot(n, config.projection, history=history, **given)
    try:
        return ResponseField.dense(n, seed=config.seed, **given)
    except MemoryError as error:
        raise UserError(f"--recursion dense must fit the memory: {error}") from error


def _joined(shares: list[Tensor], shape: torch.Size) -> Tensor:
    """The tensor of this shape of which each rank has a share, or all of it."""
    split = [dim for dim, size in enumerate(shape) if shares[0].shape[dim] != size]
    return torch.cat(shares, split[0]) if split else shares[0]


def _share(whole: Tensor, shape: torch.Size, first: int, last: int) -> Tensor:
    """What `_joined` joined, of the rank whose shares have this shape."""
    split = [dim for dim, size in enumerate(shape) if whole.shape[dim] != size]
    return whole.narrow(split[0], first, last - first) if split else whole
