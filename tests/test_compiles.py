"""Every kernel compiles as every call launches it: the interpreter is less strict."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).parent.parent
KERNELS = {
    "losses": {"_add_means", "_add_parts", "_add_shares", "_both_sums_bwd", "_both_sums_fwd",
               "_column_sums", "_gradient_stripe", "_join_sums", "_moments_bwd", "_moments_fwd",
               "_recursion_bwd", "_recursion_fwd", "_recursion_rows", "_single_launch",
               "_softmax_sums_bwd", "_softmax_sums_fwd"},
    "fields": {"_add_parts", "_dense_finish", "_dense_keys", "_dense_rows", "_dense_walk",
               "_join_sums", "_past_sums", "_row_masses", "_snapshot_losses", "_snapshot_rows",
               "_snapshot_walk", "_softmax_sums_fwd"},
}  # fmt: skip


@pytest.mark.parametrize("what", KERNELS)
def test_every_launch_compiles(what, tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "tests/compile_launches.py", what, "sm_90"],
        env=environment, cwd=ROOT, capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    *wrong, launched, others = done.stdout.splitlines()
    assert wrong == []
    assert set(launched.split()[3:]) == KERNELS[what]
    every = set().union(*KERNELS.values())
    assert set(others.split()[2:]) == every - KERNELS[what]  # and there is no other kernel
