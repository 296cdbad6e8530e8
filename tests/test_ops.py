"""The operators: PyTorch's own checks of a custom operator, torch.compile, autocast."""

import pytest
import torch
from accuracy import DEVICE, assert_as_accurate, evaluate, sample_views

from rkdo_kernels import icon_loss, info_nce, launch, ops, reference, rkdo_loss, small
from rkdo_kernels.ops import moments, recursion, softmax_sums

pytestmark = pytest.mark.usefixtures("poisoned")
BACKENDS = ("tiled", "triton")
SCALES = torch.tensor([2.0, 2.5, 3.0], dtype=torch.float64, device=DEVICE)
CALLS = {
    "moments": (moments, (SCALES[0], 1.5, 3, [2, 0])),
    "moments of degree 0": (moments, (SCALES[0], 1.0, 0, [])),
    "softmax_sums": (softmax_sums, (SCALES, False, [2])),
    "student sums": (softmax_sums, (SCALES, True, [])),
    "recursion": (recursion, (SCALES, 0.5, 2, False)),
    "detached recursion": (recursion, (SCALES, 0.5, 2, True)),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_opcheck(name, dtype, backend):
    operator, settings = CALLS[name]
    views = [x.requires_grad_() for x in sample_views(5, 8, dtype, m=7).values()]
    torch.library.opcheck(operator, (*views, *settings, backend))
    transposed = [x.detach().T.contiguous().T.requires_grad_() for x in views]
    torch.library.opcheck(operator, (*transposed, *settings, backend), test_utils="test_faketensor")


def materialised_moments(queries, keys, bound, degree, exclude):
    s = queries @ keys.T
    e = torch.exp(SCALES[0].item() * s)
    for diagonal in exclude:
        e = e.masked_fill(reference.diagonal_mask(e, diagonal), 0)
    return torch.stack([(e * (s / bound) ** k).sum(1) for k in range(degree + 1)], 1)


def materialised_sums(queries, keys, student, exclude):
    x = queries @ keys.T
    if student:
        distance = queries.square().sum(1)[:, None] + keys.square().sum(1) - 2 * x
        x = -torch.log1p(distance.clamp_min(0))
    left_out = torch.zeros_like(x, dtype=torch.bool)
    for diagonal in exclude:
        left_out |= reference.diagonal_mask(x, diagonal)
    total = x.masked_fill(left_out, 0).sum(1)
    x = x.masked_fill(left_out, -torch.inf)
    x = x - x.amax(1, keepdim=True).detach()
    e = [torch.exp(c * x) for c in SCALES.tolist()]
    return torch.stack([total, *(y.sum(1) for y in e)], 1)


@pytest.fixture(params=[*BACKENDS, "triton in parts"])
def backend(request, monkeypatch):
    """In parts, as where there are fewer programs than multiprocessors."""
    name, _, parts = request.param.partition(" in ")
    if parts:
        monkeypatch.setattr(launch, "splits", lambda *_: 3)
    return name


EXCLUDED = [[], [0], [3], [7, 0], [0, 40], [69]]


@pytest.mark.pairs
@pytest.mark.parametrize("exclude", EXCLUDED, ids=str)
@pytest.mark.parametrize(("bound", "degree"), [(1.0, 0), (1.5, 1), (1.0, 4), (2.0, 4)])
def test_moments(bound, degree, exclude, backend, tiles):
    assert_as_accurate(
        lambda **x: moments(**x, scale=SCALES[0], bound=bound, degree=degree, exclude=exclude,
                            backend=backend).float(),
        lambda **x: materialised_moments(**x, bound=bound, degree=degree, exclude=exclude),
        sample_views(37, 20, m=70),
    )  # fmt: skip


@pytest.mark.pairs
@pytest.mark.parametrize("exclude", EXCLUDED, ids=str)
@pytest.mark.parametrize("student", [False, True])
def test_softmax_sums(student, exclude, backend, tiles):
    def ours(queries, keys):
        _, mass, _, total = softmax_sums(queries, keys, SCALES, student, exclude, backend)
        return torch.cat([total[:, None], mass], 1).float()

    assert_as_accurate(
        ours,
        lambda **x: materialised_sums(**x, student=student, exclude=exclude),
        sample_views(37, 20, m=70),
    )


@pytest.mark.pairs
@pytest.mark.parametrize("student", [False, True])
@pytest.mark.parametrize(("n", "m"), [(32, 64), (33, 64), (64, 33), (5, 3)])
def test_softmax_sums_of_whole_and_of_broken_tiles(n, m, student, backend, tiles):
    """With S near −50 exp(c (x − peak)) overflows where a key past the last is not left out."""
    for exclude in ([], [0, m - n], [m - n, 1]):
        inputs = sample_views(n, 20, m=m)
        if not student:
            inputs = {"queries": inputs["queries"] + 1.6, "keys": inputs["keys"] - 1.6}

        def ours(queries, keys, exclude=exclude):
            _, mass, _, total = softmax_sums(queries, keys, SCALES, student, exclude, backend)
            return torch.cat([total[:, None], mass], 1).float()

        assert_as_accurate(
            ours,
            lambda e=exclude, **x: materialised_sums(**x, student=student, exclude=e),
            inputs,
            200.0,
        )


@pytest.mark.parametrize("student", [False, True])
def test_slopes_are_the_derivatives_for_the_scales(student, backend, tiles):
    views = sample_views(37, 20, m=70)
    peak, mass, slope, _ = softmax_sums(*views.values(), SCALES, student, [1], backend)
    x = (views["queries"] @ views["keys"].T).double()
    if student:
        x = -torch.log1p(torch.cdist(*(v.double() for v in views.values())) ** 2)
    x = x.masked_fill(reference.diagonal_mask(x, 1), -torch.inf)
    assert float((peak - x.amax(1)).abs().max()) <= 4e-7
    x = (x - x.amax(1, keepdim=True)).clamp_min(-1e30)[:, None]
    wanted = (x * torch.exp(SCALES[:, None] * x)).sum(2)
    assert slope.shape == mass.shape == (37, 3)
    assert float((slope - wanted).abs().max()) <= 2e-6 * float(wanted.abs().max())


@pytest.mark.pairs
@pytest.mark.parametrize(("n", "m", "d"), [(37, 70, 20), (64, 64, 64), (16, 32, 16), (33, 49, 140)])
def test_tiles_and_their_edges(n, m, d, backend, tiles, monkeypatch):
    monkeypatch.setattr(small, "MAX_ENTRIES", 0)
    for offset, detach in ((0, False), (min(3, m - n), True), (m - n, False)):
        for bound in (1.0, None):
            settings = {"positive_offset": offset, "detach_target": detach, "depth": 2}
            assert_as_accurate(
                lambda s=settings, b=bound, **x: rkdo_loss(
                    **x, **s, bound=b, backend=backend, reduction="none"
                ),
                lambda s=settings, **x: reference.rkdo_loss(**x, **s),
                sample_views(n, d, m=m),
                2.0,
            )


@pytest.mark.pairs
@pytest.mark.parametrize("learnable", [False, True], ids=["float", "learnable"])
@pytest.mark.parametrize(
    ("kept", "name"),
    [("small", name) for name in ("rkdo", "rkdo direct", "rkdo detached")]  # it alone has that path
    + [
        ("tiles", name)
        for name in ("rkdo", "rkdo direct", "rkdo detached", "icon", "student", "nce")
    ],
)
def test_compiled_whole_and_with_dynamic_shapes(name, learnable, kept, monkeypatch):
    function, settings = {
        "rkdo": (rkdo_loss, {}),
        "rkdo direct": (rkdo_loss, {"bound": None, "alpha": 0.3}),
        "rkdo detached": (rkdo_loss, {"detach_target": True}),
        "icon": (icon_loss, {}),
        "student": (icon_loss, {"kernel": "student"}),
        "nce": (info_nce, {"positive_offset": 0}),
    }[name]
    if kept == "tiles":
        monkeypatch.setattr(small, "MAX_ENTRIES", 0)

    def loss(**inputs):
        return function(**inputs, **settings, reduction="none")

    torch.compiler.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
    for n in (20, 33, 7):
        views = sample_views(n, 12)
        if learnable:
            views["temperature"] = torch.tensor(0.4, device=DEVICE)
        wanted, found = evaluate(loss, views), evaluate(compiled, views)
        for key, x in wanted.items():
            assert float((found[key] - x).abs().max()) <= 4e-7 * max(1, float(x.abs().max())), key


@pytest.mark.parametrize("function", [rkdo_loss, icon_loss, info_nce])
def test_autocast_gives_float32_losses(function):
    views = sample_views(33, 24)
    for bound in (1.0, None):
        wanted = function(**views, bound=bound)
        with torch.autocast(DEVICE, torch.bfloat16):
            assert torch.equal(function(**views, bound=bound), wanted)
            keys = views["keys"].bfloat16()  # as a linear layer under autocast would return
            mixed = function(views["queries"], keys, bound=bound)
        assert torch.equal(mixed, function(views["queries"], keys.float(), bound=bound))
        assert mixed.dtype == torch.float32


@pytest.mark.parametrize("backend", BACKENDS)
def test_operators_under_autocast_run_in_float32(backend):
    queries, keys = sample_views(9, 8, torch.bfloat16).values()
    for operator, settings in CALLS.values():
        args = (*settings[:-1], [0]) if operator is not recursion else (SCALES, 0.5, 0, False)
        with torch.autocast(DEVICE, torch.bfloat16):
            found = operator(queries, keys, *args, backend)
        wanted = operator(queries.float(), keys.float(), *args, backend)
        found, wanted = (x if isinstance(x, tuple) else (x,) for x in (found, wanted))
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_row_results_are_float64_where_there_is_float64():
    assert ops.row_dtype(torch.empty(0)) == torch.float64
    assert ops.row_dtype(torch.empty(0, device="meta").bfloat16()) == torch.float64
