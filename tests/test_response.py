"""ResponseField: when it advances, what it refuses, how it is saved, several ranks, memory."""

import itertools
import re
import weakref

import pytest
import torch
import torch.distributed as dist
from accuracy import DEVICE, sample_views
from ranks import on_two_ranks
from test_field_ops import BACKENDS, initials, neighbours, same_bytes, samples
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from rkdo_kernels import ResponseField, field_blocks, field_tiles, launch

N, D, B = 30, 8, 20
KINDS = {
    "dense": lambda **s: ResponseField.dense(N, device=DEVICE, **s),
    "dense bfloat16": lambda **s: ResponseField.dense(N, dtype=torch.bfloat16, device=DEVICE, **s),
    "snapshot": lambda **s: ResponseField.snapshot(N, D, history=3, device=DEVICE, **s),
}


@pytest.fixture(params=KINDS)
def make(request):
    return KINDS[request.param]


def batch(seed=0):
    return samples(N, B, contiguous=False, seed=seed), sample_views(B, D, seed=seed)


def visited(make, **settings):
    field = make(**settings)
    for seed in range(4):
        index, views = batch(seed + 50)
        field.update(**views, index=index, alpha=0.3)
    return field


# ---- when the field advances ---------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("initial", ["identity", "labels", "neighbours"])
def test_loss_and_update_are_step(initial, reduction, backend, make):
    one, two = (visited(make, initial=initials(N)[initial]) for _ in range(2))
    index, views = batch()
    leaves = [[x.clone().requires_grad_() for x in views.values()] for _ in range(2)]
    settings = {"temperature": 0.2, "reduction": reduction, "backend": backend}
    stepped = one.step(*leaves[0], index, alpha=0.4, **settings)
    loss = two.loss(*leaves[1], index, **settings)
    loss.sum().backward()
    two.update(*leaves[1], index, alpha=0.4, temperature=0.2, backend=backend)
    stepped.sum().backward()
    assert torch.equal(stepped, loss)
    same_bytes(one.state_dict(), two.state_dict())
    assert one.updates == two.updates == 5
    for a, b in zip(*leaves, strict=True):
        assert torch.equal(a.grad, b.grad)
        assert a.grad.any()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_gradient_after_an_update_is_that_of_the_field_before(reduction, make):
    index, views = batch()
    leaves = [[x.clone().requires_grad_() for x in views.values()] for _ in range(2)]
    one, two = visited(make), visited(make)
    loss = one.loss(*leaves[0], index, reduction=reduction)
    one.update(*leaves[0], index)
    loss.backward()
    two.loss(*leaves[1], index, reduction=reduction).backward()
    for a, b in zip(*leaves, strict=True):
        assert torch.equal(a.grad, b.grad)


def test_rows_of_a_dense_field_that_has_been_updated_have_no_gradient():
    index, views = batch()
    for name in ("dense", "dense bfloat16"):
        field = visited(KINDS[name])
        leaves = [x.clone().requires_grad_() for x in views.values()]
        loss = field.loss(*leaves, index, reduction="none")
        field.update(*leaves, index)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.sum().backward()
    field = visited(KINDS["snapshot"])  # whose batch is a copy
    loss = field.loss(*leaves, index, reduction="none")
    field.update(*leaves, index)
    loss.sum().backward()


def encoder(seed=0):
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(D, D), torch.nn.Tanh()).to(DEVICE)


def test_a_checkpointed_encoder(make):
    """The encoder runs twice, the field advances once, and the gradients are the same."""
    index, views = batch()
    found = []
    for kept in (False, True):
        field, model = visited(make), encoder()

        def embed(x, model=model, kept=kept):
            return checkpoint(model, x, use_reentrant=False) if kept else model(x)

        loss = field.step(embed(views["queries"]), embed(views["keys"]), index)
        loss.backward()
        assert field.updates == 5
        found.append((field.state_dict(), [p.grad for p in model.parameters()]))
    same_bytes(found[0][0], found[1][0])
    assert all(torch.equal(a, b) for a, b in zip(found[0][1], found[1][1], strict=True))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("call", ["step", "update"])
