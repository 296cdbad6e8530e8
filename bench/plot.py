"""Time and memory against N, log-log, with the hardware's floor: from result files alone.

    python -m bench plot [FILE ...] [--case NAME] [--out DIR]

A picture knows what it was drawn from: `drawn_from` reads it back, so that a test can tell one
that is older than its file.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from .errors import BenchError, Parser
from .measure import DTYPES
from .record import ADDED, FIELDS, RUNS, Result, benchmark_files, make_folder, newest, read

DOCS = Path(__file__).parent.parent / "docs"
# Okabe and Ito's colours, which the colour-blind can tell apart.
STYLE = {
    "ours": ("#D55E00", "o", "-"),
    "eager": ("#0072B2", "s", "-"),
    "compiled": ("#E69F00", "^", "-"),
    "chunked": ("#009E73", "v", "-"),
    "cross_entropy": ("#CC79A7", "D", "-"),
    "attention": ("#56B4E9", "P", "-"),
    "inf-cl": ("#666666", "X", "-"),
    "ours, graph": ("#D55E00", ".", ":"),
    "eager, graph": ("#0072B2", ".", ":"),
}
SOURCE = "Source"  # the PNG's key for what it was drawn from


def main(arguments: list[str]) -> int:
    parser = Parser(prog="python -m bench plot")
    parser.add_argument("files", nargs="*", type=Path, help="result files; all of them if none")
    parser.add_argument("--case", metavar="NAME", help="only this case")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="beside the first of FILES if not given; bench/runs without FILES",
    )
    chosen = parser.parse_args(arguments)
    files = chosen.files or benchmark_files()
    if not files:
        raise BenchError("no result files: python -m bench")
    beside = files[0].parent if chosen.files else RUNS
    for path in draw(files, chosen.out or beside, chosen.case):
        print(path)
    return 0


def draw(paths: list[Path], folder: Path, case: str | None = None) -> list[Path]:
    """One picture a file, case, dimension and dtype that has more than one N."""
    drawable = {
        folder / name: group
        for path in paths
        for name, group in groups(path).items()
        if case in (None, group[0].case)
    }
    if not drawable:
        of = "no case" if case is None else f"no case {case!r}"
        raise BenchError(
            f"nothing to draw: {of} has results at two sizes in {', '.join(map(str, paths))}"
        )
    make_folder(folder)
    for path, group in drawable.items():
        picture(group, path)
    return list(drawable)


def groups(path: Path) -> dict[str, list[Result]]:
    """What can be drawn of a file, by the name of the picture."""
    found: dict[str, list[Result]] = defaultdict(list)
    for x in newest(read(path)).values():
        if x.contender in STYLE:
            found[f"{path.stem}-{x.case}-d{x.d}-{x.dtype}.png"].append(x)
    return {name: group for name, group in sorted(found.items()) if len({x.n for x in group}) > 1}


def picture(group: list[Result], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator

    first = group[0]
    figure = Figure(figsize=(9, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    times, sizes = figure.subplots(1, 2)
    for name in (name for name in STYLE if any(x.contender == name for x in group)):
        mine = sorted((x for x in group if x.contender == name), key=lambda x: x.n)
        right = [x for x in mine if x.status == "ok" and x.p50]
        if not right and all(x.status == "unavailable" for x in mine):
            continue
        colour, marker, stroke = STYLE[name]
        label = name if len(right) == len(mine) else f"{name} ({fate(mine)})"
        look: dict[str, Any] = {"color": colour, "marker": marker, "linestyle": stroke}
        times.plot([x.n for x in right], [1e3 * (x.p50 or 0) for x in right], label=label, **look)
        held = [x for x in right if x.peak_bytes]
        sizes.plot([x.n for x in held], [(x.peak_bytes or 0) / 1e6 for x in held], **look)
    every = sorted({x.n for x in group})
    floor = sorted({(x.n, x.floor) for x in group if x.floor})
    if floor:
        heights = [1e3 * (seconds or 0) for _, seconds in floor]
        times.plot([n for n, _ in floor], heights, "k--", label="hardware's floor")
    gradients = 2 * first.d * DTYPES[first.dtype].itemsize
    sizes.plot(every, [n * gradients / 1e6 for n in every], "k--")
    for axes, what in ((times, "forward and backward (ms)"), (sizes, "peak memory (MB)")):
        axes.set(xscale="log", yscale="log", xlabel="N (rows and columns of S)", ylabel=what)
        axes.set_xticks(every, [str(n) for n in every])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.grid(True, which="major", alpha=0.3)
    longest = max((len(str(line.get_label())) for line in times.lines), default=0)
    columns = 5 if longest < 20 else 3
    figure.legend(loc="outside lower center", ncols=columns, fontsize="small", frameon=False)
    figure.suptitle(
        f"{first.case}, d = {first.d}, {first.dtype}, {first.device}", fontsize="medium"
    )
    save(figure, path, digest(group))


def fate(results: list[Result]) -> str:
    """Why a line ends early: the first size that did not work, and how."""
    lost = next(x for x in results if x.status != "ok" or not x.p50)
    what = {"oom": "out of memory"}.get(lost.status, lost.status)
    return f"{what} at N = {lost.n}"


def digest(drawn: object) -> str:
    return hashlib.sha256(json.dumps(drawn, default=first_fields).encode()).hexdigest()


def first_fields(result: Result) -> tuple[Any, ...]:
    """Without those that were added later: pictures do not show them."""
    return tuple(getattr(result, name) for name in FIELDS if name not in ADDED)


def save(figure: Any, path: Path, source: str) -> None:
    raw = io.BytesIO()
    figure.savefig(raw, format="png", dpi=120)
    shrink(raw, path, source)


def shrink(raw: io.BytesIO | Path, path: Path, source: str) -> None:
    """Writes a picture with few colours, and with what it was drawn from."""
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    about = PngInfo()
    about.add_text(SOURCE, source)
    with Image.open(raw) as image:
        few = image.convert("RGB").quantize(64, dither=Image.Dither.NONE)
    few.save(path, format="png", optimize=True, pnginfo=about)


def drawn_from(path: Path) -> str:
    """The digest of what a picture shows; "" if it does not say."""
    from PIL import Image

    with Image.open(path) as image:
        return str(image.info.get(SOURCE, ""))
