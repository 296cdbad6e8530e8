"""Which of a test's combinations of parameters are run: enough for every pair of values to meet.

A fault needs the right value of one parameter, or of two together; one that needs three is rare.
So a test that is marked `pairs` runs on a few combinations of its parameters' values, such that any
two values that meet in one of all meet in one of these.
"""

import hashlib
from itertools import combinations


def covering(combined: list[tuple[int, ...]]) -> list[int]:
    """Positions of a few of the combinations, in order, in which no pair of values is missing.

    Greedily: the one that brings most new pairs, of these the one whose hash is least.
    """
    pairs = [set(combinations(enumerate(values), 2)) or {values} for values in combined]
    missing = set().union(*pairs)
    by_hash = sorted(
        range(len(combined)),
        key=lambda k: hashlib.sha256(repr(combined[k]).encode()).hexdigest(),
    )
    chosen = []
    while missing:
        best = max(by_hash, key=lambda k: len(pairs[k] & missing))
        missing -= pairs[best]
        chosen.append(best)
    return sorted(chosen)


def thin(items: list) -> tuple[list, list]:
    """pytest's items that are run, and those that are left out; the same ones in every process."""
    groups: dict[str, list] = {}
    for item in sorted(items, key=lambda item: item.nodeid):  # their order may be random
        if item.get_closest_marker("pairs"):
            groups.setdefault(item.nodeid.partition("[")[0], []).append(item)
    left_out = set()
    for group in groups.values():
        kept = covering(numbered([item.callspec.params for item in group]))
        left_out |= set(group) - {group[k] for k in kept}
    return [x for x in items if x not in left_out], [x for x in items if x in left_out]


def numbered(combined: list[dict[str, object]]) -> list[tuple[int, ...]]:
    """Each value as its place among the values of its parameter."""
    places: dict[str, dict[str, int]] = {name: {} for name in combined[0]}
    return [
        tuple(
            places[name].setdefault(repr(values[name]), len(places[name]))
            for name in sorted(places)
        )
        for values in combined
    ]
