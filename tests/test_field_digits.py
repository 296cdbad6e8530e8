"""A dense field's diagonal has digits of its own, however small it is, and rows add up to one."""

import math

import pytest
import torch
import torch.distributed as dist
from accuracy import DEVICE
from ranks import on_two_ranks
from test_field_ops import BACKENDS, samples

from rkdo_kernels import ResponseField, field_tiles, reference
from rkdo_kernels.needs import NEITHER

STORED = (torch.float32, torch.bfloat16)
KINDS = {
    "float32": lambda n, d, **s: ResponseField.dense(n, dtype=torch.float32, **s),
    "bfloat16": lambda n, d, **s: ResponseField.dense(n, dtype=torch.bfloat16, **s),
    "snapshot": lambda n, d, **s: ResponseField.snapshot(n, d, history=2, **s),
}
SETTINGS = {"alpha": 1.0, "temperature": 1 / 30}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("order", [[0, 1], [1, 0]], ids=["contiguous", "gathered"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_row_that_has_left_itself_still_trains(kind, order, backend):
    """exp(−30) of its mass stays, and is all that samples 0 and 2 have in common."""
    field = KINDS[kind](3, 3, device=DEVICE)
    z, pair = torch.eye(3, device=DEVICE), torch.tensor(order, device=DEVICE)
    field.update(z[pair], z[1 - pair], pair, backend=backend, **SETTINGS)
    queries = z[[0, 2]].requires_grad_()
    index = torch.tensor([0, 2], device=DEVICE)
    losses = field.loss(
        queries, -z[[0, 2]], index, temperature=1.0, reduction="none", backend=backend
    )
    assert torch.allclose(losses, losses.new_tensor(math.log1p(math.e)), rtol=1e-6)
    losses.sum().backward()
    assert queries.grad.abs().amax(1).min() > 0.5
    if kind != "snapshot":
        own = field.rows(pair)[torch.arange(2), pair]
        assert torch.allclose(own, own.new_tensor(math.exp(-30)), rtol=1e-5, atol=0)


def on_a_rank(rank, _):
    z = torch.eye(4)
    field = ResponseField.dense(4, process_group=dist.group.WORLD)
    mine = slice(2 * rank, 2 * rank + 2)
    swapped = torch.tensor([1, 0, 3, 2])
    field.update(z[mine], z[swapped][mine], torch.arange(4)[mine], **SETTINGS)
    return field.state_dict()["diagonal"]


def test_on_two_ranks(tmp_path):
    for diagonal in on_two_ranks(on_a_rank, tmp_path):
        assert torch.allclose(diagonal, torch.tensor(math.exp(-30)), rtol=1e-5, atol=0)


@pytest.mark.parametrize("stored", STORED, ids=str)
def test_a_small_weight_of_ones_own_at_the_start(stored):
    given = torch.tensor([[1e-12, 0.7, 0.3], [0, 0, 1], [1, 1, 1e3]], dtype=torch.float64)
    field = ResponseField.dense(3, dtype=stored, initial=given.to_sparse_csr(), device=DEVICE)
    rows = field.rows(slice(0, 3)).double().cpu()
    truth = given / given.sum(1, keepdim=True)
    assert torch.allclose(rows.diagonal(), truth.diagonal(), rtol=1e-2, atol=0)
    assert float((rows.sum(1) - 1).abs().max()) <= 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("kind", ["float32", "snapshot"])
def test_half_precision_is_rounded_once(kind, reduction, dtype, backend):
    """A collapsed batch's gradients are small differences: float32's own, rounded at the end."""
    n, d = 33, 24
    generator = torch.Generator().manual_seed(0)
    away = torch.randn(2, n, d, generator=generator, dtype=torch.float64)
    center = torch.nn.functional.normalize(torch.ones(d, dtype=torch.float64), dim=0)
    away -= (away @ center)[..., None] * center
    near = 0.999 * center + 0.0447 * torch.nn.functional.normalize(away, dim=2)
    views = near.to(DEVICE, dtype).unbind()
    field = KINDS[kind](n, d, device=DEVICE)
    field.update(*views, slice(0, n))
    weights = torch.linspace(-1, 1, n, dtype=torch.float64, device=DEVICE)

    def gradients(loss, *views):
        leaves = [x.clone().requires_grad_() for x in views]
        value = loss(*leaves)
        total = value.double() @ weights if value.dim() else value
        return torch.autograd.grad(total, leaves)

    def eager(queries, keys):
        block = field.block(slice(0, n)).to(queries.dtype)
        rows = reference.field_loss(block, queries, keys, temperature=0.5)
        return rows if reduction == "none" else rows.mean()

    def ours(queries, keys):
        return field.loss(queries, keys, slice(0, n), reduction=reduction, backend=backend)

    truth = gradients(eager, *(x.double() for x in views))
    once = gradients(eager, *(x.float() for x in views))
    for found, single, true in zip(gradients(ours, *views), once, truth, strict=True):
        error, eagers = (float((x.to(dtype).double() - true).abs().max()) for x in (found, single))
        ulp = torch.finfo(dtype).eps * float(true.abs().max())
        assert error <= 2 * eagers + ulp / 4


def anti_aligned(count, step):
    """Unit rows whose own pair is far less similar than the others, all different every step."""
    generator = torch.Generator().manual_seed(step)
    center = torch.zeros(8, dtype=torch.float64)
    center[0] = 2
    queries, keys = (
        torch.nn.functional.normalize(
            torch.randn(count, 8, generator=generator, dtype=torch.float64) / 4 + center, dim=1
        )
        for _ in range(2)
    )
    own = torch.arange(count) < count // 2  # the others lose nothing of themselves
    return queries, torch.where(own[:, None], -keys, keys)


@pytest.mark.parametrize(
    ("stored", "relative", "raw"),
    [(torch.float32, 1e-5, 1e-5), (torch.bfloat16, 0.05, 2**-8)],
    ids=["float32", "bfloat16"],
)
def test_ten_thousand_updates(stored, relative, raw):
    """Against the recursion in float64: the diagonal, the rows' sums, and those of what is stored,
    which wait for an update to be divided by `row_sum`."""
    n, count, alpha, scale = 10, 6, 0.1, torch.tensor(10.0)
    field = ResponseField.dense(n, dtype=stored)
    state = field.state_dict(copy=False)
    matrix, diagonal, row_sum, clock = (
        state[name] for name in ("matrix", "diagonal", "row_sum", "clock")
    )
    truth = torch.eye(n, dtype=torch.float64)
    views = [anti_aligned(count, step) for step in range(50)]
    order = torch.Generator().manual_seed(0)
    worst = tracked = drift = 0.0
    for step in range(10_000):
        index = torch.randperm(n, generator=order)[:count].sort().values
        queries, keys = views[step % len(views)]
        field_tiles.dense_pass(
            queries.float(), keys.float(), matrix, diagonal, row_sum, index, index,
            torch.arange(count), 0, scale, torch.tensor(alpha), clock, NEITHER,
        )  # fmt: skip
        clock[1] += 1
        place = index[:, None], index
        truth[place] = reference.field_update(
            truth[place], queries, keys, alpha=alpha, temperature=0.1
        )
        if step % 500 == 499:
            rows = field.rows(slice(0, n)).double()
            assert float((rows.sum(1) - 1).abs().max()) <= 1e-6
            stored_sums = matrix.double().sum(1) + diagonal.double()
            tracked = max(tracked, float((stored_sums / row_sum - 1).abs().max()))
            drift = max(drift, float((stored_sums - 1).abs().max()))
            error = rows.diagonal() / truth.diagonal() - 1
            worst = max(worst, float(error.abs().max()))
    assert truth.diagonal().min() < 1e-7
    assert worst <= relative
    assert tracked <= 1e-5
    assert drift <= raw


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_has_a_target_from_the_smallest_normal_mass_on(backend):
    """Sample 0 has left the block {0, 1}, but for a mass of `least` or of half of it."""
    queries = torch.tensor([[1.0, 0.0], [0.0, 1.0]], device=DEVICE, requires_grad=True)
    keys, index = torch.eye(2, device=DEVICE), torch.tensor([0, 1], device=DEVICE)
    for stored in (torch.float32, torch.float64)[: 1 + (backend == "tiled")]:
        least = torch.finfo(stored).tiny
        for mass, alive in ((least, True), (least / 2, False)):
            field = ResponseField.dense(3, dtype=stored, device=DEVICE)
            matrix, diagonal, *_ = field._state.tensors.values()
            matrix[0, 1], matrix[0, 2], diagonal[0] = mass, 1.0, 0.0
            before = field.rows(index)
            settings = {"temperature": 1.0, "reduction": "none", "backend": backend}
            losses = field.loss(queries, keys, index, **settings)
            (gradient,) = torch.autograd.grad(losses.sum(), queries)
            wanted = math.log1p(math.e) if alive else 0.0
            assert losses[0].item() == pytest.approx(wanted, rel=1e-6)
            assert bool(gradient[0].any()) == alive
            assert field.block(index)[0].sum() == float(alive)
            field.update(queries, keys, index, alpha=0.5, temperature=1.0, backend=backend)
            assert torch.equal(field.rows(index)[0], before[0]) != alive


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("contiguous", [True, False], ids=["contiguous", "gathered"])
@pytest.mark.parametrize("temperature", [0.05, 0.03])
@pytest.mark.parametrize("stored", STORED, ids=str)
def test_where_q_is_close_to_the_start_gradients_keep_their_digits(
    stored, temperature, contiguous, reduction
):
    """q − p̂ of a row's own column is a difference of numbers near 1, as small as the others are.

    Blocks of rows form it from the others; the kernels, as eager float32, do not.
    """
    n, d = 20, 24
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(n, d, generator=generator, dtype=torch.float64)
    rows = torch.nn.functional.normalize(rows, dim=1).float().to(DEVICE)
    index = torch.arange(n, device=DEVICE) if contiguous else samples(n, n, contiguous=False)
    field = ResponseField.dense(n, dtype=stored, device=DEVICE)
    results = []
    for x in (rows, rows.double()):
        leaves = [x.clone().requires_grad_() for _ in range(2)]
        if x.dtype == torch.float64:
            target = torch.eye(n, dtype=x.dtype, device=DEVICE)
            loss = reference.field_loss(target, *leaves, temperature=temperature)
        else:
            settings = {"temperature": temperature, "reduction": reduction, "backend": "tiled"}
            loss = field.loss(*leaves, index, **settings)
        loss = loss.mean() if loss.dim() else loss
        results.append(torch.autograd.grad(loss, leaves))
    for found, true in zip(*results, strict=True):
        assert float((found - true).abs().max()) <= 3e-5 * float(true.abs().max())
