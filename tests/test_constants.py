"""Cached tables are plain tensors on their device, whatever was going on at the first call."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accuracy import sample_views

import rkdo_kernels
from rkdo_kernels import ResponseField

ROOT = Path(__file__).parent.parent
SETTING = """
import torch
from torch.nn.functional import normalize
from rkdo_kernels import RKDOLoss, icon_loss, info_nce, nt_xent, rkdo_loss

torch.manual_seed(0)

def pair(n, dtype=torch.float32):
    views = normalize(torch.randn(2, n, 16, dtype=torch.float64, device="cpu"), dim=2).to(dtype)
    return [x.detach().clone().requires_grad_() for x in views]

PAIRS = [pair(n) for n in (20, 200)]  # by whole matrices, by tiles

def values():
    result = []
    for function in (rkdo_loss, icon_loss, info_nce, nt_xent):
        for queries, keys in PAIRS:
            loss = function(queries, keys)
            result += [loss.detach().clone(), *torch.autograd.grad(loss, (queries, keys))]
    return result
"""
FIRST = {  # what happens before the first plain call
    "export": """
for queries, keys in PAIRS:
    exported = torch.export.export(RKDOLoss(), (queries.detach(), keys.detach())).module()
    torch.testing.assert_close(exported(queries, keys), rkdo_loss(queries, keys))
""",
    "on meta": """
with torch.device("meta"):
    values()
""",
    "of fake tensors": """
from torch._subclasses.fake_tensor import FakeTensorMode
mode = FakeTensorMode()
for pair_of_them in PAIRS:
    fakes = [mode.from_tensor(x) for x in pair_of_them]
    for settings in ({}, {"bound": None}):
        try:
            with mode:
                rkdo_loss(*fakes, **settings)
        except Exception:  # a fake mode may refuse real tables
            pass
""",
    "compiled": """
for function in (rkdo_loss, info_nce):
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    for queries, keys in PAIRS:
        torch.autograd.grad(compiled(queries, keys), (queries, keys))
""",
    "in inference mode": """
with torch.inference_mode():
    for queries, keys in PAIRS:
        for function in (rkdo_loss, icon_loss, info_nce, nt_xent):
            function(queries, keys)
""",
    "in bfloat16 on meta": """
torch.set_default_dtype(torch.bfloat16)
torch.set_default_device("meta")
values()
""",
    "refused by torch.func": """
for function in (rkdo_loss, info_nce):
    for queries, keys in PAIRS:
        try:
            torch.func.grad(function)(queries.detach(), keys.detach())
        except NotImplementedError:
            pass
