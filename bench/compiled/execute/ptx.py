"""PTX text to statements: what is executed, with its line, its guard, its opcode and operands."""

from __future__ import annotations

import re
from bisect import bisect_right
from dataclasses import dataclass
from functools import cached_property

from ...errors import BenchError

NOT_CODE = re.compile(r"//[^\n]*|^\s*\.(?:loc|file)\b[^\n]*", re.M)
STATEMENT = re.compile(r"\s*(?:([{}])|([$%\w]+):(?!:)|([^;{}]*(?:\{[^}]*\}[^;{}]*)*);)")
INSTRUCTION = re.compile(r"(?:@(!?)([%$\w]+)\s+)?([a-z][\w.:]*)\s*(.*)$", re.S)
REGISTERS = re.compile(r"\.reg\s+\.(\w+)\s+(.*)$", re.S)
OPERAND = re.compile(r"[^,{\[]*(?:\{[^}]*\}|\[[^\]]*\])?[^,]*")
PARAMETER = re.compile(r"\.param\s+\.(\w+)[^,)]*?([$\w]+)\s*(?=[,)])")
WIDTHS = {"pred": 0, "b64": 8, "s64": 8, "u64": 8, "f64": 8}  # of registers, in bytes; else 4


@dataclass
class Statement:
    line: int  # of the text, from 1
    guard: str | None
    negated: bool
    opcode: str
    operands: list[str]


def split_operands(text: str) -> list[str]:
    """Commas part operands, but not within a list or an address."""
    if "{" not in text and "[" not in text:
        return [part.strip() for part in text.split(",")] if text.strip() else []
    return [part.strip() for part in OPERAND.findall(text) if part.strip()]


class Listing:
    """The body of one entry: statements, labels, registers' widths, parameters' types.

    Raises:
        BenchError: no such entry, or text that is not understood.
    """

    def __init__(self, text: str, kernel: str):
        self.text, self.kernel = text, kernel
        self.statements: list[Statement] = []
        self.labels: dict[str, int] = {}
        self.widths: dict[str, int] = {}
        self._families: list[tuple[str, int]] = []  # %r<n> declares %r0 to %r(n-1)
        head = re.search(rf"\.entry\s+{re.escape(kernel)}\s*\(", text)
        if not head:
            raise BenchError(f"the PTX has no entry {kernel}")
        start = text.index("{", head.end())
        closing = text.index(")", head.end())
        self.parameters = {
            name: (number, kind)
            for number, (kind, name) in enumerate(PARAMETER.findall(text[head.end() : closing + 1]))
        }
        self._read(start + 1)

    @cached_property
    def _line_starts(self) -> list[int]:
        return [0, *(match.end() for match in re.finditer("\n", self.text))]

    def line_of(self, position: int) -> int:
        return bisect_right(self._line_starts, position)

    def _read(self, start: int) -> None:
        # Blanked, not removed, so that positions stay those of the text.
        body = NOT_CODE.sub(lambda match: " " * len(match.group()), self.text[start:])
        scopes: list[dict[str, str]] = [{}]  # names declared in inner blocks: {name: its own name}
        serial, position = 0, 0
        while True:
            match = STATEMENT.match(body, position)
            if not match:
                line = self.line_of(start + position)
                raise BenchError(f"{self.kernel}: line {line} of the PTX is not understood")
            position = match.end()
            brace, label, statement = match.groups()
            if brace == "{":
                scopes.append({})
                serial += 1
            elif brace == "}":
                scopes.pop()
                if not scopes:
                    return
            elif label:
                self.labels[label] = len(self.statements)
            else:
                first = match.start(3) + len(statement) - len(statement.lstrip())
                self._statement(statement.strip(), start + first, scopes, serial)

    def _statement(
        self, text: str, position: int, scopes: list[dict[str, str]], serial: int
    ) -> None:
        if text.startswith("."):
            if found := REGISTERS.match(text):
                self._declare(found.group(1), found.group(2), scopes, serial)
            return
        found = INSTRUCTION.match(text)
        if not found:
            raise BenchError(
                f"{self.kernel}: line {self.line_of(position)} of the PTX is not understood: {text}"
            )
        negated, guard, opcode, rest = found.groups()
        if len(scopes) > 1 and any(scopes):
            rename = {name: own for scope in scopes for name, own in scope.items()}
            names = re.compile(r"(?<![\w.%$])(" + "|".join(map(re.escape, rename)) + r")(?![\w.])")
            rest = names.sub(lambda match: rename[match.group()], rest)
            guard = rename.get(guard, guard)
        self.statements.append(
            Statement(self.line_of(position), guard, bool(negated), opcode, split_operands(rest))
        )

    def _declare(self, kind: str, names: str, scopes: list[dict[str, str]], serial: int) -> None:
        width = WIDTHS.get(kind, 4)
        for name in (part.strip() for part in names.split(",")):
            if "<" in name:
                self._families.append((name[: name.index("<")], width))
            elif len(scopes) > 1:
                own = f"{name}@{serial}"
                scopes[-1][name] = own
                self.widths[own] = width
            else:
                self.widths[name] = width

    def width(self, register: str) -> int | None:
        """Bytes of a register, 0 for a predicate, None where there is no such register."""
        if register not in self.widths:
            family = register.rstrip("0123456789")
            for name, width in self._families:
                if name == family:
                    self.widths[register] = width
                    return width
            return None
        return self.widths[register]
