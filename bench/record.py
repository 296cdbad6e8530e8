"""Results: one JSON line each, written as soon as it is there."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from .errors import BenchError, Parser
from .gpu.device import current

SCHEMA = 1
FOLDER = Path(__file__).parent / "results"
RUNS = FOLDER.parent / "runs"
PACKAGES = ("rkdo-kernels", "torch", "triton", "inf-cl")
CODE = ("rkdo_kernels", "rkdo", "bench")


@dataclass(frozen=True)
class Result:
    """A contender on a case at a shape. Times are of forward and backward, in seconds a call."""

    case: str
    contender: str
    n: int
    d: int
    dtype: str
    status: str  # ok, wrong, oom, unavailable or failed
    detail: str = ""  # why, or the variant that was fastest
    p20: float | None = None
    p50: float | None = None
    p80: float | None = None
    samples: int = 0
    wall: float | None = None  # GPU: seconds a call seen from the host, warm
    peak_bytes: int | None = None  # above the inputs
    value_error: float | None = None  # against float64, ÷ the largest true entry
    gradient_error: float | None = None
    limit_used: float | None = None  # of the yardstick's limit; above 1 is wrong
    floor: float | None = None  # the least that the hardware needs, seconds
    device: str = ""
    driver: str = ""
    threads: int = 0
    versions: dict[str, str] = field(default_factory=dict)
    commit: str = ""
    dirty: bool | None = None
    time: str = ""  # UTC
    sensors: dict[str, Any] = field(default_factory=dict)  # GPU: MHz, W, °C meanwhile, if known
    rehearsal: bool = False  # the times say nothing: see gpu/stand_in.py
    schema: int = SCHEMA

    @property
    def key(self) -> tuple[str, str, int, int, str]:
        return self.case, self.contender, self.n, self.d, self.dtype

    @property
    def problem(self) -> tuple[str, int, int, str]:
        return self.case, self.n, self.d, self.dtype


FIELDS = tuple(x.name for x in fields(Result))
ADDED = frozenset({"sensors", "rehearsal"})  # since the first files of this schema


def environment(device: str) -> dict[str, Any]:
    """What a result has to say of where and when it was measured."""
    commit, dirty = revision()
    return {
        "device": device_name(device),
        "driver": driver() if device == "cuda" else "",
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "commit": commit,
        "dirty": dirty,
        "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def device_name(device: str) -> str:
    if device == "cuda":
        return current().properties().name
    model = platform.processor() or platform.machine()
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return model
    names = [line.split(":", 1)[1].strip() for line in text.splitlines() if "model name" in line]
    return names[0] if names else model


def driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return next(iter(output(command).splitlines()), "unknown")


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def revision() -> tuple[str, bool | None]:
    """The commit, and whether the code that is measured differs from it; unknown outside git."""
    git = ["git", "-C", str(Path(__file__).parent.parent)]
    commit = output([*git, "rev-parse", "HEAD"])
    if not commit or not output([*git, "ls-files", "bench/record.py"]):  # someone else's git
        return "unknown", None
    changed = output([*git, "status", "--porcelain", "--", *CODE, ":!bench/results"])
    return commit, bool(changed)


def output(command: list[str]) -> str:
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return found.stdout.strip() if found.returncode == 0 else ""


def default_path(device: str) -> Path:
    """bench/runs/cpu-model-2025-01-31.jsonl: what README's figures come from is kept elsewhere."""
    words = device_name(device).lower().replace("(r)", "").replace("(tm)", "")
    name = "-".join("".join(c if c.isalnum() else " " for c in words).split()[:6])
    prefix = "gpu" if device == "cuda" else "cpu"
    return RUNS / f"{prefix}-{name}-{datetime.date.today().isoformat()}.jsonl"


def benchmark_files() -> list[Path]:
    """The result files of the benchmark among those that are kept."""
    return sorted([*FOLDER.glob("cpu-*.jsonl"), *FOLDER.glob("gpu-*.jsonl")])


def make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BenchError(f"{path} cannot be a folder: {error.strerror}") from None


class Writer:
    """Appends to a new file; every line is on the disk before the next is measured."""

    def __init__(self, path: Path) -> None:
        if path.exists():
            raise BenchError(f"{path} exists already: pass another --out")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.file = path.open("x")
        except OSError as error:
            raise BenchError(f"--out {path} cannot be written: {error.strerror}") from None
        self.path = path
        self.results: list[Result] = []

    def write(self, result: Result) -> None:
        self.file.write(json.dumps(asdict(result)) + "\n")
        self.file.flush()
        os.fsync(self.file.fileno())
        self.results.append(result)

    def close(self) -> None:
        """Leaves no empty file."""
        self.file.close()
        if not self.results:
            self.path.unlink(missing_ok=True)


def read(path: Path) -> list[Result]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise BenchError(f"{path}: no such result file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise BenchError(f"{path} cannot be read: {error}") from None
    found = [parse(path, number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not found:
        raise BenchError(f"{path} holds no result")
    return found


def parse(path: Path, number: int, line: str) -> Result:
    try:
        values = json.loads(line)
    except ValueError:
        raise BenchError(f"{path}:{number} is not JSON") from None
    if not isinstance(values, dict) or "schema" not in values:
        raise BenchError(f"{path}:{number} is not a result of this benchmark")
    if values["schema"] != SCHEMA:
        raise BenchError(f"{path}:{number} has schema {values['schema']}, wanted {SCHEMA}")
    if values.get("rehearsal"):
        raise BenchError(f"{path}:{number} is of a rehearsal: it is no result")
    if odd := (set(values) ^ set(FIELDS)) - (ADDED - set(values)):
        raise BenchError(f"{path}:{number} has other fields than schema {SCHEMA}: {sorted(odd)}")
    return Result(**values)


def newest(results: Iterable[Result]) -> dict[tuple[str, str, int, int, str], Result]:
    """One result a contender and problem: the last one read."""
    return {result.key: result for result in results}


def out_of(command: str, arguments: list[str]) -> Path:
    """Where `python -m bench COMMAND` writes; what README's figures come from is kept elsewhere."""
    parser = Parser(prog=f"python -m bench {command}")
    parser.add_argument("--out", type=Path, metavar="FILE", default=RUNS / f"{command}.jsonl")
    return parser.parse_args(arguments).out


def write_lines(path: Path, lines: Iterable[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
