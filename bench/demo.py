"""What README shows of `make demo`: the same training, timed and kept.

    python -m bench demo [--out FILE]

Writes bench/runs/demo.jsonl: a line about the run, then the losses and evaluations.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from .errors import BenchError
from .record import environment, out_of, write_lines

SETTINGS = ("dataset", "method", "epochs")
TIMED = ("images_per_second", "epoch")  # not in the file: the first differs from run to run


def main(arguments: list[str]) -> int:
    path = out_of("demo", arguments)
    about = environment("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        start = time.monotonic()
        if subprocess.run([sys.executable, "-m", "rkdo", "train", "--out", str(run)]).returncode:
            raise BenchError("the training failed")
        kept = lines(run, about | {"seconds": time.monotonic() - start})
    write_lines(path, kept)
    print(path)
    return 0


def lines(run: Path, about: dict[str, Any]) -> list[dict[str, Any]]:
    """Of a run's folder: its settings and what was measured, then its metrics."""
    config = json.loads((run / "config.json").read_text())["config"]
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [
        {name: config[name] for name in SETTINGS} | about,
        *({name: x for name, x in line.items() if name not in TIMED} for line in metrics),
    ]
