"""Statements to what the interpreter reads: instructions, operands' slots, values at the start."""

from __future__ import annotations

import re
import struct
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from ...errors import BenchError
from . import uneven
from .opcodes import HAND_WRITTEN, OPERATIONS, spelling, width
from .ptx import Listing, Statement

INSTRUCTION = struct.Struct("<10i2q")  # warp.h: Instruction
TARGET = 12  # where in it a branch's target stands
BRANCH, BARRIER, RETURN, FIRST_OF_TABLE = range(4)
ON_WGMMA_REGISTERS = -3  # as a target: not wgmma itself, and has a register of one
MOVES_ON_WGMMA = -4  # the same, and is a mov
ADDRESS = re.compile(r"\[\s*(.+?)\s*(?:\+\s*(-?\w+)\s*)?\]$")
NUMBER = re.compile(r"-?(?:0x[0-9a-fA-F]+|\d+)U?$")
SPECIAL = (
    "%tid.x", "%tid.y", "%tid.z", "%ctaid.x", "%ctaid.y", "%ctaid.z", "%nctaid.x", "%nctaid.y",
    "%nctaid.z", "%ntid.x", "%laneid", "%warpid",
)  # fmt: skip
SPECIAL_WIDTH = 16  # launch.c: the value is a number of the list
NUMBERS = {name: number for number, name in enumerate([*OPERATIONS, *HAND_WRITTEN], FIRST_OF_TABLE)}
KINDS = {"bf16": 0, "f16": 1, "tf32": 2}
MEMORY_MODIFIERS = {"volatile", "relaxed", "weak", "gpu", "sys", "cta"}


@dataclass
class Fields:
    """An instruction besides its guard and its line."""

    name: str
    slots: list[int]
    size: int = 0
    vector: int = 0
    width: int = 0
    offset: int = 0
    offset2: int = 0
    target: int = -1


@dataclass
class Program:
    code: bytearray = field(default_factory=bytearray)
    count: int = 0
    lines: list[int] = field(default_factory=list)  # an instruction's, of the text
    operands: array[int] = field(default_factory=lambda: array("i"))
    slots: int = 0
    constants: list[tuple[int, int, int]] = field(default_factory=list)  # slot, width, bits
    parameters: list[tuple[int, int, int, str]] = field(default_factory=list)  # slot, width, ...
    parameter_count: int = 0
    grain: int = 4  # log2 of the bytes of shared memory that are traced together
    products: bool = False
    uneven: tuple[int, ...] = ()  # lines, see uneven.py


def assemble(text: str, kernel: str) -> Program:
    """The program of an entry.

    Raises:
        BenchError: an operation that the interpreter does not have, by its line.
    """
    listing = Listing(text, kernel)
    program = _Assembler(listing).program
    program.uneven = tuple(uneven.lines(listing))
    return program


