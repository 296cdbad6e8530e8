"""Whatever ends a run ends all its processes, within seconds and with the right exit code."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from runs import ROOT, environment, write_digits

import rkdo.embed
from rkdo import ranks
from rkdo.batches import Batches, evaluation_loader, training_loader
from rkdo.config import TrainConfig
from rkdo.data import load_data
from rkdo.errors import ProcessLost, Stopped, UserError
from rkdo.images import find_images, unreadable
from rkdo.interrupt import listening
from rkdo.pretrained import Transform
from rkdo.record import Run
from rkdo.workers import Loader, workers_watched

QUICK = ROOT / "tests" / "quick_rkdo.py"
SETTINGS = [
    "--dataset", "folder", "--image-size", "32", "--batch-size", "16", "--epochs", "2000",
    "--device", "cpu", "--workers", "1",
]  # fmt: skip


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ends")
    write_digits(folder, n_train=64, n_test=20)
    return folder


def start(folder, images, ranks=1):
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    return subprocess.Popen(
        [
            sys.executable, *(command if ranks > 1 else []), str(QUICK), "train", "--out",
            str(folder), "--data-dir", str(images), *SETTINGS,
        ],
        env=environment(OMP_NUM_THREADS="1"), stderr=subprocess.PIPE, stdout=subprocess.PIPE,
        text=True, start_new_session=True,
    )  # fmt: skip


def session_of(process):
    """The processes that were started by `process`, by whomever, and have not ended."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            state, _, _, session = (entry / "stat").read_text().rpartition(") ")[2].split()[:4]
        except (OSError, ValueError):
            continue
        if int(session) == process.pid and state not in "ZX":
            found.append(int(entry.name))
    return found


def assert_all_end(process, seconds=20):
    until = time.monotonic() + seconds
    try:
        while left := session_of(process):
            assert time.monotonic() < until, f"{left} had not ended"
            time.sleep(0.05)
    finally:
        for pid in session_of(process):
            os.kill(pid, signal.SIGKILL)
    return process.communicate()


def until_training(process, folder):
    metrics = folder / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_bytes().count(b"\n") > 2):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


@pytest.mark.parametrize("ranks", [1, 2])
def test_an_unreadable_image_ends_every_process_and_is_said_once(ranks, images, tmp_path):
    """On two ranks one of them alone meets it, and the other waits for it in a collective."""
    broken = tmp_path / "data"
    subprocess.run(["cp", "-r", str(images), str(broken)], check=True)
    victim = sorted((broken / "train").rglob("*.png"))[5]
    process = start(tmp_path / "run", broken, ranks)
    until_training(process, tmp_path / "run")
    victim.write_bytes(victim.read_bytes()[:80])  # it was whole when the run began
    _, err = assert_all_end(process, 60)
    assert process.returncode == (2 if ranks == 1 else 1), err  # torchrun's is 1, whatever ours
    said = [line for line in err.splitlines() if str(victim) in line]
    assert len(said) == 1, err
    wanted = r"rkdo: error: (rank 1: )?\S+ is not a readable image: [^:]*: put it back, [^:]*$"
    assert re.search(wanted, said[0])
    assert not re.search(r'File ".*/rkdo/\w+\.py"', err), err  # torchrun shows one of its own


def test_a_run_whose_torchrun_is_killed_is_saved_and_ends(images, tmp_path):
    process = start(tmp_path / "run", images, ranks=2)
    until_training(process, tmp_path / "run")
    process.kill()
    _, err = assert_all_end(process)
    assert "rkdo: stopped after step" in err
    saved = Run(tmp_path / "run").load_checkpoint()
    assert f"stopped after step {saved['step']};" in err


def test_signals_to_the_whole_group_leave_the_workers_to_the_run(images, tmp_path):
    """As a terminal's Ctrl-C and a cluster's SIGTERM: the step is finished, the run saved."""
    process = start(tmp_path / "run", images)
    until_training(process, tmp_path / "run")
    os.killpg(process.pid, signal.SIGTERM)
    os.killpg(process.pid, signal.SIGINT)
    _, err = assert_all_end(process)
    assert process.returncode in (128 + signal.SIGTERM, 128 + signal.SIGINT)
    assert "rkdo: stopped after step" in err.splitlines()[-1]
    assert Run(tmp_path / "run").load_checkpoint()["step"] > 0