""",
}  # fmt: skip
THEN = """
torch.set_default_dtype(torch.float32)
torch.set_default_device(None)
torch.save(values(), RESULT)
"""


def run(first, path):
    script = SETTING + first + THEN.replace("RESULT", repr(str(path)))
    return subprocess.Popen(
        [sys.executable, "-c", script], cwd=ROOT, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip


@pytest.fixture(scope="module")
def wanted(tmp_path_factory):
    path = tmp_path_factory.mktemp("plain") / "values"
    assert run("", path).wait() == 0
    return path.read_bytes()


@pytest.mark.parametrize("first", FIRST)
def test_later_calls_are_as_if_nothing_had_been(first, wanted, tmp_path):
    done = run(FIRST[first], tmp_path / "values")
    errors = done.communicate()[1]
    assert done.returncode == 0, errors[-3000:]
    assert (tmp_path / "values").read_bytes() == wanted


@pytest.mark.parametrize("given", [{}, {"initial": torch.arange(12) // 3}], ids=["own", "labels"])
@pytest.mark.parametrize("index", [slice(2, 10), torch.tensor([5, 2, 9, 3])], ids=["slice", "some"])
@pytest.mark.parametrize("kind", ["dense", "snapshot"])
def test_fields_stay_where_they_are_under_another_default_device(kind, index, given):
    views = sample_views(4 if isinstance(index, torch.Tensor) else 8, 4)
    pair = [views[name].cpu() for name in ("queries", "keys")]

    def result(default):
        with torch.device(default):
            made = {"n": 12, "device": "cpu", **given}
            if kind == "snapshot":
                field = ResponseField.snapshot(**made, dim=4, history=2)
            else:
                field = ResponseField.dense(**made)
            losses = [field.step(*pair, index, temperature=0.1) for _ in range(3)]
            return torch.stack(losses), field.block(index)

    for found, wanted in zip(result("meta"), result("cpu"), strict=True):
        assert torch.equal(found, wanted)


FACTORIES = (
    "arange", "as_tensor", "empty", "empty_strided", "eye", "full", "linspace", "logspace",
    "normal", "ones", "rand", "randint", "randn", "randperm", "scalar_tensor", "sparse_coo_tensor",
    "sparse_csr_tensor", "tensor", "tril_indices", "triu_indices", "zeros",
)  # fmt: skip
CONSTANTS = ("chebyshev",)  # whose functions run in host_constant's thread


def without_a_device(source):
    """Calls that make a tensor on the default device, outside of what host_constant computes."""
    tree = ast.parse(source)
    constant = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef)
        if any(ast.unparse(x) == "host_constant" for x in node.decorator_list)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if node in constant or not isinstance(node, ast.Call):
            continue
        module, _, name = ast.unparse(node.func).rpartition(".")
        placed = any(keyword.arg == "device" for keyword in node.keywords)
        if module == "torch" and name in FACTORIES and not placed:
            yield ast.unparse(node)


def test_no_tensor_is_made_on_the_default_device():
    found = {
        path.stem: list(without_a_device(path.read_text()))
        for path in Path(rkdo_kernels.__file__).parent.glob("*.py")
    }
    assert {name for name, calls in found.items() if calls} == set(CONSTANTS), found


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("x = torch.zeros(3)", ["torch.zeros(3)"]),
        ("x = torch.zeros(3, device=y.device)", []),
        ("x = y.new_zeros(3) + torch.ones_like(y)", []),
        ("def f():\n    return torch.arange(3)", ["torch.arange(3)"]),
        ("@host_constant\ndef f():\n    return torch.arange(3)", []),
    ],
)
def test_the_search_finds(source, found):
    assert list(without_a_device(source)) == found


def everything(pair, backends):
    """Every public function's values and gradients."""
    learnable = torch.full((), 0.4, device="cpu", requires_grad=True)
    calls = [
        lambda *x, **s: rkdo_kernels.rkdo_loss(*x, **s),
        lambda *x, **s: rkdo_kernels.rkdo_loss(*x, temperature=learnable, **s),
        lambda *x, **s: rkdo_kernels.icon_loss(*x, debias=0.3, **s),
        lambda *x, **s: rkdo_kernels.icon_loss(*x, kernel="student", bound=None, **s),
        lambda *x, **s: rkdo_kernels.info_nce(*x, **s),
        lambda *x, **s: rkdo_kernels.nt_xent(*x, **s),
        lambda *x, **s: rkdo_kernels.similarity_logsumexp(*x, temperature=0.4, **s),
        lambda *x, **s: rkdo_kernels.similarity_moments(*x, temperature=0.4, degree=2, **s),
        *(lambda *x, f=f, **s: f(**s)(*x) for f in (
            rkdo_kernels.RKDOLoss, rkdo_kernels.IConLoss, rkdo_kernels.InfoNCELoss,
            rkdo_kernels.NTXentLoss,
        )),
    ]  # fmt: skip
    results = []
    for backend in backends:
        for call in calls:
            leaves = [x.clone().requires_grad_() for x in pair]
            value = call(*leaves, backend=backend)
            results += [value.detach(), *torch.autograd.grad(value.sum(), leaves)]
    return results


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton takes CPU tensors interpreted only")
@pytest.mark.parametrize(
    ("n", "backends"),
    [(20, ("auto", "tiled", "triton")), (140, ("auto", "tiled"))],
    ids=["whole matrices", "tiles"],
)
def test_every_function_stays_where_its_arguments_are(n, backends):
    pair = [x.cpu() for x in sample_views(n, 4).values()]
    wanted = everything(pair, backends)
    with torch.device("meta"):
        found = everything(pair, backends)
    for x, y in zip(found, wanted, strict=True):
        assert torch.equal(x, y)
