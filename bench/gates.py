"""What the machine code must be like, whatever the speed: one function a gate.

A gate takes what was found of a kernel and answers in one line, or "" if all is well.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatch

from rkdo_kernels.launch_tables import triton_before

from .static import Resources
from .targets import TARGETS


def fits(found: Resources) -> str:
    device = TARGETS[found.target]
    if found.fits:
        return ""
    return (
        f"needs {found.shared_bytes} of {device.shared_limit} bytes of shared memory and "
        f"{found.tensor_columns} of {device.tensor_memory} columns of tensor memory"
    )


def no_spills(found: Resources) -> str:
    traffic = found.loop.local if found.loop else 0
    if not found.spill_bytes and not traffic:
        return ""
    return f"{found.spill_bytes} bytes of spills a thread, {traffic:.2f} accesses an entry"


def no_traps(found: Resources) -> str:
    return ", ".join(found.traps)


def no_atomics(found: Resources) -> str:
    return ", ".join(sorted(set(found.atomics)))


def has_hot_loop(found: Resources) -> str:
    if found.loop or not found.tile or found.variant == "ones":  # of one pass, which is no loop
        return ""
    return "no loop holds a matrix instruction"


def matrix_kind(found: Resources) -> str:
    wanted = TARGETS[found.target].matrix_kind
    if not found.loop or found.loop.kinds == (wanted,) or found.variant == "ones":
        return ""
    return f"{' and '.join(found.loop.kinds)} instead of {wanted}"


def all_passes(found: Resources) -> str:
    """float32 in one pass of tf32 would do a third of the multiply-adds."""
    if not found.loop or found.loop.multiply_adds > 0.99:
        return ""
    return f"{found.loop.multiply_adds:.2f} of the multiply-adds that its precision needs"


def wide_loads(found: Resources) -> str:
    """Every byte of an operand comes by a load of 16 bytes."""
    if found.variant != "aligned" or not found.loop or not found.tile:
        return ""
    wide = found.loop.loads.get(16, 0.0) * 16 * found.tile.entries
    if wide >= 0.99 * found.tile.operand_bytes:
        return ""
    return f"{wide:.0f} of {found.tile.operand_bytes} bytes a tile come by loads of 16 bytes"


def wide_stores(found: Resources) -> str:
    """So does every byte of the response field's block that a pass writes."""
    if found.variant != "aligned" or not found.loop or not found.tile:
        return ""
    wide, wanted = found.loop.stores.get(16, 0.0) * 16, found.tile.written
    if wide >= 0.99 * wanted:
        return ""
    return f"{wide:.1f} of {wanted} bytes an entry go by stores of 16 bytes"


GATES: dict[str, Callable[[Resources], str]] = {
    "fits": fits,
    "spills": no_spills,
    "traps": no_traps,
    "atomics": no_atomics,
    "hot loop": has_hot_loop,
    "matrix kind": matrix_kind,
    "passes": all_passes,
    "16-byte loads": wide_loads,
    "16-byte stores": wide_stores,
}


@dataclass(frozen=True)
class Waiver:
    """A gate that some entries need not pass; patterns as in a shell."""

    target: str
    kernel: str
    dtype: str
    dim: str
    gate: str
    why: str

    def covers(self, found: Resources, gate: str) -> bool:
        values = (found.target, found.kernel, found.dtype, str(found.dim), gate)
        patterns = (self.target, self.kernel, self.dtype, self.dim, self.gate)
        return all(fnmatch(*pair) for pair in zip(values, patterns, strict=True))


SPLIT = "tf32x3 splits operands in registers: with the 64 keys that wgmma wants, these spill"
NARROW = (
    "the compiler stores from the matrix product's layout, without a way round by shared memory"
)
SCATTERED = "every entry of the field's block has an address of its own"
WAIVERS = (
    Waiver("sm_90", "moments* dk", "fp32", "512", "matrix kind", SPLIT),
    Waiver("sm_90", "field_dk *", "fp32", "512", "matrix kind", SPLIT),
    *(  # 3.9 keeps 64 of both in registers: launch_tables.BEFORE_39
        Waiver("sm_90", "moments* dk", "fp32", "64", "matrix kind", SPLIT)
        for _ in range(triton_before(3, 9))
    ),
    Waiver("gfx942", "field_*", "*", "*", "16-byte stores", NARROW),
    *(
        Waiver("*", "field_* gathered *", "*", "*", f"16-byte {what}", SCATTERED)
        for what in ("loads", "stores")
    ),
)


def failures(found: Resources) -> dict[str, str]:
    """By gate, without what is waived."""
    messages = {name: gate(found) for name, gate in GATES.items()}
    return {
        name: message
        for name, message in messages.items()
        if message and not any(waiver.covers(found, name) for waiver in WAIVERS)
    }
