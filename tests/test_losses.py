"""The public losses, on every path and backend: the yardstick, golden values, float64."""

import math
from functools import partial

import pytest
import torch
from accuracy import DEVICE, DTYPES, assert_as_accurate, compare, evaluate, sample_views
from golden_cases import CASES, LOSSES, golden_inputs, golden_truth, settings_of

from rkdo_kernels import (
    icon_loss,
    info_nce,
    reference,
    rkdo_loss,
    similarity_logsumexp,
    similarity_moments,
    small,
)

pytestmark = pytest.mark.usefixtures("poisoned")

PATHS = {  # of rkdo_loss; elsewhere "moments" is a fixed shift and "direct" a running maximum
    "small": {"backend": "tiled"},
    "moments-tiled": {"backend": "tiled"},
    "moments-triton": {"backend": "triton"},
    "direct-tiled": {"backend": "tiled", "bound": None},
    "direct-triton": {"backend": "triton", "bound": None},
}
if DEVICE != "cpu":
    del PATHS["small"]
BACKENDS = ("tiled", "triton")
F32, BF16, F16 = DTYPES
SAMPLES = [  # n, d, dtype, aligned
    (1, 1, F32, False), (1, 1, BF16, False), (3, 31, F32, True), (3, 31, F16, False),
    (3, 31, BF16, False), (64, 64, F32, False), (64, 64, F32, True), (64, 64, BF16, True),
    (64, 64, F16, False), (129, 200, F32, False), (70, 136, BF16, False), (70, 136, F16, True),
]  # fmt: skip
FUNCTIONS = {
    "rkdo": (rkdo_loss, reference.rkdo_loss, {}),
    "rkdo-detached": (rkdo_loss, reference.rkdo_loss, {"detach_target": True}),
    "icon": (icon_loss, reference.icon_loss, {}),
    "icon-student": (icon_loss, reference.icon_loss, {"kernel": "student"}),
    "info_nce": (info_nce, reference.info_nce, {"temperature": 0.2}),
}


@pytest.fixture
def on_path(monkeypatch):
    def choose(path):
        if path != "small":
            monkeypatch.setattr(small, "MAX_ENTRIES", 0)
        return PATHS[path]

    return choose


def paths_of(name):
    return [path for path in PATHS if path != "small" or name.startswith("rkdo")]


def hold(function, eager, inputs, path, **settings):
    """Holds `function` on a path to the yardstick; settings go to both functions."""
    temperature = settings.get("temperature", 0.5)
    assert_as_accurate(
        lambda **x: function(**x, **settings, **path, reduction="none"),
        lambda **x: eager(**x, **settings),
        inputs,
        scale=1 / float(inputs.get("temperature", temperature)),
    )


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_golden_values(case, path, on_path):
    function, eager = LOSSES[case["loss"]]
    settings, inputs = settings_of(case), golden_inputs(case)
    path, scale = on_path(path), 1 / case["temperature"]
    ours = evaluate(lambda **x: function(**x, **settings, **path, reduction="none"), inputs)
    naive = partial(evaluate, lambda **x: eager(**x, **settings))
    compare(ours, naive, inputs, scale, golden_truth(case))


@pytest.mark.pairs
@pytest.mark.parametrize(("n", "d", "dtype", "aligned"), SAMPLES)
@pytest.mark.parametrize(
    ("name", "path"), [(name, path) for name in FUNCTIONS for path in paths_of(name)]
)
def test_as_accurate_as_eager(name, path, n, d, dtype, aligned, on_path):
    function, eager, settings = FUNCTIONS[name]
    hold(function, eager, sample_views(n, d, dtype, aligned=aligned), on_path(path), **settings)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("depth", "detach_target"), [(1, False), (3, True), (8, False)])