def test_kills_and_full_disks():
    """A few of what CONTRIBUTING's long command does hundreds of times."""
    done = subprocess.run(
        [
            sys.executable, str(ROOT / "tests" / "kills.py"), "--kills", "3", "--processes", "2",
            "--workers", "1", "--disk-full", "1",
        ],
        env=environment(), capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 kills in" in done.stdout
    assert "1 full disks" in done.stdout


# --- what a worker's end is called ----------------------------------------------------------------


class Deadly:
    """Images of which one is the end of the worker that prepares it."""

    def __len__(self):
        return 8

    def __getitem__(self, index):
        if index == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return index


def test_a_worker_that_was_killed_is_one_line():
    with pytest.raises(ProcessLost, match="has ended") as caught, workers_watched():
        list(Loader(Deadly(), num_workers=1))
    assert "\n" not in str(caught.value)


def full(*_, **__):
    raise RuntimeError("unable to write to file </torch_1_2_3>: No space left on device (28)")


@pytest.mark.parametrize("loader", ["training", "evaluation", "embed"])
def test_a_worker_without_shared_memory_is_one_line(loader, images, tmp_path, monkeypatch):
    """Not a thread's traceback in the worker, whose batch then never comes."""
    monkeypatch.setattr(torch.Tensor, "share_memory_", full)
    monkeypatch.setattr(torch.UntypedStorage, "_new_shared", full)  # of batches that are stacked
    config = TrainConfig(dataset="folder", data_dir=str(images), image_size=32, workers=1)
    data, cpu = load_data(config), torch.device("cpu")
    monkeypatch.setattr(rkdo.embed, "load_encoder", lambda *_, **__: Nothing(config))
    take = {
        "training": lambda: next(
            iter(training_loader(data.train, config, Batches(8, 4, 2, 1, 0), cpu))
        ),
        "evaluation": lambda: next(iter(evaluation_loader(data.test, config, cpu))),
        "embed": lambda: rkdo.embed.embed(tmp_path, images / "test", tmp_path / "x.npy", workers=1),
    }[loader]
    with pytest.raises(UserError, match="--workers needs more shared memory"), workers_watched():
        take()


class Nothing(torch.nn.Linear):
    """An encoder that is not asked."""

    def __init__(self, config):
        super().__init__(1, 1)
        self.width, self.transform = 1, Transform(config.size)


@pytest.mark.parametrize(
    ("raised", "kind", "said"),
    [
        (UserError("Caught UserError in DataLoader worker process 0.\nTraceback\n"
                   "rkdo.errors.UserError: a.png is none\n"), UserError, "^a.png is none$"),
        (RuntimeError("Caught RuntimeError in DataLoader worker process 0.\nTraceback\n"
                      "RuntimeError: unable to write to file </torch_1_2_3>: No space left"),
         UserError, "--workers needs more shared memory"),
        (RuntimeError("Caught RuntimeError in DataLoader worker process 0.\nshapes"),
         RuntimeError, "shapes"),
    ],
    ids=["user", "shared memory", "other"],
)  # fmt: skip
def test_errors_out_of_workers(raised, kind, said):
    with pytest.raises(kind, match=said), workers_watched():
        raise raised


# --- a signal in the middle of something ----------------------------------------------------------


def look_at(images):
    unreadable(find_images(images / "test"))


def start_watch(_):
    ranks._end_with_parent()


@pytest.mark.parametrize("starts", [look_at, start_watch])
def test_a_signal_while_threads_start_is_heard_after(starts, images, monkeypatch):
    """Raised in the middle of `Thread.start` it left a thread that ended in a traceback."""
    name = next(x for x in ("_start_joinable_thread", "_start_new_thread") if hasattr(threading, x))
    start, ignored = getattr(threading, name), []

    def start_and_signal(*given, **more):
        result = start(*given, **more)
        os.kill(os.getpid(), signal.SIGTERM)
        return result

    monkeypatch.setattr(sys, "unraisablehook", ignored.append)
    monkeypatch.setattr(ranks.os, "getppid", lambda: 1)
    monkeypatch.setattr(ranks, "POLL", 3600)
    monkeypatch.setattr(threading, name, start_and_signal)
    with listening(), pytest.raises(Stopped):
        starts(images)
    assert ignored == []
