"""The kernels cross-compile for every target, fit its shared memory and spill nothing.

Compiled, not interpreted: in a process of its own, with a cache of its own.
"""

import os
import subprocess
import sys
from pathlib import Path

COMPILE = """
from bench.static import cases, compile_case

def compile_all(names, dtypes, target):
    for case in cases():
        if names is None or case.name in names:
            for dtype in dtypes:
                made = compile_case(case, dtype, 64, target)
                print(target, dtype, made.kernel, made.fits, made.spill_bytes, sep="|", flush=True)

compile_all(None, ("bf16", "fp32"), "sm_90")
for target in ("sm_80", "sm_100", "gfx942"):
    compile_all(("moments_fwd k=4",), ("bf16",), target)
"""


def test_kernels_compile_fit_and_spill_nothing(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    process = subprocess.run(
        [sys.executable, "-c", COMPILE],
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path)},
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr[-2000:]
    made = [line.split("|") for line in process.stdout.splitlines()]
    assert {line[0] for line in made} == {"sm_80", "sm_90", "sm_100", "gfx942"}
    assert len(made) >= 30
    assert [line for line in made if line[3:] != ["True", "0"]] == []