def test_a_checkpointed_update_is_refused(call, reentrant, make):
    """A function that is computed anew in the backward pass must not update again."""
    index, views = batch()
    field = visited(make)

    def run(queries, keys):
        if call == "step":
            return field.step(queries, keys, index)
        field.update(queries, keys, index)
        return field.loss(queries, keys, index)

    leaves = [x.clone().requires_grad_() for x in views.values()]
    loss = checkpoint(run, *leaves, use_reentrant=reentrant)
    before = field.state_dict()
    with pytest.raises(RuntimeError, match=f"{call} was called while a backward pass runs.*loss"):
        loss.backward()
    same_bytes(before, field.state_dict())
    loss = checkpoint(lambda *x: field.loss(*x, index), *leaves, use_reentrant=reentrant)
    loss.backward()
    same_bytes(before, field.state_dict())


def test_accumulation_and_skipped_steps(make):
    """A loop that accumulates two batches a step, and skips a step whose gradients overflow."""
    field, model = make(), encoder()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    advanced = 0
    for step in range(3):
        seen = []
        for half in range(2):
            index, views = batch(10 * step + half)
            embedded = model(views["queries"]), model(views["keys"])
            (field.loss(*embedded, index) / 2).backward()
            seen.append((*(x.detach() for x in embedded), index))
        if step == 1:
            next(model.parameters()).grad.fill_(torch.inf)
        before = field.state_dict()
        if all(bool(p.grad.isfinite().all()) for p in model.parameters()):
            optimizer.step()
            for queries, keys, index in seen:
                field.update(queries, keys, index)
                advanced += 1
        else:
            same_bytes(before, field.state_dict())
        optimizer.zero_grad()
        assert field.updates == advanced
    assert advanced == 4


@pytest.mark.skipif(DEVICE != "cpu", reason="compiled for the CPU")
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiled(reduction, make):
    torch._dynamo.reset()
    one, two = visited(make), visited(make)

    def run(field, queries, keys, index, alpha):
        loss = field.step(queries * 1.0, keys * 1.0, index, alpha=alpha, reduction=reduction)
        return loss * 2

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    for step in range(4):
        index, views = batch(step)
        leaves = [[x.clone().requires_grad_() for x in views.values()] for _ in range(2)]
        wanted = run(one, *leaves[0], index, 0.1 + step / 10)
        found = compiled(two, *leaves[1], index, 0.1 + step / 10)
        wanted.sum().backward()
        found.sum().backward()
        assert torch.allclose(found, wanted, rtol=1e-6)
        for a, b in zip(*leaves, strict=True):
            assert torch.allclose(a.grad, b.grad, rtol=1e-5, atol=1e-7)
        assert two.updates == one.updates == 5 + step
    for name, x in one.state_dict().items():
        if isinstance(x, torch.Tensor) and x.is_floating_point():
            assert torch.allclose(x, two.state_dict()[name], rtol=1e-5, atol=1e-6)
    index, views = batch()
    index[3] = index[4]
    before = two.state_dict()
    assert compiled(two, *views.values(), index, 0.1).isnan().all()
    same_bytes(before, two.state_dict())


def test_autocast_and_no_grad(make):
    index, views = batch()
    field = visited(make)
    wanted = field.loss(**views, index=index)
    with torch.autocast(DEVICE, torch.bfloat16):
        found = field.loss(**views, index=index)
    assert found.dtype == torch.float32
    assert torch.equal(found, wanted)
    with torch.no_grad():
        leaves = {name: x.clone().requires_grad_() for name, x in views.items()}
        assert not field.step(**leaves, index=index).requires_grad


def test_a_second_derivative_is_refused(make):
    index, views = batch()
    field = visited(make)
    leaves = [x.clone().requires_grad_() for x in views.values()]
    for reduction in ("mean", "none"):
        loss = field.loss(*leaves, index, reduction=reduction).sum()
        (gradient,) = torch.autograd.grad(loss, leaves[0], create_graph=True)
        with pytest.raises(RuntimeError, match="differentiated once"):
            gradient.square().sum().backward()


