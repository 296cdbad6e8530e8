"""Do the tests notice a wrong kernel?  Breaks the package one expression at a time and runs them.

    python tests/mutants.py --all               every mutant of every file; exit 1 if any survives
    python tests/mutants.py moments small       of these files
    python tests/mutants.py --all --every 7     every seventh, for a quick look

First all tests that use the package run once, in processes side by side, on sources in which every
function says that it was called. A mutant then meets the tests that call its function, those that
have killed most of that function's mutants first, then the quickest, up to `--seconds` of them; one
that survives meets all of them. Every run is a fork of this process, which has imported all but the
package, in a folder that it has for itself; one that takes much longer than it should is caught: it
hangs.
"""

from __future__ import annotations

import argparse
import builtins
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from mutations import PACKAGE, Mutant, is_equivalent, mutants_of, touching

ROOT = PACKAGE.parent
VARIANTS = 8  # of a test's parameters, in the first look
KILLERS = 6  # tests that are run first
WITHOUT = (  # of tests: what trains, measures and compiles takes minutes and knows no arithmetic
    "test_bench", "test_batchnorm", "test_compiles", "test_config", "test_data", "test_encoder",
    "test_evaluate", "test_fuzz", "test_layering", "test_main", "test_objective", "test_package",
    "test_readme", "test_schedule", "test_train", "test_golden",
)  # fmt: skip
FILES = sorted(path.stem for path in PACKAGE.glob("*.py"))


@dataclass
class Test:
    """What one test did when nothing was wrong."""

    name: str
    seconds: float
    touched: list[str]


# ---- in a fork -----------------------------------------------------------------------------------


def pytest_in(folder: Path, names: list[str], *plugins: object) -> int:
    import pytest

    os.chdir(folder)
    os.environ["PYTHONPATH"] = str(folder)
    sys.path.insert(0, str(folder))
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    return int(pytest.main(["-q", "-p", "no:cacheprovider", *names], plugins=list(plugins)))


class Watch:
    """A plugin: chooses variants, and notes of every test its seconds and what it touched."""

    def __init__(self) -> None:
        self.touched: set[str] = set()
        self.found: dict[str, list] = {}
        builtins.__touch__ = self.touched.add  # type: ignore[attr-defined]

    def pytest_collection_modifyitems(self, items: list) -> None:
        items[:] = few_of_each(items)

    def pytest_runtest_logstart(self) -> None:
        self.touched.clear()

    def pytest_runtest_logreport(self, report) -> None:
        seconds, passed, _ = self.found.get(report.nodeid, (0.0, True, []))
        passed = passed and report.passed
        self.found[report.nodeid] = [seconds + report.duration, passed, sorted(self.touched)]


def few_of_each(items: list) -> list:
    by_function: dict[str, list] = {}
    for item in items:
        by_function.setdefault(item.nodeid.partition("[")[0], []).append(item)
    chosen: set = set()
    for name, variants in by_function.items():
        count = min(VARIANTS, len(variants))
        chosen.update(random.Random(name).sample(variants, count))
    return [item for item in items if item in chosen]


