"""Reads machine code: the loop over the keys, and what one pass through it executes.

Understands the SASS that `cuobjdump` prints and the assembly that LLVM prints for AMD. The hot loop
is found from its back edge: of all loops the outermost that holds a matrix instruction. The loop
over chunks of a wide embedding lies inside it, and what it holds counts once a chunk but for the
first.

*Interior* counts are those of a tile that meets neither an edge nor an excluded diagonal: what a
forward branch inside the loop can skip is left out, unless the skipped part does work that every
tile needs (a memory access, a special function, a matrix product, a barrier). What the compiler
moved beyond the program's end (slow paths, waiting) is never counted.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

WORK = re.compile(
    r"MMA|MUFU|^LD[GSTL]|^ST[GST]|^BAR|^UT|SYNCS|mfma|^ds_|load|store|s_barrier|v_(exp|log|rcp)_"
)
MATRIX = re.compile(r"HMMA|HGMMA|UTC\w*MMA|v_mfma")
SPECIAL = re.compile(r"MUFU|^v_(exp|log|rcp|rsq|sqrt|sin|cos)_f")
GLOBAL = re.compile(r"^(LDG|STG|LDGSTS|UTMALDG|UBLKCP|global_|buffer_(load|store)|flat_)")
GLOBAL_LOAD = re.compile(r"^(LDG|UTMALDG|UBLKCP|global_load|buffer_load|flat_load)")
GLOBAL_STORE = re.compile(r"^(STG|global_store|buffer_store|flat_store)")
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

    own: int  # rows of the operand that the program keeps
    other: int  # rows of the one that it walks over
    threads: int
    wave: int  # threads that one instruction serves: 32 or 64
    similarity: Product
    gradient: Product | None
    chunks: int  # of the embedding; all but the first in a loop of their own
    steps: int = 1  # products with as many parts of the other operand, one after another
    read: int = 0  # bytes an entry that stay in no cache: the response field's block
    written: int = 0
    both: bool = False  # the program loads its own rows in the loop too

    @property
    def operand_bytes(self) -> int:
        """What a pass has to load: rows of the other, later chunks of both operands, the field."""
        width = self.similarity.inner // self.chunks
        rows = self.other + (self.chunks - 1) * (self.own + self.other) + self.both * self.own
        return rows * width * self.similarity.size + self.read * self.entries

    @property
    def entries(self) -> int:
        return self.own * self.other

    @property
    def multiply_adds(self) -> int:
        products = [self.similarity, self.gradient]
        return self.entries * sum(p.inner * p.passes for p in products if p)

    @property
    def tcgen05_steps(self) -> float:
        """tcgen05 instructions: 128 rows and 32 bytes of the contracted axis each."""
        deep = self.similarity.inner * self.similarity.passes * self.similarity.size * self.steps
        if self.gradient:
            deep += self.other * self.gradient.passes * self.gradient.size
        return -(-self.own // 128) * deep / 32


@dataclass(frozen=True)
class Loop:
    """Everything is per entry of S: what a thread executes over the entries that it owns."""

    slots: float
    special: float
    matrix: float
    kinds: tuple[str, ...]  # of its matrix instructions
    multiply_adds: float  # by its matrix instructions, ÷ what the tile needs
    loads: dict[int, float] = field(default_factory=dict)  # from global memory, by bytes a thread
    stores: dict[int, float] = field(default_factory=dict)
    shared: dict[int, float] = field(default_factory=dict)  # shared accesses, by bytes a thread
    local: float = 0.0  # spilled registers' traffic


def parse_sass(text: str) -> list[Instruction]:
    pattern = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;]*);")
    found = [(int(a, 16), guard, name, rest) for a, guard, name, rest in pattern.findall(text)]
    at = {address: index for index, (address, *_) in enumerate(found)}
    program = []
    for _, guard, name, rest in found:
        jump = None
        far = name == "CALL.REL.NOINC" and guard  # how ptxas leaves some loops; it does not return
        if name.split(".")[0] == "BRA" or far:
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


def loops(program: Sequence[Instruction]) -> list[frozenset[int]]:
    """Every natural loop's instructions, one a header, without what lies beyond the program's end.

    A backward jump alone makes no loop: compilers move rare paths to where they jump back from. In
    a loop the header dominates what leads back to it: no way goes there but through the header.
    """
    starts = sorted(
        {0}
        | {x.jump for x in program if x.jump is not None}
        | {at + 1 for at, x in enumerate(program) if x.jump is not None or ends(x)}
    )
    starts = [at for at in starts if at < len(program)]
    number = {at: block for block, at in enumerate(starts)}
    stops = [*starts[1:], len(program)]
    before: list[set[int]] = [set() for _ in starts]
    for block, stop in enumerate(stops):
        last = program[stop - 1]
        if last.jump is not None:
            before[number[last.jump]].add(block)
        if block + 1 < len(starts) and not (
            ends(last) or (last.jump is not None and not last.conditional)
        ):
            before[block + 1].add(block)
    dominators = dominate(before)
    found = []
    for header, previous in enumerate(before):
        body = {header}
        todo = [block for block in previous if dominators[block] >> header & 1]
        if not todo:
            continue
        while todo:
            at = todo.pop()
            if at not in body:
                body.add(at)
                todo.extend(before[at])
        over = next(
            (block for block in range(header, len(stops)) if ends(program[stops[block] - 1])),
            len(stops),
        )
        found.append(
            frozenset(
                at for block in body if block <= over for at in range(starts[block], stops[block])
            )
        )
    return found


def dominate(before: list[set[int]]) -> list[int]:
    """For every block the blocks that every path to it passes, as bits."""
    everything = (1 << len(before)) - 1
    result = [1, *[everything] * (len(before) - 1)]
    changed = True
    while changed:
        changed = False
        for block in range(1, len(before)):
            common = everything
            for previous in before[block]:
                common &= result[previous]
            common |= 1 << block
            changed |= common != result[block]
            result[block] = common
    return result


def ends(instruction: Instruction) -> bool:
    """Whether nothing follows."""
    name = instruction.name.split(".")[0]
    return name in ("EXIT", "RET", "s_endpgm", "BRX") and not instruction.conditional


def interior(program: Sequence[Instruction], body: frozenset[int]) -> list[int]:
    """The loop's instructions, without masks that a branch can skip."""
    last = max(body)
    skipped: set[int] = set()
    for index in body:
        jump = program[index].jump
        if jump is None or not program[index].conditional or not index < jump <= last:
            continue
        block = range(index + 1, jump)
        if not any(WORK.search(program[at].name) for at in block):
            skipped.update(block)
    return sorted(body - skipped)


