"""Metrics for other programs: a CSV and TensorBoard's events say what metrics.jsonl says."""

import csv
import json
import os
import signal
import sys
from dataclasses import replace
from types import ModuleType

import pytest
from runs import COMMAND, METRICS, SHORT, quicken, signal_at

from rkdo import logs
from rkdo.__main__ import main
from rkdo.errors import Stopped, UserError
from rkdo.files import append
from rkdo.logs import CSV, EVENTS
from rkdo.record import Run
from rkdo.train import train


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    quicken(monkeypatch)


def rows_of(folder):
    """The rows of metrics.csv as the lines of metrics.jsonl."""
    header, *rows = csv.reader((folder / CSV).open(newline=""))
    return [{name: json.loads(x) for name, x in zip(header, row, strict=True) if x} for row in rows]


def assert_csv_agrees(folder):
    assert rows_of(folder) == Run(folder).read_metrics()


def test_a_csv_holds_every_line(tmp_path):
    folder = tmp_path / "run"
    metrics = train(replace(SHORT, csv=True, recursion="dense", projection=8), folder)
    assert rows_of(folder) == metrics
    header = (folder / CSV).read_text().splitlines()[0].split(",")
    assert header[:2] == ["step", "epoch"]
    assert {*METRICS, "loss", "field_entropy"} <= set(header)


def test_without_the_flags_there_is_neither(tmp_path):
    train(SHORT, tmp_path / "run")
    assert not (tmp_path / "run" / CSV).exists()
    assert not list((tmp_path / "run").glob(EVENTS))


def test_a_csv_is_up_to_date_at_every_moment(tmp_path, monkeypatch):
    write, seen = Run.write_metrics, []

    def write_and_look(run, values):
        write(run, values)
        assert_csv_agrees(run.folder)
        seen.append(values["step"])

    monkeypatch.setattr(Run, "write_metrics", write_and_look)
    train(replace(SHORT, csv=True), tmp_path / "run")
    assert seen == [0, 1, 2, 3, 4, 5, 6, 6]


def test_a_run_that_goes_on_keeps_its_csv_right(tmp_path, monkeypatch):
    folder, config = tmp_path / "run", replace(SHORT, csv=True)
    with monkeypatch.context() as patch:
        signal_at(patch, 3, signal.SIGTERM)
        with pytest.raises(Stopped):
            train(config, folder)
    assert_csv_agrees(folder)
    # killed after the checkpoint: lines that it does not vouch for, half a row, a rewrite cut off
    (folder / "metrics.jsonl").open("a").write('{"step": 4, "epoch": 1.3, "loss": 9.0}\n')
    (folder / CSV).open("a").write("4,1.3,,9")
    (folder / f".{CSV}.partial").write_text("step,")
    train(config, folder, resume=True)
    assert_csv_agrees(folder)
    assert [row["step"] for row in rows_of(folder)] == [0, 1, 2, 3, 4, 5, 6, 6]
    assert not (folder / f".{CSV}.partial").exists()


def test_a_csv_may_be_asked_for_and_given_up_when_resuming(tmp_path):
    folder = tmp_path / "run"
    train(SHORT, folder)
    longer = replace(SHORT, epochs=3, csv=True)
    train(longer, folder, resume=True)
    assert_csv_agrees(folder)
    assert len(rows_of(folder)) == 12
    train(replace(longer, epochs=4, csv=False), folder, resume=True)
    assert not (folder / CSV).exists()  # it would lack an epoch