@pytest.mark.parametrize("alpha", [0, 0.3, 1])
@pytest.mark.parametrize("temperature", [0.01, 0.05, 0.5])
def test_rkdo_settings(temperature, alpha, depth, detach_target, path, on_path):
    hold(
        rkdo_loss, reference.rkdo_loss, sample_views(19, 24, m=21, aligned=depth == 3),
        on_path(path), temperature=temperature, alpha=alpha, depth=depth, cooling=0.3,
        detach_target=detach_target, positive_offset=2,
    )  # fmt: skip


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_more_keys_than_queries(name, path, on_path):
    function, eager, settings = FUNCTIONS[name]
    for offset, m in ((0, 70), (5, 30), (65, 90)):
        views = sample_views(25, 16, m=m, aligned=offset == 0, seed=offset)
        hold(function, eager, views, on_path(path), positive_offset=offset, **settings)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_rows_longer_than_one_within_a_wider_bound(name, path, on_path):
    function, eager, settings = FUNCTIONS[name]
    wider = {"bound": 1.5} | on_path(path)
    hold(function, eager, sample_views(33, 24, length=1.2), wider, **settings)


@pytest.mark.parametrize(
    "path", ["moments-tiled", "moments-triton", "direct-tiled", "direct-triton"]
)
@pytest.mark.parametrize("n", [1, 20, 70])
@pytest.mark.parametrize("temperature", [0.01, 0.2])
def test_nt_xent(temperature, n, path):
    """Both directions at once, against the definition over 2N images."""
    views = sample_views(n, 16, aligned=True)
    settings = {"temperature": temperature, "exclude_self": True, "positive_offset": n}

    def both(function, **settings):
        def loss(queries, keys):
            one = function(queries, torch.cat([queries, keys]), **settings)
            return torch.cat([one, function(keys, torch.cat([keys, queries]), **settings)])

        return loss

    def materialised(queries, keys):
        images = torch.cat([queries, keys])
        logits = images @ images.T / temperature
        logits = logits.masked_fill(torch.eye(2 * n, dtype=torch.bool, device=DEVICE), -torch.inf)
        partner = torch.arange(2 * n, device=DEVICE).roll(n)
        return torch.nn.functional.cross_entropy(logits, partner, reduction="none")

    ours = both(info_nce, **settings, **PATHS[path], reduction="none")
    assert_as_accurate(ours, materialised, views, 1 / temperature)


LAYOUTS = {
    "transposed": lambda x: x.T.contiguous().T,
    "strided rows": lambda x: x.repeat_interleave(2, 0)[::2],
    "strided columns": lambda x: x.repeat_interleave(3, 1)[:, ::3],
    "an odd offset": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),
    "wide rows": lambda x: torch.cat([x, x.new_full((len(x), 3), torch.nan)], 1)[:, : x.shape[1]],
    "rows of stride 0": lambda x: x[:1].expand_as(x),
    "columns of stride 0": lambda x: (x[:, :1] / x[:, :1].abs() / x.shape[1] ** 0.5).expand_as(x),
}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout(layout, path, on_path):
    """A product of other strides is another of BLAS's, with other bits: no copy is the truth."""
    views = {name: LAYOUTS[layout](x) for name, x in sample_views(20, 24, aligned=True).items()}
    for function, eager in LOSSES.values():
        hold(function, eager, views, on_path(path))


@pytest.mark.parametrize("backend", ["tiled", "triton", "reference"])
def test_reductions(backend):
    views = sample_views(20, 8)
    for function in (rkdo_loss, icon_loss, info_nce):
        rows = function(**views, backend=backend, reduction="none").double()
        total = function(**views, backend=backend, reduction="sum")
        mean = function(**views, backend=backend, reduction="mean")
        assert total.shape == mean.shape == ()
        assert mean.item() == function(**views, backend=backend).item()
        assert abs(total.item() - rows.sum().item()) <= 2e-7 * rows.abs().sum().item()
        assert abs(mean.item() - rows.mean().item()) <= 2e-7 * rows.abs().mean().item()


@pytest.mark.parametrize("temperature", [0.02, 0.5])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_learnable_temperature(name, temperature, on_path):
    function, eager, settings = FUNCTIONS[name]
    settings = {**settings, "cooling": 0.3} if name.startswith("rkdo") else {**settings}
    settings.pop("temperature", None)
    for path in paths_of(name):
        for positive_offset in (0, 3):
            views = sample_views(20, 24, m=24, aligned=True)
            views["temperature"] = torch.tensor(temperature, device=DEVICE)
            hold(function, eager, views, on_path(path), positive_offset=positive_offset, **settings)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("exclude_self", [False, True])
