"""Ends runs at random moments, lets them go on, and compares them with runs that nothing ended.

    python tests/kills.py --kills 300 --processes 1,2,3 --workers 2   # ranks and workers
    python tests/kills.py --disk-full 50 --workers 2                 # the disk fills up

After each kill every process must be gone within seconds, with exit code 1 and no traceback; after
each full disk with exit code 2, nothing half-written and the last checkpoint whole. A run that has
come to its end, in however many pieces, must have the checkpoint, the metrics and the encoder file
of one that came there in one, bit for bit. Each start is a fork of this process, which has
imported everything already and does what torchrun does for the ranks. Linux only.
"""

import argparse
import atexit
import contextlib
import faulthandler
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from pathlib import Path

import pytest
import torch
from runs import METRICS, assert_same, metrics_of, quicken, state_of, write_digits

import rkdo.train
from rkdo.__main__ import main as rkdo_main
from rkdo.batches import evaluation_loader
from rkdo.record import Run

LIMIT = 20.0  # seconds in which everything must have ended
PAGE = 4096


class Started:
    """The processes of one run, in a process group of their own."""

    def __init__(self, folder, log, arguments, size=1, file_limit=None):
        self.log = log
        log.write_text("")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.ranks, self.ended = [], {}
        for rank in range(size):
            pid = os.fork()
            if pid == 0:
                try:
                    _become(rank, size, port, self.ranks[0] if rank else 0, log, file_limit)
                    _end(rkdo_main(["train", "--out", str(folder), *arguments]))
                except BaseException:
                    traceback.print_exc()
                finally:
                    os._exit(99)
            self.ranks.append(pid)
        self.group = self.ranks[0]

    def alive(self):
        """Of its processes, (pid, whether it is a rank), but for those that have ended."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    state, _, group = (entry / "stat").read_text().rpartition(") ")[2].split()[:3]
                except (OSError, ValueError):  # it has ended by now
                    continue
                pid = int(entry.name)
                if (int(group) == self.group or pid in self.ranks) and state not in "ZX":
                    found.append((pid, pid in self.ranks))
        return found

    def codes(self, patience=0.0):
        """The ranks' exit codes, once every process has ended, workers too.

        The first rank that has ended badly ends the others by SIGTERM, as torchrun does, after
        `patience` seconds in which they may find out by themselves.
        """
        until = time.monotonic() + LIMIT
        told = False
        while left := self.alive():
            if not told and time.monotonic() > until - LIMIT + patience and self._failed():
                told = True
                for pid, is_rank in left:
                    if is_rank:
                        self.send(pid, signal.SIGTERM)
            if time.monotonic() > until:
                for number in (signal.SIGUSR1, signal.SIGKILL):  # where are they?
                    for pid, is_rank in left:
                        if is_rank or number == signal.SIGKILL:
                            self.send(pid, number)
                    time.sleep(1)
                raise AssertionError(f"{left} had not ended:\n{self.log.read_text()}")
            time.sleep(0.01)
        codes = [os.waitstatus_to_exitcode(self._status(pid)) for pid in self.ranks]
        said = self.log.read_text()
        assert "Traceback" not in said, said
        assert "itself failed" not in said, said
        return codes

    def send(self, pid, number):
        with contextlib.suppress(ProcessLookupError):  # it has just ended
            os.kill(pid, number)

    def _failed(self):
        for pid in self.ranks:
            if pid not in self.ended:
                found, status = os.waitpid(pid, os.WNOHANG)
                if found:
                    self.ended[pid] = status
        return any(self.ended.values())

    def _status(self, pid):
        return self.ended[pid] if pid in self.ended else os.waitpid(pid, 0)[1]


def _become(rank, size, port, group, log, file_limit):
    os.setpgid(0, group)
    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    faulthandler.register(signal.SIGUSR1)
    if file_limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
    if size > 1:
        os.environ.update(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port), TORCHELASTIC_RUN_ID="kills",
        )  # fmt: skip


def _end(code):
    """As an interpreter ends, without the rest of this program."""
    threading._shutdown()
    atexit._run_exitfuncs()
    os._exit(code)


class Trial:
    """A run that is ended and goes on until it is whole, and the whole run that it must equal."""

    def __init__(self, scratch, size, workers, random):
        self.scratch, self.size, self.random = scratch, size, random
        self.folder = scratch / "run"
        self.settings = [
            "--dataset", "folder", "--data-dir", str(scratch / "data"), "--image-size", "32",
            "--batch-size", "12", "--epochs", "2", "--steps-per-epoch", "5", "--device", "cpu",
            "--checkpoint-every", "2", "--evaluate-every", "1", "--workers", str(workers),
        ]  # fmt: skip
        self.whole = scratch / f"whole-{size}"
        if not self.whole.exists():
            started = time.monotonic()
            codes = self.start(self.whole).codes()
            assert not any(codes), (scratch / "log").read_text()
            (scratch / f"seconds-{size}").write_text(str(time.monotonic() - started))
        self.seconds = float((scratch / f"seconds-{size}").read_text())

    def start(self, folder=None, **limits):
        folder = folder or self.folder
        resume = (folder / "config.json").exists()
        arguments = ["--resume"] if resume else self.settings
        return Started(folder, self.scratch / "log", arguments, self.size, **limits)

    def kill(self):
        """Start it and kill one of its processes; what was killed, or "" if it had ended."""
        running = self.start()
        time.sleep(self.random.uniform(0, self.seconds))
        alive = running.alive()
        is_rank = self.random.random() < 0.5
        victims = [pid for pid, rank in alive if rank is is_rank] or [pid for pid, _ in alive]
        victim = self.random.choice(victims) if victims else None
        if victim is not None:
            running.send(victim, signal.SIGKILL)
        codes = running.codes(self.random.choice((0, LIMIT / 2)))
        stopped = {-signal.SIGTERM, 128 + signal.SIGTERM}  # told to by torchrun
        assert set(codes) <= {0, 1, -signal.SIGKILL, *stopped}, (codes, running.log.read_text())
        if not any(codes):
            self.compare()
        if victim is None:
            return ""
        return "rank" if victim in running.ranks else "worker"

    def finish(self):
        running = self.start()
        codes = running.codes()
        assert not any(codes), (codes, running.log.read_text())
        self.compare()

    def compare(self):
        """That the run is whole and equal; then forget it."""
        assert_same(state_of(self.folder), state_of(self.whole), f"{self.size} processes: ")
        assert metrics_of(self.folder) == metrics_of(self.whole)
        encoders = [f / "encoder.safetensors" for f in (self.folder, self.whole)]
        assert encoders[0].read_bytes() == encoders[1].read_bytes()
        assert {p.name for p in self.folder.iterdir()} == {p.name for p in self.whole.iterdir()}
        shutil.rmtree(self.folder)

    def fill_disk(self, small):
        """Let the disk in `small`, if any, fill up; whether the run came up against it."""
        limits = {}
        if small is None:  # no disk, but no file may be larger
            limits["file_limit"] = self.random.randrange(1, 150_000)
        else:
            self.folder = small / "run"
        running = self.start(**limits)
        if small is not None:
            time.sleep(self.random.uniform(0, self.seconds))
            _leave_free(small, self.random.randrange(0, 40) * PAGE)
        codes = running.codes()
        said = [line for line in running.log.read_text().splitlines() if "rkdo: " in line]
        full = codes[0] == 2
        if full:
            assert len(said) == 1, said
            assert any(text in said[0] for text in ("No space", "no space", "too large")), said
        else:
            assert not any(codes), (codes, said)
        left = {path.name for path in self.folder.iterdir()} if self.folder.exists() else set()
        assert not [name for name in left if name.endswith((".partial", ".lock"))], left
        if self.folder.exists():
            Run(self.folder).load_checkpoint()
        if small is not None:
            (small / "filler").unlink(missing_ok=True)
        if full:
            self.finish()
        else:
            self.compare()
        return full


def _leave_free(folder, size):
    with (folder / "filler").open("wb", buffering=0) as filler:
        try:
            while (free := shutil.disk_usage(folder).free - size) > 0:
                filler.write(bytes(min(free, 1 << 16)))
        except OSError:  # somebody was faster
            pass


def _mounted(folder):
    """A disk of a megabyte, where this process may mount one."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    done = subprocess.run(command, capture_output=True) if shutil.which("mount") else None
    return folder if done is not None and done.returncode == 0 else None


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=0)
    parser.add_argument("--disk-full", type=int, default=0)
    parser.add_argument("--processes", default="1,2,3", help="ranks of the runs, in turn")
    parser.add_argument("--workers", type=int, default=2, help="of each rank")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    sizes = [int(size) for size in given.processes.split(",")]
    rng = random.Random(given.seed)
    torch.set_num_threads(1)
    quicken(pytest.MonkeyPatch())
    rkdo.train.evaluate = lambda encoder, data, config: (  # and its workers may be killed
        len(list(evaluation_loader(data.test, config, torch.device("cpu")))) and dict(METRICS)
    )
    scratch = Path(tempfile.mkdtemp(prefix="rkdo-kills-"))
    small = None
    try:
        write_digits(scratch / "data", n_train=64, n_test=20)
        started, killed, whole = time.monotonic(), Counter(), 0
        while sum(killed.values()) < given.kills:
            size = sizes[sum(killed.values()) % len(sizes)]
            trial = Trial(scratch, size, given.workers, rng)
            while sum(killed.values()) < given.kills:
                what = trial.kill()
                if what:
                    killed[f"{what} of {size}"] += 1
                    sys.stdout.write(f"\r{sum(killed.values())} kills, {whole} whole runs")
                    sys.stdout.flush()
                if not trial.folder.exists():
                    break
            else:
                trial.finish()
            whole += 1
        if given.kills:
            seconds = time.monotonic() - started
            print(f"\r{sum(killed.values())} kills in {seconds:.0f} s: {dict(killed)}")
            print(f"{whole} runs went on to the bits of an unstopped one, all that were begun")

        if given.disk_full:
            small = _mounted(scratch / "small")
        met = Counter()
        for turn in range(10 * given.disk_full):
            if sum(met.values()) == given.disk_full:
                break
            disk = small if turn % 2 else None
            trial = Trial(scratch, 1, given.workers, rng)
            if trial.fill_disk(disk):
                met["a full tmpfs" if disk else "a limit on the size of files"] += 1
        if given.disk_full:
            print(f"{sum(met.values())} full disks: {dict(met)}; each run went on to the same bits")
            assert sum(met.values()) == given.disk_full
    finally:
        if small is not None:
            subprocess.run(["umount", str(small)], check=True)
        shutil.rmtree(scratch)


if __name__ == "__main__":
    main()
