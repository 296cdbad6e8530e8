"""The response field's kernels: what they share with the tiles, bit for bit where they can, and
what the compiler makes of them.

Held to float64 by the yardstick on every backend in test_field_ops.py.
"""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from accuracy import DEVICE, DTYPES, compare
from torch.nn.functional import normalize

pytest.importorskip("triton")
from rkdo_kernels import field, field_tiles, launch, reference
from rkdo_kernels.needs import BOTH, NEITHER

pytestmark = pytest.mark.usefixtures("poisoned")
ROOT = Path(__file__).parent.parent
STORED = (torch.float32, torch.bfloat16)
LAYOUTS = ("whole", "contiguous", "gathered", "own columns shifted")
NAMES = ("loss", "d_queries", "d_keys", "matrix", "diagonal", "row_sum")


class Problem:
    """A field over n samples and a batch of `count` columns, of which the rows are some."""

    def __init__(self, count, d, dtype, stored, layout, seed=0):
        generator = torch.Generator().manual_seed(seed)
        n = count if layout == "whole" else count + 37
        p = torch.rand(n, n, generator=generator, dtype=torch.float64) ** 6
        p[torch.rand(n, n, generator=generator) < 0.2] = 0
        p.diagonal().add_(0.1)
        p /= p.sum(1, keepdim=True)
        diagonal = p.diagonal().float()
        matrix = p.fill_diagonal_(0).to(stored)
        self.start, self.rows, self.cols, self.own = 0, None, None, None
        height = count
        if layout == "contiguous":
            self.start = 19
        if layout == "gathered":
            self.rows = self.cols = torch.randperm(n, generator=generator)[:count]
        if layout == "own columns shifted":  # the second of two ranks, and its samples out of order
            height = count - count // 2
            self.cols = torch.arange(n - count, n)
            self.own = count // 2 + torch.randperm(height, generator=generator)
            self.rows = self.cols[self.own]

        def rows(size):
            x = torch.randn(size, d, generator=generator, dtype=torch.float64)
            return normalize(x, dim=1).to(DEVICE, dtype)

        self.queries, self.keys = rows(height), rows(count)
        self.matrix, self.diagonal = matrix.to(DEVICE), diagonal.to(DEVICE)
        self.row_sum = self.matrix.double().sum(1) + self.diagonal.double()
        self.rows, self.cols, self.own = (
            None if x is None else x.to(DEVICE) for x in (self.rows, self.cols, self.own)
        )
        self.clock = torch.tensor([7, 1 << 33], device=DEVICE)

    def positions(self):
        at = torch.arange(self.start, self.start + len(self.keys), device=DEVICE)
        own = torch.arange(len(self.queries), device=DEVICE) if self.own is None else self.own
        return (at if self.rows is None else self.rows, at if self.cols is None else self.cols, own)

    def block(self):
        """P[rows, cols] in float64, and m."""
        rows, cols, own = self.positions()
        p = self.matrix[rows[:, None], cols].double()
        p.scatter_(1, own[:, None], self.diagonal[rows, None].double())
        return p

    def run(self, module, scale=2.0, alpha=0.3, needs=BOTH):
        """The pass's results, and the field after it."""
        state = [x.clone() for x in (self.matrix, self.diagonal, self.row_sum)]
        scale = torch.tensor(scale, device=DEVICE)
        alpha = None if alpha is None else torch.tensor(alpha, device=DEVICE)
        found = module.dense_pass(
            self.queries, self.keys, *state, self.rows, self.cols, self.own, self.start, scale,
            alpha, self.clock, needs,
        )  # fmt: skip
        return dict(zip(NAMES, (*found, *state), strict=True))

    def eager(self, inputs, alpha, scale=2.0):
        """By whole matrices: loss, gradients of its sum, and the block's next entries but own."""
        q, k = (x.detach().requires_grad_() for x in (inputs["queries"], inputs["keys"]))
        dtype = q.dtype
        p = self.block().to(dtype)
        loss = reference.field_loss(p, q, k, temperature=1 / scale)
        gradients = torch.autograd.grad(loss.sum(), (q, k))
        mass = p.sum(1, keepdim=True)
        target = mass / self.row_sum[self.positions()[0], None].to(dtype)
        soft = torch.softmax(q.detach() @ k.detach().T * scale, dim=1)
        share = torch.where(mass > 0, p / mass, 0)
        new = target * ((1 - alpha) * share + alpha * soft)
        new = torch.where(mass > 0, new, p).scatter(1, self.positions()[2][:, None], 0.0)
        return dict(zip((*NAMES[:3], "block"), (loss.detach(), *gradients, new), strict=True))


