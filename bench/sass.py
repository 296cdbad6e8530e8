"""Reads machine code: the loop over the keys, and what one pass through it executes.

Understands the SASS that `cuobjdump` prints and the assembly that LLVM prints for AMD. The hot loop
is found from its back edge: of all ranges from a backward branch's target to the branch, the
outermost that holds a matrix instruction. The loop over chunks of a wide embedding lies inside it,
and what it holds counts once a chunk but for the first.

*Interior* counts are those of a tile that meets neither an edge nor an excluded diagonal: what a
forward branch inside the loop can skip is left out, unless the skipped part does work that every
tile needs (a memory access, a special function, a matrix product, a barrier). What sits after the
program's end (slow paths, waiting loops) is outside the range and so never counted.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

WORK = re.compile(
    r"MMA|MUFU|^LD[GSTL]|^ST[GST]|^BAR|^UT|SYNCS|mfma|^ds_|load|store|s_barrier|v_(exp|log|rcp)_"
)
MATRIX = re.compile(r"HMMA|HGMMA|UTC\w*MMA|v_mfma")
SPECIAL = re.compile(r"MUFU|^v_(exp|log|rcp|rsq|sqrt|sin|cos)_f")
GLOBAL = re.compile(r"^(LDG|STG|LDGSTS|UTMALDG|UBLKCP|global_|buffer_(load|store)|flat_)")
GLOBAL_LOAD = re.compile(r"^(LDG|UTMALDG|UBLKCP|global_load|buffer_load|flat_load)")
SHARED = re.compile(r"^(LDS|STS|ds_(read|write|load|store))")
LOCAL = re.compile(r"^(LDL|STL|scratch_)")
ATOMIC = re.compile(r"^(ATOM|RED(\.|G|$)|UREDG|UTMARED)|atomic|^ds_(add|or|and|max|min|cmpst)_")
TRAP = re.compile(r"^(BPT|s_trap)")
TENSOR_MEMORY = re.compile(r"^UTCATOMSWS")


@dataclass(frozen=True)
class Instruction:
    name: str
    operands: str
    conditional: bool
    jump: int | None  # index of the instruction it branches to


@dataclass(frozen=True)
class Product:
    """A matrix product of the loop, per entry of S."""

    inner: int  # multiply-adds: the embedding for S, the program's stripe of it for the gradient
    passes: int  # 3 for float32 in tf32x3
    size: int  # bytes an element of its operands


@dataclass(frozen=True)
class Tile:
    """What one pass of the hot loop computes, by one program."""

    rows: int
    cols: int
    threads: int
    wave: int  # threads that one instruction serves: 32 or 64
    similarity: Product
    gradient: Product | None
    chunks: int  # of the embedding; all but the first in a loop of their own

    @property
    def operand_bytes(self) -> int:
        """What the program has to load: a tile of keys, and the later chunks of both operands."""
        width = self.similarity.inner // self.chunks
        rows = self.cols + (self.chunks - 1) * (self.rows + self.cols)
        return rows * width * self.similarity.size

    @property
    def multiply_adds(self) -> int:
        products = [self.similarity, self.gradient]
        return self.rows * self.cols * sum(p.inner * p.passes for p in products if p)

    @property
    def tcgen05_steps(self) -> float:
        """tcgen05 instructions: 128 rows and 32 bytes of the contracted axis each."""
        deep = self.similarity.inner * self.similarity.passes * self.similarity.size
        if self.gradient:
            deep += self.cols * self.gradient.passes * self.gradient.size
        return -(-self.rows // 128) * deep / 32


@dataclass(frozen=True)
class Loop:
    """Everything is per entry of S: what a thread executes over the entries that it owns."""

    slots: float
    special: float
    matrix: float
    kinds: tuple[str, ...]  # of its matrix instructions
    multiply_adds: float  # by its matrix instructions, ÷ what the tile needs
    loads: dict[int, float] = field(default_factory=dict)  # from global memory, by bytes a thread
    shared: dict[int, float] = field(default_factory=dict)  # shared accesses, by bytes a thread
    local: float = 0.0  # spilled registers' traffic


def parse_sass(text: str) -> list[Instruction]:
    pattern = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;]*);")
    found = [(int(a, 16), guard, name, rest) for a, guard, name, rest in pattern.findall(text)]
    at = {address: index for index, (address, *_) in enumerate(found)}
    program = []
    for _, guard, name, rest in found:
        jump = None
        if name.split(".")[0] == "BRA":
            targets = re.findall(r"0x([0-9a-f]+)", rest)
            jump = at.get(int(targets[-1], 16)) if targets else None
        conditional = bool(guard) or re.search(r"\bU?P\d", rest) is not None
        program.append(Instruction(name, rest.strip(), conditional, jump))
    return program


def parse_amdgcn(text: str) -> list[Instruction]:
    lines: list[tuple[str, str]] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        code = line.split(";")[0].strip()
        if match := re.match(r"(\.LBB\w+):", code):
            labels[match[1]] = len(lines)
        elif re.match(r"[a-z]+_\w+(\s|$)", code) and not code.endswith(":"):
            name, _, rest = code.partition(" ")
            name, _, tabbed = name.partition("\t")
            lines.append((name, (tabbed + rest).strip()))
    return [
        Instruction(
            name,
            rest,
            name.startswith("s_cbranch"),
            labels.get(rest.strip()) if "branch" in name else None,
        )
        for name, rest in lines
    ]


def loops(program: Sequence[Instruction]) -> list[tuple[int, int]]:
    """First and last instruction of every loop, one a header."""
    ends: dict[int, int] = {}
    for index, instruction in enumerate(program):
        if instruction.jump is not None and instruction.jump < index:
            ends[instruction.jump] = max(index, ends.get(instruction.jump, 0))
    return sorted(ends.items())


def interior(program: Sequence[Instruction], first: int, last: int) -> list[int]:
    """The loop's instructions, without masks that a branch can skip."""
    skipped: set[int] = set()
    for index in range(first, last):
        jump = program[index].jump
        if jump is None or not program[index].conditional or not index < jump <= last:
            continue
        block = range(index + 1, jump)
        if not any(WORK.search(program[at].name) for at in block):
            skipped.update(block)
    return [index for index in range(first, last + 1) if index not in skipped]


