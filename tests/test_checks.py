"""Bad arguments: an error of the right type that names the argument, what came, what was wanted."""

import re

import pytest
import torch
from accuracy import DEVICE, sample_views

from rkdo_kernels import (
    checks,
    icon_loss,
    info_nce,
    launch,
    rkdo_loss,
    similarity_logsumexp,
    similarity_moments,
)

FUNCTIONS = (rkdo_loss, icon_loss, info_nce)
X = torch.nn.functional.normalize(torch.ones(4, 3, device=DEVICE), dim=1)
ON_CPU = pytest.mark.skipif(DEVICE != "cpu", reason="on a GPU values are never read: NaN instead")

TENSORS = [  # queries, keys, error, its words
    (X[0], X, ValueError, r"queries must be \[rows, dim\], got shape \[3\]"),
    (X, X[None], ValueError, r"keys must be \[rows, dim\], got shape \[1, 4, 3\]"),
    (X, X[:3], ValueError, r"keys \[3, 3\] must match queries \[4, 3\]"),
    (X, X[:, :2], ValueError, r"keys \[4, 2\] must have the dim of queries \[4, 3\]"),
    (X[:0], X, ValueError, r"queries must not be empty, got shape \[0, 3\]"),
    (X, X[:, :0], ValueError, r"keys must not be empty, got shape \[4, 0\]"),
    (X.long(), X, TypeError, r"queries must be float32, .*, got int64"),
    (X, X.bool(), TypeError, r"keys must be float32, .*, got bool"),
    (X.to(torch.complex64), X, TypeError, r"queries must be float32, .*, got complex64"),
    (X, X.to_sparse(), TypeError, r"keys must be a dense tensor, got layout torch.sparse_coo"),
    (X.tolist(), X, TypeError, r"queries must be a torch.Tensor, got list"),
    (X, None, TypeError, r"keys must be a torch.Tensor, got NoneType"),
    (X, X.to("meta"), ValueError, r"keys are on meta, queries on c.*: want one device"),
    (X, X.half(), TypeError, r"keys are float16, queries float32: want one dtype"),
]  # fmt: skip

NOT_A_NUMBER = ["1", None, True, 1j, [0.5]]
SETTINGS = [  # functions, setting, values, error, its words
    (FUNCTIONS, "temperature", [0, -0.1, float("nan"), float("inf"), 1e-320, 10**5000], ValueError,
     "temperature must be positive and finite, got"),
    (FUNCTIONS, "temperature", NOT_A_NUMBER, TypeError, "temperature must be a number or a tensor"),
    (FUNCTIONS, "temperature", [torch.ones(2), torch.ones(1, dtype=torch.int64)], TypeError,
     "temperature must be a number or a floating tensor of one element, got"),
    (FUNCTIONS, "bound", [0, -1.0, float("nan"), float("inf"), 1e-320, 10**400, 10**5000],
     ValueError, "bound must be positive and finite, or None, got"),
    (FUNCTIONS, "bound", ["1", True, X], TypeError, "bound must be a number or None, got"),
    (FUNCTIONS, "reduction", ["max", None, "", 1], ValueError,
     "reduction must be one of 'mean', 'sum', 'none', got"),
    (FUNCTIONS, "backend", ["cuda", None, True], ValueError,
     "backend must be one of 'auto', 'triton', 'tiled', 'reference', got"),
    (FUNCTIONS, "positive_offset", [-1], ValueError, "positive_offset must be at least 0, got -1"),
    (FUNCTIONS, "positive_offset", [1], ValueError,
     "positive_offset must leave 4 positives among 4 keys, got 1"),
    (FUNCTIONS, "positive_offset", [1.0, True, "0"], TypeError, "positive_offset must be an int"),
    (FUNCTIONS, "positive_offset", [2**63, 10**400, 10**5000], ValueError,
     "positive_offset must be below 2**63, got"),
    ([rkdo_loss], "alpha", [-0.1, 1.1, float("nan"), float("inf"), 10**5000], ValueError,
     "alpha must be in [0, 1], got"),
    ([rkdo_loss], "alpha", [*NOT_A_NUMBER, X], TypeError, "alpha must be a number, got"),
    ([rkdo_loss], "depth", [0, -3], ValueError, "depth must be at least 1, got"),
    ([rkdo_loss], "depth", [2**63, 10**400, 10**5000], ValueError,
     "depth must be below 2**63, got"),
    ([rkdo_loss], "depth", [1.0, True, "3", None], TypeError, "depth must be an int, got"),
    ([rkdo_loss], "cooling", [-0.1, 1, 1.5, float("nan")], ValueError,
     "cooling must be in [0, 1), got"),
    ([rkdo_loss], "cooling", NOT_A_NUMBER, TypeError, "cooling must be a number, got"),
    ([rkdo_loss], "detach_target", [1, None, "yes"], TypeError,
     "detach_target must be True or False, got"),
    ([icon_loss], "debias", [-0.1, 1.1, float("nan")], ValueError, "debias must be in [0, 1], got"),
    ([icon_loss], "debias", NOT_A_NUMBER, TypeError, "debias must be a number, got"),
    ([icon_loss], "kernel", ["cauchy", None], ValueError,
     "kernel must be one of 'gaussian', 'student', got"),
    ([info_nce], "exclude_self", [1, None], TypeError, "exclude_self must be True or False, got"),
    ([info_nce], "exclude_self", [True], ValueError,
     "exclude_self leaves out the positives too: positive_offset must not be 0"),
]  # fmt: skip


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize(("queries", "keys", "error", "words"), TENSORS)
def test_bad_tensors(function, queries, keys, error, words, backend):
    with pytest.raises(error, match=words):
        function(queries, keys, backend=backend)