class _Assembler:
    def __init__(self, listing: Listing):
        self.listing = listing
        self.program = Program(parameter_count=len(listing.parameters))
        self.registers: dict[object, int] = {}
        # A statement may become several instructions: places of the former, for labels.
        self.places: list[int] = []
        self.branches: list[tuple[int, str]] = []
        self.wgmma_registers: set[int] = set()
        for statement in listing.statements:
            self.places.append(self.program.count)
            try:
                self.statement(statement)
            except (BenchError, KeyError, ValueError, IndexError) as error:
                detail = f" ({error})" if isinstance(error, BenchError) else ""
                raise BenchError(
                    f"{listing.kernel}, line {statement.line} of the PTX: "
                    f"the interpreter has no {statement.opcode}{detail}"
                ) from error
        self.places.append(self.program.count)
        for at, label in self.branches:
            place = self.places[listing.labels[label]]
            struct.pack_into("<i", self.program.code, at * INSTRUCTION.size + TARGET, place)
        if self.wgmma_registers:
            self.mark_wgmma_registers()

    def mark_wgmma_registers(self) -> None:
        """Whatever touches a register of wgmma, or one that is copied into such a register."""
        code, operands = self.program.code, self.program.operands
        instructions = list(INSTRUCTION.iter_unpack(bytes(code)))
        moves = {NUMBERS["mov.b32"], NUMBERS["mov.f32"]}
        copies = [operands[x[5] : x[5] + 2] for x in instructions if x[0] in moves]
        traced, before = set(self.wgmma_registers), 0
        while len(traced) > before:
            before = len(traced)
            traced.update(source for to, source in copies if to in traced)
        for at, (op, _, _, _, _, first, count, *_) in enumerate(instructions):
            if not traced.isdisjoint(operands[first : first + count]) and op != NUMBERS["wgmma"]:
                mark = MOVES_ON_WGMMA if op in moves else ON_WGMMA_REGISTERS
                struct.pack_into("<i", code, at * INSTRUCTION.size + TARGET, mark)

    # ---- operands

    def fresh(self, size: int) -> int:
        slot = self.program.slots
        self.program.slots += 2 if size == 8 else 1
        return slot

    def constant(self, bits: int, size: int) -> int:
        bits &= (1 << 8 * (size or 8)) - 1
        key = ("constant", bits, size)
        if key not in self.registers:
            self.registers[key] = self.fresh(size)
            self.program.constants.append((self.registers[key], size, bits))
        return self.registers[key]

    def special(self, name: str) -> int:
        if name not in self.registers:
            self.registers[name] = self.fresh(4)
            number = SPECIAL.index(name)
            self.program.constants.append((self.registers[name], SPECIAL_WIDTH, number))
        return self.registers[name]

    def parameter(self, name: str, kind: str, size: int) -> int:
        number, _ = self.listing.parameters[name]
        key = ("parameter", number, kind, size)
        if key not in self.registers:
            self.registers[key] = self.fresh(size)
            self.program.parameters.append((self.registers[key], size, number, kind))
        return self.registers[key]

    def register(self, name: str) -> int:
        if name not in self.registers:
            size = self.listing.width(name)
            if size is None:
                raise BenchError(f"no register {name}")
            self.registers[name] = self.fresh(size)
        return self.registers[name]

    def size_of(self, text: str, otherwise: int) -> int:
        """Bytes of a register; numbers and special registers are what is wanted."""
        size = self.listing.width(text)
        return otherwise if size is None else size

    def operand(self, text: str, size: int) -> int:
        if text == "_":
            return self.registers.setdefault(("sink", size), self.fresh(size))
        if text.startswith(("0f", "0F", "0d", "0D")):
            return self.constant(int(text[2:], 16), size)
        if NUMBER.match(text):
            return self.constant(int(text.rstrip("U"), 0), size)
        if text == "global_smem":
            return self.constant(0, size)
        if text in ("true", "false"):
            return self.constant(int(text == "true"), 0)
        if text in SPECIAL:
            return self.special(text)
        return self.register(text)

    def address(self, text: str, size: int) -> tuple[int, int]:
        found = ADDRESS.match(text)
        if not found:
            raise BenchError(f"no address: {text}")
        base, offset = found.groups()
        if base == "global_smem" or NUMBER.match(base):
            return self.constant(0 if base == "global_smem" else int(base, 0), size), int(
                offset or "0", 0
            )
        if self.listing.width(base) != size:
            raise BenchError(f"{base} is not an address of {8 * size} bits")
        return self.register(base), int(offset or "0", 0)

    # ---- statements

    def emit(self, statement: Statement, op: int, fields: Fields) -> None:
        program = self.program
        guard = -1 if statement.guard is None else self.register(statement.guard)
        program.code += INSTRUCTION.pack(
            op, guard, statement.negated, fields.target, statement.line,
            len(program.operands), len(fields.slots), fields.size, fields.vector, fields.width,
            fields.offset, fields.offset2,
        )  # fmt: skip
        program.operands.extend(fields.slots)
        program.lines.append(statement.line)
        program.count += 1

    def statement(self, statement: Statement) -> None:
        opcode = statement.opcode
        if opcode in ("bra", "bra.uni"):
            self.branches.append((self.program.count, statement.operands[0]))
            self.emit(statement, BRANCH, Fields("", []))
        elif opcode in ("bar.sync", "barrier.sync.aligned", "barrier.sync"):
            if statement.operands != ["0"]:
                raise BenchError("one barrier only, of all threads")
            self.emit(statement, BARRIER, Fields("", []))
        elif opcode in ("ret", "exit"):
            self.emit(statement, RETURN, Fields("", []))
        else:
            for fields in self.lowered(statement):
                self.emit(statement, NUMBERS[fields.name], fields)

    def lowered(self, statement: Statement) -> Iterator[Fields]:
        opcode, operands = statement.opcode, statement.operands
        parts = opcode.replace("shared::cta", "shared").split(".")
        for start, lower in LOWER.items():
            if opcode.startswith(start):
                yield lower(self, parts, operands)
                return
        if parts[0] in ("ld", "st"):
            yield self.memory(parts, operands)
        elif parts[0] == "mov" and any(text.startswith("{") for text in operands):
            yield self.packing(parts, operands)
        elif parts[0] == "selp":
            size = width(parts[-1])
            slots = [self.operand(text, size) for text in operands[:3]]
            slots.append(self.operand(operands[3], 0))
            yield Fields(f"selp.{8 * size}", slots)
        elif opcode in HAND_WRITTEN:
            yield Fields(opcode, [self.operand(text, 0) for text in operands])
        else:
            yield from self.one_lane(spelling(opcode), operands)

    def one_lane(self, name: str, operands: list[str]) -> Iterator[Fields]:
        """An operation of the table. A register of another width is converted around it."""
        types = OPERATIONS[name].types
        if len(operands) != len(types):
            raise BenchError(f"{len(types)} operands, not {len(operands)}")
        slots = []
        after = []
        for at, (text, kind) in enumerate(zip(operands, types, strict=True)):
            size = width(kind)
            own = self.size_of(text, size)
            if own == size or text == "_":
                slots.append(self.operand(text, size))
                continue
            between = self.fresh(size)
            slots.append(between)
            if at == 0:  # signed results are extended, as PTX does for wider registers
                sign = "s" if kind.startswith("s") else "u"
                change = f"cvt.{sign}{8 * own}.{sign}{8 * size}"
                after.append(Fields(change, [self.register(text), between]))
            else:
                change = f"cvt.u{8 * size}.u{8 * own}"
                yield Fields(change, [between, self.register(text)])
        yield Fields(name, slots)
        yield from after

    def memory(self, parts: list[str], operands: list[str]) -> Fields:
        load, space, kind = parts[0] == "ld", parts[1], parts[-1]
        if load and space == "param":
            size = self.size_of(operands[0].strip("{} "), 4)
            name = ADDRESS.match(operands[1])
            if not name or name.group(2):
                raise BenchError("a part of a parameter")
            slot = self.parameter(name.group(1), kind, size)
            return Fields(f"mov.b{8 * size}", [self.operand(operands[0].strip("{} "), size), slot])
        known = [part for part in parts[2:-1] if part not in MEMORY_MODIFIERS]
        known = [part for part in known if not part.startswith(("L1::", "L2::"))]
        if space in MEMORY_MODIFIERS:
            space = next(part for part in parts if part in ("global", "shared"))
            known.remove(space)
        vector = 1
        if known and known[0] in ("v2", "v4"):
            vector = int(known.pop(0)[1])
        if known or space not in ("global", "shared"):
            raise BenchError(f"not known: {' '.join(known) or space}")
        data, memory = operands if load else reversed(operands)
        names = [text.strip() for text in data.strip("{} ").split(",")]
        size = int(kind[1:]) // 8
        least = 8 if size == 8 else 4
        wide = {self.size_of(text, least) for text in names}
        if len(wide) != 1 or (load and kind[0] == "s" and size < max(wide)):
            raise BenchError("registers of different widths")
        at, offset = self.address(memory, 8 if space == "global" else 4)
        if space == "shared":
            self.traced(size)
        (own,) = wide
        slots = [self.operand(text, own) for text in names]
        return Fields(f"{parts[0]}.{space}", [*slots, at], size, vector, own, offset)

    def traced(self, size: int) -> None:
        self.program.grain = min(self.program.grain, size.bit_length() - 1)

    def packing(self, parts: list[str], operands: list[str]) -> Fields:
        pack = operands[1].startswith("{")
        one, many = operands if pack else reversed(operands)
        names = [text.strip() for text in many.strip("{} ").split(",")]
        size = int(parts[-1][1:]) // 8
        slots = [self.operand(text, 4) for text in names]
        return Fields(
            "pack" if pack else "unpack", [self.operand(one, max(size, 4)), *slots],
            size // len(names), width=max(size, 4),
        )  # fmt: skip

    def shuffle(self, parts: list[str], operands: list[str]) -> Fields:
        if parts[-1] != "b32":
            raise BenchError("32 bits only")
        result, _, inside = operands[0].partition("|")
        slots = [self.operand(text, 4) for text in (result, *operands[1:])]
        if inside:
            slots.append(self.operand(inside, 0))
        return Fields("shfl", slots, ("idx", "up", "down", "bfly").index(parts[2]))

    def redux(self, parts: list[str], operands: list[str]) -> Fields:
        slots = [self.operand(text, 4) for text in operands]
        kind = ("min", "max", "add", "and", "or", "xor").index(parts[2])
        if parts[-1] not in ("s32", "u32", "b32"):
            raise BenchError("integers of 32 bits only")
        return Fields("redux", slots, kind, int(parts[-1] == "s32"))

    def copy(self, parts: list[str], operands: list[str]) -> Fields:
        to, offset = self.address(operands[0], 4)
        source, offset2 = self.address(operands[1], 8)
        size = int(operands[2], 0)
        count = self.operand(operands[3] if len(operands) > 3 else operands[2], 4)
        self.traced(size)
        return Fields("cp.async", [to, source, count], size, offset=offset, offset2=offset2)

    def counted(self, parts: list[str], operands: list[str]) -> Fields:
        name = ".".join(part for part in parts if part not in ("sync", "aligned"))
        return Fields(name, [], offset=int(operands[0], 0) if operands else 0)

    def matrix(self, parts: list[str], operands: list[str]) -> Fields:
        load = parts[0] == "ldmatrix"
        if parts[-1] != "b16" or "m8n8" not in parts:
            raise BenchError("8 × 8 of 16 bits only")
        data, memory = operands if load else reversed(operands)
        at, offset = self.address(memory, 4)
        slots = [self.operand(text.strip(), 4) for text in data.strip("{} ").split(",")]
        return Fields(
            parts[0], [*slots, at], vector=len(slots), width=int("trans" in parts), offset=offset
        )

    def mma(self, parts: list[str], operands: list[str]) -> Fields:
        shape, layouts, kinds = parts[3], parts[4:6], parts[6:]
        if layouts != ["row", "col"] or kinds[0] != "f32" or kinds[3] != "f32":
            raise BenchError("row by column, added up in f32, only")
        if kinds[1] != kinds[2] or not shape.startswith("m16n8k"):
            raise BenchError("m16n8 of one type only")
        slots = [
            self.operand(text.strip(), 4)
            for group in operands
            for text in group.strip("{} ").split(",")
        ]
        name = "mma.tf32" if kinds[1] == "tf32" else "mma.halves"
        return Fields(name, slots, KINDS[kinds[1]], int(shape[6:]))

    def wgmma(self, parts: list[str], operands: list[str]) -> Fields:
        self.program.products = True
        found = re.fullmatch(r"m64n(\d+)k(8|16)", parts[4])
        if not found or parts[5] != "f32" or parts[6] != parts[7]:
            raise BenchError("m64, added up in f32, only")
        d, a, b, scale, *signs = operands
        flags = 0
        if a.startswith("{"):
            flags |= 1
        first = [
            self.operand(text.strip(), 4 if flags else 8) for text in a.strip("{} ").split(",")
        ]
        numbers = [int(text, 0) for text in signs] or [1, 1]
        transposed = numbers[2:]
        if flags:
            transposed = [0, *transposed]
        flags |= 2 * any(transposed[:1]) | 4 * any(transposed[1:])
        flags |= 8 * (numbers[0] == -1) | 16 * (numbers[1] == -1)
        slots = [*first, self.operand(b, 8), self.operand(scale, 0)]
        slots += [self.operand(text.strip(), 4) for text in d.strip("{} ").split(",")]
        self.wgmma_registers.update(first if len(first) > 1 else (), slots[len(first) + 2 :])
        return Fields("wgmma", slots, int(found.group(1)), KINDS[parts[-1]], flags)


LOWER: dict[str, Callable[[_Assembler, list[str], list[str]], Fields]] = {
    "cp.async.ca": _Assembler.copy,
    "cp.async.cg": _Assembler.copy,
    "cp.async.": _Assembler.counted,
    "ldmatrix": _Assembler.matrix,
    "stmatrix": _Assembler.matrix,
    "mma.sync": _Assembler.mma,
    "wgmma.mma_async": _Assembler.wgmma,
    "wgmma.": _Assembler.counted,
    "shfl.sync": _Assembler.shuffle,
    "redux.sync": _Assembler.redux,
    "fence.proxy.async": lambda self, parts, operands: Fields("fence.proxy.async", []),
    "fence.": lambda self, parts, operands: Fields("nothing", []),
    "membar.": lambda self, parts, operands: Fields("nothing", []),
    "trap": lambda self, parts, operands: Fields("trap", []),
    "bar.warp.sync": lambda self, parts, operands: Fields(
        "bar.warp.sync", [self.operand(operands[0], 4)]
    ),
}  # by the start of the opcode, in this order
