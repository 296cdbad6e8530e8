"""The field's loss, gradient and update against whole matrices: the yardstick, on every backend."""

import pytest
import torch
from accuracy import DEVICE, DTYPES, assert_as_accurate, cast, compare, sample_views

from rkdo_kernels import ResponseField, field_blocks, reference

pytestmark = pytest.mark.usefixtures("poisoned")
BACKENDS = ("tiled", "triton")
F32, BF16, F16 = DTYPES
STORED = (torch.float32, torch.bfloat16, torch.float64)
STORED_BY = [  # the kernels have no float64
    (backend, stored)
    for backend in BACKENDS
    for stored in STORED
    if (backend, stored) != ("triton", torch.float64)
]


@pytest.fixture(params=["one block", "many blocks"])
def blocks(request, monkeypatch):
    if request.param == "many blocks":
        monkeypatch.setattr(field_blocks, "BLOCK_BYTES", 1)
        monkeypatch.setattr(field_blocks, "LEAST_ROWS", 3)


def samples(n, count, *, contiguous, seed=0):
    if contiguous:
        return torch.arange(n - count, n, device=DEVICE)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    return order[:count].to(DEVICE)


def neighbours(n, *, without_mass=(), seed=0):
    """Random rows over the samples, far from uniform; those in `without_mass` have one other."""
    generator = torch.Generator().manual_seed(seed)
    p = torch.rand(n, n, generator=generator, dtype=torch.float64) ** 6
    p[torch.rand(n, n, generator=generator) < 0.2] = 0
    p.diagonal().add_(0.1)
    for i in without_mass:
        p[i] = 0
        p[i, (i + 1) % n] = 1
    return p


def random_field(n, dtype, **options):
    p = neighbours(n, **options)
    return ResponseField.dense(n, dtype=dtype, initial=p.to_sparse_csr(), device=DEVICE)


def block_of(field, index):
    """P[I, I], as it is stored."""
    return field.rows(index)[:, index].double()


def wide(x):
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def hold(field_loss, block, views, temperature=0.5, scale=1.0):
    """Holds the losses, their sum and their mean to the yardstick, with their gradients."""
    for reduction in ("none", "sum", "mean"):

        def eager(queries, keys, reduction=reduction):
            p = block(wide(queries)) if callable(block) else block.to(wide(queries))
            rows = reference.field_loss(p, queries, keys, temperature=temperature)
            return rows if reduction == "none" else getattr(rows, reduction)()

        assert_as_accurate(
            lambda r=reduction, **x: field_loss(**x, reduction=r), eager, views,
            scale / temperature,
        )  # fmt: skip


@pytest.mark.parametrize(("backend", "stored"), STORED_BY, ids=str)
@pytest.mark.parametrize("contiguous", [True, False], ids=["contiguous", "gathered"])
@pytest.mark.parametrize(
    ("n", "count", "d", "dtype", "aligned"),
    [(1, 1, 1, F32, False), (5, 3, 31, F32, True), (70, 64, 64, F32, True), (50, 33, 16, BF16, 0),
     (50, 33, 16, F16, True), (90, 70, 40, F32, False)],
)  # fmt: skip
def test_dense_is_as_accurate_as_eager(
    n, count, d, dtype, aligned, contiguous, stored, backend, blocks
):
    field = random_field(n, stored)
    index = samples(n, count, contiguous=contiguous)
    views = sample_views(count, d, dtype, aligned=aligned)
    before = field.state_dict()
    hold(
        lambda **x: field.loss(**x, index=index, backend=backend),
        block_of(field, index),
        views,
    )
    same_bytes(before, field.state_dict())


def same_bytes(one, other):
    assert set(one) == set(other)
    for name, x in one.items():
        if isinstance(x, torch.Tensor):
            assert torch.equal(x, other[name]), name
        else:
            assert x == other[name]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("temperature", [0.5, 0.05, 0.01])