class Killer:
    """A plugin: writes down the first test that fails, or that cannot be collected."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def pytest_runtest_logreport(self, report) -> None:
        if report.failed and not self.file.exists():
            self.file.write_text(report.nodeid)

    def pytest_collectreport(self, report) -> None:
        if report.failed and not self.file.exists():
            self.file.write_text("")


def fork(work: Callable[[], int]) -> int:
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.setpgid(0, 0)
            code = work()
        finally:
            os._exit(code)
    return child


# ---- which tests touch what ----------------------------------------------------------------------


def copy(folder: Path) -> Path:
    for name in ("rkdo_kernels", "tests", "bench"):
        shutil.copytree(ROOT / name, folder / name, dirs_exist_ok=True)
    (folder / "pytest.ini").write_text("[pytest]\n")
    return folder


def map_of_tests(folder: Path, jobs: int) -> dict[str, Test]:
    """Every test that passes, by name; kept in the folder for as long as no source changes."""
    digest = hashlib.sha256()
    for path in sorted([*PACKAGE.glob("*.py"), *Path(ROOT, "tests").glob("*.py")]):
        digest.update(path.read_bytes())
    kept = Path(tempfile.gettempdir()) / f"tests-that-touch-{digest.hexdigest()[:16]}.json"
    if not kept.exists():
        copy(folder)
        for file in FILES:
            (folder / "rkdo_kernels" / f"{file}.py").write_text(touching(file))
        files = [
            path.name
            for path in sorted((ROOT / "tests").glob("test_*.py"))
            if not path.stem.startswith(WITHOUT)
        ]
        started = time.time()

        def watch(name: str) -> int:
            plugin = Watch()
            pytest_in(folder, [f"tests/{name}"], plugin)
            (folder / f"{name}.json").write_text(json.dumps(plugin.found))
            return 0

        running: dict[int, str] = {}
        while files or running:
            while files and len(running) < jobs:
                name = files.pop(0)
                running[fork(lambda name=name: watch(name))] = name  # type: ignore[misc]
            running.pop(os.wait()[0])
        found = {}
        for path in folder.glob("test_*.json"):
            found.update(json.loads(path.read_text()))
        kept.write_text(json.dumps(found))
        print(f"{len(found)} tests in {time.time() - started:.0f} s", flush=True)
    found = json.loads(kept.read_text())
    for name in sorted(name for name, (_, passed, _) in found.items() if not passed):
        print(f"fails unchanged (or cannot be watched), not counted: {name}", flush=True)
    return {
        name: Test(name, seconds, touched)
        for name, (seconds, passed, touched) in found.items()
        if passed
    }


# ---- the mutants ---------------------------------------------------------------------------------


@dataclass
class Look:
    """A mutant and the tests that it has yet to meet, in rounds of names with their seconds."""

    mutant: Mutant
    rounds: list[tuple[list[str], float]]
    killer: str | None = None
    folder: Path = field(default_factory=Path)
    deadline: float = 0.0


class Session:
    def __init__(self, tests: dict[str, Test], seconds: float, jobs: int, base: Path) -> None:
        self.tests, self.seconds, self.base = tests, seconds, base
        self.of: dict[str, list[Test]] = {}
        for test in tests.values():
            for function in test.touched:
                self.of.setdefault(function, []).append(test)
        self.kills: dict[str, Counter[str]] = {}
        self.free = [base / f"job-{k}" for k in range(jobs)]
        for folder in self.free:
            copy(folder)
        self.running: dict[int, Look] = {}

    def look(self, mutant: Mutant) -> Look:
        tests = self.of.get(mutant.function, [])
        kills = self.kills.setdefault(mutant.function, Counter())
        elsewhere = self.kills.setdefault(mutant.file, Counter())
        tests = sorted(tests, key=lambda t: (-kills[t.name], -elsewhere[t.name], t.seconds))
        first, rest, spent = tests[:KILLERS], [], 0.0
        for test in tests[KILLERS:]:
            spent += test.seconds
            if spent > self.seconds:
                break
            rest.append(test)
        rounds = [([t.name for t in part], sum(t.seconds for t in part)) for part in (first, rest)]
        every = sorted({t.name.partition("[")[0] for t in tests})
        rounds.append((every, 40 * sum(t.seconds for t in tests)))
        return Look(mutant, [r for r in rounds if r[0]])

    def start(self, look: Look) -> None:
        names, seconds = look.rounds.pop(0)
        look.folder = folder = self.free.pop()
        look.deadline = time.time() + min(30 + 5 * seconds, 600)
        source = folder / "rkdo_kernels" / f"{look.mutant.file}.py"
        source.write_text(look.mutant.source)
        for stale in (source.parent / "__pycache__").glob(f"{look.mutant.file}.*"):
            stale.unlink()

        def work() -> int:
            sys.dont_write_bytecode = True
            return pytest_in(folder, ["-x", *names], Killer(folder / "killer"))

        self.running[fork(work)] = look

    def wait(self) -> tuple[Look, bool]:
        """A look that has ended, and whether the mutant was noticed."""
        while True:
            child, status = os.waitpid(-1, os.WNOHANG)
            if child in self.running:
                break
            for late, look in self.running.items():
                if time.time() > look.deadline:
                    os.killpg(late, signal.SIGKILL)
            time.sleep(0.02)
        look = self.running.pop(child)
        note = look.folder / "killer"
        if note.exists():
            look.killer = note.read_text()
            note.unlink()
        self.free.append(look.folder)
        file = look.folder / "rkdo_kernels" / f"{look.mutant.file}.py"
        shutil.copy2(PACKAGE / f"{look.mutant.file}.py", file)
        noticed = not (os.WIFEXITED(status) and os.WEXITSTATUS(status) == 0)
        if noticed and look.killer:
            self.kills[look.mutant.function][look.killer] += 1
            self.kills[look.mutant.file][look.killer] += 1
        return look, noticed


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("files", nargs="*", metavar="FILE", help=", ".join(FILES))
    parser.add_argument("--all", action="store_true", help="of every file")
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--from", type=int, default=0, dest="first")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=20, help="of tests, at the first look")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--first-look", action="store_true", help="do not run all variants")
    options = parser.parse_args()
    if unknown := [name for name in options.files if name not in FILES]:
        parser.error(f"no file {', '.join(unknown)}: {', '.join(FILES)}")
    if not options.files and not options.all:
        parser.error("name files, or say --all")
    mutants = [m for f in options.files or FILES for m in mutants_of(f)]
    equivalent = [m for m in mutants if is_equivalent(m)]
    mutants = [m for m in mutants if not is_equivalent(m)][options.first :: options.every]
    if options.list:
        print(*mutants, sep="\n")
        return 0
    os.environ.setdefault("TRITON_INTERPRET", "1")
    import numpy  # noqa: F401
    import pytest  # noqa: F401
    import torch
    import triton  # noqa: F401

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="mutants") as scratch:
        base = Path(scratch)
        tests = map_of_tests(base / "watched", options.jobs)
        session = Session(tests, options.seconds, options.jobs, base)
        survivors = run(session, mutants, options.first_look)
    print(f"{len(equivalent)} equivalent")
    return 1 if survivors else 0


def run(session: Session, mutants: list[Mutant], first_look: bool) -> list[Mutant]:
    """The survivors; each is printed, and every hundred mutants how far it has got."""
    started, survivors, done, untouched = time.time(), [], 0, 0
    waiting: list[Look] = []
    mutants = list(mutants)
    while mutants or waiting or session.running:
        while session.free and (waiting or mutants):
            if not waiting:
                look = session.look(mutants.pop(0))
                if first_look:
                    look.rounds = look.rounds[:-1]
                if not look.rounds:
                    done, untouched = done + 1, untouched + 1
                    survivors.append(look.mutant)
                    print("NO TEST CALLS", look.mutant, flush=True)
                    continue
                waiting.append(look)
            session.start(waiting.pop(0))
        if not session.running:
            continue
        look, noticed = session.wait()
        if not noticed and look.rounds:
            waiting.append(look)
            continue
        done += 1
        if not noticed:
            survivors.append(look.mutant)
            print("SURVIVED", look.mutant, flush=True)
        if done % 100 == 0 or not (mutants or waiting or session.running):
            minutes = (time.time() - started) / 60
            print(
                f"{done} mutants of {done + len(mutants) + len(session.running) + len(waiting)}, "
                f"{len(survivors)} survivors ({untouched} that no test calls), "
                f"{done / max(minutes, 1e-3):.0f} a minute",
                flush=True,
            )
    return survivors


if __name__ == "__main__":
    sys.exit(main())
