"""A few of the rehearsal's checks, run by the command's own code on the stand-in for a GPU."""

import json

from bench.gpu import command, plan
from bench.gpu.outcome import Found, Setup

FIRST = {  # quick ones, in the order in which they run
    "accuracy: rkdo, moments, bf16, 33×64", "CUDA graph: rkdo, moments, fp32, 17×64",
    "accuracy: rkdo, moments, fp32, 17×64", "host waits for nothing: rkdo, moments, bf16, 33×64",
    "dirty memory: rkdo, moments, bf16, 33×64", "side stream: rkdo, moments, bf16, 33×64",
    "second GPU: rkdo, moments, bf16, 33×64", "a row past the bound: rkdo, moments, fp32, 17×64",
    "2 reruns bitwise: rkdo, moments, bf16, 33×64",
}  # fmt: skip


def execute(folder, names=FIRST, stages=plan.STAGES, minutes=10.0, **setup):
    """The command's exit status, and what it found by name."""
    settings = command.Settings(
        folder, minutes, stages, Setup(rehearsal=True, **setup), lambda check: check.name in names
    )
    status = command.execute(settings)
    return status, found_in(folder)


def found_in(folder):
    lines = (folder / "checks.jsonl").read_text().splitlines()
    return {x["name"]: Found(**x) for x in map(json.loads, lines)}
