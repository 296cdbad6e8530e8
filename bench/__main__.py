"""python -m bench            the cases on this machine: a table, and a JSON line a result
python -m bench static     what the compiler makes of the kernels, for four targets, anywhere
python -m bench execute    every kernel's PTX, executed on a CPU and held to float64
python -m bench fuzz       random cases of every loss against the truth, shrunk where one fails
python -m bench fits       whether every launch fits every device, and its options are known there
python -m bench gpu        a CUDA machine's one command: rates, correctness, speed, verdicts
python -m bench precision  digits of loss and gradient against float64
python -m bench demo       what README shows of `make demo`
python -m bench plot       pictures from result files
python -m bench readme     README's numbers and pictures, from the files in bench/results"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

from .errors import BenchError, Parser, at_least_one

ELSEWHERE = {  # the module whose main is the command
    "static": "static_table",
    "execute": "compiled.execute.command",
    "fuzz": "fuzz.command",
    "fits": "fits",
    "gpu": "gpu.command",
    "precision": "precision",
    "demo": "demo",
    "plot": "plot",
    "readme": "readme",
}
STOPPED = 130  # by Ctrl-C, as shells have it


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    command: Callable[[list[str]], int] = run
    try:
        if arguments and arguments[0] in ELSEWHERE:
            command = import_module(f".{ELSEWHERE[arguments[0]]}", __package__).main
            arguments = arguments[1:]
        return command(arguments)
    except BenchError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        print(f"bench: needs {error.name}, which is not installed", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return STOPPED


def run(arguments: list[str]) -> int:
    parser = Parser(
        prog="python -m bench", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="few sizes, few rounds, minutes")
    parser.add_argument("--case", action="append", metavar="NAME", help="only these cases")
    parser.add_argument("--contender", action="append", metavar="NAME", help="only these")
    parser.add_argument("--n", type=at_least_one, action="append", help="only these N")
    parser.add_argument("--dtype", action="append", metavar="NAME", help="fp32, bf16 or fp16")
    parser.add_argument("--device", default=None, help="cpu or cuda; cuda where there is one")
    parser.add_argument("--threads", type=at_least_one, help="of the CPU")
    parser.add_argument("--out", type=Path, metavar="FILE", help="a new file of JSON lines")
    parser.add_argument(
        "--against", type=Path, metavar="FILE", help="fail if ours is over 5 %% worse than in FILE"
    )
    parser.add_argument("--with", dest="new", type=Path, metavar="FILE",
                        help="compare FILE to --against instead of measuring")  # fmt: skip
    chosen = parser.parse_args(arguments)
    from . import report, session
    from .measure import QUICK, Effort
    from .record import Writer, default_path, read

    before = read(chosen.against) if chosen.against else []
    if chosen.new:
        if not before:
            raise BenchError("--with needs --against")
        results, complete = read(chosen.new), True
        report.comparable([*before, *results], results[0].device, results[0].threads)
    else:
        problems, device = session.prepare(chosen)
        report.comparable(before, *session.hardware(device))  # before the minutes that it takes
        writer = Writer(chosen.out or default_path(device))
        effort = QUICK if chosen.quick else Effort()
        complete, results = session.measure_all(problems, device, effort, writer), writer.results
        if results:
            print(f"{len(results)} results in {writer.path}\n")
        print(report.table(results))
        print("\n" + "\n".join(report.ratios(results)))
    if not complete:
        return STOPPED
    if not before:
        return 1 if session.at_fault(results) else 0
    worse, notes = report.against(before, results)
    fine = [] if worse else [f"nothing is over 5 % worse than in {chosen.against}"]
    print("\n".join([*notes, *worse, *fine]))
    return 1 if worse else 0


if __name__ == "__main__":
    sys.exit(main())
