"""Row and column sums from one pass: the operators, and the losses that queries and keys share."""

import pytest
import torch
from accuracy import DEVICE, DTYPES, assert_as_accurate, evaluate, sample_views

from rkdo_kernels import info_nce, launch, nt_xent, ops, reference, symmetric, tiled

pytestmark = pytest.mark.usefixtures("poisoned")
BACKENDS = ("tiled", "triton")
SCALE = 3.0
DIAGONALS = [[], [0], [3], [7, 0], [0, 40], [69], [-20, 5], [33, 32]]
SHAPES = [(1, 1, 1), (37, 70, 20), (70, 37, 31), (64, 64, 64), (33, 49, 140)]


@pytest.fixture(params=[1, 3], ids=["whole", "in parts"])
def splits(request, monkeypatch):
    monkeypatch.setattr(launch, "splits", lambda *_: request.param)


@pytest.fixture(params=[64, 1], ids=["one launch", "many launches"])
def launches(request, monkeypatch):
    monkeypatch.setattr(symmetric, "PARTS", request.param)


def materialised(queries, keys, exclude, paired=False):
    s = queries @ keys.T
    e = torch.exp(SCALE * s)
    for diagonal in exclude:
        e = e.masked_fill(reference.diagonal_mask(e, diagonal), 0)
    positive = [s.diagonal(exclude[0])[: len(queries)]] if paired else []
    return torch.cat([e.sum(1), e.sum(0), *positive])


def check_sums(views, exclude, backend, paired=False):
    def ours(queries, keys):
        return torch.cat(ops.both_sums(queries, keys, SCALE, exclude, paired, backend)).float()

    assert_as_accurate(ours, lambda **x: materialised(**x, exclude=exclude, paired=paired), views)


@pytest.mark.pairs
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("exclude", DIAGONALS, ids=str)
def test_both_sums(exclude, backend, splits, launches, tiles):
    check_sums(sample_views(37, 20, m=70), exclude, backend)
    if exclude == [3]:
        check_sums(sample_views(37, 20, m=70), exclude, backend, paired=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "m", "d"), SHAPES)
def test_both_sums_in_every_dtype(n, m, d, dtype, backend, tiles):
    views = sample_views(n, d, dtype, m=m)
    check_sums(views, [m - n] if m >= n else [-1], backend, paired=m >= n)


@pytest.mark.pairs
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "d"), [(1, 3), (37, 20), (70, 140)])
def test_self_sums(n, d, dtype, backend, splits, tiles):
    def eager(queries):
        e = torch.exp(SCALE * queries @ queries.T)
        return e.masked_fill(reference.diagonal_mask(e, 0), 0).sum(1)

    views = {"queries": sample_views(n, d, dtype)["queries"]}
    assert_as_accurate(lambda queries: ops.self_sums(queries, SCALE, backend).float(), eager, views)


