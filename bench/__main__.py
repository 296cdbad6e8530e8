"""python -m bench            the cases on this machine: a table, and a JSON line a result
python -m bench static     what the compiler makes of the kernels, for four targets, anywhere
python -m bench plot       pictures from result files
python -m bench gpu        a CUDA machine's one command: correctness, then speed"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from .errors import BenchError


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        if arguments[:1] == ["static"]:
            from .static_table import main as static

            return static(arguments[1:])
        if arguments[:1] == ["plot"]:
            return plot(arguments[1:])
        if arguments[:1] == ["gpu"]:
            from .gpu import main as gpu

            return gpu(arguments[1:])
        return run(arguments)
    except BenchError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        print(f"bench: needs {error.name}, which is not installed", file=sys.stderr)
        return 2


def run(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="few sizes, few rounds, minutes")
    parser.add_argument("--case", action="append", metavar="NAME", help="only these cases")
    parser.add_argument("--contender", action="append", metavar="NAME", help="only these")
    parser.add_argument("--n", type=int, action="append", help="only these N")
    parser.add_argument("--dtype", action="append", metavar="NAME", help="fp32, bf16 or fp16")
    parser.add_argument("--device", default=None, help="cpu or cuda; cuda where there is one")
    parser.add_argument("--threads", type=int, help="of the CPU")
    parser.add_argument("--out", type=Path, metavar="FILE", help="a new file of JSON lines")
    parser.add_argument(
        "--against", type=Path, metavar="FILE", help="fail if ours is over 5 %% worse than in FILE"
    )
    parser.add_argument("--with", dest="new", type=Path, metavar="FILE",
                        help="compare FILE to --against instead of measuring")  # fmt: skip
    chosen = parser.parse_args(arguments)
    from . import report, session
    from .record import read

    before = read(chosen.against) if chosen.against else None
    if chosen.new and before is None:
        raise BenchError("--with needs --against")
    results = read(chosen.new) if chosen.new else session.run(chosen)
    if not chosen.new:
        print(report.table(results))
        print("\n" + "\n".join(report.ratios(results)))
    if before is None:
        return 0
    worse, notes = report.against(before, results)
    print("\n".join([*notes, *worse]) or f"nothing is over 5 % worse than in {chosen.against}")
    return 1 if worse else 0


def plot(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench plot")
    parser.add_argument("files", nargs="*", type=Path, help="result files; all of them if none")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="beside the first file if not given"
    )
    chosen = parser.parse_args(arguments)
    from . import plot as drawing
    from .record import FOLDER

    files = chosen.files or sorted(FOLDER.glob("*.jsonl"))
    if not files:
        raise BenchError(f"no result files in {FOLDER}")
    for path in drawing.draw(files, chosen.out or files[0].parent):
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
