"""README's numbers and pictures, from the files in bench/results and from nothing else.

    python -m bench readme [--check]

Rewrites what stands between the markers `<!-- generated: NAME -->` and `<!-- end -->`, and draws
the pictures that it shows. `--check` changes nothing and fails if anything would change.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

from . import plot, report
from .errors import BenchError, Parser
from .record import FOLDER, Result, benchmark_files, newest, read

README = Path(__file__).parent.parent / "README.md"
BLOCK = re.compile(r"(<!-- generated: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
SHOWN = "rkdo_loss"  # the case whose picture README shows
NO_GPU = "Nothing has been measured on a GPU yet: `python -m bench gpu --out DIR` does that."


def main(arguments: list[str]) -> int:
    parser = Parser(prog="python -m bench readme")
    parser.add_argument("--check", action="store_true", help="change nothing; fail if it is old")
    chosen = parser.parse_args(arguments)
    text = README.read_text(encoding="utf-8")
    wanted, old = rendered(text), stale()
    if chosen.check:
        for name in [*old, *([README.name] if wanted != text else [])]:
            print(f"{name} is not what bench/results gives: python -m bench readme")
        return 1 if old or wanted != text else 0
    README.write_text(wanted, encoding="utf-8")
    for name in old:
        pictures()[name][1](plot.DOCS / name)
    print("\n".join([str(README), *(str(plot.DOCS / name) for name in old)]))
    return 0


def rendered(text: str) -> str:
    """`text` with every block as the files have it."""
    found = {name for _, name, _ in BLOCK.findall(text)}
    if found != set(BLOCKS):
        raise BenchError(f"README.md needs the blocks {sorted(BLOCKS)}, has {sorted(found)}")
    return BLOCK.sub(lambda match: f"{match[1]}{BLOCKS[match[2]]()}\n{match[3]}", text)


# ---- blocks --------------------------------------------------------------------------------------


def demo() -> str:
    about, evaluations, _ = demo_lines()
    before, after = evaluations[0], evaluations[-1]
    from rkdo.evaluate import LABELS

    steps = after["step"]
    rows = [
        (label, f"{before[name]:.4f}", f"{after[name]:.4f}")
        for name, label in LABELS.items()
        if name in after
    ]
    epochs = f"{about['dataset']}, {about['epochs']} epochs ({steps} steps)"
    return "\n\n".join(
        (
            f"![loss and metrics over {steps} steps](docs/curves.png)",
            markdown([(epochs, "before", "after"), *rows]),
            f"{about['seconds']:.0f} s on {machine(about)} (`bench/results/demo.jsonl`).",
        )
    )


def precision() -> str:
    lines = json_lines("precision.jsonl")
    first = lines[0]
    return (
        f"N = {first['n']}, d = {first['d']}, depth {first['depth']} "
        f"(`python -m bench precision`, `bench/results/precision.jsonl`):\n\n"
        f"{precision_table(lines)}"
    )


def benchmark() -> str:
    files = [(path, list(newest(read(path)).values())) for path in benchmark_files()]
    if not files:
        raise BenchError(f"no result files in {FOLDER}: python -m bench")
    parts = [part for path, results in files for part in measured(path, results)]
    if not any(result.driver for _, results in files for result in results):
        parts.append(NO_GPU)
    return "\n\n".join(parts)


BLOCKS: dict[str, Callable[[], str]] = {
    "demo": demo,
    "precision": precision,
    "benchmark": benchmark,
}


def measured(path: Path, results: list[Result]) -> list[str]:
    """What README says of one file."""
    about = vars(results[-1])
    parts = [
        f"{machine(about)} (`bench/results/{path.name}`):",
        markdown(benchmark_rows(results)),
    ]
    parts += [
        f"At N = {deep.n}, d = {deep.d}, {deep.dtype}: {deep.contender} takes "
        f"{report.times(deep, shallow):.2f} times what {shallow.contender} takes."
        for shallow, deep in report.depths(results)
    ]
    if picture := shown(path):
        parts.append(f"![time and memory of {SHOWN} against N](docs/{picture})")
    return parts


def benchmark_rows(results: list[Result]) -> list[tuple[str, ...]]:
    """A row a problem: the times of the three that matter, what they come to, and the memory."""
    rows: list[tuple[str, ...]] = [
        (
            "case (d, dtype)", "N", "eager", "compiled", "ours", "eager ÷ ours", "compiled ÷ ours",
            "peak eager", "peak compiled", "peak ours",
        )
    ]  # fmt: skip
    problems = dict.fromkeys(x.problem for x in results if x.contender == "ours")
    for problem in problems:
        among = {x.contender: x for x in results if x.problem == problem}
        three = [among.get(name) for name in ("eager", "compiled", "ours")]
        ratios = [report.ratio_to_ours(x, results) if x else None for x in three[:2]]
        case, n, d, dtype = problem
        rows.append(
            (
                f"{case} ({d}, {dtype})",
                str(n),
                *(time_cell(x) for x in three),
                *(ratio_cell(x) for x in ratios),
                *(report.size(x.peak_bytes) if x and x.peak_bytes else "–" for x in three),
            )
        )
    return rows


def time_cell(result: Result | None) -> str:
    if result is None or result.status == "unavailable":
        return "–"
    if result.status != "ok":
        return {"oom": "out of memory"}.get(result.status, result.status)
    return report.duration(result.p50)


def ratio_cell(ratio: float | None) -> str:
    return "–" if ratio is None else f"{ratio:.{1 if ratio >= 1 else 2}f}"


def precision_table(lines: Iterable[dict[str, Any]]) -> str:
    rows: list[tuple[str, ...]] = [("positives", "τ", "eager float32", "ours", "path")]
    for x in lines:
        pairs = (
            f"{x[f'{who}_loss']:.0e} / {x[f'{who}_gradient']:.0e}" for who in ("eager", "ours")
        )
        rows.append((x["positives"], str(x["temperature"]), *pairs, x["path"]))
    return markdown(rows)


def markdown(rows: list[tuple[str, ...]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def machine(about: dict[str, Any]) -> str:
    """Where, with what, and from which commit."""
    parts = [about["device"], f"driver {about['driver']}" if about.get("driver") else ""]
    if not about.get("driver"):
        parts.append(f"{about['threads']} threads")
    if torch := about.get("versions", {}).get("torch"):
        parts.append(f"torch {torch}")
    if commit := about.get("commit"):
        parts.append(f"commit {commit[:7]}{' with changes' if about.get('dirty') else ''}")
    parts.append(str(about.get("time", ""))[:10])
    return ", ".join(part for part in parts if part)


# ---- files ---------------------------------------------------------------------------------------


def json_lines(name: str) -> list[dict[str, Any]]:
    path = FOLDER / name
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except OSError as error:
        raise BenchError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError:
        raise BenchError(f"{path} is not JSON lines") from None
    if not lines:
        raise BenchError(f"{path} holds no result")
    return lines


def demo_lines() -> tuple[dict[str, Any], list[dict[str, Any]], list[dict[str, Any]]]:
    """Of demo.jsonl: what was run, the evaluations, and every line of its metrics."""
    about, *metrics = json_lines("demo.jsonl")
    evaluations = [line for line in metrics if "linear_probe" in line]
    if "epochs" not in about or not evaluations:
        raise BenchError(f"{FOLDER / 'demo.jsonl'} is not what python -m bench demo writes")
    return about, evaluations, metrics


# ---- pictures ------------------------------------------------------------------------------------


def shown(path: Path) -> str:
    """The picture of a file that README shows: of the most sizes; "" if there is none."""
    found = {x: g for x, g in plot.groups(path).items() if g[0].case == SHOWN}
    return max(found, key=lambda name: len({x.n for x in found[name]}), default="")


def pictures() -> dict[str, tuple[str, Callable[[Path], None]]]:
    """By name in docs: the digest of what it shows, and what draws it."""
    found: dict[str, tuple[str, Callable[[Path], None]]] = {}
    for path in benchmark_files():
        if name := shown(path):
            group = plot.groups(path)[name]
            found[name] = plot.digest(group), partial(plot.picture, group)
    _, _, metrics = demo_lines()
    if any("loss" in line for line in metrics):
        found["curves.png"] = plot.digest(metrics), draw_curves
    return found


def stale() -> list[str]:
    """The pictures that are missing, or older than their file."""
    return [
        name
        for name, (digest, _) in pictures().items()
        if not (plot.DOCS / name).exists() or plot.drawn_from(plot.DOCS / name) != digest
    ]


def draw_curves(path: Path) -> None:
    """As the trainer draws them."""
    from rkdo import report as trainer

    about, _, metrics = demo_lines()
    with tempfile.TemporaryDirectory() as folder:
        large = Path(folder) / path.name
        trainer.draw_curves(metrics, f"{about['method']} on {about['dataset']}", large)
        plot.shrink(large, path, plot.digest(metrics))
