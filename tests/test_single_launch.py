"""A small batch in one launch: the yardstick, the same as in several, and that it is one."""

import pytest
import torch
from accuracy import DEVICE, DTYPES, compare, evaluate, sample_views

pytest.importorskip("triton")
from rkdo_kernels import (
    icon_loss,
    info_nce,
    kernels,
    launch,
    moments,
    moments_gradient,
    quadrature,
    reference,
    rkdo_loss,
    rows,
    single_launch,
)
from rkdo_kernels.needs import BOTH
from rkdo_kernels.problem import Problem

pytestmark = pytest.mark.usefixtures("poisoned")
FUNCTIONS = {
    "rkdo": (rkdo_loss, reference.rkdo_loss, {}),
    "rkdo-cold": (rkdo_loss, reference.rkdo_loss, {"temperature": 0.07, "depth": 8}),
    "rkdo-one-hot": (rkdo_loss, reference.rkdo_loss, {"alpha": 0}),
    "rkdo-uncooled": (rkdo_loss, reference.rkdo_loss, {"cooling": 0}),
    "icon": (icon_loss, reference.icon_loss, {}),
    "info_nce": (info_nce, reference.info_nce, {"temperature": 0.2}),
    "info_nce-cold": (info_nce, reference.info_nce, {"temperature": 0.05}),
}
SHAPES = [  # n, m, d, positive_offset, aligned
    (1, 1, 1, 0, False), (3, 3, 31, 0, True), (64, 64, 64, 0, False), (65, 63 + 9, 140, 7, True),
    (100, 128, 20, 11, False), (128, 128, 64, 0, True),
]  # fmt: skip


class Counted:
    """A kernel that counts its launches."""

    def __init__(self, kernel, counts):
        self.kernel, self.counts = kernel, counts

    def __getitem__(self, grid):
        self.counts.append(self.kernel.__name__)
        return self.kernel[grid]


@pytest.fixture
def launched(monkeypatch):
    """The kernels launched so far."""
    counts = []
    for module, name in (
        (single_launch, "_single_launch"), (moments, "_moments_fwd"), (moments, "_recursion_rows"),
        (moments_gradient, "_moments_bwd"),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, Counted(getattr(module, name), counts))
    return counts


@pytest.fixture
def hold(launched, monkeypatch):
    """Holds the rows' losses and the gradients of their sum and mean to the yardstick."""
    kept = []
    run = single_launch.recursion_moments

    def watched(*arguments):
        kept[:] = run(*arguments)
        return tuple(kept)

    monkeypatch.setattr(single_launch, "recursion_moments", watched)

    def check(name, views, offset, **others):
        function, eager, settings = FUNCTIONS[name]
        settings = settings | others | {"positive_offset": offset}
        bounded = {"bound": settings.pop("bound", 1.0)}
        icon = function is icon_loss  # whose rows are more than the launch's
        for reduction in ("mean", "sum"):
            ours = evaluate(
                lambda r=reduction, **x: function(
                    **x, **settings, **bounded, backend="triton", reduction=r
                ),
                views,
            )
            assert ours["value"].dtype == torch.float32

            def materialised(inputs, r=reduction):
                found = evaluate(lambda **x: getattr(eager(**x, **settings), r)(), inputs)
                return found if icon else found | {"value": eager(**inputs, **settings)}

            if not icon:
                ours["value"] = kept[0].float()
            compare(ours, materialised, views, scale=1 / settings.get("temperature", 0.5))
        assert launched == 2 * ["_single_launch"]

    return check


@pytest.mark.pairs
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "m", "d", "offset", "aligned"), SHAPES)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_as_accurate_as_eager(name, n, m, d, offset, aligned, dtype, hold):
    hold(name, sample_views(n, d, dtype, m=m, aligned=aligned), offset)


