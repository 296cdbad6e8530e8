"""NaN and infinity reach a field's loss through tensors, whatever the machine's BLAS makes of them.

Some libraries read alpha = NaN of a matrix product as a number. Here every one does.
"""

import ast
import math
from pathlib import Path

import pytest
import torch
from test_response import DEVICE, KINDS, batch, same_bytes, visited
from torch.utils._python_dispatch import TorchDispatchMode

import rkdo_kernels
from rkdo_kernels import field_tiles

BLAS = ("addmm", "addmv", "addr", "addbmm", "baddbmm", "sspaddmm")
# Scalars of a product that are not literals: numbers of the host, which the arguments' checks have
# seen to be finite.
KNOWN = {("tiles", "alpha", "factor"), ("one_pass", "alpha", "x_scale")}


class CarelessBlas(TorchDispatchMode):
    """Matrix products take a scalar that is not finite for 1."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if function.overloadpacket.__name__.rstrip("_") in BLAS:
            kwargs |= {k: 1 for k in ("alpha", "beta") if not math.isfinite(kwargs.get(k, 1))}
        return function(*args, **kwargs)


@pytest.fixture
def careless_blas(monkeypatch):
    """For what the operators compute; a mode that is on while a call is compiled sees only them."""

    def careless(function):
        def call(*args, **kwargs):
            with CarelessBlas():
                return function(*args, **kwargs)

        return call

    for name in ("dense_pass", "dense_gradient", "snapshot_pass", "snapshot_gradient"):
        monkeypatch.setattr(field_tiles, name, careless(getattr(field_tiles, name)))
    x = torch.ones(2, 2)
    with CarelessBlas():
        assert torch.equal(torch.addmm(x, x, x, beta=0, alpha=math.nan), 2 * x)
        assert torch.equal(x.clone().addmm_(x, x, alpha=math.inf), 3 * x)
        assert torch.equal(torch.addmm(x, x, x, beta=0, alpha=-math.inf, out=x.clone()), 2 * x)


@pytest.mark.skipif(DEVICE != "cpu", reason="compiled for the CPU")
@pytest.mark.parametrize("stored", ["dense", "dense bfloat16", "snapshot"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_what_is_bad_arrives(stored, reduction, careless_blas):
    """A bad index or temperature of a compiled call: a NaN loss, NaN gradients, the field as it
    was."""
    torch._dynamo.reset()
    field = visited(KINDS[stored])
    before = field.state_dict()
    index, views = batch()

    def step(queries, keys, index, temperature):
        return field.step(queries, keys, index, temperature=temperature, reduction=reduction)

    step = torch.compile(step, backend="aot_eager", fullgraph=True)
    twice = torch.cat([index[:-1], index[:1]])
    outside = torch.where(index == index[0], 30, index)
    for at, temperature in (
        (twice, 0.5), (outside, 0.5), (index, -0.5), (index, 0.0), (index, math.inf),
        (index, math.nan),
    ):  # fmt: skip
        leaves = [x.clone().requires_grad_() for x in views.values()]
        loss = step(*leaves, at, torch.tensor(temperature))
        assert loss.isnan().all()
        loss.sum().backward()
        assert all(x.grad.isnan().all() for x in leaves)
    same_bytes(before, field.state_dict())


def scalars_of_products(source):
    """(keyword, its source) of every scalar of a matrix product that is not a literal."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            if node.func.attr.rstrip("_") not in BLAS:
                continue
            for keyword in node.keywords:
                value = keyword.value
                if isinstance(value, ast.UnaryOp) and isinstance(value.op, ast.USub):
                    value = value.operand
                if keyword.arg in ("alpha", "beta", None) and not isinstance(value, ast.Constant):
                    yield keyword.arg, ast.unparse(value)


def test_no_product_takes_a_scalar_that_may_be_nan():
    found = {
        (path.stem, *scalar)
        for path in Path(rkdo_kernels.__file__).parent.glob("*.py")
        for scalar in scalars_of_products(path.read_text())
    }
    assert found <= KNOWN


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("torch.addmm(x, y, z, beta=0, alpha=scale)", [("alpha", "scale")]),
        ("x.addmm_(y, z, beta=-b, alpha=-1)", [("beta", "b")]),
        ("torch.baddbmm(x, y, z, **options)", [(None, "options")]),
        ("torch.addmm(x, y, z, beta=0, alpha=2.5)", []),
        ("torch.add(x, y, alpha=scale)", []),
    ],
)
def test_the_search_finds(source, found):
    assert list(scalars_of_products(source)) == found
