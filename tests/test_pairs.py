"""The tests that are chosen from a product of parameters."""

from itertools import combinations, product
from types import SimpleNamespace

import pytest
from pairs import covering, thin


def pairs_of(combined):
    return {pair for values in combined for pair in combinations(enumerate(values), 2)}


@pytest.mark.parametrize("sizes", [(1,), (5,), (2, 3), (3, 4, 2, 2, 3), (9, 3, 3, 2)], ids=str)
def test_no_pair_is_missing(sizes):
    combined = list(product(*map(range, sizes)))
    chosen = [combined[k] for k in covering(combined)]
    assert pairs_of(chosen) == pairs_of(combined)
    least = max(a * b for a, b in combinations((*sizes, 1), 2))
    assert least <= len(chosen) <= 1.5 * least


def test_what_the_product_leaves_out_is_not_missed():
    combined = [x for x in product(range(3), range(3), range(2)) if x[:2] != (0, 0)]
    chosen = [combined[k] for k in covering(combined)]
    assert pairs_of(chosen) == pairs_of(combined)


class Item(SimpleNamespace):
    __hash__ = object.__hash__


def items(marked):
    return [
        Item(
            nodeid=f"test_x[{a}-{b}-{c}]",
            callspec=SimpleNamespace(params={"a": a, "b": b, "c": c}),
            get_closest_marker=lambda name: marked,
        )
        for a, b, c in product("123", "xyz", "+-")
    ]


def test_the_order_changes_nothing_and_others_stay():
    every = items(True)
    kept, left_out = thin(every)
    assert 9 <= len(kept) < 18
    assert len(kept) + len(left_out) == 18
    again, _ = thin(every[::-1])
    assert {x.nodeid for x in again} == {x.nodeid for x in kept}
    unmarked = items(False)
    assert thin(unmarked) == (unmarked, [])


def test_a_test_named_by_itself_is_run():
    every = items(True)
    for one in every:
        assert thin([one]) == ([one], [])
