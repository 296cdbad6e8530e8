"""No kernel touches memory outside its tensors, nor loses offsets past 2³¹ elements.

Every tensor that a kernel sees ends (or begins) exactly at a page that may not be touched: to touch
it kills the process. The work is in memory_guard.py, which runs as processes of its own.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available() or not sys.platform.startswith("linux"),
    reason="page protection guards CPU tensors under the interpreter, on Linux",
)


def run(*what):
    script = Path(__file__).parent / "memory_guard.py"
    checkout = str(script.parent.parent)  # where nothing needs to be installed
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": checkout}
    return subprocess.run(
        [sys.executable, str(script), *what], env=environment, capture_output=True, text=True
    )


@pytest.mark.parametrize(("side", "dtype"), [("end", "float32"), ("start", "bfloat16")])
def test_no_kernel_touches_what_lies_beyond_its_tensors(side, dtype):
    process = run("all", side)
    assert process.returncode == 0, (process.returncode, process.stdout[-500:], process.stderr)
    assert f"recursion_backward (33, 65, 70) {dtype}" in process.stdout


@pytest.mark.parametrize("what", ["read", "write"])
@pytest.mark.parametrize("side", ["end", "start"])
def test_the_guard_kills(what, side):
    assert run(what, side).returncode == -signal.SIGSEGV


def test_offsets_past_2_to_the_31():
    process = run("far")
    assert process.returncode == 0, (process.returncode, process.stdout[-500:], process.stderr)
