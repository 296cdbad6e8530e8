"""Runs the whole suite as on other machines, and prints a table of what passed.

    python tests/matrix.py [NAME ...] [--apart] [--jobs N] [--list] [-- PYTEST ARGUMENTS]

A row is an environment (a Python with a release of PyTorch and the Triton that it brings), and what
makes this processor act like another: instruction sets, threads, the order of the tests. Each
environment is a virtual one below `.venvs`, made at its first use by the pip of a `pythonX.Y` on
PATH, and kept. Few rows have everything, several things each; with `--apart` there is a row for
each thing. Names choose among all rows, by their beginning; the rows run one after another.
What a row printed is in `runs/matrix/NAME.log`. Exits with 1 if a row failed or could not run.
"""

import argparse
import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parent.parent
ENVIRONMENTS = ROOT / ".venvs"
LOGS = ROOT / "runs" / "matrix"
COUNTED = re.compile(r"(\d+) (passed|failed|errors?|skipped|warnings?)")


@dataclass(frozen=True)
class Environment:
    python: str  # its version, X.Y
    torch: str  # the requirement
    others: tuple[str, ...] = ()  # further ones

    @property
    def folder(self) -> Path:
        release = re.sub(r"[^\d.]", "", self.torch).strip(".") or "newest"
        return ENVIRONMENTS / f"torch-{release}-python-{self.python}"

    def interpreter(self) -> Path:
        """Of the virtual environment, which is made where there is none."""
        ready = self.folder / "bin" / "python"
        if not (self.folder / ".ready").exists():
            subprocess.run([f"python{self.python}", "-m", "venv", self.folder], check=True)
            install = [ready, "-m", "pip", "install", "--quiet", self.torch, *self.others]
            subprocess.run([*install, "--editable", f"{ROOT}[dev]"], check=True)
            (self.folder / ".ready").touch()
        return ready


@dataclass(frozen=True)
class Machine:
    name: str
    environment: Environment
    variables: dict[str, str] = field(default_factory=dict)
    options: tuple[str, ...] = ()


# Triton 3.6's interpreter does not take the newest NumPy.
OLDEST = Environment("3.12", "torch==2.11.*", ("numpy==2.2.*",))
NEWEST = Environment("3.13", "torch")
USUAL = Environment("3.11", "torch==2.14.*")
OTHER = Environment("3.10", "torch==2.14.*")
SHUFFLED = ("--random-order-bucket=global", "--random-order-seed=1")
# Together these have all: a version, an instruction set or a thread count is in one row at least.
TOGETHER = [
    Machine("usual", USUAL),
    Machine("oldest", OLDEST, {
        "ATEN_CPU_CAPABILITY": "default", "MKL_ENABLE_INSTRUCTIONS": "AVX2", "TEST_THREADS": "2",
    }),
    Machine("newest", NEWEST, {"ATEN_CPU_CAPABILITY": "avx2", "MKL_CBWR": "COMPATIBLE"}, SHUFFLED),
    Machine("other", OTHER, {
        "ATEN_CPU_CAPABILITY": "avx512", "MKL_ENABLE_INSTRUCTIONS": "AVX512", "TEST_THREADS": "5",
    }),
]  # fmt: skip
# One by one they tell which of them a failure comes from.
APART = [
    Machine("oldest-versions", OLDEST),
    Machine("newest-versions", NEWEST),
    Machine("newest-versions-python-3.11", Environment("3.11", "torch")),
    Machine("python-3.10", OTHER),
    *(
        Machine(f"aten-{level}", USUAL, {"ATEN_CPU_CAPABILITY": level})
        for level in ("default", "avx2", "avx512")
    ),
    *(
        Machine(f"mkl-{level.lower()}", USUAL, {"MKL_ENABLE_INSTRUCTIONS": level})
        for level in ("AVX2", "AVX512")
    ),
    Machine("mkl-compatible", USUAL, {"MKL_CBWR": "COMPATIBLE"}),
    *(Machine(f"threads-{n}", USUAL, {"TEST_THREADS": str(n)}) for n in (2, 5)),
    Machine("random-order", USUAL, options=SHUFFLED),
]


def run(machine: Machine, jobs: int, more: list[str]) -> tuple[bool, str]:
    """Whether all passed, and pytest's closing words."""
    started = time.monotonic()
    command = ["-m", "pytest", "--numprocesses", str(jobs), "--dist", "worksteal"]
    try:
        python = machine.environment.interpreter()
    except (OSError, subprocess.CalledProcessError) as error:
        return False, f"no environment: {error}"
    LOGS.mkdir(parents=True, exist_ok=True)
    with open(LOGS / f"{machine.name}.log", "w") as log:
        done = subprocess.run(
            [python, *command, *machine.options, *more],
            cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT), **machine.variables},
            stdout=log, stderr=subprocess.STDOUT,
        )  # fmt: skip
    closing = (LOGS / f"{machine.name}.log").read_text().splitlines()[-1:]
    counts = [f"{n} {what}" for n, what in COUNTED.findall(" ".join(closing)) if what[0] != "w"]
    passed = done.returncode == 0 and len(counts) >= 1
    minutes = (time.monotonic() - started) / 60
    return passed, f"{', '.join(counts) or f'exit {done.returncode}'}, {minutes:.1f} min"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", nargs="*", help="rows, by the beginning of their names")
    parser.add_argument("--apart", action="store_true", help="one thing at a time")
    parser.add_argument("--jobs", type=int, default=2, help="processes of a suite (%(default)s)")
    parser.add_argument("--list", action="store_true", help="name the rows, run nothing")
    own, more = sys.argv[1:], []
    if "--" in own:
        own, more = own[: own.index("--")], own[own.index("--") + 1 :]
    chosen = parser.parse_args(own)
    machines = [*TOGETHER[:1], *APART] if chosen.apart else TOGETHER
    if chosen.name:
        machines = [m for m in [*TOGETHER, *APART] if m.name.startswith(tuple(chosen.name))]
    if not machines:
        parser.error(f"no row is named {' or '.join(chosen.name)}; see --list")
    rows = []
    for machine in machines:
        settings = " ".join([*(f"{k}={v}" for k, v in machine.variables.items()), *machine.options])
        passed, words = (True, "") if chosen.list else run(machine, chosen.jobs, more)
        rows.append(passed)
        python, torch = machine.environment.python, machine.environment.torch
        about = f"| {machine.name} | {python} | {torch} | {settings or '–'} |"
        print(about if chosen.list else f"{about} {'passed' if passed else 'FAILED'} | {words} |")
        sys.stdout.flush()
    return 0 if all(rows) else 1


if __name__ == "__main__":
    sys.exit(main())