@pytest.mark.parametrize("learnable", [False, True], ids=["float", "learnable"])
def test_similarity_moments(learnable, exclude_self, backend):
    for degree, bound, temperature in ((0, 1.0, 0.5), (1, 1.5, 0.2), (5, 1.5, 0.5)):
        views = sample_views(20, 24, m=70, length=1.2 if bound > 1 else 1.0)
        if learnable:
            views["temperature"] = torch.tensor(temperature, device=DEVICE)
        settings = {"degree": degree, "bound": bound, "exclude_self": exclude_self}
        if not learnable:
            settings["temperature"] = temperature
        assert_as_accurate(
            lambda s=settings, **x: similarity_moments(**x, **s, backend=backend),
            lambda s=settings, **x: reference.similarity_moments(**x, **s),
            views,
            scale=1 / temperature,
        )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("exclude_self", [False, True])
@pytest.mark.parametrize("learnable", [False, True], ids=["float", "learnable"])
def test_similarity_logsumexp(learnable, exclude_self, backend):
    for temperature, bound in ((0.5, 1.0), (0.5, None), (0.01, 1.0)):
        views = sample_views(20, 24, m=70, aligned=True)
        settings = {"exclude_self": exclude_self}
        if learnable:
            views["temperature"] = torch.tensor(temperature, device=DEVICE)
        else:
            settings["temperature"] = temperature
        assert_as_accurate(
            lambda s=settings, b=bound, **x: similarity_logsumexp(
                **x, **s, bound=b, backend=backend
            ),
            lambda s=settings, **x: reference.similarity_logsumexp(**x, **s),
            views,
            scale=1 / temperature,
        )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("n", "exclude_self"), [(1, False), (2, True)])
def test_logsumexp_over_one_key_is_its_logit(n, exclude_self, backend):
    for bound in (1.0, None):
        settings = {"exclude_self": exclude_self, "temperature": 0.3}
        assert_as_accurate(
            lambda s=settings, b=bound, **x: similarity_logsumexp(
                **x, **s, bound=b, backend=backend
            ),
            lambda s=settings, **x: reference.similarity_logsumexp(**x, **s),
            sample_views(n, 8),
            scale=4.0,
        )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("length", [1e9, 1e18])
def test_equal_logits_of_any_size_share_the_probability(length, backend):
    """The logit is taken from the peak, not from peak + log mass, which has no digits."""
    queries = torch.full((1, 1), length, device=DEVICE, requires_grad=True)
    keys = torch.ones(3, 1, device=DEVICE)
    for settings in ({"positive_offset": 1}, {"positive_offset": 1, "exclude_self": True}):
        loss = info_nce(queries, keys, temperature=0.5, bound=None, backend=backend, **settings)
        count = 2 if "exclude_self" in settings else 3
        assert abs(float(loss.detach()) - math.log(count)) <= 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_without_keys_does_not_pull_at_the_temperature(backend):
    views = sample_views(2, 8, m=1)  # the first row's only key is its own
    temperature = torch.tensor(0.5, device=DEVICE, requires_grad=True)
    sums = similarity_logsumexp(
        **views, temperature=temperature, exclude_self=True, bound=None, backend=backend
    )
    assert float(sums[0].detach()) == float("-inf")
    (gradient,) = torch.autograd.grad(sums.sum(), temperature)
    s = float((views["queries"][1] * views["keys"][0]).sum())
    assert abs(float(gradient) + 4 * s) <= 2e-6


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_a_row_without_keys_has_no_mass_and_no_gradient(backend):
    views = sample_views(1, 8)
    for bound in (1.0, None):
        settings = {"temperature": 0.5, "exclude_self": True, "backend": backend, "bound": bound}
        assert float(similarity_logsumexp(**views, **settings)) == float("-inf")
    found = evaluate(
        lambda **x: similarity_moments(
            **x, temperature=0.5, degree=2, exclude_self=True, backend=backend
        ),
        views,
    )
    assert all(float(x.abs().max()) == 0 for x in found.values())


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_nan_poisons_its_row_and_a_nan_key_every_row(name, path, on_path):
    function, _, settings = FUNCTIONS[name]
    settings = {**settings, **on_path(path), "reduction": "none"}
    views = sample_views(70, 16)
    clean = function(**views, **settings)
    queries, keys = views["queries"].clone(), views["keys"].clone()
    queries[3, 5] = float("nan")
    found = function(queries, views["keys"], **settings)
    assert found[3].isnan()
    rest = torch.arange(70, device=DEVICE) != 3
    assert float((found[rest] - clean[rest]).abs().max()) <= 1e-6 * float(clean.abs().max())
    keys[66, 2] = float("nan")
    assert function(views["queries"], keys, **settings).isnan().all()