# ---- what it refuses -----------------------------------------------------------------------------

I = torch.arange(B, device=DEVICE)  # noqa: E741
INDICES = [
    (I + N - B + 1, ValueError, rf"index must be in \[0, {N}\), got {N}"),
    (I - 1, ValueError, rf"index must be in \[0, {N}\), got -1"),
    (torch.cat([I[:-1], I[:1]]), ValueError, "index must not repeat a sample, got 0"),
    (I[:-1], ValueError, rf"index must have {B} samples, got shape \[{B - 1}\]"),
    (I[None], ValueError, rf"index must have {B} samples, got shape \[1, {B}\]"),
    (slice(0, B + 1), ValueError, rf"index must have {B} samples, got shape \[{B + 1}\]"),
    (
        slice(N - B + 1, N + 1),
        ValueError,
        rf"index must be a slice of .* samples of {N}, got slice",
    ),
    (slice(0, N, 2), ValueError, "index must be a slice of consecutive samples"),
    (I.float(), TypeError, "index must be int64 or int32, got float32"),
    (I > 3, TypeError, "index must be int64 or int32, got bool"),
    (list(range(B)), TypeError, "index must be a torch.Tensor or a slice, got list"),
]


@pytest.mark.parametrize("index", [I[:0], slice(5, 2)])
def test_an_empty_index(index, make):
    with pytest.raises(ValueError, match=r"^index must"):
        make().block(index)


def test_a_compiled_call_that_is_bad_changes_nothing(make):
    torch._dynamo.reset()
    field = visited(make)
    before = field.state_dict()
    index, views = batch()

    def run(index, temperature):
        return field.step(**views, index=index, temperature=temperature)

    run = torch.compile(run, backend="aot_eager", fullgraph=True)
    for bad in (torch.cat([index[:-1], index[:1]]), torch.where(index == index[0], N, index)):
        assert run(bad, torch.tensor(0.5)).isnan()
    for temperature in (-0.5, 0.0, torch.inf):
        assert run(index, torch.tensor(temperature)).isnan()
    same_bytes(before, field.state_dict())


@pytest.mark.parametrize(("index", "error", "words"), INDICES)
@pytest.mark.parametrize("call", ["loss", "update", "step"])
def test_a_bad_index(call, index, error, words, make):
    field = visited(make)
    before = field.state_dict()
    if DEVICE != "cpu" and error is ValueError and ("repeat" in words or "in \\[" in words):
        assert call == "update" or getattr(field, call)(**batch()[1], index=index).isnan()
    else:
        with pytest.raises(error, match=words):
            getattr(field, call)(**batch()[1], index=index)
    same_bytes(before, field.state_dict())


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"temperature": 0}, ValueError, "temperature must be positive"),
        ({"temperature": torch.ones(1, requires_grad=True)}, ValueError, "must not require a grad"),
        ({"alpha": 1.5}, ValueError, r"alpha must be in \[0, 1\], got 1.5"),
        ({"alpha": float("nan")}, ValueError, r"alpha must be in \[0, 1\], got nan"),
        ({"reduction": "max"}, ValueError, "reduction must be one of"),
        ({"backend": "reference"}, ValueError, "backend must be one of 'auto', 'triton', 'tiled'"),
        ({"keys": torch.ones(B, D + 1, device=DEVICE)}, ValueError, "must have the dim of queries"),
        ({"keys": torch.ones(B + 1, D, device=DEVICE)}, ValueError, "as many keys as queries"),
        ({"queries": torch.ones(B, D, device="meta")}, ValueError, "want one device"),
        ({"keys": torch.ones(B, D, device=DEVICE).long()}, TypeError, "keys must be float32"),
    ],
)
def test_other_bad_arguments(settings, error, words, make):
    field = visited(make)
    before = field.state_dict()
    index, views = batch()
    with pytest.raises(error, match=words):
        field.step(**{**views, "index": index, **settings})
    same_bytes(before, field.state_dict())


