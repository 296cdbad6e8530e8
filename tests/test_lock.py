"""One process at a time in a run's folder, whatever ends the one before."""

import errno
import fcntl
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from runs import SHORT, environment

import rkdo.train
from rkdo.__main__ import main
from rkdo.errors import UserError
from rkdo.lock import FolderLock
from rkdo.record import Run
from rkdo.train import train

HOLD = """
import sys, time
from pathlib import Path
from rkdo.lock import FolderLock
lock = FolderLock(Path(sys.argv[1]))
lock.acquire(wait=False)
print("held", flush=True)
sys.stdin.read()
lock.release()
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds `tmp_path`, until its input ends or it is killed."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], env=environment(), text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_the_second_is_told_who_holds_the_folder(holder, tmp_path):
    with pytest.raises(UserError) as caught:
        FolderLock(tmp_path).acquire(wait=False)
    about = re.fullmatch(
        rf"--out {re.escape(str(tmp_path))} is in use by process (\d+) on (\S+) since "
        r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\+00:00: let it end or stop it; --wait waits until it has "
        "ended",
        str(caught.value),
    )
    assert about is not None, caught.value
    assert (int(about[1]), about[2]) == (holder.pid, socket.gethostname())


def test_a_crash_gives_the_folder_back_at_once(holder, tmp_path):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert (tmp_path / ".lock").exists()
    lock = FolderLock(tmp_path)
    lock.acquire(wait=False)
    lock.release()
    assert list(tmp_path.iterdir()) == []


def test_waiting_ends_with_the_holder(holder, tmp_path, capsys):
    started = time.monotonic()
    waiting = subprocess.Popen(
        [sys.executable, "-c", HOLD.replace("wait=False", "wait=True"), str(tmp_path)],
        env=environment(), text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )  # fmt: skip
    assert f"in use by process {holder.pid} on" in waiting.stderr.readline()
    holder.communicate("")
    assert waiting.stdout.readline() == "held\n"
    waiting.communicate("")
    assert time.monotonic() - started < 10
    assert list(tmp_path.iterdir()) == []


def test_a_process_keeps_itself_out_too_and_does_not_lose_the_lock_over_it(tmp_path):
    first, second = FolderLock(tmp_path), FolderLock(tmp_path / "." / "")
    first.acquire(wait=False)
    first.acquire(wait=False)  # it has it
    with pytest.raises(UserError, match=f"in use by this process, {os.getpid()}"):
        second.acquire(wait=False)
    tried = subprocess.run(
        [sys.executable, "-c", HOLD, str(tmp_path)], env=environment(), capture_output=True
    )
    assert b"is in use by process" in tried.stderr
    first.release()
    second.acquire(wait=False)
    second.release()


def test_a_lock_that_was_removed_while_waiting_is_made_anew(tmp_path, monkeypatch):
    """The holder removes its file between this process's opening and locking it."""
    lock, calls = FolderLock(tmp_path), []
    lockf = fcntl.lockf

    def late(file, how):
        calls.append(file)
        if len(calls) == 1:
            (tmp_path / ".lock").unlink()
        lockf(file, how)

    monkeypatch.setattr(fcntl, "lockf", late)
    lock.acquire(wait=False)
    assert len(calls) == 2
    assert (tmp_path / ".lock").exists()
    lock.release()


@pytest.mark.parametrize("content", [b"", b"\xff", b"[]", b"{}", b"[" * 100_000])
def test_a_lock_that_cannot_be_read_is_a_lock(content, holder, tmp_path):
    (tmp_path / ".lock").write_bytes(content)
    with pytest.raises(UserError, match="another process, which has not signed its lock"):
        FolderLock(tmp_path).acquire(wait=False)


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch, capsys):
    def refuse(file, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", refuse)
    lock = FolderLock(tmp_path)
    lock.acquire(wait=False)
    lock.release()
    err = capsys.readouterr().err
    assert "has no locks (No locks available): nothing keeps a second process out" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("how", ["--resume", "--overwrite", "--resume --workers 1"])
def test_a_run_in_use_is_refused_in_one_line_and_left_alone(how, tmp_path, capsys, request):
    run = Run(tmp_path)
    run.create(SHORT)
    run.close()
    holder = request.getfixturevalue("holder")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert main(["train", "--out", str(tmp_path), *how.split()]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"rkdo: error: --out {tmp_path} is in use by process {holder.pid} on")
    assert err.count("\n") == 1
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_folder_that_another_process_took_in_the_meantime_is_refused(tmp_path, monkeypatch):
    """Both found the folder new; the other was faster and has ended."""
    folder = tmp_path / "run"
    build = rkdo.train._build

    def slow(config, data, ranks):
        other = Run(folder)
        other.create(SHORT)
        other.close()
        return build(config, data, ranks)

    monkeypatch.setattr("rkdo.train._build", slow)
    with pytest.raises(UserError, match="already holds a run"):
        train(SHORT, folder)
    assert {path.name for path in folder.iterdir()} == {"config.json"}


def test_locks_are_where_a_folder_can_be_written(tmp_path):
    with pytest.raises(UserError, match="cannot be written: No such file or directory"):
        FolderLock(Path(tmp_path / "none")).acquire(wait=False)