@pytest.mark.parametrize("length", [1.0, 4.0])
def test_dense_at_any_temperature(length, temperature, backend):
    """Logits that exponentials bear as they are, and far larger ones."""
    index = samples(40, 33, contiguous=False)
    field = random_field(40, torch.float32, without_mass=index[3:5].tolist())
    views = sample_views(33, 24, aligned=True, length=length)
    hold(
        lambda **x: field.loss(**x, index=index, temperature=temperature, backend=backend),
        block_of(field, index),
        views,
        temperature,
        length**2,
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("temperature", [0.5, 0.01])
@pytest.mark.parametrize("mass", [1e-2, 1e-6, 1e-30])
def test_little_of_a_row_is_in_the_block(mass, temperature, backend):
    """And p̂ may be as close to q as rounding: the loss of a row, not their mean."""
    n, count = 40, 39
    views = sample_views(count, 16)
    q = torch.softmax(views["queries"].double() @ views["keys"].double().T / temperature, 1)
    field = ResponseField.dense(n, device=DEVICE)
    for p in (mass * q, mass * torch.rand(count, count, device=DEVICE) / count):
        state = field.state_dict()
        off = p.float().fill_diagonal_(0)
        state["matrix"][:count, :count] = off
        state["diagonal"][:count] = p.diagonal()
        state["matrix"][:count, count] = 1 - mass
        field.load_state_dict(state)
        block = off + torch.diag(state["diagonal"][:count])
        hold(
            lambda **x: field.loss(
                **x, index=slice(0, count), temperature=temperature, backend=backend
            ),
            block,
            views,
            temperature,
        )


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_mass_below_the_normal_numbers_is_none(backend):
    field = ResponseField.dense(3, device=DEVICE)
    state = field.state_dict()
    state["matrix"][0, 1], state["matrix"][0, 2], state["diagonal"][0] = 1e-39, 1, 0
    field.load_state_dict(state)
    views = sample_views(2, 8)
    losses = field.step(**views, index=slice(0, 2), reduction="none", backend=backend)
    assert losses[0] == 0
    after = field.state_dict()
    for name in ("matrix", "diagonal", "row_sum"):
        assert torch.equal(after[name][0], state[name][0])
        assert not torch.equal(after[name][1], state[name][1]) or name == "row_sum"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("snapshot", [False, True], ids=["dense", "snapshot"])
def test_one_column_leaves_nothing_to_learn(snapshot, backend):
    for seed in range(30):
        generator = torch.Generator().manual_seed(seed)
        queries, keys = torch.randn(2, 1, 8, generator=generator).to(DEVICE).unbind()
        queries.requires_grad_()
        make = ResponseField.dense
        field = (
            ResponseField.snapshot(4, 8, history=2, device=DEVICE)
            if snapshot
            else make(4, device=DEVICE)
        )
        field.update(queries, keys, slice(2, 3), alpha=0.3, backend=backend)
        loss = field.loss(queries, keys, slice(2, 3), backend=backend)
        loss.backward()
        assert abs(loss) <= 1e-7
        assert queries.grad.abs().max() <= (0 if backend == "tiled" and not snapshot else 1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("contiguous", [True, False], ids=["contiguous", "gathered"])
def test_a_row_without_mass_in_the_block(contiguous, backend):
    """Loss 0, gradient 0 from that row, and the row stays."""
    index = samples(40, 20, contiguous=contiguous)
    absent = (set(range(40)) - set(index.tolist())).pop()
    row = int(index[7])
    p = neighbours(40)
    p[row] = 0
    p[row, absent] = 1
    field = ResponseField.dense(40, initial=p.to_sparse_csr(), device=DEVICE)
    views = sample_views(20, 8)
    block = block_of(field, index)
    assert not block[7].any()
    hold(lambda **x: field.loss(**x, index=index, backend=backend), block, views)
    losses = field.step(**views, index=index, reduction="none", backend=backend)
    assert losses[7] == 0
    assert (losses[:7] > 0).all()
    one_hot = torch.nn.functional.one_hot(torch.tensor(absent), 40).to(DEVICE)
    assert torch.equal(field.rows(index)[7], one_hot.float())
    assert not torch.equal(block_of(field, index)[6], block[6])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("contiguous", [True, False], ids=["contiguous", "gathered"])
@pytest.mark.parametrize("alpha", [0.01, 0.5, 1.0])
@pytest.mark.parametrize(("n", "count", "d"), [(1, 1, 1), (5, 3, 31), (90, 65, 16)])
def test_the_update_is_as_accurate_as_eager(n, count, d, alpha, contiguous, backend, blocks):
    field = random_field(n, torch.float32)
    index = samples(n, count, contiguous=contiguous)
    views = sample_views(count, d)
    before = field.state_dict()["matrix"]
    old = block_of(field, index)
    field.update(**views, index=index, alpha=alpha, temperature=0.2, backend=backend)
    after = field.rows(torch.arange(n)).double()
    found = after[index[:, None], index]
    matrix = field.state_dict()["matrix"]
    settings = {"alpha": alpha, "temperature": 0.2}

    def eager(inputs):
        block = old.to(inputs["queries"].dtype)
        return {"value": reference.field_update(block, **inputs, **settings)}

    truth = eager(cast(views, torch.float64))
    compare({"value": found}, eager, views, 5.0, truth)
    assert float((found / truth["value"] - 1).diagonal().abs().max()) <= 2e-6
    matrix[index[:, None], index] = before[index[:, None], index]
    assert torch.equal(matrix, before), "an entry outside of the block"
    assert float((field.rows(index).double().sum(1) - 1).abs().max()) <= 3e-7


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("contiguous", [True, False], ids=["contiguous", "gathered"])
def test_bfloat16_is_rounded_to_a_neighbour(contiguous, backend, blocks):
    field = random_field(60, torch.bfloat16)
    index = samples(60, 50, contiguous=contiguous)
    views = sample_views(50, 16)
    old = block_of(field, index)
    field.update(**views, index=index, alpha=0.3, backend=backend)
    truth = reference.field_update(
        old, *(x.double() for x in views.values()), alpha=0.3, temperature=0.5
    )
    state = field.state_dict()
    found = state["matrix"][index[:, None], index].double()
    found.diagonal().copy_(state["diagonal"][index])
    error = (found - truth).abs()
    assert float((error / truth).diagonal().max()) <= 1e-6
    error.diagonal().zero_()
    assert (error <= 2**-7 * truth + 1e-7).all()
    assert (error > 2**-9 * truth).any(), "rounded to the nearest"
    assert float((field.rows(index).double().sum(1) - 1).abs().max()) <= 3e-7


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("stored", STORED[:2], ids=str)
@pytest.mark.parametrize("drift", [1e-3, -1e-3, 3.0])
def test_what_a_row_has_too_much_or_too_little_is_taken_back(drift, stored, backend):
    """The block is divided by the row's sum; p̂ and what the row is meant to be do not change."""
    field = random_field(30, stored)
    index = samples(30, 20, contiguous=False)
    state = field.state_dict()
    state["diagonal"] += drift
    state["row_sum"] += drift
    if drift > 1:  # outside of the batch
        state["diagonal"] -= drift
        outside = (set(range(30)) - set(index.tolist())).pop()
        state["matrix"][index, outside] += drift
    state["row_sum"] = state["matrix"].double().sum(1) + state["diagonal"]
    field.load_state_dict(state)
    at = index[:, None], index
    views = sample_views(20, 8)
    mass = state["matrix"][at].double().sum(1) + state["diagonal"][index]
    before = field.loss(**views, index=index, reduction="none", backend=backend)
    losses = field.step(**views, index=index, alpha=0.3, reduction="none", backend=backend)
    assert torch.equal(losses, before)
    assert float((field.rows(index).double().sum(1) - 1).abs().max()) <= 3e-7
    total, after = state["row_sum"][index], field.state_dict()
    found = after["matrix"][at].double().sum(1) + after["diagonal"][index]
    unit = 2e-6 if stored == torch.float32 else 2**-8
    assert float((found * total / mass - 1).abs().max()) <= unit
    assert float((after["row_sum"][index] - (total - mass + found)).abs().max()) <= 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("stored", STORED[:2], ids=str)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_rows_that_are_not_finite_stay(bad, stored, backend, blocks):
    for name, rows in (("queries", [4]), ("keys", range(20))):
        field = random_field(30, stored)
        index = samples(30, 20, contiguous=False)
        views = sample_views(20, 8)
        views[name][4] = bad
        before = field.rows(torch.arange(30))
        losses = field.step(**views, index=index, reduction="none", backend=backend)
        after = field.rows(torch.arange(30))
        changed = (before != after).any(1)[index]
        assert torch.isfinite(after).all()
        for i in range(20):
            assert changed[i] == (torch.isfinite(losses[i]) and i not in (rows if i == 4 else []))
        assert not torch.isfinite(losses[4])
        if name == "queries":
            assert changed.sum() == 19


# ---- snapshots -----------------------------------------------------------------------------------


def past(k, count, d, dtype, seed=0):
    """Operands of the snapshots' operators, with samples that have from 0 to k visits."""
    generator = torch.Generator().manual_seed(seed)

    def rows(*shape):
        x = torch.randn(*shape, generator=generator, dtype=torch.float64)
        return torch.nn.functional.normalize(x, dim=-1).to(DEVICE, dtype)

    visits = torch.randint(0, k + 1, (count,), generator=generator).to(DEVICE)
    alphas = torch.rand(k, count, generator=generator).to(DEVICE)
    temperatures = 1 / (1 + 4 * torch.rand(k, count, generator=generator)).to(DEVICE)
    return rows(k, count, d), rows(k, count, d), alphas, temperatures, visits


def visited(field, k, count, d, n, seed=0):
    """A snapshot field whose samples have from 0 to 2 k visits, in batches of different samples."""
    for step in range(2 * k):
        index = samples(n, count, contiguous=False, seed=seed + step)
        views = sample_views(count, d, seed=seed + step)
        field.update(**views, index=index, alpha=0.2 + 0.1 * step, temperature=0.3 + 0.05 * step)
    return field


def initials(n):
    p = neighbours(n)
    p[p < 0.2] = 0
    p[3] = 0
    labels = torch.arange(n) % 7
    return {"identity": "identity", "labels": labels, "neighbours": p.to_sparse_csr()}


def materialised(field, index, initial, n, dtype=torch.float64):
    """The mixture by reference.snapshot_target, from the field's own state."""
    state = field.state_dict()
    total = state["visits"][index].long()
    k = len(state["queries"])
    slot = (total - 1 - torch.arange(k, device=DEVICE)[:, None]) % k
    queries, keys, alpha, scale = (
        state[name][slot, index].to(dtype) for name in ("queries", "keys", "alpha", "scale")
    )
    if isinstance(initial, str):
        p = torch.eye(n, dtype=torch.float64)
    elif initial.layout == torch.sparse_csr:
        p = initial.to_dense()
        p[p.sum(1) == 0] = torch.eye(n, dtype=torch.float64)[p.sum(1) == 0]
        p /= p.sum(1, keepdim=True)
    else:
        p = (initial[:, None] == initial).double()
    p = p.to(DEVICE)[index[:, None], index]
    return reference.snapshot_target(
        queries, keys, alpha, 1 / scale, total.clamp_max(k), p.to(dtype)
    )


@pytest.mark.pairs
@pytest.mark.parametrize(("backend", "stored"), STORED_BY, ids=str)
@pytest.mark.parametrize(
    ("k", "n", "count", "d", "dtype", "initial"),
    [
        (1, 1, 1, 1, F32, "identity"),
        *[
            (*shape, initial)
            for shape in ((2, 40, 33, 16, F32), (4, 60, 30, 24, F32), (3, 30, 17, 31, BF16))
            for initial in ("identity", "labels", "neighbours")
        ],
    ],
)
def test_snapshot_is_as_accurate_as_eager(k, n, count, d, dtype, stored, initial, backend, blocks):
    given = initials(n)[initial] if n > 1 else "identity"
    field = ResponseField.snapshot(n, d, history=k, dtype=stored, initial=given, device=DEVICE)
    index = samples(n, count, contiguous=False, seed=100)
    for _ in range(2):  # without visits, and with some
        hold(
            lambda **x: field.loss(**x, index=index, backend=backend),
            lambda dtype: materialised(field, index, given, n, dtype),
            sample_views(count, d, dtype, aligned=True),
        )
        p = materialised(field, index, given, n)
        assert float((field.block(index) - p).abs().max()) <= 1e-6
        visited(field, k, count, d, n)