def test_a_full_disk_in_the_csv_is_one_line_and_no_half_row(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "run"

    def append_or_fail(file, content):
        if content.startswith(b"4,"):
            os.write(file, content[:3])
            os.ftruncate(file, os.fstat(file).st_size - 3)
            raise OSError(28, "No space left on device")
        append(file, content)

    with monkeypatch.context() as patch:
        patch.setattr(logs, "append", append_or_fail)
        assert main(["train", "--out", str(folder), *COMMAND, "--csv"]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said == f"rkdo: error: {folder / CSV} cannot be written: No space left on device"
    assert [row["step"] for row in rows_of(folder)] == [0, 1, 2, 3]
    assert main(["train", "--out", str(folder), "--resume"]) == 0
    assert_csv_agrees(folder)


# ---- TensorBoard ---------------------------------------------------------------------------------


class SummaryWriter:
    """As much of TensorBoard's as is used: its file has a line an event, once it is flushed."""

    count = 0

    def __init__(self, log_dir, purge_step=None):
        SummaryWriter.count += 1
        self.path = f"{log_dir}/events.out.tfevents.{SummaryWriter.count:03}.here"
        self.waiting = [("purge", None, purge_step)]
        open(self.path, "w").close()

    def add_scalar(self, tag, scalar_value, global_step):
        self.waiting.append((tag, scalar_value, global_step))

    def flush(self):
        with open(self.path, "a") as file:
            file.writelines(json.dumps(event) + "\n" for event in self.waiting)
        self.waiting = []

    close = flush


@pytest.fixture
def _tensorboard(monkeypatch):
    module = ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = SummaryWriter
    monkeypatch.setitem(sys.modules, module.__name__, module)


def shown(folder):
    """What TensorBoard shows: the events of all files, less those that a later one purges."""
    events = {}
    for path in sorted(folder.glob(EVENTS)):
        for tag, value, step in map(json.loads, path.read_text().splitlines()):
            if tag == "purge":
                kept = {key: x for key, x in events.items() if step is None or key[1] < step}
                events = kept
            else:
                assert events.setdefault((tag, step), value) == value
    return events


def told(folder):
    """The events that the lines of metrics.jsonl are."""
    return {
        (f"{'train' if 'loss' in line else 'evaluation'}/{name}", line["step"]): value
        for line in Run(folder).read_metrics()
        for name, value in line.items()
        if name not in ("step", "epoch")
    }


@pytest.mark.usefixtures("_tensorboard")
def test_tensorboard_shows_every_number(tmp_path):
    train(replace(SHORT, tensorboard=True), tmp_path / "run")
    events = shown(tmp_path / "run")
    assert events == told(tmp_path / "run")
    assert ("evaluation/knn", 0) in events
    assert ("train/loss", 6) in events


@pytest.mark.usefixtures("_tensorboard")
@pytest.mark.parametrize("saved", [True, False], ids=["from a checkpoint", "from the start"])
def test_a_run_that_was_killed_shows_each_step_once(saved, tmp_path, monkeypatch):
    folder, config = tmp_path / "run", replace(SHORT, tensorboard=True)

    class KilledError(BaseException):
        pass

    write = Run.write_metrics

    def write_and_die(run, values):
        write(run, values)
        if values["step"] == (3 if saved else 1) and "loss" in values:
            raise KilledError

    with monkeypatch.context() as patch:
        patch.setattr(Run, "write_metrics", write_and_die)
        with pytest.raises(KilledError):
            train(config, folder)
    assert Run(folder).checkpoint.exists() == saved
    # what came after the checkpoint has other numbers, as on another machine: they are forgotten
    (events,) = folder.glob(EVENTS)
    after = 2 if saved else 0
    lines = [json.loads(line) for line in events.read_text().splitlines()]
    other = [[tag, -9.0 if (step or 0) > after else value, step] for tag, value, step in lines]
    assert other != lines
    events.write_text("".join(json.dumps(line) + "\n" for line in other))
    train(config, folder, resume=True)
    assert shown(folder) == told(folder)


@pytest.mark.usefixtures("_tensorboard")
def test_the_events_before_a_checkpoint_are_on_the_disk(tmp_path, monkeypatch):
    """A process that is killed loses what waits in memory."""
    save, seen = Run.save_checkpoint, []

    def look_and_save(run, values):
        steps = {step for tag, step in shown(run.folder) if tag == "train/loss"}
        assert steps == set(range(1, values["step"] + 1))
        seen.append(values["step"])
        save(run, values)

    monkeypatch.setattr(Run, "save_checkpoint", look_and_save)
    train(replace(SHORT, tensorboard=True), tmp_path / "run")
    assert seen == [2, 4, 6, 6]


@pytest.mark.usefixtures("_tensorboard")
def test_tensorboard_asked_for_when_resuming_shows_all_that_was(tmp_path):
    folder = tmp_path / "run"
    train(SHORT, folder)
    train(replace(SHORT, epochs=3, tensorboard=True), folder, resume=True)
    assert shown(folder) == told(folder)


@pytest.mark.usefixtures("_tensorboard")
def test_overwriting_removes_events_and_csv(tmp_path):
    folder = tmp_path / "run"
    train(replace(SHORT, tensorboard=True, csv=True), folder)
    train(SHORT, folder, overwrite=True)
    assert not list(folder.glob(EVENTS))
    assert not (folder / CSV).exists()


def test_tensorboard_that_is_not_installed_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    folder = tmp_path / "run"
    assert main(["train", "--out", str(folder), *COMMAND, "--tensorboard"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("rkdo: error: --tensorboard needs the package tensorboard, which is not")
    assert "rkdo-kernels[tensorboard]" in said
    assert said.count("\n") == 1
    assert not folder.exists()
    train(SHORT, folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(UserError, match="needs the package tensorboard"):
        train(replace(SHORT, tensorboard=True), folder, overwrite=True)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
