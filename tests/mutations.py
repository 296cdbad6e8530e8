"""One change of a source file at a time, and those that change nothing to see.

A mutation is one change of an expression or statement inside a function: a mask or a `where`
removed, `<` to `<=`, + to −, a sign or an in-place operation dropped, a whole number off by one,
alpha swapped with 1 − alpha.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "rkdo_kernels"
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
    function: str  # file:line of its def
    text: str  # the line
    before: str
    after: str
    source: str  # of the whole file, changed

    def __str__(self) -> str:
        return f"{self.file}.py:{self.line}: {self.before} → {self.after}    in {self.text.strip()}"


def mutants_of(file: str) -> Iterator[Mutant]:
    source = (PACKAGE / f"{file}.py").read_bytes()
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
                    file, row + 1, f"{file}:{function.lineno}", lines[row].decode(), flat(before),
                    flat(after), changed.decode(),
                )  # fmt: skip


def is_equivalent(mutant: Mutant) -> bool:
    changed = mutant.source.splitlines()[mutant.line - 1]
    return any(file == mutant.file and part in changed for file, part, _ in EQUIVALENT)


def touching(file: str) -> str:
    """The file's source, in which every function that is called says so."""
    source = (PACKAGE / f"{file}.py").read_text()
    lines = source.splitlines(keepends=True)
    tree = ast.parse(source)
    for function in sorted(functions(tree), key=lambda f: -f.lineno):
        body = function.body
        if isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
            body = body[1:]
        if not body:
            continue  # a docstring alone
        first = min([body[0].lineno, *(d.lineno for d in getattr(body[0], "decorator_list", []))])
        line = lines[first - 1]
        if not line[: body[0].col_offset].strip():  # else it stands on the line of its def
            call = f'__touch__("{file}:{function.lineno}")'
            lines.insert(first - 1, line[: len(line) - len(line.lstrip())] + call + "\n")
    return "".join(lines)


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
