"""Measuring in processes of their own: new ones, deaf to Ctrl-C, gone with their parent."""

import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bench import apart
from bench.gpu import tools

ROOT = Path(__file__).parent.parent


def pids(count):
    yield from [os.getpid()] * count


def killed(count):
    yield from range(count)
    os.kill(os.getpid(), signal.SIGKILL)


def test_every_stream_comes_from_a_new_process():
    first, second = (set(apart.stream(pids, 2)) for _ in range(2))
    assert len(first | second | {os.getpid()}) == 3


def test_a_process_that_dies_is_told_of_after_what_it_sent():
    found = []
    with pytest.raises(apart.Died) as death:
        found.extend(apart.stream(killed, 3))
    assert death.value.killed


def pid_and_wait():
    yield os.getpid()
    time.sleep(600)


def start_and_wait(path):
    for pid in apart.stream(pid_and_wait):
        path.write_text(str(pid))


def test_a_measuring_process_ends_with_its_parent(tmp_path):
    path = tmp_path / "pid"
    parent = multiprocessing.get_context("spawn").Process(target=start_and_wait, args=(path,))
    parent.start()
    wait_for(lambda: path.exists() and path.read_text())
    parent.kill()
    parent.join()
    pid = int(path.read_text())
    wait_for(lambda: ended(pid))


SERVER_AND_CHILD = """
import os
from bench import apart
from bench.gpu import tools
children = "/proc/self/task", os.listdir("/proc/self/task")[0], "children"
for _ in apart.stream(iter, "x"):
    for pid in open(os.path.join(*children)).read().split():
        if "forkserver" in open(f"/proc/{pid}/cmdline").read():
            print(open(f"/proc/{pid}/status").read())
"""


def test_the_server_is_deaf_to_ctrl_c_while_it_starts():
    """Where nothing has started multiprocessing's tracker, which undoes masks."""
    run = [sys.executable, "-c", SERVER_AND_CHILD]
    status = subprocess.run(run, cwd=ROOT, text=True, capture_output=True, check=True).stdout
    (blocked,) = re.findall(r"^SigBlk:\s+(\w+)$", status, re.MULTILINE)
    assert int(blocked, 16) >> (signal.SIGINT - 1) & 1


def run_and_wait(path):
    yield "started"
    tools.run(["sh", "-c", f"echo $$ > {path}; exec sleep 600"], 600)


def test_what_a_process_runs_ends_with_it(tmp_path):
    process, path = apart.Apart(run_and_wait, tmp_path / "pid"), tmp_path / "pid"
    assert process.receive() == "started"
    wait_for(lambda: path.exists() and path.read_text().strip())
    process.close()
    wait_for(lambda: ended(int(path.read_text())))


LOOKS_FOR_A_GPU = """
import torch
def trapped(name):
    def call(*arguments):
        raise SystemExit(f"{name} was called")
    return call
for name in dir(torch._C):
    if name.startswith(("_cuda_", "_accelerator_")):
        setattr(torch._C, name, trapped(name))
import bench.apart
"""


def test_the_server_looks_for_no_gpu():
    """CUDA does not outlive a fork: it would be lost to all measuring processes."""
    run = subprocess.run([sys.executable, "-c", LOOKS_FOR_A_GPU], cwd=ROOT, text=True,
                         capture_output=True)  # fmt: skip
    assert run.returncode == 0, run.stderr


def handler():
    yield signal.getsignal(signal.SIGINT)


def test_measuring_processes_are_deaf_to_ctrl_c():
    assert list(apart.stream(handler)) == [signal.SIG_IGN]


def ended(pid):
    stat = Path(f"/proc/{pid}/stat")
    return not stat.exists() or stat.read_text().split()[2] == "Z"


def wait_for(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)
