"""Rows that one key dominates: their gradients are as exact as S rounds alike in every pass.

1/τ multiplies a similarity's rounding. Where all passes over S share it, q (1 − q) next to 0 takes
it out again, as it does in eager code, which has one S; between passes that differ nothing does.
"""

import pytest
import torch
from accuracy import assert_as_accurate
from torch.nn.functional import normalize

from rkdo_kernels import (
    icon_loss,
    info_nce,
    nt_xent,
    reference,
    rkdo_loss,
    similarity_logsumexp,
    small,
    tiles,
)

COLD = {"temperature": 0.01, "bound": None}
SHIFTED = {"temperature": 0.026}  # the coldest that unshifted exponents take
LOSSES = {
    "rkdo": (rkdo_loss, reference.rkdo_loss, COLD),
    "rkdo, detached": (rkdo_loss, reference.rkdo_loss, {**COLD, "detach_target": True}),
    "rkdo, moments": (rkdo_loss, reference.rkdo_loss, {"temperature": 0.03, "cooling": 0.01}),
    "info_nce": (info_nce, reference.info_nce, COLD),
    "info_nce, moments": (info_nce, reference.info_nce, SHIFTED),
    "clip": (info_nce, reference.info_nce, {**COLD, "symmetric": True}),
    "clip, moments": (info_nce, reference.info_nce, {**SHIFTED, "symmetric": True}),
    "nt_xent": (nt_xent, reference.nt_xent, COLD),
    "nt_xent, moments": (nt_xent, reference.nt_xent, SHIFTED),
    "icon": (icon_loss, reference.icon_loss, COLD),
    "logsumexp": (similarity_logsumexp, reference.similarity_logsumexp, COLD),
}


def misled(n, d=64, length=1.0):
    """Views whose queries lie by another row's key, not by their own."""
    generator = torch.Generator().manual_seed(1)
    keys, noise = (normalize(torch.randn(n, d, generator=generator), dim=1) for _ in range(2))
    queries = normalize(keys.roll(1, 0) + 0.3 * noise, dim=1)
    return {"queries": length * queries, "keys": length * keys}


@pytest.mark.parametrize("n", [140, 229, 280, 512])
@pytest.mark.parametrize("name", LOSSES)
def test_as_accurate_as_eager(name, n, monkeypatch):
    function, eager, settings = LOSSES[name]
    monkeypatch.setattr(small, "MAX_ENTRIES", 0)
    others = {key: x for key, x in settings.items() if key != "bound"}
    reductions = ("none",) if name == "logsumexp" else ("none", "sum")
    for reduction in reductions:
        given = settings if name == "logsumexp" else {**settings, "reduction": reduction}
        assert_as_accurate(
            lambda given=given, **x: function(**x, **given),
            lambda r=reduction, **x: (lambda y: y if r == "none" else y.sum())(
                eager(**x, **others)
            ),
            misled(n),
            scale=1 / settings["temperature"],
        )


@pytest.mark.parametrize("n", [140, 229, 280, 1100])
@pytest.mark.parametrize("name", [x for x in LOSSES if "nt_xent" not in x])
def test_every_pass_has_the_same_tiles(name, n, monkeypatch):
    """On a CPU whose products round alike whatever their shape, the losses cannot tell."""
    function, _, settings = LOSSES[name]
    monkeypatch.setattr(small, "MAX_ENTRIES", 0)
    seen, product = [], tiles.Tile.product

    def watched(tile, factor):
        seen.append((tile.rows.start, tile.rows.stop, tile.cols.start, tile.cols.stop))
        product(tile, factor)

    monkeypatch.setattr(tiles.Tile, "product", watched)
    pair = {key: x.requires_grad_() for key, x in misled(n, d=4).items()}
    given = settings if name == "logsumexp" else {**settings, "reduction": "none"}
    function(**pair, **given).sum().backward()
    areas = [(below - above) * (right - left) for above, below, left, right in set(seen)]
    assert len(seen) >= 1.5 * len(areas)  # there are two passes at least, one may be by itself
    assert sum(areas) == n * n


@pytest.mark.parametrize("n", [280, 512])
@pytest.mark.parametrize("name", ["rkdo", "info_nce", "clip", "nt_xent"])
def test_long_rows(name, n):
    function, eager, settings = LOSSES[name]
    others = {key: x for key, x in settings.items() if key != "bound"}
    assert_as_accurate(
        lambda **x: function(**x, **settings, reduction="none"),
        lambda **x: eager(**x, **others),
        misled(n, length=300**0.5),
        scale=300 / settings["temperature"],
    )


@pytest.mark.parametrize("threads", [2, 5])
def test_other_numbers_of_threads(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        test_long_rows("rkdo", 280)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("name", ["rkdo", "info_nce", "icon", "clip", "nt_xent"])
def test_interpreted_kernels(name):
    function, eager, settings = LOSSES[name]
    others = {key: x for key, x in settings.items() if key != "bound"}
    assert_as_accurate(
        lambda **x: function(**x, **settings, reduction="none", backend="triton"),
        lambda **x: eager(**x, **others),
        misled(131),
        scale=1 / settings["temperature"],
    )
