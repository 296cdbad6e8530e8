"""The run folder: what is in it, and how it is written so that no moment leaves it broken.

config.json            settings, versions, commit; what makes a folder a run
skipped.json           unreadable images that it does without, if there are any
metrics.jsonl          a line per step and per evaluation
metrics.csv            the same, and events.out.tfevents.* for TensorBoard, if asked for
checkpoint.pt          everything needed to go on
curves.png             loss and metrics over the steps
field.png              the response field, if the run has one and it was asked for
encoder.safetensors    the trained backbone
evaluation.json        what `rkdo evaluate` found; evaluation-paper.json by the paper's protocol
traceback.txt          where rkdo itself failed, if it did
.lock                  who is training into the folder (rkdo/lock.py)
"""

import json
import os
import platform
import struct
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from rkdo import checkpoint, unexpected
from rkdo.augment import VIEWS
from rkdo.config import TrainConfig
from rkdo.data import Skipped
from rkdo.errors import UserError
from rkdo.files import (
    append,
    parse_json,
    partial_of,
    require_room,
    write_atomically,
    write_json,
    writing,
)
from rkdo.lock import NAME as LOCK
from rkdo.lock import FolderLock
from rkdo.logs import CSV, Log, remove_events

PACKAGES = ("rkdo-kernels", "torch", "torchvision", "triton", "numpy", "scikit-learn")
OURS = (  # in the order in which --overwrite removes them
    "checkpoint.pt",
    "skipped.json",
    "metrics.jsonl",
    CSV,
    "curves.png",
    "field.png",
    "encoder.safetensors",
    "evaluation.json",
    "evaluation-paper.json",
    unexpected.NAME,
)