@pytest.fixture(params=[1, 3], ids=["whole", "in parts"])
def parts(request, monkeypatch):
    """In parts, as where there are fewer programs than multiprocessors."""
    monkeypatch.setattr(launch, "splits", lambda *_: request.param)


every_walk = pytest.mark.parametrize(
    ("tiles", "parts"),
    [("wide tiles", 1), ("tall tiles", 1), ("tall tiles", 3)],  # tall: more columns' tiles to share
    ids=["wide", "tall", "tall in parts"],
    indirect=True,
)


@pytest.mark.pairs
@every_walk
@pytest.mark.parametrize("alpha", [0.01, 1.0])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("stored", STORED, ids=str)
@pytest.mark.parametrize(
    ("count", "d", "dtype"),
    [(1, 1, DTYPES[0]), (3, 31, DTYPES[1]), (33, 16, DTYPES[2]), (64, 64, DTYPES[1]),
     (65, 70, DTYPES[0]), (130, 140, DTYPES[1])],
)  # fmt: skip
def test_dense_is_what_whole_matrices_and_the_tiles_have(
    count, d, dtype, stored, layout, alpha, tiles, parts
):
    problem = Problem(count, d, dtype, stored, layout)
    found, other = problem.run(field, alpha=alpha), problem.run(field_tiles, alpha=alpha)
    rows, cols, own = problem.positions()
    block = found["matrix"][rows[:, None], cols].double()
    at_own = torch.zeros_like(block, dtype=torch.bool).scatter_(1, own[:, None], True)
    assert not block[at_own].any()
    outside = torch.ones_like(found["matrix"], dtype=torch.bool)
    outside[rows[:, None], cols] = False
    assert torch.equal(found["matrix"][outside], problem.matrix[outside])
    if stored == torch.bfloat16:  # the same bits are added to what may differ in its last bit
        differ = found["matrix"] != other["matrix"]
        assert differ.sum() <= 1 + differ.numel() / 3000
        alike = ~differ.any(1)
        change = (found["matrix"].double() - other["matrix"].double()).abs()
        assert (change <= 2**-7 * other["matrix"].double()).all()
        assert float((found["row_sum"] - other["row_sum"])[alike].abs().max()) <= 3e-7
    held = {name: found[name] for name in NAMES[:3]}
    if stored == torch.float32:  # roundings that differ in every entry are held to what they may be
        held["block"] = block
    inputs = {"queries": problem.queries, "keys": problem.keys}
    exact = problem.eager({name: x.double() for name, x in inputs.items()}, alpha)
    compare(
        held, partial(problem.eager, alpha=alpha), inputs,
        truth={name: exact[name] for name in held},
    )  # fmt: skip
    assert float((found["diagonal"] / other["diagonal"] - 1).abs().max()) <= 2e-6
    sums = found["matrix"].double().sum(1) + found["diagonal"].double()
    assert float((found["row_sum"] - sums).abs().max()) <= 3e-7
    if d > 16:
        assert (block[~at_own] != problem.block()[~at_own]).float().mean() > 0.05


@every_walk
@pytest.mark.parametrize("layout", LAYOUTS)
def test_loss_alone_leaves_the_field(layout, tiles, parts):
    problem = Problem(33, 16, torch.float32, torch.bfloat16, layout)
    both = problem.run(field)
    for needs in (NEITHER, BOTH):
        found = problem.run(field, alpha=None, needs=needs)
        assert torch.equal(found["loss"], both["loss"])
        assert torch.equal(found["matrix"], problem.matrix)
        assert torch.equal(found["diagonal"], problem.diagonal)
        assert torch.equal(found["row_sum"], problem.row_sum)
        for name in ("d_queries", "d_keys"):
            same = both[name] if any(needs) else both[name].new_empty(0)
            assert torch.equal(found[name], same)


def test_alpha_0_moves_nothing_but_roundings():
    problem = Problem(64, 16, torch.float32, torch.bfloat16, "gathered")
    found = problem.run(field, alpha=0.0)
    assert torch.equal(found["matrix"] == 0, problem.matrix == 0)
    change = (found["matrix"].double() - problem.matrix.double()).abs()
    assert (change <= 2**-7 * problem.matrix.double()).all()


