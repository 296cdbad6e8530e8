"""The embeddings of a folder of images, in a file beside the images' names."""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from rkdo.config import AT_MOST, flag
from rkdo.errors import UserError
from rkdo.files import require_room, write_atomically, writing
from rkdo.images import find_images, read_image
from rkdo.interrupt import held, listening
from rkdo.pretrained import LoadedEncoder, Transform, load_encoder
from rkdo.workers import Loader, hand_over, workers_watched

SUFFIXES = (".npy", ".csv")
Rows = NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Embedded:
    """What was written: so many embeddings of such a length, into these files."""

    count: int
    width: int
    files: tuple[Path, ...]
    skipped: tuple[Path, ...]  # images that could not be read


def embed(
    run: Path,
    data: Path,
    out: Path,
    *,
    device: str = "auto",
    workers: int = 0,
    batch_size: int = 256,
    skip_unreadable: bool = False,
) -> Embedded:
    """Write the embeddings of all images below the folder `data`, in the order of their paths.

    X.npy: an array [n, width] in the encoder's dtype, and beside it X.names.txt, line i the name of
    row i. X.csv: a header, then a line an image, its name and its numbers. A name is the path below
    `data`, with slashes. Each file is written whole or not at all, and no X.npy is ever beside
    another's names.

    Raises:
        UserError: no run, no images, an image that cannot be read (unless `skip_unreadable`), or a
            file that cannot be written; what was there is left as it is.
    """
    _check_out(out)
    _check_between("workers", workers, 0)
    _check_between("batch_size", batch_size, 1)
    paths = find_images(data, "--data")
    names = [path.relative_to(data).as_posix() for path in paths]
    for name in names:
        if out.suffix == ".npy" and name.splitlines() != [name]:
            raise UserError(f"--out X.csv is for names with line breaks, there is {name!r}")
    encoder = load_encoder(run, device=device)
    with listening(), workers_watched():
        rows, kept = _embeddings(encoder, paths, workers, batch_size, skip_unreadable, out)
        files = _write(out, [names[i] for i in kept], rows)
    read = set(kept)
    skipped = tuple(path for i, path in enumerate(paths) if i not in read)
    return Embedded(len(rows), encoder.width, files, skipped)


def names_of(out: Path) -> Path:
    """Where the names are that belong to the array in `out`."""
    return out.with_suffix(".names.txt")


def _check_out(out: Path) -> None:
    if out.suffix not in SUFFIXES:
        raise UserError(f"--out must end in {' or '.join(SUFFIXES)}, got {out}")
    if out.is_dir():
        raise UserError(f"--out must be a file, {out} is a folder")
    if not out.parent.is_dir():
        raise UserError(f"--out {out}: there is no folder {out.parent}")


def _check_between(name: str, value: int, least: int) -> None:
    for bound, holds in (("least", value >= least), ("most", value <= AT_MOST[name])):
        if not holds:
            limit = least if bound == "least" else AT_MOST[name]
            raise UserError(f"{flag(name)} must be at {bound} {limit}, got {value}")


class _Views(Dataset):
    """(i, the view of image i), or the reason why there is none."""

    def __init__(self, paths: Sequence[Path], transform: Transform, skip: bool) -> None:
        self.paths, self.transform, self.skip = paths, transform, skip

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[int, Tensor | None]:
        try:
            return index, self.transform.view(read_image(self.paths[index]))
        except UserError:
            if not self.skip:
                raise
            return index, None


def _batch(rows: list[tuple[int, Tensor | None]]) -> tuple[list[int], Tensor | None]:
    """The rows that are there."""
    views = {index: view for index, view in rows if view is not None}
    return list(views), hand_over(torch.stack(list(views.values()))) if views else None


@torch.no_grad()
def _embeddings(
    encoder: LoadedEncoder, paths: list[Path], workers: int, batch_size: int, skip: bool, out: Path
) -> tuple[Rows, list[int]]:
    """The embeddings [≤ n, width], and which of the images they are of."""
    dtype = next(encoder.parameters()).dtype
    rows = torch.empty(len(paths), encoder.width, dtype=dtype)
    require_room(out.parent, rows.nbytes, what="the embeddings")
    kept: list[int] = []
    loader = Loader(
        _Views(paths, encoder.transform, skip),
        batch_size=batch_size,
        num_workers=workers,
        collate_fn=_batch,
        generator=torch.Generator(),
    )
    with held():  # it may have a thread that watches it
        progress = tqdm(total=len(paths), unit="image", disable=None)
    with progress:
        for index, views in loader:
            if views is not None:
                rows[len(kept) : len(kept) + len(index)] = encoder(views).cpu()
                kept += index
            progress.update(min(batch_size, len(paths) - progress.n))
    if not kept:
        raise UserError(f"none of the {len(paths)} images could be read, the first is {paths[0]}")
    return rows[: len(kept)].numpy(), kept


def _write(out: Path, names: list[str], rows: Rows) -> tuple[Path, ...]:
    if out.suffix == ".csv":
        with writing(out):
            write_atomically(out, lambda file: _write_csv(file, names, rows))
        return (out,)
    beside = names_of(out)

    def write_array(_: Path) -> None:
        """Once the new names are on the disk; the old ones go before the old array does."""
        with writing(out):
            write_atomically(
                out,
                lambda file: _write_npy(file, rows),
                check=lambda _: beside.unlink(missing_ok=True),
            )

    lines = "".join(f"{name}\n" for name in names).encode(errors="surrogateescape")
    with writing(beside):
        write_atomically(beside, lambda file: file.write(lines), check=write_array)
    return out, beside


def _write_npy(file: IO[bytes], rows: Rows) -> None:
    """As `np.save`, which does not say why it could not."""
    np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(rows))
    file.write(rows.data)


def _write_csv(file: IO[bytes], names: list[str], rows: Rows) -> None:
    digits = 9 if rows.dtype == np.float32 else 17  # which give the same numbers when read
    text = io.TextIOWrapper(file, encoding="utf-8", errors="surrogateescape", newline="")
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow(["name", *range(rows.shape[1])])
    for name, row in zip(names, rows, strict=True):
        lines.writerow([name, *(f"{number:.{digits}g}" for number in row)])
    text.detach()  # flushes, and leaves the file open