@pytest.mark.pairs
@pytest.mark.parametrize("detach_target", [False, True])
@pytest.mark.parametrize("depth", [1, 3, 8])
@pytest.mark.parametrize("alpha", [0, 0.3, 1])
def test_settings(alpha, depth, detach_target, hold, tiles):
    hold(
        "rkdo", sample_views(37, 24, m=50, aligned=depth == 3), 5, alpha=alpha, depth=depth,
        detach_target=detach_target, cooling=0.3,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_two_diagonals(dtype, hold, tiles):
    hold("info_nce", sample_views(40, 70, dtype, m=80), 40, exclude_self=True)


def test_rows_longer_than_one_within_a_wider_bound(hold):
    hold("rkdo", sample_views(33, 24, length=1.2), 0, bound=1.5)


def test_when_several_launches_are_needed(launched):
    views = sample_views(20, 8)
    rkdo_loss(**views, backend="triton")
    assert launched == ["_moments_fwd"], "a gradient that nobody asked for"
    evaluate(lambda **x: rkdo_loss(**x, backend="triton", reduction="none"), views)
    assert launched[1:] == ["_moments_fwd", "_moments_bwd", "_moments_bwd"]
    del launched[:]
    evaluate(lambda **x: rkdo_loss(**x, backend="triton"), sample_views(129, 8))
    assert launched == ["_moments_fwd", "_moments_bwd", "_moments_bwd"]
    assert launch.is_single(128, 128)
    assert not launch.is_single(128, 129)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_same_as_by_several_launches(name):
    function, _, settings = FUNCTIONS[name]
    views = sample_views(70, 24, aligned=True)
    one = evaluate(lambda **x: function(**x, **settings, backend="triton"), views)
    several = evaluate(
        lambda **x: function(**x, **settings, backend="triton", reduction="none").mean(), views
    )
    for key, x in several.items():
        assert float((one[key] - x).abs().max()) <= 4e-6 * float(x.abs().max()), key


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_same_bits_every_time(dtype):
    found = [gradients(*sample_views(100, 40, dtype, m=110).values()) for _ in range(2)]
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


def test_one_operand_may_be_a_constant_and_rows_lie_apart():
    queries, keys = sample_views(40, 16).values()
    both = evaluate(lambda **x: rkdo_loss(**x, backend="triton"), sample_views(40, 16))
    apart = torch.full((40, 3, 16), torch.nan, device=DEVICE)
    apart[:, 1] = keys
    for k in (keys, apart[:, 1], keys.T.contiguous().T):
        alone = evaluate(
            lambda queries, k=k: rkdo_loss(queries, k, backend="triton"), {"queries": queries}
        )
        assert torch.equal(both["queries"], alone["queries"])


# ---- rows that are not to be trusted -------------------------------------------------------------


def gradients(queries, keys, bound=1.0):
    """Loss by row, ∂Σ loss/∂queries and ∂Σ loss/∂keys."""
    scales = [2.0, 2.1, 2.2]
    table = quadrature.table(4, tuple(scales), 0.5, bound, queries.device)
    loss, nothing, none, d_queries, d_keys = kernels.recursion_moments(
        queries, keys, scales, 0.5, bound, 4, [len(keys) - len(queries)], False, BOTH, table
    )
    assert nothing.numel() == none.numel() == 0
    assert (loss.dtype, d_queries.dtype, d_keys.dtype) == (torch.float64, *2 * [torch.float32])
    return loss, d_queries, d_keys


@pytest.mark.parametrize("which", [0, 1], ids=["query", "key"])
@pytest.mark.parametrize("row", [0, 69])
def test_a_row_that_passes_the_bound(which, row):
    def too_long(length):
        views = [*sample_views(70, 24).values()]
        views[which][row] *= length
        return gradients(*views)

    assert all(x.isfinite().all() for x in too_long(1.009))
    loss, *both = too_long(1.011)
    wrong = torch.full((70,), which == 1, device=DEVICE)
    wrong[row] = True
    assert torch.equal(loss.isnan(), wrong)
    assert all(x.isnan().all() for x in both)


def test_the_bound_is_for_the_product_of_lengths():
    queries, keys = sample_views(70, 24).values()
    assert all(x.isfinite().all() for x in gradients(2 * queries, keys / 2))
    assert all(x.isnan().all() for x in gradients(2 * queries, keys, bound=1.9))
    assert all(x.isfinite().all() for x in gradients(2 * queries, keys, bound=2.0))


@pytest.mark.parametrize("side", [0, 1], ids=["queries", "keys"])
def test_lengths_whose_squares_are_no_float32_numbers(side):
    """Their product is 10; a NaN row is no such row."""
    views = [*sample_views(70, 24).values()]
    views[side] *= 1e24
    views[1 - side] *= 1e-23
    loss, *both = gradients(*views)
    assert loss.isnan().all()
    assert all(x.isnan().all() for x in both)
    views = [*sample_views(70, 24).values()]
    views[0][3] = float("nan")
    wrong = torch.arange(70, device=DEVICE) == 3
    loss, to_queries, _ = gradients(*views)
    assert torch.equal(loss.isnan(), wrong)
    assert torch.equal(to_queries.isnan().all(1), wrong)


def test_the_launch_vouches_for_the_bound():
    """No other operator need look at the rows' lengths: its loss is NaN already."""
    for reduction, held in (("mean", True), ("none", False)):
        queries, keys = (x.requires_grad_() for x in sample_views(10, 8).values())
        problem = Problem(queries, keys, 0.5, 1.0, None, "triton")
        problem.held = False  # as on a GPU
        rows.rkdo_from_moments(problem, 2, [2.0, 2.1], 0.5, False, reduction)
        assert problem.held == held


@pytest.mark.parametrize("which", [0, 1], ids=["query", "key"])
def test_nan(which):
    """A NaN query has its own row only; every row meets a NaN key."""
    views = [*sample_views(70, 24).values()]
    clean = gradients(*views)
    views[which][3, 5] = torch.nan
    loss, d_queries, d_keys = gradients(*views)
    assert d_keys.isnan().all()
    if which == 0:
        others = torch.arange(70, device=DEVICE) != 3
        assert torch.equal(loss.isnan(), ~others)
        assert torch.equal(loss[others], clean[0][others])
        assert torch.equal(d_queries[others], clean[1][others])
    else:
        assert loss.isnan().all()