@pytest.mark.parametrize(
    ("build", "error", "words"),
    [
        (lambda: ResponseField.dense(0), ValueError, "n must be at least 1, got 0"),
        (lambda: ResponseField.dense(3.0), TypeError, "n must be an int, got float"),
        (lambda: ResponseField.dense(3, dtype=torch.int8), ValueError, "dtype must be one of"),
        (lambda: ResponseField.dense(3, initial="labels"), TypeError, "initial must be 'identity'"),
        (lambda: ResponseField.dense(3, initial=torch.ones(3)), TypeError, "got float32"),
        (lambda: ResponseField.dense(3, initial=torch.ones(2).long()), ValueError, "have 3 labels"),
        (lambda: ResponseField.dense(3, initial=torch.eye(2).to_sparse_csr()), ValueError,
         r"initial must be \[3, 3\], got shape \[2, 2\]"),
        (lambda: ResponseField.dense(3, initial=(-torch.eye(3)).to_sparse_csr()), ValueError,
         "weights of at least 0"),
        (lambda: ResponseField.snapshot(3, 2, history=0), ValueError, "history must be at least 1"),
        (lambda: ResponseField.snapshot(3, 0, history=1), ValueError, "dim must be at least 1"),
    ],
)  # fmt: skip
def test_bad_settings(build, error, words):
    with pytest.raises(error, match=words):
        build()


def test_a_matrix_that_does_not_fit():
    with pytest.raises(MemoryError, match=r"dense field of 50000000 samples has 1e\+07 GB.*snapsh"):
        ResponseField.dense(50_000_000, device=DEVICE)


def test_snapshots_that_do_not_fit():
    wanted = r"snapshot field of 1000000000 samples, dim=1024, history=4 has .* shorter history"
    with pytest.raises(MemoryError, match=wanted):
        ResponseField.snapshot(10**9, 1024, history=4, device=DEVICE)


def test_a_state_without_copies_is_the_fields_own():
    field = ResponseField.dense(N, device=DEVICE)
    assert field.state_dict(copy=False)["matrix"] is field._tensors["matrix"]
    assert field.state_dict()["matrix"] is not field._tensors["matrix"]
    with pytest.raises(TypeError, match="copy must be True or False, got int"):
        field.state_dict(copy=0)


def test_a_snapshot_wants_its_own_dim():
    index, views = batch()
    field = ResponseField.snapshot(N, D + 1, history=1, device=DEVICE)
    with pytest.raises(ValueError, match=f"must have the field's dim, {D + 1}"):
        field.loss(**views, index=index)
    with pytest.raises(RuntimeError, match="has no rows"):
        field.rows(index)


def test_snapshots_of_rows_that_are_not_finite_are_not_kept():
    index, views = batch()
    field = visited(KINDS["snapshot"])
    before = field.state_dict()
    views["queries"][2, 1] = torch.nan
    views["keys"][5, 0] = torch.inf
    field.update(**views, index=index)
    after = field.state_dict()
    changed = (before["visits"] != after["visits"])[index]
    assert changed.sum() == B - 2
    assert not changed[2]
    assert not changed[5]
    for name in ("queries", "keys", "alpha"):
        assert torch.equal(before[name][:, index[[2, 5]]], after[name][:, index[[2, 5]]])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("dtype", "factor", "temperature"),
    [(torch.float16, 1e6, 0.5), (torch.float32, 1e30, 0.5), (torch.float32, 1, 1e-40)],
)
def test_snapshots_that_would_not_be_finite_are_not_kept(dtype, factor, temperature, backend):
    index, views = batch()
    field = visited(KINDS["snapshot"], dtype=dtype)
    before = field.block(index)
    large = {name: x * factor for name, x in views.items()}
    field.update(**large, index=index, temperature=temperature, backend=backend)
    assert torch.equal(field.block(index), before)
    assert field.step(**views, index=index, backend=backend).isfinite()