def test_a_huge_gradient_at_the_positive_keeps_its_digits(splits, tiles):
    """bfloat16 would round it to three digits before the product; here only the result is."""
    queries, keys = sample_views(33, 16, torch.bfloat16).values()
    nothing, at_positive = torch.zeros(33, device=DEVICE), torch.randn(33).to(DEVICE) * 1e6
    for run in (symmetric, tiled):
        found = run.both_sums_backward(queries, keys, SCALE, nothing, nothing, [0], at_positive)
        for x, other in zip(found, (keys, queries), strict=True):
            exact = at_positive[:, None] * other.float()
            ulp = torch.exp2(torch.frexp(exact).exponent - 8.0)  # the interpreter rounds to zero
            assert ((x - exact).abs() < ulp).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(dtype, backend):
    for strides in (lambda x: x, lambda x: x.T.contiguous().T):
        views = [strides(x).requires_grad_() for x in sample_views(5, 8, dtype, m=7).values()]
        for exclude, paired in (([2, 0], True), ([], False)):
            torch.library.opcheck(ops.both_sums, (*views, SCALE, exclude, paired, backend))
        torch.library.opcheck(ops.self_sums, (views[0], SCALE, backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_operators_under_autocast_run_in_float32(backend):
    queries, keys = sample_views(9, 8, torch.bfloat16).values()
    for operator, tensors, rest in (
        (ops.both_sums, (queries, keys), (SCALE, [0], True, backend)),
        (ops.self_sums, (queries,), (SCALE, backend)),
    ):
        with torch.autocast(DEVICE, torch.bfloat16):
            found = operator(*tensors, *rest)
        wanted = operator(*(x.float() for x in tensors), *rest)
        pairs = [(found, wanted)] if torch.is_tensor(found) else zip(found, wanted, strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


# ---- the losses ----------------------------------------------------------------------------------

PATHS = {  # "direct" is today's way: both directions, one after the other
    "tiled": {"backend": "tiled"},
    "triton": {"backend": "triton"},
    "direct-tiled": {"backend": "tiled", "bound": None},
    "direct-triton": {"backend": "triton", "bound": None},
}
F32, BF16, F16 = DTYPES
SAMPLES = [  # n, d, dtype, aligned
    (1, 1, F32, False), (1, 1, BF16, False), (3, 31, F32, True), (3, 31, F16, False),
    (3, 31, BF16, False), (64, 64, F32, True), (64, 64, BF16, True), (129, 200, F32, False),
    (70, 136, BF16, False), (70, 136, F16, True),
]  # fmt: skip


def clip(**settings):
    return info_nce(**settings, symmetric=True)


def clip_reference(**settings):
    return reference.info_nce(**settings, symmetric=True)


def nt_xent_reference(queries, keys, temperature):
    if torch.is_tensor(temperature) and temperature.dim():  # one a pair: see accuracy.py
        temperature = torch.cat([temperature, temperature])
    return reference.nt_xent(queries, keys, temperature=temperature)


FUNCTIONS = {"clip": (clip, clip_reference), "nt_xent": (nt_xent, nt_xent_reference)}


@pytest.fixture
def taken(monkeypatch):
    """How often both sums came from one pass."""
    calls = []
    for module in (symmetric, tiled):
        run = module.both_sums
        counted = lambda *args, run=run: calls.append(1) or run(*args)  # noqa: E731
        monkeypatch.setattr(ops.implementation("tiled" if module is tiled else "triton"),
                            "both_sums", counted)  # fmt: skip
    return calls


def hold(name, views, settings, reduction="none"):
    function, eager = FUNCTIONS[name]
    temperature = float(views.get("temperature", settings.get("temperature", 0.2)))
    settings = {"temperature": 0.2, **settings}
    if "temperature" in views:
        del settings["temperature"]
    known = {k: v for k, v in settings.items() if k == "temperature"}
    sizes = {"none": lambda x: x, "mean": torch.mean, "sum": torch.sum}
    assert_as_accurate(
        lambda **x: function(**x, **settings, reduction=reduction),
        lambda **x: sizes[reduction](eager(**x, **known)),
        views,
        scale=1 / temperature,
    )


@pytest.mark.pairs
@pytest.mark.parametrize(("n", "d", "dtype", "aligned"), SAMPLES)
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_as_accurate_as_eager(name, path, n, d, dtype, aligned, taken):
    hold(name, sample_views(n, d, dtype, aligned=aligned), PATHS[path])
    assert bool(taken) == (not path.startswith("direct"))


@pytest.mark.parametrize("bound", [1.0, None])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_float64(name, bound):
    hold(name, sample_views(70, 24, torch.float64), {"bound": bound})


@pytest.mark.pairs
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_other_temperatures_bounds_and_reductions(name, path, tiles):
    views = sample_views(37, 24, aligned=True)
    for temperature in (0.01, 0.03, 1.0):
        hold(name, views, {**PATHS[path], "temperature": temperature})
    hold(name, sample_views(33, 24, length=1.2), {"bound": 1.5, **PATHS[path]})
    for reduction in ("mean", "sum"):
        hold(name, views, PATHS[path], reduction)


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_reductions_agree(name, backend):
    function, views = FUNCTIONS[name][0], sample_views(20, 8)
    rows = function(**views, backend=backend, reduction="none").double()
    assert rows.shape == (40 if name == "nt_xent" else 20,)
    for reduction in (torch.sum, torch.mean):
        found = function(**views, backend=backend, reduction=reduction.__name__)
        assert found.shape == ()
        assert abs(found.item() - reduction(rows).item()) <= 2e-7 * reduction(rows.abs()).item()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("temperature", [0.02, 0.5])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_learnable_temperature(name, temperature, path, taken):
    views = sample_views(20, 24, aligned=True)
    views["temperature"] = torch.tensor(temperature, device=DEVICE)
    hold(name, views, PATHS[path])
    assert not taken


@pytest.mark.parametrize("path", PATHS)
def test_the_same_as_one_direction_after_the_other(path):
    views = sample_views(70, 24, aligned=True)
    settings = {**PATHS[path], "reduction": "none", "temperature": 0.2}

    def clip_by_hand(queries, keys):
        return (info_nce(queries, keys, **settings) + info_nce(keys, queries, **settings)) / 2

    def nt_xent_by_hand(queries, keys):
        offset = {"exclude_self": True, "positive_offset": 70}
        one = info_nce(queries, torch.cat([queries, keys]), **offset, **settings)
        return torch.cat([one, info_nce(keys, torch.cat([keys, queries]), **offset, **settings)])

    for name, by_hand in (("clip", clip_by_hand), ("nt_xent", nt_xent_by_hand)):
        wanted = evaluate(by_hand, views)
        found = evaluate(lambda n=name, **x: FUNCTIONS[n][0](**x, **settings), views)
        for key, x in wanted.items():
            assert float((found[key] - x).abs().max()) <= 4e-7 * max(1, float(x.abs().max())), key


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_nan_anywhere_is_a_nan_everywhere(name, path):
    """Every row's loss depends on every image: by its own sum, or by its partner's."""
    for which in ("queries", "keys"):
        views = {key: x.clone() for key, x in sample_views(70, 16).items()}
        views[which][66, 2] = float("nan")
        assert FUNCTIONS[name][0](**views, **PATHS[path], reduction="none").isnan().all()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_results_are_the_same_every_time(name, path):
    views = sample_views(70, 24)
    first, again = (
        evaluate(lambda **x: FUNCTIONS[name][0](**x, **PATHS[path]), views) for _ in range(2)
    )
    assert all(torch.equal(first[key], again[key]) for key in first)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_single_pair_has_nothing_to_learn(name, path):
    found = evaluate(lambda **x: FUNCTIONS[name][0](**x, **PATHS[path]), sample_views(1, 8))
    assert float(found["value"]) == 0
    assert all(float(x.abs().max()) <= 1e-7 for x in found.values())


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("bound", [1.0, None])
def test_compiled_whole_and_with_dynamic_shapes(name, bound):
    def loss(**inputs):
        return FUNCTIONS[name][0](**inputs, bound=bound, reduction="none")

    torch.compiler.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
    for n in (20, 33, 7):
        views = sample_views(n, 12)
        wanted, found = evaluate(loss, views), evaluate(compiled, views)
        for key, x in wanted.items():
            assert float((found[key] - x).abs().max()) <= 4e-7 * max(1, float(x.abs().max())), key


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_second_derivative_is_refused(name):
    queries, keys = (x.double().requires_grad_() for x in sample_views(6, 4).values())
    loss = FUNCTIONS[name][0](queries=queries, keys=keys)
    (gradient,) = torch.autograd.grad(loss, queries, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated once"):
        torch.autograd.grad(gradient.square().sum(), [queries, keys])


X = torch.eye(4, device=DEVICE)
ERRORS = [
    (clip, (X, X[:3]), {"positive_offset": 0}, "symmetric needs as many keys as queries, got keys"),
    (clip, (X[:3], X), {"positive_offset": 1}, "symmetric needs as many keys as queries, got keys"),
    (clip, (X, X), {"positive_offset": 1}, "positive_offset must leave 4 positives among 4 keys"),
    (clip, (X, X), {"exclude_self": True}, "symmetric and exclude_self do not go together"),
    (nt_xent, (X[:3], X), {}, r"nt_xent needs as many keys as queries, got keys \[4, 4\] for"),
    (nt_xent, (X, X[:, :3]), {}, "must have the dim of queries"),
    (nt_xent, (X, X), {"temperature": 0}, "temperature must be positive"),
    (nt_xent, (X, X), {"reduction": "max"}, "reduction must be one of"),
    (nt_xent, (X, X), {"bound": 0}, "bound must be positive"),
]


@pytest.mark.parametrize(("function", "pair", "settings", "words"), ERRORS)
def test_bad_arguments(function, pair, settings, words):
    with pytest.raises(ValueError, match=words):
        function(queries=pair[0], keys=pair[1], **settings)


def test_symmetric_is_a_flag():
    with pytest.raises(TypeError, match="symmetric must be True or False, got int"):
        info_nce(X, X, symmetric=1)


@pytest.mark.skipif(DEVICE != "cpu", reason="where reading would wait, it is NaN")
def test_images_longer_than_the_bound_are_named():
    queries, keys = X[:3] * 1.1, X[1:] / 1.2  # the products of queries and keys are short enough
    assert clip(queries=queries, keys=keys).isfinite()
    with pytest.raises(ValueError, match=r"queries\[0\] has length 1.1 and the longest of queries"):
        nt_xent(queries, keys)
    with pytest.raises(ValueError, match=r"keys\[0\] has length 1.1 and the longest of keys"):
        nt_xent(keys, queries)
    assert nt_xent(queries, keys, bound=1.3).isfinite()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_where_reading_would_wait_one_image_past_the_bound_makes_all_nan(name, monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    queries, keys = X.clone(), X.clone()
    for settings in ({}, {"temperature": torch.tensor(0.5, device=DEVICE)}):
        rows = FUNCTIONS[name][0](queries=queries, keys=keys, reduction="none", **settings)
        assert rows.isfinite().all()
    keys[1] *= 1.02
    for settings in ({}, {"temperature": torch.tensor(0.5, device=DEVICE)}):
        rows = FUNCTIONS[name][0](queries=queries, keys=keys, reduction="none", **settings)
        assert rows.isnan().all()
