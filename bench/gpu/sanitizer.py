"""NVIDIA's compute-sanitizer around a call, where it is installed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from ..measure import forward_and_backward
from .checks import loss_of, paths, views
from .device import current
from .outcome import NotApplicable, Outcome
from .tools import run

TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
SECONDS = 130.0
FOUND_ERRORS = 86  # an exit status that nothing else has


def installed() -> str | None:
    """On PATH, in CUDA's folder, or in a package of NVIDIA's."""
    name = "compute-sanitizer"
    if path := shutil.which(name):
        return path
    homes = [os.environ.get(x) for x in ("CUDA_HOME", "CUDA_PATH")] + ["/usr/local/cuda"]
    places = [Path(home) / "bin" for home in homes if home]
    places += [Path(home) / name for home in homes if home]
    packages = Path(sysconfig.get_paths()["purelib"]) / "nvidia"
    places += [path.parent for path in sorted(packages.glob(f"**/{name}")) if path.is_file()]
    return next((str(x / name) for x in places if os.access(x / name, os.X_OK)
                 and (x / name).is_file()), None)  # fmt: skip


def check(tool: str, path: str) -> Outcome:
    """A value and its gradients, in a process that the sanitizer runs."""
    program = installed()
    if program is None:
        raise NotApplicable("compute-sanitizer is not installed")
    command = [program, "--tool", tool, "--error-exitcode", str(FOUND_ERRORS)]
    command += [sys.executable, "-m", "bench.gpu.sanitizer", path]
    command += ["stand-in"] * current().rehearsal
    # PyTorch's allocator would hide what lies past an allocation's end, or was never written.
    try:
        ran = run(command, SECONDS, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    except subprocess.TimeoutExpired:
        return Outcome(False, f"not done in {SECONDS:.0f} s")
    output = ran.stdout + ran.stderr
    lines = [x.strip("= ") for x in output.splitlines() if x.startswith("=========")]
    summary = next((x for x in reversed(lines) if "SUMMARY" in x), "it wrote no summary")
    if ran.returncode == 0:
        return Outcome("SUMMARY" in summary, summary)
    first = next((x for x in lines if x and "COMPUTE-SANITIZER" not in x), "")
    if ran.returncode != FOUND_ERRORS:
        first = first or next(iter(output.strip().splitlines()[-1:]), "")
    return Outcome(False, f"status {ran.returncode}: {summary}; {first}"[:300])


def main() -> None:
    if "stand-in" in sys.argv:
        from .device import use
        from .stand_in import StandIn

        use(StandIn())
    inputs = views(200, 64)
    forward_and_backward(loss_of(paths()[sys.argv[1]], inputs), inputs)
    current().synchronize()


if __name__ == "__main__":
    main()
