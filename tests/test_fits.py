"""Launches fit their devices, and the check sees one that does not.

Compiled in another process: here Triton may be its interpreter.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).parent.parent
TOO_MUCH = """
from dataclasses import replace
from bench import fits
from rkdo_kernels import launch_tables
from rkdo_kernels.field_snapshot import Snapshots
from rkdo_kernels.launch import Config

launch_tables.TWO_CHUNKS.clear()  # as the tables were: 248,320 bytes on sm_90
fits.QUICK = fits.QUICK[:1]
wrong = [x.wrong for x in fits.quick() if x.wrong]
assert wrong, "nothing is refused"
assert all("of 232448 bytes of shared memory" in x for x in wrong), wrong
fits.QUICK = [("sm_86", "_snapshot_walk", 33, "fp32")]
Snapshots.fits_unrolled = lambda *_: True  # as all walks were: 139,264 bytes of 101,376
assert any(x.wrong for x in fits.quick()), "no snapshot is refused"
limited = Config(64, 64, 4, 2, registers=128).options
assert fits.refused_options("gfx942", limited) == {"maxnreg"}
assert fits.refused_options("sm_90", limited) == set()
"""


def run(*arguments, folder):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(folder), "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *arguments],
        env=environment, cwd=ROOT, capture_output=True, text=True, timeout=900,
    )  # fmt: skip


def test_a_selection_of_launches_fits(tmp_path):
    done = run("-m", "bench", "fits", "--quick", folder=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert int(done.stdout.split()[0]) > 30


def test_a_launch_that_does_not_is_seen(tmp_path):
    done = run("-c", TOO_MUCH, folder=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
