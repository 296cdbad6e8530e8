"""The run folder: what is in it, and how it is written so that no moment leaves it broken.

config.json            settings, versions, commit; what makes a folder a run
metrics.jsonl          a line per step and per evaluation
checkpoint.pt          everything needed to go on
curves.png             loss and metrics over the steps
field.png              the response field, if the run has one and it was asked for
encoder.safetensors    the trained backbone
evaluation.json        what `rkdo evaluate` found; evaluation-paper.json by the paper's protocol
"""

import json
import os
import pickle
import platform
import subprocess
from collections.abc import Callable, Mapping
from importlib import metadata
from io import BytesIO
from pathlib import Path
from typing import IO, Any

import safetensors.torch
import torch
from torch import Tensor

from rkdo.config import TrainConfig
from rkdo.errors import UserError

FORMAT = "rkdo-checkpoint"
VERSION = 2
PACKAGES = ("rkdo-kernels", "torch", "torchvision", "triton", "numpy", "scikit-learn")
OURS = (  # in the order in which --overwrite removes them
    "checkpoint.pt",
    "metrics.jsonl",
    "curves.png",
    "field.png",
    "encoder.safetensors",
    "evaluation.json",
    "evaluation-paper.json",
)


def write_atomically(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """`path` holds what it held or all that `write` writes, whenever the machine stops."""
    partial = _partial(path)
    with partial.open("wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial")


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    text = json.dumps(values, indent=2) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))


class Run:
    """One run's folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.checkpoint = folder / "checkpoint.pt"
        self.metrics = folder / "metrics.jsonl"
        self.curves = folder / "curves.png"
        self.field = folder / "field.png"
        self.encoder = folder / "encoder.safetensors"
        self._lines: IO[bytes] | None = None

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
        if any(not entry.name.endswith(".partial") for entry in self.folder.iterdir()):
            raise UserError(
                f"--out {self.folder} is not empty: name another folder, or pass --overwrite "
                "to write into it"
            )

    def create(self, config: TrainConfig) -> None:
        """Begin a new run: from here on the folder can be resumed."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for name in OURS:
                (self.folder / name).unlink(missing_ok=True)
                _partial(self.folder / name).unlink(missing_ok=True)
        except OSError as error:
            raise UserError(f"--out {self.folder} cannot be written: {error.strerror}") from error
        self.write_config(config)

    def write_config(self, config: TrainConfig) -> None:
        values = {"config": config.to_dict(), "versions": versions(), "commit": commit()}
        try:
            write_json(self.folder / "config.json", values)
        except OSError as error:
            raise UserError(f"--out {self.folder} cannot be written: {error.strerror}") from error

    def read_config(self) -> TrainConfig:
        path = self.folder / "config.json"
        try:
            values = json.loads(path.read_bytes())
        except FileNotFoundError:
            raise UserError(f"{self.folder} holds no run: no {path}") from None
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}") from error
        except ValueError as error:
            raise UserError(f"{path} is not JSON: {error}") from error
        config = values.get("config") if isinstance(values, dict) else None
        return TrainConfig.from_dict(config, str(path))

    def open_metrics(self, size: int) -> None:
        """Go on writing metrics after the first `size` bytes, which the checkpoint vouches for.

        Raises:
            UserError: the file is shorter than that, or not what `write_metrics` writes.
        """
        if size:
            self._check_metrics(size)
        self._lines = self.metrics.open("ab")
        self._lines.truncate(size)

    def _check_metrics(self, size: int) -> None:
        found = self.metrics.read_bytes()[:size] if self.metrics.exists() else b""
        if len(found) < size:
            raise UserError(
                f"{self.metrics} must hold the {size} bytes of metrics up to the checkpoint, "
                f"got {len(found)}"
            )
        try:
            for line in found.splitlines():
                json.loads(line)
        except ValueError as error:
            raise UserError(f"{self.metrics} holds a line that is not JSON: {error}") from error

    def write_metrics(self, values: Mapping[str, Any]) -> None:
        assert self._lines is not None
        self._lines.write(json.dumps(values).encode() + b"\n")
        self._lines.flush()

    def sync_metrics(self) -> int:
        """Put the metrics on the disk; their size in bytes."""
        assert self._lines is not None
        os.fsync(self._lines.fileno())
        return self._lines.tell()

    def close(self) -> None:
        if self._lines is not None:
            self._lines.close()

    def read_metrics(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.metrics.read_bytes().splitlines()]

    def save_checkpoint(self, values: Mapping[str, Any]) -> None:
        tagged = {"format": FORMAT, "version": VERSION, **values}
        write_atomically(self.checkpoint, lambda file: torch.save(tagged, file))

    def load_checkpoint(self) -> dict[str, Any] | None:
        """The last checkpoint, or None if the run has not come to its first.

        Its tensors stay in the file until they are read: a field may be as large as the memory.

        Raises:
            UserError: the file is damaged, or something else's.
        """
        path = self.checkpoint
        try:
            values = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except FileNotFoundError:
            return None
        except (OSError, RuntimeError, ValueError, EOFError, KeyError, pickle.PickleError) as error:
            raise UserError(f"{path} is damaged or not a checkpoint of rkdo") from error
        if not isinstance(values, dict) or values.get("format") != FORMAT:
            raise UserError(f"{path} is not a checkpoint of rkdo")
        if values.get("version") != VERSION:
            raise UserError(
                f"{path} has version {values.get('version')}, this rkdo reads version {VERSION}"
            )
        return values

    def save_encoder(self, backbone: Mapping[str, Tensor], about: dict[str, str]) -> None:
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in backbone.items()}
        content = BytesIO(safetensors.torch.save(tensors, metadata=about))
        write_atomically(self.encoder, lambda file: file.write(content.getbuffer()))


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
