"""Files that are written whole or not at all, and read without surprises."""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from rkdo.errors import UserError


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """What the system says against writing `path` is one line for whoever runs the command."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from error


def write_atomically(
    path: Path,
    write: Callable[[IO[bytes]], object],
    check: Callable[[Path], object] | None = None,
) -> None:
    """`path` holds what it held or all that `write` writes, whenever the machine stops.

    `check` is given the new file before it takes the old one's place, and raises if it is not as
    it was meant. An error leaves the old file and removes the new one.
    """
    partial = partial_of(path)
    try:
        with partial.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        if check is not None:
            check(partial)
        os.replace(partial, path)
    except BaseException:
        with suppress(OSError):
            partial.unlink()
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def append(file: int, content: bytes) -> None:
    """Append all of `content` to an open file, or on an error nothing."""
    size = os.fstat(file).st_size
    try:
        written = 0
        while written < len(content):
            written += os.write(file, content[written:])
    except OSError:
        os.ftruncate(file, size)
        raise


def partial_of(path: Path) -> Path:
    """Where `path` is written before it takes its place."""
    return path.with_name(f".{path.name}.partial")


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    text = json.dumps(values, indent=2) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))


def parse_json(text: bytes, source: Path, what: str = "") -> Any:
    """The JSON in `text`, which was read from `source`.

    Raises:
        UserError: it is not JSON, or nested deeper than anything that was written here.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise UserError(
            f"{source} {what or 'is'} not JSON of rkdo: it is nested too deeply"
        ) from None
    except ValueError as error:
        raise UserError(f"{source} {what or 'is'} not JSON: {error}") from error


def require_room(folder: Path, size: int, freed: int = 0, what: str = "a checkpoint") -> None:
    """That `size` bytes more, for `what`, fit where `folder` is or will be, once `freed` have been
    removed.

    Raises:
        UserError: they do not. A quota is not seen: it shows when writing.
    """
    there = folder.absolute()
    while not there.exists():
        there = there.parent
    free = shutil.disk_usage(there).free + freed
    if free < size:
        raise UserError(
            f"{folder} needs {size / 1e6:.1f} MB for {what}, and its disk has "
            f"{free / 1e6:.1f} MB left: no space left on device"
        )