@pytest.mark.parametrize(("functions", "name", "values", "error", "words"), SETTINGS)
def test_bad_settings(functions, name, values, error, words):
    for function in functions:
        for value in values:
            with pytest.raises(error, match=re.escape(words)):
                function(X, X, **{name: value})


@pytest.mark.parametrize("function", [similarity_logsumexp, similarity_moments])
def test_sums_check_their_arguments(function):
    settings = {"degree": 2} if function is similarity_moments else {}
    for queries, keys, error, words in TENSORS:
        if "must match" not in words:  # these rows need no positives
            with pytest.raises(error, match=words):
                function(queries, keys, temperature=0.5, **settings)
    for name, value, error, words in [
        ("temperature", 0, ValueError, "temperature must be positive and finite, got 0"),
        ("exclude_self", 1, TypeError, "exclude_self must be True or False, got int"),
        ("backend", "c", ValueError, "backend must be one of"),
        ("bound", -1, ValueError, "bound must be positive and finite"),
    ]:
        with pytest.raises(error, match=words):
            function(X, X, **{"temperature": 0.5, **settings, name: value})


def test_moments_need_a_degree_and_a_range_that_float32_holds():
    for name, value, error, words in [
        ("degree", -1, ValueError, "degree must be at least 0, got -1"),
        ("degree", 10**400, ValueError, r"degree must be below 2\*\*63, got an int of 1329 bits"),
        ("degree", 1.0, TypeError, "degree must be an int, got float"),
        ("bound", None, ValueError, "bound must be a number for moments, got None"),
        ("temperature", 0.0249, ValueError, "temperature must be at least 0.025"),
    ]:
        with pytest.raises(error, match=words):
            similarity_moments(X, X, **{"temperature": 0.5, "degree": 2, name: value})
    assert similarity_moments(X, X, temperature=0.025, degree=0).isfinite().all()
    moments = similarity_moments(X.double(), X.double(), temperature=0.0249, degree=0)
    assert moments.isfinite().all()
    small = torch.tensor([0.0249, 0.0251], device=DEVICE)
    for temperature, is_nan in zip(small, (True, False), strict=True):  # one that is never read
        assert similarity_moments(X, X, temperature=temperature, degree=1).isnan().all() == is_nan


@ON_CPU
@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_bad_tensor_temperature_is_an_error_on_a_cpu(function):
    for value in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="temperature must be positive and finite, got"):
            function(X, X, temperature=torch.tensor(value))


@ON_CPU
@pytest.mark.parametrize("function", FUNCTIONS)
def test_rows_longer_than_the_bound_are_named(function):
    views = sample_views(20, 8)
    for length, bound, passes in ((1.004, 1.0, True), (1.02, 1.0, False), (1.02, 1.05, True)):
        views["queries"][7] *= length / views["queries"][7].norm()
        views["keys"][3] *= length / views["keys"][3].norm()
        if passes and length**2 <= checks.SLACK * bound:
            assert function(**views, bound=bound).isfinite()
        else:
            with pytest.raises(ValueError, match=r"queries\[7\] has length 1\.02 .* bound=1\. "):
                function(**views, bound=bound)
        assert function(**views, bound=None).isfinite()