@pytest.mark.parametrize("backend", BACKENDS)
def test_snapshots_that_would_not_be_finite_with_others_are_not_kept(backend):
    index, views = batch()
    field = KINDS["snapshot"](dtype=torch.float32)
    half = B // 2
    large = [(views["queries"][:half] * 1e25, views["keys"][:half]),
             (views["queries"][half:], views["keys"][half:] * 1e25)]  # fmt: skip
    for of, (queries, keys) in zip((index[:half], index[half:]), large, strict=True):
        field.update(queries, keys, index=of, backend=backend)
    assert field.block(index).isfinite().all()
    assert field.step(**views, index=index, backend=backend).isfinite()


@pytest.mark.parametrize("side", ["queries", "keys"])
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_snapshots_are_kept_up_to_entries_of_2_to_the_32(dtype, sign, side):
    """Any two of them make a logit that every dtype of a sum holds."""
    index, views = batch()
    wide = {name: x.double() for name, x in views.items()}
    next_one = 2.0**32 * (1 + torch.finfo(dtype).eps)
    for row, entry in enumerate((2.0**32, next_one, 2.0**33)):
        wide[side][row, 1] = sign * entry
    field = KINDS["snapshot"](dtype=dtype)
    field.update(**wide, index=index)
    wanted = torch.ones(B, device=DEVICE, dtype=torch.int32)
    wanted[1:3] = 0
    assert torch.equal(field.state_dict()["visits"][index], wanted)
    assert field.block(index).isfinite().all()


def test_a_wide_batch_leaves_nothing_that_a_narrow_one_could_not_read():
    index, views = batch()
    wide = {name: x.double() for name, x in views.items()}
    field = KINDS["snapshot"](dtype=torch.float32)
    field.update(**wide, index=index, temperature=1e-39)
    large = {name: 1e8 * x for name, x in wide.items()}
    field.update(**large, index=index, temperature=1e-30)
    assert field.step(**views, index=index).isfinite()


def test_autocast_does_not_touch_a_block():
    index, _ = batch()
    field = visited(KINDS["snapshot"])
    before = field.block(index)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        assert torch.equal(field.block(index), before)


def test_a_temperature_whose_inverse_is_no_float32(make):
    field = visited(make)
    index, views = batch()
    before = field.block(index)
    assert field.step(**views, index=index, temperature=1e-40).isnan()
    assert torch.equal(field.block(index), before)


@pytest.mark.parametrize("kind", ["dense", "snapshot"])
def test_automatically_no_kernel_gets_a_float64_field(kind, monkeypatch):
    field = visited(KINDS[kind], dtype=torch.float64)
    index, views = batch()
    asked = []
    monkeypatch.setattr(launch, "backend_for", lambda name, _: asked.append(name) or "tiled")
    field.step(**views, index=index)
    assert asked == ["tiled"]


# ---- what it is ----------------------------------------------------------------------------------


@pytest.mark.parametrize("initial", ["identity", "labels", "neighbours"])
def test_all_of_it_moves(initial, make):
    field = make(initial=initials(N)[initial]).to("meta")
    index, views = batch()
    views = {name: x.to("meta") for name, x in views.items()}
    assert field.step(**views, index=index.cpu()).device.type == "meta"


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_index_with_a_stride(backend, make):
    one, two = visited(make), visited(make)
    index, views = batch()
    strided = index.repeat_interleave(2)[::2]
    assert not strided.is_contiguous()
    one.update(**views, index=index, backend=backend)
    two.update(**views, index=strided, backend=backend)
    same_bytes(one.state_dict(), two.state_dict())


def test_int32_slices_and_ranges_are_the_same_samples(make):
    views = sample_views(B, D)
    found = []
    for index in (I + 5, (I + 5).int(), slice(5, 5 + B), (I + 5).cpu()):
        field = visited(make)
        found.append((field.step(**views, index=index), field.state_dict()))
    for loss, state in found[1:]:
        assert torch.equal(loss, found[0][0])
        same_bytes(state, found[0][1])
    order = torch.randperm(B, generator=torch.Generator().manual_seed(0))
    field = visited(make)
    loss = field.step(*(x[order] for x in views.values()), (I + 5)[order.to(DEVICE)])
    assert torch.allclose(loss, found[0][0], rtol=1e-6)


