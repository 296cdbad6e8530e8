"""Results to test with, and what the command says of bad ones."""

import json
from dataclasses import asdict

from bench.__main__ import main
from bench.record import Result


def result(contender="ours", n=64, p50=1.0, **others):
    values = {"status": "ok", "peak_bytes": 10_000_000, "floor": 0.1, "device": "test"}
    return Result("rkdo_loss", contender, n, 64, "fp32", p50=p50, **{**values, **others})


def write(path, results):
    path.write_text("".join(json.dumps(asdict(x)) + "\n" for x in results))
    return path


def complaint(capsys, arguments):
    """The one line that it says, exiting with 2."""
    assert main([str(x) for x in arguments]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    return lines[0]
