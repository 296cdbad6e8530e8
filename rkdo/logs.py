"""A run's metrics in the forms that other programs read.

Both are made from metrics.jsonl, and nothing else reads them back: a run that goes on makes the
first anew and tells TensorBoard to forget what came after the checkpoint.
"""

import csv
import io
import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from rkdo.config import TrainConfig
from rkdo.errors import UserError
from rkdo.files import append, write_atomically, writing

CSV = "metrics.csv"
EVENTS = "events.out.tfevents.*"
BESIDE = ("step", "epoch")  # of every line, and no metrics

Line = Mapping[str, Any]
Lines = Callable[[], list[dict[str, Any]]]


class Log(Protocol):
    """What follows metrics.jsonl while a run writes it."""

    def begin(self) -> None:
        """Hold what metrics.jsonl holds."""

    def add(self, values: Line) -> None:
        """Take a line that metrics.jsonl has taken."""

    def sync(self) -> None:
        """Put everything so far where a crash leaves it."""

    def close(self) -> None: ...


def make_logs(config: TrainConfig, folder: Path, lines: Lines) -> list[Log]:
    """The logs that the run in `folder`, whose metrics `lines` reads, is asked for.

    Raises:
        UserError: the library that one needs is not installed.
    """
    logs: list[Log] = []
    if config.tensorboard:
        logs.append(TensorBoardLog(folder, lines))
    if config.csv:
        logs.append(CsvLog(folder / CSV, lines))
    return logs


def remove_events(folder: Path) -> None:
    for path in folder.glob(EVENTS):
        path.unlink(missing_ok=True)


class CsvLog:
    """A row for every line of metrics.jsonl, a column for every metric, empty where a line lacks
    it."""

    def __init__(self, path: Path, lines: Lines) -> None:
        self.path, self.lines = path, lines
        self.columns: dict[str, None] = {}  # in the order in which they came
        self.file: int | None = None

    def begin(self) -> None:
        self.close()
        lines = self.lines()
        self.columns = dict.fromkeys((*BESIDE, *(name for line in lines for name in line)))
        content = self._rows([dict(zip(self.columns, self.columns, strict=True)), *lines])
        with writing(self.path):
            write_atomically(self.path, lambda file: file.write(content))
            self.file = os.open(self.path, os.O_WRONLY | os.O_APPEND)

    def add(self, values: Line) -> None:
        if not values.keys() <= self.columns.keys():
            self.begin()  # the line is among those of metrics.jsonl
            return
        assert self.file is not None
        with writing(self.path):
            append(self.file, self._rows([values]))

    def sync(self) -> None:
        pass  # it is made anew when the run goes on

    def close(self) -> None:
        if self.file is not None:
            os.close(self.file)
            self.file = None

    def _rows(self, lines: Iterable[Line]) -> bytes:
        text = io.StringIO()
        rows = csv.DictWriter(text, self.columns, lineterminator="\n")
        rows.writerows(lines)
        return text.getvalue().encode()


class TensorBoardLog:
    """Events in the run's folder: train/* for steps, evaluation/* for evaluations."""

    def __init__(self, folder: Path, lines: Lines) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise UserError(
                "--tensorboard needs the package tensorboard, which is not installed: it comes "
                f"with rkdo-kernels[tensorboard] ({' '.join(str(error).split())})"
            ) from error
        self.folder, self.lines = folder, lines
        self.make = SummaryWriter
        self.writer: Any = None

    def begin(self) -> None:
        lines = self.lines()
        known = any(self.folder.glob(EVENTS))
        after = lines[-1]["step"] + 1 if lines else 0
        with writing(self.folder):
            self.writer = self.make(str(self.folder), purge_step=after if known else None)
        for line in [] if known else lines:  # of a run that began without
            self.add(line)

    def add(self, values: Line) -> None:
        kind = "train" if "loss" in values else "evaluation"
        with writing(self.folder):
            for name, value in values.items():
                if name not in BESIDE:
                    self.writer.add_scalar(f"{kind}/{name}", value, values["step"])

    def sync(self) -> None:
        with writing(self.folder):
            self.writer.flush()

    def close(self) -> None:
        if self.writer is not None:
            with suppress(OSError):  # of a full disk, which `sync` has told
                self.writer.close()
            self.writer = None