@pytest.mark.parametrize("initial", ["identity", "labels", "neighbours"])
def test_save_and_load(initial, make, tmp_path):
    field = visited(make, initial=initials(N)[initial])
    torch.save(field.state_dict(), tmp_path / "field.pt")
    loaded = make(initial=initials(N)[initial])
    loaded.load_state_dict(torch.load(tmp_path / "field.pt", weights_only=True))
    same_bytes(field.state_dict(), loaded.state_dict())
    for seed in range(3):
        index, views = batch(seed)
        assert torch.equal(field.step(**views, index=index), loaded.step(**views, index=index))
        same_bytes(field.state_dict(), loaded.state_dict())
    assert len(field) == N
    assert field.to(DEVICE) is field


def test_a_saved_field_of_another_making_is_refused():
    wanted = ResponseField.dense(N, device=DEVICE)
    before = wanted.state_dict()
    others = {
        rf"state has n={N + 1}, the field {N}": ResponseField.dense(N + 1),
        "state has kind='snapshot', the field 'dense'": KINDS["snapshot"](),
        rf"state has matrix \[{N}, {N}\] bfloat16, the field \[{N}, {N}\] float32": KINDS[
            "dense bfloat16"
        ](),
    }
    for words, other in others.items():
        with pytest.raises(ValueError, match=words):
            wanted.load_state_dict(other.state_dict())
    broken = wanted.state_dict()
    del broken["row_sum"]
    with pytest.raises(ValueError, match="differ in row_sum"):
        wanted.load_state_dict(broken)
    with pytest.raises(ValueError, match="differ in 3, row_sum"):
        wanted.load_state_dict({**broken, 3: None})
    with pytest.raises(ValueError, match=rf"state has n=tensor\(.*, the field {N}"):
        wanted.load_state_dict({**before, "n": torch.tensor([N, N])})
    with pytest.raises(TypeError, match="state must be a dict, got list"):
        wanted.load_state_dict(list(before))
    with pytest.raises(TypeError, match="state has matrix of type int, want a tensor"):
        wanted.load_state_dict({**before, "matrix": 3})
    last = list(before)[-1]
    other = ResponseField.dense(N, initial=torch.zeros(N, dtype=torch.int64), device=DEVICE)
    for without in (before[last].to("meta"), before[last].to_sparse()):
        with pytest.raises(ValueError, match=f"state has {last} without values of its own"):
            wanted.load_state_dict({**other.state_dict(), last: without})
    same_bytes(before, wanted.state_dict())
    labelled = KINDS["snapshot"](initial=torch.arange(N))
    with pytest.raises(ValueError, match=re.escape("differ in initial.labels")):
        labelled.load_state_dict(KINDS["snapshot"]().state_dict())


def test_the_start():
    p = neighbours(N)
    p[p < 0.05] = 0
    p[4] = 0
    p[7, 7] = 0
    labels = torch.arange(N) % 4
    alike = (labels[:, None] == labels).double()
    p_normal = p / p.sum(1, keepdim=True)
    p_normal[4] = torch.eye(N, dtype=p.dtype)[4]
    wanted = {"identity": torch.eye(N, dtype=p.dtype), "labels": alike / alike.sum(1, keepdim=True),
              "neighbours": p_normal}  # fmt: skip
    given = {"identity": "identity", "labels": labels, "neighbours": p.to_sparse_csr()}
    every = torch.arange(N)
    for name, truth in wanted.items():
        for dtype, tolerance in (
            (torch.float64, 1e-15),
            (torch.float32, 1e-7),
            (torch.bfloat16, 0.01),
        ):
            found = ResponseField.dense(N, dtype=dtype, initial=given[name]).rows(every)
            assert float((found - truth).abs().max()) <= tolerance
            rows = found.diagonal() > 0  # which take up what rounding leaves
            assert float((found[rows].double().sum(1) - 1).abs().max()) <= 3e-7
            assert not found[truth == 0].any()
        snapshot = ResponseField.snapshot(N, D, history=2, dtype=torch.float64, initial=given[name])
        half = torch.arange(0, N, 2)
        block = truth[half[:, None], half]
        mass = block.sum(1, keepdim=True)
        block = torch.where(mass > 0, block / mass, 0)
        assert float((snapshot.block(half) - block).abs().max()) <= 1e-15


