"""Sums over lanes of which every lane has another rounding.

A sum over a row ends with each lane adding its partner's part to its own, and all lanes then hold
the same bits, as a + b = b + a. Not so if a lane's part is one product, and the compiler makes one
FMA of the product and the sum: its own product is exact then, its partner's rounded. Threads that
hold the same entry store different values of it, and a result depends on which was last.
"""

from __future__ import annotations

from collections.abc import Iterator

from .ptx import Listing

PRODUCTS = ("mul.f32", "mul.ftz.f32", "mul.f64")  # with .rn no product is made part of an FMA
SUMS = ("add.f32", "add.ftz.f32", "add.f64")


def lines(listing: Listing) -> Iterator[int]:
    """Of the additions, in the PTX as it stands or as ptxas may contract it."""
    factors: dict[str, frozenset[str]] = {}  # of the product that a register holds
    partners: dict[str, str] = {}  # what the register holds of another lane
    for statement in listing.statements:
        opcode, given = statement.opcode, statement.operands
        if not given:
            continue
        if opcode.startswith("fma.rn.") and _same(given[1:3], given[3], factors, partners):
            yield statement.line
        if opcode in SUMS:
            pairs = (given[1:3], given[2:0:-1])
            if any(own in factors and partners.get(other) == own for own, other in pairs):
                yield statement.line
        result = given[0].split("|")[0]
        factors.pop(result, None)
        partners.pop(result, None)
        if opcode in PRODUCTS:
            factors[result] = frozenset(given[1:3])
        elif opcode == "shfl.sync.bfly.b32":
            partners[result] = given[1]


def _same(
    own: list[str],
    added: str,
    factors: dict[str, frozenset[str]],
    partners: dict[str, str],
) -> bool:
    return factors.get(partners.get(added, "")) == frozenset(own)