def hot_loop(program: Sequence[Instruction], tile: Tile) -> Loop | None:
    """None if no loop holds a matrix instruction; of two that hold as many, the shorter one."""

    def products(body: frozenset[int]) -> float:
        return sum(multiply_adds(program[at], tile) for at in body)

    holding = [body for body in loops(program) if products(body)]
    outermost = [body for body in holding if not any(body < other for other in holding)]
    if not outermost:
        return None
    hot = max(outermost, key=lambda body: (products(body), -len(body)))
    inside = frozenset().union(*(body for body in holding if body < hot))
    weights = {at: tile.chunks - 1.0 if at in inside else 1.0 for at in interior(program, hot)}
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
    per_entry = tile.threads / tile.entries
    slots = special = matrix = products = local = 0.0
    kinds: set[str] = set()
    loads: dict[int, float] = defaultdict(float)
    stores: dict[int, float] = defaultdict(float)
    shared: dict[int, float] = defaultdict(float)
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
        elif GLOBAL_STORE.search(name):
            stores[width(name)] += weight
        elif SHARED.search(name) and "[RZ]" not in instruction.operands:
            shared[width(name)] += weight
    return Loop(
        slots=slots * per_entry,
        special=special * per_entry,
        matrix=matrix * per_entry,
        kinds=tuple(sorted(kinds)),
        multiply_adds=products / tile.multiply_adds,
        loads={size: n * per_entry for size, n in sorted(loads.items())},
        stores={size: n * per_entry for size, n in sorted(stores.items())},
        shared={size: n * per_entry for size, n in sorted(shared.items())},
        local=local * per_entry,
    )


def kind(name: str) -> str:
    if "xf32" in name:
        return "mfma in one tf32 pass"
    for prefix, label in (
        ("HGMMA", "wgmma"),
        ("UTC", "tcgen05"),
        ("HMMA", "mma"),
        ("v_mfma", "mfma"),
    ):
        if name.startswith(prefix):
            return label
    return name


def forbidden(program: Sequence[Instruction]) -> tuple[list[str], list[str]]:
    """Atomics and traps anywhere in the program, but for those that manage tensor memory.

    The allocation of tensor memory keeps a bit mask in shared memory with ATOMS.OR and ATOMS.AND,
    and guards that with three traps at most.
    """
    managed = sum(1 for x in program if TENSOR_MEMORY.match(x.name))
    atomics = [x.name for x in program if ATOMIC.search(x.name)]
    if managed:
        atomics = [name for name in atomics if name not in ("ATOMS.OR", "ATOMS.AND")]
    traps = [x.name for x in program if TRAP.match(x.name)]
    if managed:
        traps = traps[3:]
    return atomics, traps