def test_it_is_no_buffer_and_tells_its_size():
    field = ResponseField.snapshot(1_000_000, 64, history=4, device="meta")
    assert field.nbytes == 1_000_000 * (2 * 4 * 64 * 2 + 2 * 4 * 4 + 4) + 16
    assert field.nbytes <= 1.1e9
    assert "ResponseField.snapshot(1000000, 64, history=4, dtype=torch.bfloat16" in repr(field)
    assert not isinstance(field, torch.nn.Module)
    dense = ResponseField.dense(1000, dtype=torch.bfloat16)
    assert dense.nbytes == 1000 * (1000 * 2 + 4 + 8) + 16
    assert repr(dense).startswith("ResponseField.dense(1000, dtype=torch.bfloat16, device=cpu")


# ---- memory --------------------------------------------------------------------------------------


class Watch(TorchDispatchMode):
    """The largest storage that any operator makes, but for those that it was given to ignore."""

    def __init__(self, known):
        super().__init__()
        self.known, self.largest = weakref.WeakSet(x.untyped_storage() for x in known), 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in torch.utils._pytree.tree_leaves(result):
            if isinstance(x, torch.Tensor) and x.untyped_storage() not in self.known:
                self.largest = max(self.largest, x.untyped_storage().nbytes())
        return result


@pytest.mark.skipif(DEVICE != "cpu", reason="row blocks are the CPU's")
@pytest.mark.parametrize("contiguous", [True, False], ids=["contiguous", "gathered"])
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "snapshot"])
def test_nothing_is_larger_than_the_blocks_buffers(kind, contiguous, monkeypatch):
    n, count = 700, 640
    monkeypatch.setattr(field_blocks, "BLOCK_BYTES", 1 << 14)
    if kind == "snapshot":
        field = ResponseField.snapshot(n, D, history=3)
    else:
        field = ResponseField.dense(n, dtype=getattr(torch, kind))
    views = {name: x.requires_grad_() for name, x in sample_views(count, D).items()}
    index = samples(n, count, contiguous=contiguous)
    watch = Watch(field._state.tensors.values())
    inner = field_tiles.snapshot_pass if kind == "snapshot" else field_tiles.dense_pass

    def watched(*arguments):
        with watch:
            return inner(*arguments)

    monkeypatch.setattr(field_tiles, inner.__name__, watched)
    with watch:
        field.step(**views, index=index).backward()
    assert 0 < watch.largest <= 3 * field_blocks.LEAST_ROWS * count * 4


# ---- several ranks -------------------------------------------------------------------------------


def share(rank, _):
    return train(rank, 2, dist.group.WORLD)


