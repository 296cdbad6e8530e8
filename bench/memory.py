"""Peak memory of forward and backward above the inputs.

On a CPU it is the growth of the resident set, in a process of its own. (On a GPU it is the
allocator's peak: gpu/device.py.)
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterator
from pathlib import Path

import torch

from .apart import stream
from .cases import Case, listed, named
from .contenders import Contender

MMAP_THRESHOLD = -3  # of mallopt


def apart(
    case: Case, contender: Contender, variant: int | None, n: int, d: int, dtype: str
) -> int | None:
    """Bytes, of a CPU's contender; None where they cannot be measured."""
    if not listed(case) or not Path("/proc/self/clear_refs").exists():
        return None
    (found,) = stream(in_child, case.name, contender.name, variant, n, d, dtype)
    return found


def in_child(
    case: str, contender: str, variant: int | None, n: int, d: int, dtype: str
) -> Iterator[int]:
    # Blocks past 64 KB go back to the system when they are freed: the warm-up leaves nothing.
    ctypes.CDLL(None).mallopt(MMAP_THRESHOLD, 1 << 16)
    (found,) = (x for x in named(case).contenders if x.name == contender)
    yield on_cpu(named(case), found, variant, n, d, dtype)


def on_cpu(
    case: Case, contender: Contender, variant: int | None, n: int, d: int, dtype: str
) -> int:
    from .measure import DTYPES, build, forward_and_backward

    inputs = case.inputs(n, d, DTYPES[dtype], "cpu")
    loss = build(contender, n, torch.device("cpu"), variant)
    forward_and_backward(loss, inputs)
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    before = status("VmRSS")
    kept = forward_and_backward(loss, inputs)
    after = status("VmHWM")
    del kept
    return max(0, after - before)


def status(name: str) -> int:
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return 1024 * int(found[1]) if found else 0
