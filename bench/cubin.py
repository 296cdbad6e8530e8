"""NVIDIA's compiled kernels: what they need, and their machine code as text."""

from __future__ import annotations

import re
import struct
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import triton

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def disassemble(cubins: Sequence[bytes], arch: int) -> list[str]:
    """One text a cubin, by one run of nvdisasm: it takes 0.3 s to start. Addresses run on."""
    codes = [text_section(cubin) for cubin in cubins]
    listing = run("nvdisasm", "-b", f"SM{arch}", content=b"".join(codes))
    starts = [match.start() for match in re.finditer(r"^ +/\*[0-9a-f]{4,}\*/ .*$", listing, re.M)]
    if 16 * len(starts) != sum(map(len, codes)):
        raise RuntimeError(f"nvdisasm lists {len(starts)} instructions of SM{arch}")
    texts, first = [], 0
    for code in codes:
        last = first + len(code) // 16
        texts.append(listing[starts[first] : starts[last] if last < len(starts) else None])
        first = last
    return texts


def resources(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of stack (spills) a thread."""
    text = run("cuobjdump", "--dump-resource-usage", content=cubin)
    usage = re.search(r"REG:(\d+) STACK:(\d+)", text)
    if usage is None:
        raise RuntimeError("cuobjdump names no registers")
    return int(usage[1]), int(usage[2])


def run(tool: str, *options: str, content: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(content)
        file.flush()
        command = [str(TOOLS / tool), *options, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def text_section(cubin: bytes) -> bytes:
    """The instructions of the one kernel in an ELF file."""
    (table,) = struct.unpack_from("<Q", cubin, 0x28)
    size, count, names = struct.unpack_from("<HHH", cubin, 0x3A)
    sections = [struct.unpack_from("<IIQQQQ", cubin, table + k * size) for k in range(count)]
    strings = sections[names][4]
    found = [
        cubin[offset : offset + length]
        for name, _, _, _, offset, length in sections
        if cubin.startswith(b".text.", strings + name)
    ]
    if len(found) != 1:
        raise RuntimeError(f"{len(found)} kernels in a cubin")
    return found[0]