def train(rank, ranks, group):
    """Losses, gradients and blocks of a few steps; `ranks` share each batch."""
    n, share, results = 13, 4, {}
    for name in ("dense", "labels", "neighbours", "snapshot"):
        given = initials(n).get(name, "identity")
        if name in ("dense", "neighbours"):
            field = ResponseField.dense(n, dtype=torch.float64, initial=given, process_group=group)
        else:
            field = ResponseField.snapshot(
                n, D, history=2, dtype=torch.float64, initial=given, process_group=group
            )
        found = []
        for step, reduction in enumerate(("mean", "sum", "none", "mean", "none")):
            index = torch.randperm(n, generator=torch.Generator().manual_seed(step))[: 2 * share]
            views = [x.cpu() for x in sample_views(2 * share, D, torch.float64, seed=step).values()]
            mine = slice(rank * share, (rank + 1) * share) if ranks > 1 else slice(None)
            leaves = [x[mine].clone().requires_grad_() for x in views]
            arguments = (*leaves, index[mine])
            if step % 2:
                loss = field.loss(*arguments, reduction=reduction)
                field.update(*arguments, alpha=0.3)
                if reduction == "none":
                    raise AssertionError("a dense field has been updated")
            else:
                loss = field.step(*arguments, alpha=0.3, reduction=reduction)
            weights = torch.arange(1.0, 1 + 2 * share, dtype=torch.float64)[mine]
            (loss @ weights if reduction == "none" else loss).backward()
            block = field.block(index)
            found.append((loss.detach(), *(x.grad for x in leaves), block, reduction))
        if name == "dense":
            rows = field.rows(torch.arange(n))
            found.append((rows.sum(1), rows))
        for bad in (n, int(index[(share + 1) % (2 * share)])):  # another rank's sample
            wrong = index.clone()
            wrong[0] = bad
            try:
                field.step(*views if ranks == 1 else (x[mine] for x in views), wrong[mine])
            except ValueError as error:
                found.append((str(error),))
        results[name] = found
    results["bfloat16"] = rounded(rank, ranks, group)
    return results


def rounded(rank, ranks, group):
    """What a field holds that is rounded by chance, from its start on."""
    n, share = 40, 16
    field = ResponseField.dense(
        n, dtype=torch.bfloat16, initial=initials(n)["neighbours"], process_group=group, seed=3
    )
    states = [field.state_dict()]
    for step in range(4):
        index = torch.randperm(n, generator=torch.Generator().manual_seed(step))[: 2 * share]
        views = sample_views(2 * share, D, torch.float64, seed=step).values()
        mine = slice(rank * share, (rank + 1) * share) if ranks > 1 else slice(None)
        field.update(*(x.cpu()[mine] for x in views), index[mine], alpha=0.3)
        states.append(field.state_dict())
    return states


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    return on_two_ranks(share, tmp_path_factory.mktemp("ranks"))


def test_two_ranks_round_as_one(two_ranks):
    alone = rounded(0, 1, None)
    assert not torch.equal(alone[0]["matrix"], alone[-1]["matrix"])
    for wanted, *parts in zip(alone, *(x["bfloat16"] for x in two_ranks), strict=True):
        for name in ("matrix", "diagonal", "row_sum"):
            assert torch.equal(torch.cat([x[name] for x in parts]), wanted[name]), name


def test_two_ranks_are_one(two_ranks):
    ranks = two_ranks
    for name, steps in train(0, 1, None).items():
        if name == "bfloat16":
            continue
        for wanted, *parts in zip(steps, *(rank[name] for rank in ranks), strict=True):
            if isinstance(wanted[0], str):
                assert all(part == wanted for part in parts)
                continue
            if len(wanted) == 2:
                assert all(float((part[1] - wanted[1]).abs().max()) <= 1e-14 for part in parts)
                continue
            loss, *gradients, block, reduction = wanted
            if reduction == "none":
                together, factor = torch.cat([part[0] for part in parts]), 1
            else:
                together, factor = parts[0][0], 2  # DDP's average
                assert torch.equal(parts[0][0], parts[1][0])
            assert float((together - loss).abs().max()) <= 1e-13
            for k, gradient in enumerate(gradients):
                whole = torch.cat([part[1 + k] for part in parts]) / factor
                assert float((whole - gradient).abs().max()) <= 1e-13
            assert all(float((part[3] - block).abs().max()) <= 1e-14 for part in parts)


def test_rows_are_shared_out():
    from rkdo_kernels.batch import held

    for n, ranks in ((13, 2), (8, 3), (5, 5), (2, 4)):
        shares = [held(n, ranks, rank) for rank in range(ranks)]
        assert shares[0][0] == 0
        assert shares[-1][1] == n
        assert all(a[1] == b[0] for a, b in itertools.pairwise(shares))
        assert max(b - a for a, b in shares) - min(b - a for a, b in shares) <= 1