def test_where_reading_would_wait_a_row_past_the_bound_gives_nan(monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    queries, keys = torch.eye(3), torch.eye(3)
    queries[1] *= 1.02
    factors = checks.within_bound(queries, keys, 1.0)
    assert factors[[0, 2]].tolist() == [1, 1]
    assert factors[1].isnan()


def test_infinite_rows_pass_the_bound_and_nan_rows_do_not():
    queries = torch.eye(3)
    queries[2] = float("nan")
    assert checks.within_bound(queries, torch.eye(3), 1.0) is None
    queries[1] = float("inf")
    with pytest.raises(ValueError, match=r"queries\[1\] has length inf"):
        checks.within_bound(queries, torch.eye(3), 1.0)


def test_triton_by_name_never_becomes_another_backend(monkeypatch):
    for function in FUNCTIONS:
        with pytest.raises(TypeError, match="takes float32, bfloat16 or float16, got float64"):
            function(X.double(), X.double(), backend="triton")
        monkeypatch.setattr(launch, "triton_status", lambda: "missing")
        with pytest.raises(RuntimeError, match="needs Triton, which cannot be imported"):
            function(X, X, backend="triton")
        monkeypatch.setattr(launch, "triton_status", lambda: "compiled")
        with pytest.raises(RuntimeError, match="needs a GPU, got tensors on cpu"):
            function(X.cpu(), X.cpu(), backend="triton")
        monkeypatch.undo()


def test_arguments_at_the_ends_of_their_ranges_are_fine():
    views = sample_views(5, 4)
    for alpha in (0, 1, 0.0, 1.0):
        assert rkdo_loss(**views, alpha=alpha, cooling=0, depth=1).isfinite()
    for debias in (0, 1):
        assert icon_loss(**views, debias=debias, temperature=1).isfinite()
    assert info_nce(**views, positive_offset=0, bound=1).isfinite()


FAR_APART = [  # dtype, length of the queries' entries, of the keys'
    (torch.float32, 1e-23, 1e22), (torch.float32, 1e22, 1e-23), (torch.float32, 1e-40, 1e38),
    (torch.bfloat16, 1e-23, 1e22), (torch.float64, 1e-180, 1e179), (torch.float64, 1e-310, 1e307),
]  # fmt: skip


@pytest.fixture(params=["read", "not read"])
def refuses(request, monkeypatch):
    """Whether a pair passes the bound, by the error or by the factors."""
    if request.param == "not read":
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)

    def refused(queries, keys, bound):
        try:
            factors = checks.within_bound(queries, keys, bound)
        except ValueError:
            return [True] * len(queries)
        return [False] * len(queries) if factors is None else factors.isnan().tolist()

    return refused


@pytest.mark.parametrize(("dtype", "short", "long"), FAR_APART)
def test_lengths_whose_squares_are_no_numbers(dtype, short, long, refuses):
    """Their product is one: |S| is `product`, within a percent."""
    queries = torch.full((3, 64), short, dtype=dtype, device=DEVICE)
    keys = torch.full((5, 64), long, dtype=dtype, device=DEVICE)
    keys[1:] *= torch.linspace(0, 0.9, 4, dtype=dtype, device=DEVICE)[:, None]
    product = 64 * float(queries[0, 0].double() * keys[0, 0].double())
    assert refuses(queries, keys, 0.9 * product) == [True] * 3
    assert refuses(queries, keys, 1.1 * product) == [False] * 3
    queries[1:] = 0
    if DEVICE != "cpu" or torch.compiler.is_compiling():
        assert refuses(queries, keys, 0.9 * product) == [True, False, False]


@ON_CPU
@pytest.mark.parametrize("backend", ["tiled", "triton", "reference"])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_rows_that_pass_the_bound_by_lengths_far_apart(function, backend):
    queries = torch.full((200, 64), 1e-23)
    keys = torch.full((200, 64), 1e22) * torch.linspace(0, 1, 200)[:, None]
    with pytest.raises(
        ValueError, match=r"queries\[\d+\] has length 8e-23 and the longest of keys"
    ):
        function(queries, keys, backend=backend)
    queries[7] = float("nan")  # which has no length
    with pytest.raises(ValueError, match="their product must not pass bound=1"):
        function(queries, keys, backend=backend)


@pytest.mark.parametrize("bound", [1e-300, 1e-40, 1e39, 1e300])
@pytest.mark.parametrize("backend", ["tiled", "triton", "reference"])
@pytest.mark.parametrize("function", [*FUNCTIONS, similarity_logsumexp])
def test_a_bound_that_is_no_number_of_the_products(function, backend, bound):
    for x in (X, X.bfloat16()):
        with pytest.raises(ValueError, match=r"bound must be .* float32's .*, got"):
            function(0 * x, 0 * x, temperature=0.5, bound=bound, backend=backend)
    if backend != "triton":
        doubles = 0 * X.double()
        assert function(doubles, doubles, temperature=max(0.5, bound), bound=bound).isfinite().all()


@pytest.mark.parametrize("bound", [1.2e-38, 1e37])
@pytest.mark.parametrize("backend", ["tiled", "triton", "reference"])
def test_bounds_at_the_ends_of_their_range(backend, bound):
    views = sample_views(5, 4, length=bound**0.5)
    for function in (*FUNCTIONS, similarity_logsumexp):
        x = {name: view.clone().requires_grad_() for name, view in views.items()}
        loss = function(**x, temperature=0.5 * bound, bound=bound, backend=backend).sum()
        assert loss.isfinite()
        loss.backward()