@pytest.mark.parametrize("path", PATHS)
def test_a_single_pair_has_nothing_to_learn(path, on_path):
    path = on_path(path)
    for function in (rkdo_loss, info_nce):
        found = evaluate(lambda f=function, **x: f(**x, **path), sample_views(1, 8))
        assert float(found["value"]) == 0
        assert all(float(x.abs().max()) <= 1e-7 for x in found.values())


@pytest.mark.parametrize("path", PATHS)
def test_wide_embeddings(path, on_path):
    dim = 520 if path.endswith("triton") and DEVICE == "cpu" else 4096  # products: dim²
    hold(rkdo_loss, reference.rkdo_loss, sample_views(5, dim), on_path(path))


@pytest.mark.parametrize("kept", ["small", "tiles"])
@pytest.mark.parametrize("detach_target", [False, True], ids=["flowing", "detached"])
@pytest.mark.parametrize("bound", [1.0, None])
def test_float64_meets_the_yardstick(bound, detach_target, kept, monkeypatch):
    """eager is in float64 too: every function must be as good, up to the truth's rounding."""
    if kept == "tiles":
        monkeypatch.setattr(small, "MAX_ENTRIES", 0)
    for name, (function, eager, settings) in FUNCTIONS.items():
        if name.startswith("rkdo"):
            settings = {**settings, "detach_target": detach_target}
        hold(function, eager, sample_views(70, 24, torch.float64), {"bound": bound}, **settings)


def gradients_are_right(function, views, temperature, settings):
    temperature = torch.tensor(temperature, dtype=torch.float64, requires_grad=True)
    w = torch.linspace(-1, 1, len(views["queries"]), dtype=torch.float64)

    def weighted(queries, keys, temperature):
        rows = function(queries, keys, temperature=temperature, **settings)
        return rows if rows.dim() == 2 else w * rows

    inputs = (*(x.cpu().requires_grad_() for x in views.values()), temperature)
    assert torch.autograd.gradcheck(weighted, inputs, eps=1e-6, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("kept", ["small", "tiles"])
@pytest.mark.parametrize("bound", [1.0, None])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_gradcheck(name, bound, kept, monkeypatch):
    if kept == "tiles":
        monkeypatch.setattr(small, "MAX_ENTRIES", 0)
    function, _, settings = FUNCTIONS[name]
    if settings.get("detach_target"):  # its gradient is no derivative of its value
        settings = {"depth": 5, "cooling": 0.5}
    settings = {k: v for k, v in settings.items() if k != "temperature"}
    settings = {**settings, "bound": bound, "reduction": "none", "positive_offset": 1}
    views = sample_views(4, 3, torch.float64, m=6, length=0.9)
    gradients_are_right(function, views, 0.4, settings)


@pytest.mark.parametrize("exclude_self", [False, True])
def test_gradcheck_of_sums(exclude_self):
    views = sample_views(4, 3, torch.float64, m=6, length=0.9)
    settings = {"exclude_self": exclude_self, "backend": "tiled"}
    gradients_are_right(similarity_logsumexp, views, 0.4, {**settings, "bound": None})
    gradients_are_right(similarity_logsumexp, views, 0.4, settings)
    gradients_are_right(similarity_moments, views, 0.4, {**settings, "degree": 3, "bound": 1.2})


@pytest.mark.parametrize("path", PATHS)
def test_results_are_the_same_every_time(path, on_path):
    path, views = on_path(path), sample_views(70, 24)
    for function in (rkdo_loss, icon_loss, info_nce):
        first, again = (evaluate(lambda f=function, **x: f(**x, **path), views) for _ in range(2))
        assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("alpha", [0, 0.5])
def test_probabilities_that_no_float_holds(alpha, path, on_path):
    """At τ = 0.001 a positive may be exp(−2000) as likely as another key; the loss is finite."""
    settings = {"temperature": 0.001, "alpha": alpha, "cooling": 0.3}
    hold(rkdo_loss, reference.rkdo_loss, sample_views(20, 3), on_path(path), **settings)
