"""Do the tests notice a wrong kernel?  Breaks the package one expression at a time and runs them.

    python tests/mutants.py                     all mutants of all files; exit 1 if any survives
    python tests/mutants.py moments small       of these files
    python tests/mutants.py --every 7           every seventh, for a quick look

A mutant is one change of an expression or statement inside a function: a mask or a `where` removed,
`<` to `<=`, + to −, a sign or an in-place operation dropped, a whole number off by one, alpha
swapped with 1 − alpha. Each runs in a fork of this process, which has imported all but the package.
"""

from __future__ import annotations

import argparse
import ast
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
SECONDS = 120  # a mutant that runs for longer is caught: it hangs
KERNELS = [
    "tests/test_losses.py::test_float64", "tests/test_ops.py::test_softmax_sums",
    "tests/test_ops.py::test_moments",
    "tests/test_ops.py::test_tiles_and_their_edges", "tests/test_ops.py::test_slopes_are_the",
    "tests/test_losses.py::test_rkdo_settings", "tests/test_losses.py::test_nt_xent",
    "tests/test_losses.py::test_learnable_temperature", "tests/test_losses.py::test_as_accurate",
    "tests/test_losses.py::test_probabilities",
    "tests/test_losses.py::test_a_row", "tests/test_losses.py::test_nan", "tests/test_bounds.py",
]  # fmt: skip
FILES = {  # the tests that a file's mutants have to pass, quickest first
    "moments": ["tests/test_ops.py::test_moments", *KERNELS[3:4], *KERNELS[6:]],
    "moments_gradient": [
        "tests/test_moments_gradient.py::test_d",
        "tests/test_ops.py::test_moments",
        *KERNELS[-1:],
    ],
    "quadrature": ["tests/test_one_pass.py", "tests/test_moments.py", "tests/test_losses.py"],
    "one_pass": ["tests/test_one_pass.py", "tests/test_tiled.py", "tests/test_losses.py"],
    "recursion_rows": ["tests/test_moments.py", "tests/test_losses.py", "tests/test_bounds.py"],
    "single_launch": ["tests/test_single_launch.py", "tests/test_bounds.py"],
    "gradient_stripes": ["tests/test_gradient_stripes.py", "tests/test_bounds.py"],
    "field_tiles": ["tests/test_field_ops.py", "tests/test_response.py"],
    "field_blocks": ["tests/test_field_ops.py", "tests/test_response.py"],
    "needs": ["tests/test_needs.py"],
    "rounding": ["tests/test_field_kernels.py", "tests/test_response.py"],
    "symmetric": ["tests/test_symmetric.py", "tests/test_bounds.py"],
    "softmax_sums": [*KERNELS[1:2], *KERNELS[4:]],
    "recursion": [*KERNELS[3:4], *KERNELS[5:]],
    "gradient_loop": [*KERNELS[1:2], *KERNELS[3:]],
    "primitives": KERNELS,
    **{
        name: ["tests/test_field_kernels.py", "tests/test_field_ops.py", "tests/test_bounds.py"]
        for name in (
            "field",
            "field_rows",
            "field_walk",
            "field_gradient",
            "field_snapshot",
            "field_mixture",
            "parts",
        )
    },
    "tiled": [*KERNELS[:-1], "tests/test_tiled.py"],
    "small": ["tests/test_losses.py::test_gradcheck", *KERNELS[:1], *KERNELS[5:10]],
    "rows": ["tests/test_losses.py::test_gradcheck", *KERNELS[3:-1], "tests/test_chebyshev.py"],
    "ratios": ["tests/test_losses.py::test_rkdo_settings", "tests/test_losses.py::test_golden"],
}
TRITON = (
    "moments", "moments_gradient", "recursion_rows", "single_launch", "gradient_stripes",
    "symmetric", "softmax_sums", "recursion", "gradient_loop", "primitives", "needs",
)  # fmt: skip
OPERATORS = {
    ast.Add: "-", ast.Sub: "+", ast.Mult: "/", ast.Div: "*", ast.Lt: "<=", ast.LtE: "<",
    ast.Gt: ">=", ast.GtE: ">", ast.Eq: "!=", ast.NotEq: "==",
}  # fmt: skip