@pytest.mark.pairs
@every_walk
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("stored", STORED, ids=str)
def test_weighted_gradients(layout, stored, tiles, parts):
    problem = Problem(65, 20, torch.float32, stored, layout)
    weights = torch.linspace(-1, 1, len(problem.queries), dtype=torch.float64, device=DEVICE)
    scale = torch.tensor(3.0, device=DEVICE)
    names, inputs = ("queries", "keys"), {"queries": problem.queries, "keys": problem.keys}

    def eager(inputs):
        q, k = (inputs[name].detach().requires_grad_() for name in names)
        loss = reference.field_loss(problem.block().to(q.dtype), q, k, temperature=1 / 3)
        return dict(zip(names, torch.autograd.grad((weights * loss).sum(), (q, k)), strict=True))

    for module in (field, field_tiles):
        found = module.dense_gradient(
            problem.queries, problem.keys, problem.matrix, problem.diagonal, problem.rows,
            problem.cols, problem.own, problem.start, scale, weights,
        )  # fmt: skip
        compare(dict(zip(names, found, strict=True)), eager, inputs)


@every_walk
@pytest.mark.parametrize("stored", STORED, ids=str)
def test_rows_without_mass_or_a_finite_loss_stay(stored, tiles, parts):
    problem = Problem(40, 8, torch.float32, stored, "contiguous")
    rows = problem.positions()[0]
    for matrix in (problem.matrix, problem.diagonal):
        matrix[rows[5]] = 0
    problem.row_sum[rows[5]] = 0
    problem.queries[9] = float("nan")
    problem.keys[11, 0] = -float("inf")  # to some rows a similarity of −inf, to others inf
    found = problem.run(field)
    assert found["loss"][9].isnan()
    stays = torch.zeros(40, dtype=torch.bool, device=DEVICE)
    stays[5] = True
    stays |= ~found["loss"].isfinite()
    assert stays.all()
    problem.keys[11, 0] = 0.0
    found = problem.run(field)
    assert found["loss"][5] == 0
    assert not found["d_queries"][5].any()
    changed = (found["matrix"] != problem.matrix).any(1)[rows]
    assert [i for i in range(40) if not changed[i]] == [5, 9]
    for name in ("matrix", "diagonal", "row_sum"):
        x = getattr(problem, name)
        assert torch.equal(found[name][rows[[5, 9]]], x[rows[[5, 9]]])
        assert found[name].isfinite().all()
    problem.keys[11, 0] = -float("inf")
    found = problem.run(field)
    for name in ("matrix", "diagonal", "row_sum"):
        assert torch.equal(found[name], getattr(problem, name))


def test_a_scale_of_nan_leaves_the_field():
    problem = Problem(33, 8, torch.float32, torch.bfloat16, "whole")
    found = problem.run(field, scale=float("nan"))
    assert found["loss"].isnan().all()
    for name in ("matrix", "diagonal", "row_sum"):
        assert torch.equal(found[name], getattr(problem, name))


def test_the_same_bits_every_time(parts):
    problem = Problem(130, 64, torch.bfloat16, torch.bfloat16, "contiguous")
    first, second = problem.run(field), problem.run(field)
    for name in NAMES:
        assert torch.equal(first[name], second[name])
    problem.clock = problem.clock + torch.tensor([0, 1], device=DEVICE)
    assert not torch.equal(problem.run(field)["matrix"], first["matrix"])


@pytest.fixture(params=[False, True], ids=["at once", "one after another"])
def visits_apart(request, monkeypatch):
    """Where shared memory does not hold every visit's tiles."""
    if request.param:
        monkeypatch.setattr(launch, "shared_memory", lambda _: 0)


