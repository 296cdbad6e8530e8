"""Keys that tie with the positive have its S, to the bit, where one product has both.

1/τ multiplies what two products of the same numbers differ by: a loss of log 2 shows it.
"""

import pytest
import torch
from accuracy import assert_as_accurate, cast, errors_of, evaluate, misses
from torch.nn.functional import normalize

from rkdo_kernels import one_pass, reference, rkdo_loss, small

LOSSES = {"rkdo": (rkdo_loss, reference.rkdo_loss)}


def tied(n, d=64, seed=0):
    """Every key twice, and queries near them."""
    generator = torch.Generator().manual_seed(seed)
    keys = normalize(torch.randn(n, d, generator=generator), dim=1)
    keys[1::2] = keys[0::2]
    queries = normalize(keys + 0.1 * torch.randn(n, d, generator=generator), dim=1)
    return {"queries": queries, "keys": keys}


COLD = {"temperature": 0.01, "bound": None}
CASES = {
    ("rkdo", "direct"): COLD,
    ("rkdo", "direct, warmer"): {"temperature": 0.07, "bound": None},
}


@pytest.mark.parametrize(("name", "path"), CASES)
def test_values_and_the_gradient_to_the_keys(name, path, monkeypatch):
    """That to the queries is another matter: its sum over the keys adds the positive's term last,
    where eager code has that of a key beside it cancelled before other terms are rounded."""
    function, eager = LOSSES[name]
    settings = CASES[name, path]
    others = {key: x for key, x in settings.items() if key != "bound"}
    monkeypatch.setattr(small, "MAX_ENTRIES", 0)
    for n in (64, 200):
        queries, keys = tied(n).values()

        def found(function, dtype=torch.float32, q=queries, keys=keys, **given):
            views = cast({"keys": keys}, dtype)
            return evaluate(lambda keys: function(q.to(dtype), keys, **given), views)

        truth, naive = found(eager, torch.float64, **others), found(eager, **others)
        ours = found(function, **settings, reduction="none")
        eps = dict.fromkeys(truth, torch.finfo(torch.float32).eps)
        # Of one draw: those of other roundings have no ties.
        missed = misses(ours, truth, errors_of(naive, truth), eps, 1 / settings["temperature"])
        assert not missed, "\n".join(missed)


@pytest.mark.parametrize("offset", [0, 5, 40])
@pytest.mark.parametrize("temperature", [0.07, 0.5])
def test_the_positives_of_any_tile(offset, temperature, tiles):
    """Wherever a block's positives lie among the tiles of its keys."""
    queries = tied(50, 8)["queries"]
    keys = normalize(torch.randn(101, 8), dim=1)
    keys[offset : offset + 50] = tied(50, 8)["keys"]
    settings = {"temperature": temperature, "positive_offset": offset}
    for reduction in ("none", "sum"):
        assert one_pass.fits(101, 4)
        assert_as_accurate(
            lambda r=reduction, **x: rkdo_loss(**x, **settings, reduction=r, backend="tiled"),
            lambda r=reduction, **x: (lambda y: y if r == "none" else y.sum())(
                reference.rkdo_loss(**x, **settings)
            ),
            {"queries": queries, "keys": keys},
            scale=1 / temperature,
        )
