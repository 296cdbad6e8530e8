"""A gradient is formed for the embeddings that take one, and for no others."""

import pytest
import torch
from accuracy import DEVICE, sample_views
from torch.utils._python_dispatch import TorchDispatchMode

from rkdo_kernels import (
    ResponseField,
    icon_loss,
    info_nce,
    launch,
    nt_xent,
    one_pass,
    rkdo_loss,
    similarity_logsumexp,
    similarity_moments,
    small,
)

N, D = 40, 16
LABELS = torch.arange(N, device=DEVICE) % 5
INDEX = torch.arange(N).flip(0)


def of_field(kind, call, **settings):
    def loss(queries, keys, **others):
        make = {"dense": {}, "snapshot": {"dim": queries.shape[1], "history": 2}}[kind]
        field = getattr(ResponseField, kind)(N, device=DEVICE, **make)
        field.update(queries.detach().flip(0), keys.detach(), INDEX)
        return getattr(field, call)(queries, keys, INDEX, **settings, **others)

    return loss


LOSSES = {
    "rkdo": rkdo_loss,
    "rkdo by row": lambda *x, **s: (rkdo_loss(*x, reduction="none", **s) * LABELS).sum(),
    "rkdo direct": lambda *x, **s: rkdo_loss(*x, temperature=0.01, **s),
    "icon": icon_loss,
    "student": lambda *x, **s: icon_loss(*x, kernel="student", **s),
    "info_nce": info_nce,
    "symmetric": lambda *x, **s: info_nce(*x, symmetric=True, **s),
    "nt_xent": nt_xent,
    "moments": lambda *x, **s: similarity_moments(*x, temperature=0.5, degree=2, **s).sum(),
    "logsumexp": lambda *x, **s: similarity_logsumexp(*x, temperature=0.5, **s).sum(),
    "dense": of_field("dense", "loss"),
    "dense step": of_field("dense", "step"),
    "dense by row": lambda *x, **s: of_field("dense", "step", reduction="none")(*x, **s).sum(),
    "snapshot": of_field("snapshot", "loss"),
    "snapshot by row": lambda *x, **s: (
        of_field("snapshot", "loss", reduction="none")(*x, **s) @ LABELS.float()
    ),
}


class Formed(TorchDispatchMode):
    """What our operators were asked for, and whether they did as they were told."""

    def __init__(self):
        super().__init__()
        self.asked = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        names = [x.name for x in function._schema.arguments]
        if function.namespace == "rkdo_kernels" and "needs" in names:
            needs = args[names.index("needs")]
            self.asked.append(tuple(needs))
            for x, gradient, need in zip(args, result[-2:], needs, strict=False):
                assert list(gradient.shape) == (list(x.shape) if need else [0])
        return result


@pytest.fixture(params=["as it comes", "single", "two passes"])
def path(request, monkeypatch):
    if request.param != "as it comes":  # nothing by whole matrices
        monkeypatch.setattr(small, "MAX_ENTRIES", 0)
    if request.param == "two passes":
        monkeypatch.setattr(one_pass, "fits", lambda *_: False)
        monkeypatch.setattr(launch, "SINGLE", 0)
    return request.param


@pytest.mark.pairs
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", ["tiled", "triton"])
@pytest.mark.parametrize("name", LOSSES)
def test_of_one_side(name, backend, dtype, path):
    d = 256 if dtype == torch.bfloat16 else D  # that is by stripes
    views = {side: x.to(dtype) for side, x in sample_views(N, d, torch.float32).items()}

    def gradients(*sides):
        leaves = {side: x.clone().requires_grad_(side in sides) for side, x in views.items()}
        with Formed() as formed:
            LOSSES[name](*leaves.values(), backend=backend).backward()
        assert all((x.grad is None) == (side not in sides) for side, x in leaves.items())
        return {side: leaves[side].grad for side in sides}, set(formed.asked)

    both, _ = gradients("queries", "keys")
    for at, side in enumerate(("queries", "keys")):
        alone, asked = gradients(side)
        assert torch.equal(alone[side], both[side])
        assert asked <= {(False, False), (at == 0, at == 1)}
        if not (path == "as it comes" and backend == "tiled"):
            assert (at == 0, at == 1) in asked


@pytest.mark.parametrize("extra", [0, 3], ids=["as many keys", "more keys"])
@pytest.mark.parametrize("frozen", ["queries", "keys"])
@pytest.mark.parametrize("bound", [1.0, None])
@pytest.mark.parametrize("temperature", [0.5, 0.02])
def test_one_that_is_frozen_leaves_the_other_its_gradient_in_half_precision(
    temperature, bound, frozen, extra
):
    """The last stand-in is not given: the other arguments are not shifted by that."""
    free = "keys" if frozen == "queries" else "queries"
    n = 6
    views = sample_views(n, 8, torch.bfloat16, m=n + extra)
    for loss in (rkdo_loss, info_nce, icon_loss):
        found = []
        for dtype in (torch.bfloat16, torch.float32):
            leaves = {name: x.to(dtype) for name, x in views.items()}
            leaves[free].requires_grad_()
            value = loss(
                **leaves, temperature=temperature, bound=bound, backend="tiled", positive_offset=0
            )
            found.append(torch.autograd.grad(value, leaves[free])[0].float())
        assert found[1].any()
        assert float((found[0] - found[1]).abs().max()) <= 0.01 * float(found[1].abs().max())
