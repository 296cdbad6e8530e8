"""What the paper says of the field's recursion, held to what the field does."""

import pytest
import torch
from accuracy import sample_views
from test_field_ops import BACKENDS, neighbours

from rkdo_kernels import ResponseField, reference

F64 = torch.float64


def distributions(count, n, *, sharp=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.softmax(sharp * torch.randn(count, n, generator=generator, dtype=F64), dim=1)


def table(q):
    """Embeddings whose softmax at temperature 1 is q: queries are its logarithms, keys one-hot."""
    return q.log(), torch.eye(len(q), dtype=q.dtype)


def divergence(p, q):
    return reference.kl_divergence(p, q.log())


@pytest.mark.parametrize("sharp", [0.1, 1.0, 5.0])
@pytest.mark.parametrize("alpha", [0.01, 0.3, 0.9, 1.0])
def test_a_step_towards_q_shrinks_the_divergence(alpha, sharp):
    """Jensen: KL((1 − α) p + α q ‖ q) ≤ (1 − α) KL(p ‖ q), for the recursion and for the field."""
    n = 30
    for seed in range(5):
        p, q = (distributions(n, n, sharp=sharp, seed=seed + 100 * k) for k in (0, 1))
        before = divergence(p, q)
        assert (divergence((1 - alpha) * p + alpha * q, q) <= (1 - alpha) * before + 1e-14).all()
        field = ResponseField.dense(n, dtype=F64, initial=p.to_sparse_csr())
        settings = {"temperature": 1.0, "reduction": "none"}
        found = field.step(*table(q), torch.arange(n), alpha=alpha, **settings)
        assert float((found - before).abs().max()) <= 1e-13
        after = field.loss(*table(q), torch.arange(n), **settings)
        assert (after <= (1 - alpha) * found + 1e-14).all()
        assert (after > 0).all() or alpha == 1


@pytest.mark.parametrize("alpha", [0.1, 0.5])
def test_the_loss_decays_geometrically_when_q_is_fitted(alpha):
    """L^(t) ≤ (1 − α)^t L^(0), with the model a table that holds q exactly."""
    n, q = 40, distributions(40, 40)
    field = ResponseField.dense(n, dtype=F64)
    losses = [
        float(field.step(*table(q), slice(0, n), alpha=alpha, temperature=1.0)) for _ in range(60)
    ]
    for t, loss in enumerate(losses):
        assert loss >= -1e-15
        assert loss <= (1 - alpha) ** t * losses[0] * (1 + 1e-12) + 1e-15
    assert losses[0] > 1
    assert losses[30] < losses[10] < losses[0]


@pytest.mark.parametrize("initial", ["identity", "neighbours"])
def test_dense_is_the_recursion_for_50_steps_of_random_batches(initial):
    n, d = 40, 8
    generator = torch.Generator().manual_seed(0)
    given = "identity" if initial == "identity" else neighbours(n).to_sparse_csr()
    field = ResponseField.dense(n, dtype=F64, initial=given)
    p = field.rows(torch.arange(n))
    for step in range(50):
        size = int(torch.randint(1, n + 1, (1,), generator=generator))
        index = torch.randperm(n, generator=generator)[:size]
        alpha = float(torch.rand(1, generator=generator))
        temperature = 0.05 + float(torch.rand(1, generator=generator))
        views = sample_views(size, d, F64, seed=step, aligned=step % 2 == 0)
        views = {name: x.cpu().requires_grad_() for name, x in views.items()}
        settings = {"alpha": alpha, "temperature": temperature}
        found = field.step(**views, index=index, reduction="none", **settings)
        block = p[index[:, None], index]
        wanted = reference.field_loss(block, **views, temperature=temperature)
        assert float((found - wanted).detach().abs().max()) <= 1e-12
        weights = torch.linspace(-1, 1, size, dtype=F64)
        for one, other in zip(
            torch.autograd.grad(found @ weights, list(views.values())),
            torch.autograd.grad(wanted @ weights, list(views.values())),
            strict=True,
        ):
            assert float((one - other).abs().max()) <= 1e-11
        with torch.no_grad():
            p[index[:, None], index] = reference.field_update(block, **views, **settings)
        assert float((field.rows(torch.arange(n)) - p).abs().max()) <= 1e-13
    assert field.updates == 50


@pytest.mark.parametrize("initial", ["identity", "labels", "neighbours"])
def test_snapshots_are_the_dense_field_for_the_first_visits(initial):
    """At full batch; afterwards the tail's weight lies on p⁰."""
    n, d, k = 30, 8, 4
    given = {
        "identity": "identity",
        "labels": torch.arange(n) % 5,
        "neighbours": neighbours(n).to_sparse_csr(),
    }[initial]
    dense = ResponseField.dense(n, dtype=F64, initial=given)
    snapshot = ResponseField.snapshot(n, d, history=k, dtype=F64, initial=given)
    for step in range(k + 1):
        index = torch.randperm(n, generator=torch.Generator().manual_seed(step))
        views = [x.cpu()[index] for x in sample_views(n, d, F64, seed=step).values()]
        settings = {"alpha": 0.2 + 0.1 * step, "temperature": 0.5 - 0.07 * step}
        assert float((dense.block(index) - snapshot.block(index)).abs().max()) <= 1e-14
        one, other = (f.step(*views, index, **settings) for f in (dense, snapshot))
        assert float((one - other).abs()) <= 1e-13
    assert float((dense.block(index) - snapshot.block(index)).abs().max()) > 1e-3


def test_snapshots_weigh_their_visits_and_the_rest_lies_on_the_start():
    n, d, k, alpha = 20, 8, 3, 0.3
    field = ResponseField.snapshot(n, d, history=k, dtype=F64)
    index = torch.arange(n)
    seen = []
    for step in range(7):
        views = [x.cpu() for x in sample_views(n, d, F64, seed=step).values()]
        field.update(*views, index, alpha=alpha)
        seen.insert(0, torch.softmax(views[0] @ views[1].T / 0.5, dim=1))
    p = (1 - alpha) ** k * torch.eye(n, dtype=F64)
    for s in range(k):
        p += alpha * (1 - alpha) ** s * seen[s]
    assert float((field.block(index) - p).abs().max()) <= 1e-14
    half = torch.arange(0, n, 2)
    parts = [q[half[:, None], half] for q in seen]
    p = (1 - alpha) ** k * torch.eye(len(half), dtype=F64)
    for s in range(k):
        p += alpha * (1 - alpha) ** s * parts[s] / parts[s].sum(1, keepdim=True)
    assert float((field.block(half) - p).abs().max()) <= 1e-14


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("alphas", [(0.01,), (0.1, 0.7, 1.0, 0.01)], ids=str)
def test_rows_sum_to_one_after_ten_thousand_updates(alphas, backend):
    """In bfloat16, by random halves of the samples, whose embeddings move."""
    n, d, steps = 24, 8, 10_000 if backend == "tiled" else 50
    field = ResponseField.dense(n, dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    pool = [sample_views(n, d, seed=seed, aligned=True) for seed in range(8)]
    for step in range(steps):
        index = torch.randperm(n, generator=generator)[: n // 2]
        views = {name: x.cpu()[index] for name, x in pool[step % 8].items()}
        settings = {"alpha": alphas[step % len(alphas)], "temperature": 0.1 + 0.4 * (step % 2)}
        field.update(**views, index=index, **settings, backend=backend)
    total = field.rows(torch.arange(n)).double().sum(1)
    assert float((total - 1).abs().max()) <= 1e-6
    state = field.state_dict()
    stored = state["matrix"].double().sum(1) + state["diagonal"].double()
    assert float((state["row_sum"] - stored).abs().max()) <= 1e-4
    assert float((stored - 1).abs().max()) <= 2**-8  # of the entries' roundings, whatever the step
    assert (field.rows(torch.arange(n)) >= 0).all()


@pytest.mark.parametrize("alpha", [1e-4, 0.01])
def test_small_changes_are_not_lost_and_rounding_has_no_bias(alpha):
    """Steps far below bfloat16's spacing, against the float64 recursion, over 256² entries."""
    n, d = 256, 8
    index = torch.arange(n)
    exact = ResponseField.dense(n, dtype=F64)
    field = ResponseField.dense(n, dtype=torch.bfloat16)
    for step in range(200):
        views = [x.cpu() for x in sample_views(n, d, seed=step % 3).values()]
        exact.update(*(x.double() for x in views), index, alpha=alpha)
        field.update(*views, index, alpha=alpha)
    off = ~torch.eye(n, dtype=torch.bool)
    truth, found = (f.rows(index).double()[off] for f in (exact, field))
    error = (found - truth) / truth
    assert float(error.std()) < 0.05
    assert float(error.mean().abs()) <= 5 * float(error.std()) / n
    moved = 1 - exact.rows(index).diagonal()
    drift = field.rows(index).diagonal() - exact.rows(index).diagonal()
    assert float((drift / moved).abs().max()) <= 0.01
