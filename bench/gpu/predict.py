"""Seconds an entry of S that each kernel of a loss should take: its machine code, read as `bench
static` reads it, at the rates that were measured on this device.

The compiling runs in a new Python: what this one has imported may be Triton's interpreter.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, replace
from typing import Any

from .device import current
from .outcome import NotApplicable, Outcome
from .timing import RATES
from .tools import run

SECONDS = 140.0


def check(case: str, dtype: str, width: int) -> Outcome:
    device = current().properties()
    asked = {
        "case": case, "dtype": dtype, "width": width, "rates": RATES,
        "target": "sm_{}{}".format(*device.capability), "first only": current().rehearsal,
        "processors": 0 if current().rehearsal else device.processors,
    }  # fmt: skip
    command = [sys.executable, "-m", "bench.gpu.predict", json.dumps(asked)]
    ran = run(command, SECONDS, TRITON_INTERPRET="0")
    if ran.returncode:
        last = next(iter(ran.stderr.strip().splitlines()[-1:]), "")
        return Outcome(False, f"status {ran.returncode}: {last[:200]}")
    answer = json.loads(ran.stdout.splitlines()[-1])
    if isinstance(answer, str):
        raise NotApplicable(answer)
    return Outcome(**answer)


def predicted(asked: dict[str, Any]) -> Outcome:
    """`figures`: by kernel function, of both launches where it has two."""
    from .. import static, targets
    from ..static_table import LOSSES

    if asked["target"] not in targets.TARGETS:
        raise NotApplicable(f"the tables have no target {asked['target']}")
    device = with_rates(targets.TARGETS[asked["target"]], asked["rates"], asked["processors"])
    known = {x.name: x for x in static.cases()}
    figures: dict[str, float] = {}
    parts = []
    for name in LOSSES[asked["case"]][: 1 if asked["first only"] else None]:
        kernel = known[name]
        found = static.compile_case(kernel, asked["dtype"], asked["width"], asked["target"])
        if found.loop is None or found.tile is None:
            raise NotApplicable(f"{name} has no loop to predict from")
        seconds = targets.predict(device, found.tile, found.loop)
        if "l2" in asked["rates"]:
            read = sum(size * count for size, count in found.loop.loads.items())
            seconds["L2"] = read / asked["rates"]["l2"]
        unit = max(seconds, key=lambda x: seconds[x])
        taken = seconds[unit] * found.stripes
        function = f"kernel {kernel.function.__name__}"
        figures[function] = figures.get(function, 0.0) + taken
        parts.append(f"{name} {1e12 * taken:.3g} ps by {unit}")
    return Outcome(True, "an entry: " + ", ".join(parts), figures)


def with_rates(target: Any, rates: dict[str, float], processors: int = 0) -> Any:
    """The target with what was measured in place of what its table says."""
    processors = processors or target.processors
    changes: dict[str, Any] = {"processors": processors}
    if "exp" in rates:
        changes["clock"] = rates["exp"] / (processors * target.special)
    if "memory" in rates:
        changes["memory_rate"] = rates["memory"]
    if "bf16" in rates and "tf32" in rates:
        changes["matrix"] = {**target.matrix, "2": rates["bf16"], "tf32": rates["tf32"]}
    return replace(target, **changes)


def main() -> None:
    try:
        answer: Any = asdict(predicted(json.loads(sys.argv[1])))
    except NotApplicable as why:
        answer = str(why)
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
