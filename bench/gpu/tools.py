"""Another program, run by a check: it ends with the check's process, whatever ends that."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent  # of the checkout, where the program runs
DIE_WITH_PARENT = 1  # prctl's PR_SET_PDEATHSIG


def run(command: list[str], seconds: float, **settings: str) -> subprocess.CompletedProcess[str]:
    """`settings` go into its environment. Raises subprocess.TimeoutExpired."""
    bound = partial(ctypes.CDLL(None).prctl, DIE_WITH_PARENT, signal.SIGKILL)
    return subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), **settings},
        capture_output=True,
        text=True,
        timeout=seconds,
        preexec_fn=bound if sys.platform == "linux" else None,
    )