@pytest.mark.pairs
@pytest.mark.usefixtures("visits_apart")
@every_walk
@pytest.mark.parametrize("history", [1, 4])
@pytest.mark.parametrize("prior", ["columns", "labels"])
@pytest.mark.parametrize(
    ("height", "count", "d", "dtype", "stored"),
    [(1, 1, 1, DTYPES[0], torch.bfloat16), (20, 33, 31, DTYPES[1], torch.bfloat16),
     (65, 65, 70, DTYPES[2], torch.float32), (64, 130, 16, DTYPES[0], torch.bfloat16)],
)  # fmt: skip
def test_snapshots(height, count, d, dtype, stored, prior, history, tiles, parts):
    """Rows without a visit, columns with fewer than others, and a row without a target."""
    generator = torch.Generator().manual_seed(0)

    def rows(*shape, dtype=torch.float32):
        x = torch.randn(*shape, generator=generator, dtype=torch.float64)
        return normalize(x, dim=-1).to(DEVICE, dtype)

    visits = torch.randint(0, history + 1, (count,), generator=generator).to(DEVICE)
    alphas = torch.rand(height, history, generator=generator).to(DEVICE)
    weights, rest = torch.zeros(height, history, device=DEVICE), torch.ones(height, device=DEVICE)
    for s in range(history):
        share = torch.where(visits[:height] > s, alphas[:, s], 0)
        weights[:, s], rest = rest * share, rest * (1 - share)
    at, mine, theirs = None, None, None
    if prior == "columns":
        near = torch.arange(height, device=DEVICE)
        at = torch.stack([near, (near + 3) % count], 1)
        entries = torch.stack([rest * 0.75, rest * 0.25], 1)
    else:
        theirs = torch.randint(0, 5, (count,), generator=generator).to(DEVICE)
        mine = theirs[:height]
        entries = (rest / (mine[:, None] == theirs).sum(1))[:, None]
    if height > 3:
        weights[3], entries[3] = 0, 0
    scales = 1 + 5 * torch.rand(height, history, generator=generator).to(DEVICE)
    operands = {
        "queries": rows(height, d, dtype=dtype), "keys": rows(count, d, dtype=dtype),
        "past queries": rows(history, height, d, dtype=stored),
        "past keys": rows(history, count, d, dtype=stored),
    }  # fmt: skip
    scale = torch.tensor(4.0, device=DEVICE)
    tables = (visits, entries, at, mine, theirs, scale)
    upstream = torch.linspace(-1, 1, height, dtype=torch.float64, device=DEVICE)

    def run(module, operands):
        dtype = torch.promote_types(operands["queries"].dtype, torch.float32)
        x = *operands.values(), weights.to(dtype), scales.to(dtype), *tables
        found = *module.snapshot_pass(*x, BOTH), *module.snapshot_gradient(*x, upstream)
        names = (*NAMES[:3], "weighted queries", "weighted keys")
        return dict(zip(names, found, strict=True))

    found = run(field, operands)
    compare(found, partial(run, field_tiles), operands)
    alone = field.snapshot_pass(*operands.values(), weights, scales, *tables, NEITHER)
    assert torch.equal(alone[0], found["loss"])
    assert alone[1].numel() == alone[2].numel() == 0
    if height > 3:
        assert found["loss"][3] == 0
        assert not found["d_queries"][3].any()


def test_no_float64():
    problem = Problem(3, 4, torch.float32, torch.float32, "whole")
    problem.matrix = problem.matrix.double()
    with pytest.raises(TypeError, match=r"takes no field of torch\.float64"):
        problem.run(field)


# ---- what the compiler makes of them -------------------------------------------------------------

GATES = """
import dataclasses, json
from bench import gates, static
from bench.static_table import compile_all

def wanted():
    for stored in ("bf16", "fp32"):
        for dtype, dim in (("bf16", 64), ("bf16", 128), ("fp32", 64)):
            yield static.Entry(f"field_step {stored}", dtype, dim, "sm_90")
        yield static.Entry(f"field_step gathered {stored}", "bf16", 64, "sm_90")
        for kind in (stored, f"gathered {stored}"):
            yield static.Entry(f"field_dk {kind}", "bf16", 64, "sm_90")
    for target in ("sm_80", "sm_100", "gfx942"):
        yield static.Entry("field_step bf16", "bf16", 64, target)
        yield static.Entry("field_dk bf16", "bf16", 64, target)

if __name__ == "__main__":
    results = {}
    for entry, found in compile_all(wanted(), 2):
        name = " ".join(map(str, dataclasses.astuple(entry)))
        if isinstance(found, str):
            results[name] = {"compile": found}, None
        else:
            results[name] = gates.failures(found), found.seconds
    print(json.dumps(results))
"""


def test_machine_code(tmp_path):
    """All gates, and the step bound by the memory's rate: 4 bytes an entry of bfloat16 against the
    work of every other unit, which may take as long ÷ 0.85 at most."""
    path = tmp_path / "script.py"
    path.write_text(GATES)
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, str(path)], env=environment, cwd=ROOT, capture_output=True, text=True,
        timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    results = json.loads(done.stdout.splitlines()[-1])
    assert len(results) == 18
    assert {name: found for name, (found, _) in results.items() if found} == {}
    seconds = results["field_step bf16 bf16 64 sm_90 aligned"][1]
    copy = seconds.pop("memory")
    assert copy == pytest.approx(4 / 4.3e12)
    assert max(seconds.values()) <= copy / 0.85