class Run:
    """One run's folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.checkpoint = folder / "checkpoint.pt"
        self.metrics = folder / "metrics.jsonl"
        self.skipped = folder / "skipped.json"
        self.curves = folder / "curves.png"
        self.field = folder / "field.png"
        self.encoder = folder / "encoder.safetensors"
        self._lock = FolderLock(folder)
        self._logs: list[Log] = []
        self._lines: int | None = None  # file descriptor: a buffer would be written when closing

    def claim(self, wait: bool) -> None:
        """Keep other processes from training into the folder until `close`, if it exists yet.

        Raises:
            UserError: another process holds it (and `wait` is not given).
        """
        if self.folder.is_dir():
            self._lock.acquire(wait=wait)

    def check_new(self, overwrite: bool) -> None:
        """That a new run may be written here; changes nothing."""
        if self.folder.exists() and not self.folder.is_dir():
            raise UserError(f"--out must be a folder, {self.folder} is a file")
        if overwrite or not self.folder.exists():
            return
        if (self.folder / "config.json").exists():
            raise UserError(
                f"--out {self.folder} already holds a run: pass --resume to go on with it or "
                "--overwrite to replace it"
            )
        ours = (LOCK, *map(".{}.partial".format, (*OURS, "config.json")))
        if any(entry.name not in ours for entry in self.folder.iterdir()):
            raise UserError(
                f"--out {self.folder} is not empty: name another folder, or pass --overwrite "
                "to write into it"
            )

    def create(
        self,
        config: TrainConfig,
        skipped: Skipped = Skipped(),  # noqa: B008
        *,
        overwrite: bool = False,
        wait: bool = False,
    ) -> None:
        """Begin a new run: from here on the folder can be resumed."""
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        self.claim(wait)
        self.check_new(overwrite)  # another process may have been here first
        with writing(self.folder):
            for name in OURS:
                (self.folder / name).unlink(missing_ok=True)
            remove_events(self.folder)
        self.remove_partial()
        if skipped != Skipped():
            with writing(self.skipped):
                write_json(self.skipped, asdict(skipped))
        self.write_config(config)

    def remove_partial(self) -> None:
        """Remove what a process that was killed had not finished writing."""
        with writing(self.folder):
            for name in (*OURS, "config.json"):
                partial_of(self.folder / name).unlink(missing_ok=True)

    def require_room(self, size: int, overwrite: bool) -> None:
        """That two checkpoints of `size` bytes fit on the disk (the old one is kept until the new
        one has been read back), before time is spent on training."""
        files = [self.folder / name for name in OURS] if overwrite else []
        freed = sum(file.stat().st_size for file in files if file.is_file())
        require_room(self.folder, 2 * size, freed, "two checkpoints, the last and the next")

    def write_config(self, config: TrainConfig) -> None:
        values = {
            "config": config.to_dict(), "views": VIEWS, "versions": versions(), "commit": commit(),
        }  # fmt: skip
        path = self.folder / "config.json"
        with writing(path):
            write_json(path, values)

    def read_config(self) -> TrainConfig:
        config = self._read_record().get("config")
        return TrainConfig.from_dict(config, str(self.folder / "config.json"))

    def _read_record(self) -> dict[str, Any]:
        path = self.folder / "config.json"
        try:
            text = path.read_bytes()
        except FileNotFoundError:
            raise UserError(f"{self.folder} holds no run: no {path}") from None
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}") from error
        values = parse_json(text, path)
        return values if isinstance(values, dict) else {}

    def check_views(self) -> None:
        """That this rkdo draws the random views that the run began with."""
        if self._read_record().get("views") != VIEWS:
            raise UserError(
                f"{self.folder} began with the random views of another version of rkdo: resume it "
                "with that one, or start another run"
            )

    def read_skipped(self) -> Skipped:
        """The images that the run does without.

        Raises:
            UserError: the file that says so is not what `create` writes.
        """
        try:
            values = parse_json(self.skipped.read_bytes(), self.skipped)
        except FileNotFoundError:
            return Skipped()
        except OSError as error:
            raise UserError(f"{self.skipped} cannot be read: {error.strerror}") from error
        names = set(asdict(Skipped()))
        if not (
            isinstance(values, dict)
            and set(values) == names
            and all(isinstance(x, list) and all(type(y) is str for y in x) for x in values.values())
        ):
            raise UserError(f"{self.skipped} must hold lists {' and '.join(sorted(names))}")
        return Skipped(**{name: tuple(listed) for name, listed in values.items()})

    def open_metrics(self, size: int, logs: Sequence[Log] = ()) -> None:
        """Go on writing metrics after the first `size` bytes, which the checkpoint vouches for;
        `logs` follow.

        Raises:
            UserError: the file is shorter than that, or not what `write_metrics` writes.
        """
        if size:
            self._check_metrics(size)
        with writing(self.metrics):
            self._lines = os.open(self.metrics, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
            os.ftruncate(self._lines, size)
            (self.folder / CSV).unlink(missing_ok=True)  # not to disagree if it is not in `logs`
        for log in logs:
            self._logs.append(log)
            log.begin()

    def _check_metrics(self, size: int) -> None:
        found = self._metrics_bytes()[:size]
        if len(found) < size:
            raise UserError(
                f"{self.metrics} must hold the {size} bytes of metrics up to the checkpoint, "
                f"got {len(found)}"
            )
        for line in found.splitlines():
            self._parse_line(line)

    def _metrics_bytes(self) -> bytes:
        try:
            return self.metrics.read_bytes()
        except FileNotFoundError:
            return b""
        except OSError as error:
            raise UserError(f"{self.metrics} cannot be read: {error.strerror}") from error

    def _parse_line(self, line: bytes) -> dict[str, Any]:
        values = parse_json(line, self.metrics, "holds a line that is")
        if not (
            isinstance(values, dict)
            and {"step", "epoch"} <= values.keys()
            and all(type(value) in (int, float) for value in values.values())
        ):
            shown = line[:40].decode(errors="replace")
            raise UserError(f"{self.metrics} holds a line that is not a step's metrics: {shown}")
        return values

    def write_metrics(self, values: Mapping[str, Any]) -> None:
        """Append a line: all of it, or on an error nothing."""
        assert self._lines is not None
        line = json.dumps(values).encode() + b"\n"
        with writing(self.metrics):
            append(self._lines, line)
        for log in self._logs:
            log.add(values)

    def sync_metrics(self) -> int:
        """Put the metrics on the disk; their size in bytes."""
        assert self._lines is not None
        with writing(self.metrics):
            os.fsync(self._lines)
        for log in self._logs:
            log.sync()
        return os.fstat(self._lines).st_size

    def close(self) -> None:
        """End writing, and let others write."""
        for log in self._logs:
            log.close()
        self._logs = []
        if self._lines is not None:
            os.close(self._lines)
            self._lines = None
        self._lock.release()

    def read_metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl; none if there is no such file.

        Raises:
            UserError: a line is not one that `write_metrics` writes.
        """
        return [self._parse_line(line) for line in self._metrics_bytes().splitlines()]

    def save_checkpoint(self, values: Mapping[str, Any]) -> None:
        checkpoint.save(self.checkpoint, values)

    def load_checkpoint(self) -> dict[str, Any] | None:
        """The last checkpoint, or None if the run has not come to its first.

        Raises:
            UserError: the file is damaged, or something else's.
        """
        return checkpoint.load(self.checkpoint)

    def save_encoder(self, backbone: Mapping[str, Tensor], about: Mapping[str, str]) -> None:
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in backbone.items()}
        content = _in_order(safetensors.torch.save(tensors, metadata=dict(about)))
        with writing(self.encoder):
            write_atomically(self.encoder, lambda file: file.write(content))


def _in_order(content: bytes) -> bytes:
    """A safetensors file with its header sorted: as written, its metadata's order is random."""
    start = 8 + struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8:start])
    text = json.dumps(header, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # the tensors stay aligned
    return struct.pack("<Q", len(text)) + text + content[start:]


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str | None:
    """The commit this package was checked out at, with -dirty if changed; None if it was not."""
    here = Path(__file__).resolve().parent
    git = ["git", "-C", str(here)]
    try:
        subprocess.run(
            [*git, "ls-files", "--error-unmatch", __file__],
            check=True,
            capture_output=True,
            timeout=10,
        )
        described = subprocess.run(
            [*git, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            check=True,
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return described.stdout.strip()