# Mutants that change nothing to see: (file, a part of the changed line, why).
UNREAD = "nobody reads it unless the temperature is learnable"
EQUIVALENT = [
    ("field_blocks", "torch.where(self.alive, self.mass, 1)", "the row's weight is 0"),
    ("field_blocks", 'queries.device.type != "cpu"', "the other way is as exact, and slower"),
    ("small", "if learnable else loss.new_zeros(n, depth - 1)", UNREAD),
    ("small", "if learnable else loss.new_zeros(n, depth + 2)", UNREAD),
    ("primitives", "(offset <= first_j + (COLS - 1) + first_i)", "more tiles are looked at"),
    ("ratios", "torch.where(w <= 30, small", "both sides agree there to 1e-13"),
    ("ratios", "w.clamp_max(31)", "the other side is taken from 30 on"),
    ("ratios", "torch.full_like(log_q[:, 1], math", "any column: only its shape counts"),
    ("rows", "scale * peak, 1) + _log(mass)", "the other summand is −∞ there"),
]


@dataclass(frozen=True)
class Mutant:
    file: str
    line: int
    text: str  # the line
    before: str
    after: str
    source: str  # of the whole file, changed

    def __str__(self) -> str:
        return f"{self.file}.py:{self.line}: {self.before} → {self.after}    in {self.text.strip()}"


def mutants_of(file: str) -> Iterator[Mutant]:
    source = (ROOT / "rkdo_kernels" / f"{file}.py").read_bytes()
    lines = source.splitlines(keepends=True)
    starts = [sum(map(len, lines[:k])) for k in range(len(lines))]

    def span(node: ast.AST) -> tuple[int, int]:
        return (
            starts[node.lineno - 1] + node.col_offset,
            starts[node.end_lineno - 1] + node.end_col_offset,
        )

    seen = set()
    for function in functions(ast.parse(source)):
        for node in inside(function):
            for target, after in changes(node):
                if isinstance(target, ast.AST):
                    first, last = span(target)
                else:  # the operator between two nodes
                    left, right = (span(x) for x in target)
                    found = re.search(rb"[-+*/<>=!]+", source[left[1] : right[0]])
                    first, last = left[1] + found.start(), left[1] + found.end()
                before = source[first:last].decode()
                if before == after or (first, last, after) in seen:
                    continue
                seen.add((first, last, after))
                row = source[:first].count(b"\n")
                changed = source[:first] + after.encode() + source[last:]
                yield Mutant(
                    file, row + 1, lines[row].decode(), flat(before), flat(after), changed.decode()
                )


def flat(text: str) -> str:
    return " ".join(text.split())


def functions(tree: ast.Module) -> Iterator[ast.FunctionDef]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            yield node


def inside(function: ast.FunctionDef) -> Iterator[ast.AST]:
    """Nodes of the body, without docstrings and annotations."""
    stack: list[ast.AST] = list(function.body)
    while stack:
        node = stack.pop(0)
        if isinstance(node, ast.FunctionDef):
            continue
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            continue
        yield node
        fields = {k: v for k, v in ast.iter_fields(node) if k not in ("annotation", "returns")}
        for value in fields.values():
            stack += [x for x in (value if isinstance(value, list) else [value])
                      if isinstance(x, ast.AST)]  # fmt: skip


def changes(node: ast.AST) -> Iterator[tuple]:
    """(what to replace, by what): a node, or the operator between a pair of nodes."""
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        yield (node.left, node.right), OPERATORS[type(node.op)]
    if isinstance(node, ast.Compare) and type(node.ops[0]) in OPERATORS:
        yield (node.left, node.comparators[0]), OPERATORS[type(node.ops[0])]
    if isinstance(node, ast.AugAssign) and isinstance(node.op, ast.Add | ast.Sub):
        sign = "-=" if isinstance(node.op, ast.Add) else "+="
        yield (node.target, node.value), sign
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        yield node, f"({ast.unparse(node.operand)})"
    if isinstance(node, ast.Call):
        name = node.func.attr if isinstance(node.func, ast.Attribute) else ""
        if name == "where":
            yield node, f"({ast.unparse(node.args[1])})"
        if name in (
            "sub_",
            "add_",
            "neg_",
            "mul_",
            "div_",
            "clamp_min_",
            "clamp_min",
            "exp_",
            "amax",
        ):
            yield node, ast.unparse(node.func.value)
        for keyword in node.keywords:
            if keyword.arg == "mask":
                yield keyword.value, "None"
            if keyword.arg == "other":
                yield keyword.value, "7.0"
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        yield node, "pass"
    if isinstance(node, ast.If):
        yield node.test, f"not ({ast.unparse(node.test)})"
    if isinstance(node, ast.Constant) and type(node.value) is int:
        yield node, str(node.value + 1)
    if isinstance(node, ast.Name) and node.id == "alpha":
        yield node, "(1 - alpha)"


