"""A checkpoint's file: what torch.save writes, sealed by a checksum of every byte.

The seal is the comment of the zip archive that torch.save writes: `torch.load` and every zip tool
read past it. What was written is read back before it takes the last checkpoint's place.
"""

import hashlib
import os
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from rkdo.errors import UserError
from rkdo.files import require_room, write_atomically, writing

FORMAT = "rkdo-checkpoint"
VERSION = 3
UNSEALED = 2  # the version before checksums, which is read as well
MARK = b"rkdo-sha256 "
SEAL = len(MARK) + 64
CHUNK = 1 << 24


def save(path: Path, values: Mapping[str, Any]) -> None:
    """Replace the checkpoint in `path`.

    Raises:
        UserError: there is no room for it, or it could not be written; the last one is still there.
    """
    tagged = {"format": FORMAT, "version": VERSION, **values}
    require_room(path.parent, size_of(tagged))
    with writing(path):
        write_atomically(path, lambda file: _write(tagged, file), _read_back)


def load(path: Path) -> dict[str, Any] | None:
    """The checkpoint in `path`, or None if there is none.

    Its tensors stay in the file until they are read: a field may be as large as the memory.

    Raises:
        UserError: the file is damaged, or something else's.
    """
    try:
        seal, digest = _sealed(path)
        if seal is not None and seal != digest:
            raise UserError(f"{path} is damaged: its bytes do not have the checksum it was given")
        values = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError:
        return None
    except (
        OSError, RuntimeError, ValueError, EOFError, LookupError, AttributeError, TypeError,
        ArithmeticError, pickle.PickleError,
    ) as error:  # fmt: skip
        raise UserError(f"{path} is damaged or not a checkpoint of rkdo") from error
    tag = values.get("format") if isinstance(values, dict) else None
    if not isinstance(tag, str) or tag != FORMAT:
        raise UserError(f"{path} is not a checkpoint of rkdo")
    version = values.get("version")
    if type(version) is not int or version not in (VERSION, UNSEALED):
        shown = version if isinstance(version, int | str) else f"a {type(version).__name__}"
        raise UserError(f"{path} has version {shown}, this rkdo reads version {VERSION}")
    if version == VERSION and seal is None:
        raise UserError(f"{path} is damaged: it has no checksum")
    return values


def size_of(values: Any) -> int:
    """Bytes that a checkpoint of `values` takes at most, less what no disk is that full for."""
    storages: dict[int, int] = {}
    count = _add_storages(values, storages)
    return sum(storages.values()) + 512 * count + 65_536


def _add_storages(values: Any, storages: dict[int, int]) -> int:
    if isinstance(values, Tensor):
        held = values.untyped_storage()
        storages[held.data_ptr() or id(values)] = held.nbytes()
        return 1
    if isinstance(values, Mapping):
        values = list(values.values())
    if isinstance(values, list | tuple):
        return sum(_add_storages(value, storages) for value in values)
    return 0


def _write(values: Mapping[str, Any], file: IO[bytes]) -> None:
    sink = _Sink(file)
    try:
        torch.save(values, sink)  # type: ignore[arg-type]  # it only writes
    except RuntimeError:
        if sink.error is not None:  # which torch.save replaces by one about its positions
            raise sink.error from None
        raise
    sink.seal()


class _Sink:
    """A file that keeps a checksum, and the two bytes back that say how long the comment is."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.held = b""
        self.hash = hashlib.sha256()
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        given = memoryview(data).cast("B")
        if len(given) < 2:
            joined = self.held + bytes(given)
            self._put(joined[:-2])
            self.held = joined[-2:]
        else:
            self._put(self.held)
            self._put(given[:-2])
            self.held = bytes(given[-2:])
        return len(given)

    def flush(self) -> None:
        pass

    def seal(self) -> None:
        assert self.held == b"\0\0", "an archive with a comment"
        self._put(SEAL.to_bytes(2, "little"))
        self.file.write(MARK + self.hash.hexdigest().encode())

    def _put(self, data: Any) -> None:
        try:
            self.file.write(data)
        except OSError as error:
            self.error = error
            raise
        self.hash.update(data)


def _read_back(path: Path) -> None:
    seal, digest = _sealed(path, from_disk=True)
    if seal is None or seal != digest:
        raise OSError("what was read back is not what was written")


def _sealed(path: Path, from_disk: bool = False) -> tuple[str | None, str]:
    """The checksum that the file was sealed with, and the one that it has.

    `from_disk`: not from the memory that it was written to, where the system can do that.
    """
    digest = hashlib.sha256()
    with path.open("rb") as file:
        if from_disk and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        left = os.fstat(file.fileno()).st_size - SEAL
        while left > 0 and (chunk := file.read(min(left, CHUNK))):
            digest.update(chunk)
            left -= len(chunk)
        seal = re.fullmatch(re.escape(MARK) + b"([0-9a-f]{64})", file.read())
    return seal and seal[1].decode(), digest.hexdigest()
