"""Time and memory against N, log-log, with the hardware's floor: from result files alone."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

from .errors import BenchError
from .record import Result, newest, read

STYLE = {
    "ours": ("C3", "o"),
    "eager": ("C0", "s"),
    "compiled": ("C1", "^"),
    "chunked": ("C2", "v"),
    "cross_entropy": ("C4", "D"),
    "attention": ("C5", "P"),
    "inf-cl": ("C6", "X"),
    "ours, graph": ("C8", "."),
    "eager, graph": ("C9", "."),
}


def draw(paths: list[Path], folder: Path) -> list[Path]:
    """One picture a case, dimension, dtype and device that has more than one N."""
    import matplotlib

    matplotlib.use("Agg")
    results = [result for path in paths for result in read(path)]
    groups: dict[tuple[str, int, str, str], list[Result]] = defaultdict(list)
    for result in newest_by_device(results):
        groups[result.case, result.d, result.dtype, result.device].append(result)
    drawable = {key: group for key, group in groups.items() if len({x.n for x in group}) > 1}
    if not drawable:
        raise BenchError("nothing to draw: no case has results at two sizes")
    folder.mkdir(parents=True, exist_ok=True)
    return [picture(group, folder) for _, group in sorted(drawable.items())]


def newest_by_device(results: list[Result]) -> list[Result]:
    devices = {result.device for result in results}
    return [
        result
        for device in sorted(devices)
        for result in newest(x for x in results if x.device == device).values()
    ]


def picture(group: list[Result], folder: Path) -> Path:
    from matplotlib import pyplot

    first = group[0]
    figure, (times, sizes) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    names = [name for name in STYLE if any(x.contender == name for x in group)]
    for name in names:
        mine = sorted((x for x in group if x.contender == name), key=lambda x: x.n)
        colour, marker = STYLE[name]
        right = [x for x in mine if x.status == "ok" and x.p50]
        label = name if len(right) == len(mine) else f"{name} ({fate(mine)})"
        look = {"color": colour, "marker": marker, "label": label}
        times.plot([x.n for x in right], [1e3 * (x.p50 or 0) for x in right], **look)
        held = [x for x in right if x.peak_bytes]
        sizes.plot([x.n for x in held], [(x.peak_bytes or 0) / 1e6 for x in held], **look)
    floor = sorted({(x.n, x.floor) for x in group if x.floor})
    if floor:
        times.plot(
            [n for n, _ in floor],
            [1e3 * (t or 0) for _, t in floor],
            "k--",
            label="hardware's floor",
        )
    for axes, what in ((times, "forward and backward, ms"), (sizes, "peak memory, MB")):
        axes.set(xscale="log", yscale="log", xlabel="N", ylabel=what)
        axes.grid(True, which="major", alpha=0.3)
    times.legend(fontsize="small")
    figure.suptitle(f"{first.case}, d={first.d}, {first.dtype}, {first.device}", fontsize="medium")
    kind = "gpu" if first.driver else "cpu"
    path = folder / f"{kind}-{first.case}-d{first.d}-{first.dtype}.png"
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    return path


def fate(results: list[Result]) -> str:
    """Why a line ends early: the first size that did not work, and how."""
    lost = next(x for x in results if x.status != "ok")
    return f"{lost.status} at N={lost.n}"