def is_equivalent(mutant: Mutant) -> bool:
    changed = mutant.source.splitlines()[mutant.line - 1]
    return any(file == mutant.file and part in changed for file, part, _ in EQUIVALENT)


def prepare(folder: Path, mutant: Mutant) -> None:
    for name in ("rkdo_kernels", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "rkdo_kernels" / f"{mutant.file}.py").write_text(mutant.source)
    (folder / "pytest.ini").write_text("[pytest]\n")


def run_tests(folder: Path, file: str, known: list[str] | None) -> int:
    """Exit status of the tests; with known = None, writes the names of those that fail anyway."""
    import pytest

    os.chdir(folder)
    os.environ["PYTHONPATH"] = str(folder)
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    sys.dont_write_bytecode = True
    sys.path.insert(0, str(folder))
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    signal.alarm(SECONDS if known is not None else 0)
    chosen = "triton or bounds or learnable or moments_gradient" if file in TRITON else "not triton"
    arguments = ["-q", "-p", "no:cacheprovider", "-k", chosen, *expand(FILES[file])]
    if known is None:
        failures = Failures()
        pytest.main(arguments, plugins=[failures])
        Path("failures").write_text("\n".join(failures.names))
        return 0
    return pytest.main(["-x", *arguments, *(f"--deselect={name}" for name in known)])


class Failures:
    def __init__(self) -> None:
        self.names: list[str] = []

    def pytest_runtest_logreport(self, report) -> None:
        if report.failed:
            self.names.append(report.nodeid)


def expand(paths: list[str]) -> list[str]:
    """Tests by the beginning of their names."""
    result = []
    for path in paths:
        file, _, prefix = path.partition("::")
        for node in ast.parse(Path(file).read_text()).body:
            if isinstance(node, ast.FunctionDef) and node.name.startswith(prefix or "test_"):
                result.append(f"{file}::{node.name}")
    return result


def fork(mutant: Mutant, known: list[str] | None) -> tuple[int, Path]:
    folder = Path(tempfile.mkdtemp(prefix="mutant"))
    prepare(folder, mutant)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            code = run_tests(folder, mutant.file, known)
        finally:
            os._exit(code)
    return child, folder


def failing_already(file: str) -> list[str]:
    source = (ROOT / "rkdo_kernels" / f"{file}.py").read_text()
    child, folder = fork(Mutant(file, 0, "", "", "", source), None)
    os.waitpid(child, 0)
    names = (folder / "failures").read_text().split("\n")
    shutil.rmtree(folder)
    return [name for name in names if name]


def survives(status: int) -> bool:
    return os.WIFEXITED(status) and os.WEXITSTATUS(status) == 0


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("files", nargs="*", help=", ".join(FILES))
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--from", type=int, default=0, dest="first")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--list", action="store_true")
    options = parser.parse_args()
    mutants = [m for f in options.files or FILES for m in mutants_of(f)]
    equivalent = [m for m in mutants if is_equivalent(m)]
    mutants = [m for m in mutants if not is_equivalent(m)][options.first :: options.every]
    if options.list:
        print(*mutants, sep="\n")
        return 0
    os.environ.setdefault("TRITON_INTERPRET", "1")
    import numpy  # noqa: F401
    import pytest  # noqa: F401
    import torch
    import triton  # noqa: F401

    torch.set_num_threads(1)
    started, waiting, running, survivors = time.time(), list(mutants), {}, []
    known: dict[str, list[str]] = {}
    while waiting or running:
        while waiting and len(running) < options.jobs:
            mutant = waiting.pop(0)
            if mutant.file not in known:
                known[mutant.file] = failing_already(mutant.file)
                for name in known[mutant.file]:
                    print(f"{mutant.file}: fails unchanged, not counted: {name}", flush=True)
            child, folder = fork(mutant, known[mutant.file])
            running[child] = mutant, folder
        child, status = os.wait()
        mutant, folder = running.pop(child)
        shutil.rmtree(folder, ignore_errors=True)
        if survives(status):
            survivors.append(mutant)
            print("SURVIVED", mutant, flush=True)
    print(
        f"{len(mutants)} mutants, {len(survivors)} survivors, {len(equivalent)} equivalent, "
        f"{time.time() - started:.0f} s"
    )
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