def hot_loop(program: Sequence[Instruction], tile: Tile) -> Loop | None:
    """None if no loop holds a matrix instruction."""

    def products(index: int) -> float:
        return multiply_adds(program[index], tile)

    holding = [
        (first, last)
        for first, last in loops(program)
        if any(products(at) for at in range(first, last + 1))
    ]
    if not holding:
        return None
    outermost = [
        (first, last)
        for first, last in holding
        if not any(a <= first and last <= b and (a, b) != (first, last) for a, b in holding)
    ]
    first, last = max(outermost, key=lambda ends: sum(map(products, range(ends[0], ends[1] + 1))))
    executed = interior(program, first, last)
    inside = {
        at
        for a, b in holding
        if first <= a and b <= last and (a, b) != (first, last)
        for at in range(a, b + 1)
    }
    weights = {at: tile.chunks - 1.0 if at in inside else 1.0 for at in executed}
    return count(program, weights, tile)


def multiply_adds(instruction: Instruction, tile: Tile) -> float:
    """By one program, of the matrix instruction executed once by all its threads; 0 for others."""
    name = instruction.name
    waves = tile.threads // tile.wave
    if match := re.match(r"HGMMA\.(\d+)x(\d+)x(\d+)", name):
        m, n, k = map(int, match.groups())
        return m * n * k * waves / 4
    if match := re.match(r"HMMA\.16(8|16)(4|8|16)\b", name):
        return 16 * int(match[1]) * int(match[2]) * waves
    if match := re.match(r"HMMA\.168(4|8|16)\b", name):
        return 16 * 8 * int(match[1]) * waves
    if match := re.match(r"v_mfma_f32_(\d+)x(\d+)x(\d+)", name):
        m, n, k = map(int, match.groups())
        return m * n * k * waves
    if re.match(r"UTC\w*MMA", name):
        # Its shape hides in a descriptor: an equal share of what the tile needs.
        return tile.multiply_adds / tile.tcgen05_steps
    return 0.0


def width(name: str) -> int:
    """Bytes a thread moves by a memory instruction."""
    if "LDSM" in name or "STSM" in name:
        matrices = re.search(r"M8?T?8?8?\.?(\d)?$", name)
        return 4 * int(matrices[1]) if matrices and matrices[1] else 4
    if match := re.search(r"dwordx(\d)", name):
        return 4 * int(match[1])
    if match := re.match(r"ds_(?:read|write|load|store)(2?)\w*?_[bu](\d+)", name):
        return int(match[2]) // 8 * (2 if match[1] else 1)
    if match := re.search(r"\.(128|64|32)\b", name):
        return int(match[1]) // 8
    if re.search(r"\.[US](8)\b|byte", name):
        return 1
    return 2 if re.search(r"\.[US]16\b|short", name) else 4


def count(program: Sequence[Instruction], weights: dict[int, float], tile: Tile) -> Loop:
    per_entry = tile.threads / (tile.rows * tile.cols)
    slots = special = matrix = products = local = 0.0
    kinds: set[str] = set()
    loads: Counter[int] = Counter()
    shared: Counter[int] = Counter()
    for index, weight in weights.items():
        instruction = program[index]
        name = instruction.name
        slots += weight
        if MATRIX.search(name):
            matrix += weight
            kinds.add(kind(name))
            products += weight * multiply_adds(instruction, tile)
        elif SPECIAL.search(name):
            special += weight
        elif LOCAL.search(name):
            local += weight
        elif GLOBAL_LOAD.search(name) and "DEPBAR" not in name:
            loads[width(name)] += weight
        elif SHARED.search(name) and "[RZ]" not in instruction.operands:
            shared[width(name)] += weight
    return Loop(
        slots=slots * per_entry,
        special=special * per_entry,
        matrix=matrix * per_entry,
        kinds=tuple(sorted(kinds)),
        multiply_adds=products / tile.multiply_adds,
        loads={size: n * per_entry for size, n in sorted(loads.items())},
        shared={size: n * per_entry for size, n in sorted(shared.items())},
        local=local * per_entry,
    )


def kind(name: str) -> str:
    if "xf32" in name:
        return "mfma in one tf32 pass"
    for prefix, label in (("HGMMA", "wgmma"), ("UTC", "tcgen05"), ("HMMA", "mma"), ("v_mfma", "mfma")):
        if name.startswith(prefix):
            return label
    return name


def forbidden(program: Sequence[Instruction]) -> tuple[list[str], list[str]]:
    """Atomics and traps anywhere in the program, but for those that manage tensor memory.

    The allocation of tensor memory keeps a bit mask in shared memory with ATOMS.OR and ATOMS.AND,
    and guards its release with two traps.
    """
    managed = sum(1 for x in program if TENSOR_MEMORY.match(x.name))
    atomics = [x.name for x in program if ATOMIC.search(x.name)]
    if managed:
        atomics = [name for name in atomics if name not in ("ATOMS.OR", "ATOMS.AND")]
    traps = [x.name for x in program if TRAP.match(x.name)]
    if managed:
        traps = traps[2:]
    return atomics, traps
