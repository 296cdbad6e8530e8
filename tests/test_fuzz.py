"""The fuzzer: it finds wrong implementations, shrinks what it finds, and finds nothing else."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import rkdo_kernels
from bench.fuzz import cases, command, fields, judge, shrink, truth, yardstick
from rkdo_kernels import reference

ROOT = Path(__file__).parent.parent
MAKE_TEST = 3000  # cases of every `make test`
PARTS = 6
SMALL = 24  # rows, keys and columns
CPU = cases.ON_CPU


def wrong(monkeypatch, loss, change):
    """`loss` of the package gives what `change` makes of it."""
    right = getattr(rkdo_kernels, loss)
    monkeypatch.setattr(rkdo_kernels, loss, lambda *x, **s: change(right, *x, **s))


def forgets_the_mask(right, queries, keys, **settings):
    settings.pop("exclude_self")
    return right(queries, keys, exclude_self=False, **settings)


def swallows_nan(right, queries, keys, **settings):
    return torch.nan_to_num(right(queries, keys, **settings), nan=0.5)


def flips_a_sign(right, queries, keys, **settings):
    value = right(queries, keys, **settings)
    return value - 2 * (value - value.detach())


def rounds_twice(right, queries, keys, **settings):
    value = right(queries, keys, **settings)
    if queries.dtype != torch.bfloat16:
        return value
    return value + (value.bfloat16().to(value.dtype) - value).detach()


def forgets_the_bound(right, queries, keys, **settings):
    return right(queries, keys, **{**settings, "bound": None})


def misses_one_key(right, queries, keys, **settings):
    if len(keys) < 5:
        return right(queries, keys, **settings)
    return right(queries, keys[:-1], **settings)


@pytest.mark.parametrize(
    ("loss", "change", "kind", "count"),
    [
        ("similarity_logsumexp", forgets_the_mask, "value", 40),
        ("similarity_logsumexp", misses_one_key, "value", 40),
        ("info_nce", swallows_nan, "value: plausible", 200),
        ("nt_xent", flips_a_sign, "error", 20),
        ("icon_loss", rounds_twice, "value: error", 60),
        ("info_nce", forgets_the_bound, "no error", 400),
    ],
    ids=lambda x: getattr(x, "__name__", None),
)
def test_a_wrong_implementation_is_found_and_shrunk(loss, change, kind, count, monkeypatch):
    wrong(monkeypatch, loss, change)
    for seed in range(count):
        case = cases.draw(seed, (loss,), ("tiled",), SMALL)
        miss = judge.judge(case)
        if miss and kind in miss.kind:
            break
    else:
        pytest.fail(f"{change.__name__} was not found in {count} cases")
    smaller, again = shrink.shrink(case, miss)
    assert again.kind == miss.kind
    assert smaller.n <= case.n
    assert smaller.d <= case.d
    least = {"misses_one_key": 5}.get(change.__name__, 2)
    assert smaller.n + smaller.m <= 2 * least + 1, smaller
    assert judge.judge(smaller) == again  # deterministic


def test_a_snippet_reproduces_what_it_is_about(tmp_path):
    """A bound that is broken: an error in the judged call and in the snippet's own process."""
    case = cases.Case(3, "info_nce", n=2, d=2, drawn=(2, 0, 2), length=3.0)
    text = shrink.snippet(case, yardstick.Miss("raises ValueError", "as said"))
    assert "Case(" not in text.split("#")[0]  # so few numbers are spelt out
    file = tmp_path / "snippet.py"
    file.write_text(text)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.run(
        [sys.executable, file], env=environment, capture_output=True, text=True
    )
    assert "must not pass bound=1" in process.stderr
    wide = case.but(n=30, d=30, drawn=(30, 0, 30), length=1.0, learnable="float32")
    file.write_text(shrink.snippet(wide, yardstick.Miss("value: error", "as said")))
    process = subprocess.run(
        [sys.executable, file], env=environment, capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr
    assert "tensor(" in process.stdout


def test_a_case_reads_back_from_what_it_prints():
    for seed in range(50):
        case = cases.draw(seed, cases.LOSSES, CPU, SMALL)
        again = eval(repr(case), {"Case": cases.Case})
        assert again == case
        for x, y in zip(case.inputs(), again.inputs(), strict=True):
            assert torch.equal(x.nan_to_num(7), y.nan_to_num(7))
            assert x.stride() == y.stride()


def test_a_window_of_a_case_has_the_rows_of_the_whole():
    case = cases.draw(5, ("rkdo_loss",), ("tiled",), SMALL)
    case = case.but(n=9, others=4, d=6, drawn=(9, 4, 6), offset=2, specials=(), layouts=("",) * 2)
    queries, keys = case.inputs()
    part_queries, part_keys = case.but(n=3, first=4).inputs()
    assert torch.equal(part_queries, queries[4:7])
    assert torch.equal(part_keys, torch.cat([keys[:2], keys[6:9], keys[11:]]))


@pytest.mark.parametrize("loss", [x for x in cases.LOSSES if x != "similarity_moments"])
def test_the_truth_in_float64_and_in_80_digits_agree(loss):
    """Two derivations: automatic ones of the formulas in logarithms, quotients of plain ones."""
    checked = 0
    for seed in range(400):
        case = cases.draw(seed, (loss,), ("tiled",), 6)
        if case.learnable == "float32" or case.specials or case.temperature < 0.05:
            continue
        if case.settings.get("cooling", 0) > 0.9:
            continue
        case = case.but(dtype="float64", learnable="float64")
        if not truth.fits_80_digits(case):
            continue
        pair = [x.double() for x in case.inputs()]
        exact = judge.truth_of(case, *pair, exact=True)
        naive = judge.evaluate(case, judge.true_loss(case), *pair, judge.by_row(case, judge.F64))
        for name, x in exact.items():
            size = max(1.0, float(x.abs().max())) * (1 + float(case.weights().abs().max()))
            found = naive[name].sum() if name == "temperature" else naive[name]
            x = x.sum() if name == "temperature" else x
            assert float((found - x).abs().max()) <= 1e-11 * size / case.temperature, (case, name)
        checked += 1
        if checked == 6:
            return
    pytest.fail(f"only {checked} cases")


def test_the_truth_is_the_reference_where_nothing_cancels():
    case = cases.Case(1, "icon_loss", settings={"debias": 0.2, "kernel": "student"})
    queries, keys = (x.double() for x in case.inputs())
    wanted = reference.icon_loss(queries, keys, debias=0.2, kernel="student")
    assert float((truth.losses(case, queries, keys, 0.5) - wanted).abs().max()) <= 1e-13


def test_the_truths_second_derivative_is_a_number_in_float32():
    """It stands for eager code there, whose NaN would pass for an error of 0."""
    settings = {"alpha": 1e-30, "depth": 2, "cooling": 0.5, "detach_target": False}
    case = cases.Case(
        1, backend="reference", temperature=0.05, settings=settings, pairs="correlated", second=True
    )
    queries, keys = case.inputs()
    found = judge.eager_of(case, queries, keys)
    true = judge.truth_of(case, queries, keys)
    for name, x in true.items():
        error = float((found[name].double() - x).abs().max())
        assert 0 < error <= 1e-5 * float(x.abs().max()), name


def test_the_truths_softmax_of_equal_logits_sums_to_one():
    """torch.logsumexp's gradient of three equal logits of 2e18 is 1 for each."""
    logits = torch.full((1, 3), 2e18, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(truth.logsumexp(logits).sum(), logits)
    assert torch.allclose(gradient, torch.full_like(gradient, 1 / 3))
    none = torch.full((1, 3), -torch.inf, dtype=torch.float64)
    assert truth.logsumexp(none).item() == -torch.inf


def test_a_field_that_forgets_an_update_is_found(monkeypatch):
    monkeypatch.setattr(rkdo_kernels.ResponseField, "update", lambda *x, **s: None)
    for seed in range(60):
        case = fields.draw(seed, ("tiled",), 8)
        if miss := fields.judge(case):
            break
    else:
        pytest.fail("not found in 60 sequences")
    smaller, again = fields.shrink(case, miss)
    assert again.kind == miss.kind
    assert "over the sequence" in again.kind
    assert len(smaller.calls) == 2


def test_the_command_counts_and_replays(capsys):
    assert command.main(["--cases", "12", "--loss", "info_nce", "--largest", "8"]) == 0
    assert "info_nce" in capsys.readouterr().out
    with pytest.raises(Exception, match="unknown loss 'nonesuch'"):
        command.main(["--loss", "nonesuch"])
    with pytest.raises(Exception, match="unknown backend 'abacus'"):
        command.main(["--backend", "abacus"])


NOT_LOST = {"alpha": 0.5, "depth": 1, "cooling": 0.0, "detach_target": False}


@pytest.mark.parametrize(
    "case",
    [
        cases.Case(7486, n=2, d=2, drawn=(5, 0, 20), specials=(("keys", 1, "-inf"),), bound=None,
                   settings=NOT_LOST),
        cases.Case(154812, n=2, d=3, drawn=(3, 0, 27), first=1, pairs="rolled", bound=None,
                   specials=(("keys", 2, "inf"),), settings=NOT_LOST | {"depth": 3}),
        cases.Case(173725, "icon_loss", n=2, d=1, drawn=(45, 0, 1), first=8, bound=None,
                   specials=(("keys", 9, "-inf"),), settings={"debias": 0.0, "kernel": "gaussian"}),
        cases.Case(185909, "icon_loss", n=2, d=2, drawn=(3, 0, 2), first=1, bound=None,
                   specials=(("keys", 2, "inf"),), settings={"debias": 0.0, "kernel": "student"}),
        cases.Case(100197, backend="small", n=1, d=1, drawn=(1, 0, 1), length=1.2, bound=None,
                   specials=(("queries", 0, "huge"),), learnable="float32",
                   settings=NOT_LOST | {"alpha": 0.145, "depth": 3}),
        cases.Case(1, "info_nce", n=2, d=4, drawn=(2, 0, 4), length=1.2,
                   specials=(("queries", 1, "nan"),)),
        cases.Case(163068, "icon_loss", n=4, d=20, drawn=(4, 0, 20), place="plane",
                   pairs="aligned", length=3.0, specials=(("queries", 1, "huge"),), bound=None,
                   temperature=0.001, settings={"debias": 0.0, "kernel": "student"}),
        cases.Case(371983, "icon_loss", dtype="float64", n=9, d=58, drawn=(9, 0, 58),
                   temperature=0.001, reduction="mean", upstream="ones",
                   settings={"debias": 0.0, "kernel": "student"}),
        cases.Case(147002, "icon_loss", n=3, d=1, drawn=(11, 0, 1), bound=None, upstream="ones",
                   specials=(("queries", 0, "huge"),),
                   settings={"debias": 1.0, "kernel": "gaussian"}),
        cases.Case(172236, n=2, d=1, drawn=(46, 0, 1), first=41, bound=None, upstream="ones",
                   specials=(("keys", 41, "-inf"),), settings=NOT_LOST | {"alpha": 1.0}),
        cases.Case(307087, "similarity_logsumexp", n=5, d=1, drawn=(14, 0, 1), first=3, bound=None,
                   specials=(("queries", 7, "nan"), ("queries", 3, "huge")), upstream="ones",
                   settings={"exclude_self": False}),
    ],
    ids=["−∞", "∞", "weight 0", "weight 0, Student's", "temperature", "NaN, and a bound passed",
         "far away", "nearest, float64", "even target, far away", "positive of −∞, alpha=1",
         "equal and far, beside NaN"],
)  # fmt: skip
def test_what_the_fuzzer_found_is_mended(case):
    assert judge.judge(case) is None


def test_a_fields_own_column_is_what_the_others_leave():
    step = fields.Call("step", (1, 0), 0.01, 0.05, "antipodal", 0)
    loss = fields.Call("loss", (0, 1), 0.15, 0.05, "correlated", 1)
    case = fields.FieldCase(
        182617, "dense", "bfloat16", "tiled", "float32", 2, 2, 3, "identity", "none", (step, loss)
    )
    assert fields.judge(case) is None


def test_a_miss_is_not_hidden_by_a_larger_one_at_the_edge(monkeypatch):
    edge = yardstick.Miss("value: error", "of a loss near 0", 9.0, yardstick.FLOAT32_STEP / 2)
    clear = yardstick.Miss("queries: error", "clear", 4.0)
    monkeypatch.setattr(judge, "compare", lambda *_: [edge, clear])
    assert judge.judge(cases.Case(1, settings=NOT_LOST)) is clear


def tilts(name, by):
    """The gradient to the argument is too large by a factor of 1 + `by`."""

    def change(right, queries, keys, **settings):
        given = {"queries": queries, "keys": keys, **settings}
        if isinstance(given.get(name), torch.Tensor):
            given[name] = given[name].view_as(given[name])
            if given[name].requires_grad:
                given[name].register_hook(lambda g: g * (1 + by))
        return right(**given)

    return change


def adds(by):
    return lambda right, queries, keys, **settings: right(queries, keys, **settings) + by


def learnable(case):
    return case.dtype == "float32" and case.learnable


def plain_half(case):
    return case.dtype == "bfloat16" and not case.specials and case.place == "sphere"


@pytest.mark.parametrize(
    ("loss", "backend", "change", "of"),
    [  # where the yardstick allows for more than eager's error
        ("similarity_moments", "tiled", tilts("temperature", 1e-3), learnable),
        ("info_nce", "tiled", tilts("temperature", 1e-3), learnable),
        ("info_nce", "tiled", tilts("keys", 0.1), plain_half),  # and it is said to be executed
        ("similarity_logsumexp", "tiled", tilts("queries", 0.1), plain_half),
        ("icon_loss", "tiled", tilts("keys", 1e-4),
         lambda c: c.dtype == "float32" and "huge" in str(c.specials)),
        ("rkdo_loss", "tiled", tilts("keys", 1e-10), lambda c: c.dtype == "float64"),
        ("rkdo_loss", "reference", adds(1e-3),
         lambda c: c.settings["alpha"] == 1 and c.settings["cooling"] == 0),
    ],
    ids=["moments' temperature", "one temperature", "keys' G", "queries' G", "far away", "float64",
         "loss 0"],
)  # fmt: skip
def test_what_the_yardstick_allows_for_hides_no_fault(loss, backend, change, of, monkeypatch):
    """Of the first eight such cases, some of which have a gradient of 0, four show the fault."""
    if of is plain_half:
        monkeypatch.setattr(judge, "EXECUTED", ("tiled",))
    drawn = (cases.draw(seed, (loss,), (backend,), SMALL) for seed in range(10**6))
    chosen = [next(c for c in drawn if of(c) and c.upstream in ("random", "ones") and c.n > 2)
              .but(frozen="") for _ in range(8)]  # fmt: skip
    assert all(miss is None or miss.at_the_edge for miss in map(judge.judge, chosen))
    wrong(monkeypatch, loss, change)
    found = [miss for miss in map(judge.judge, chosen) if miss and not miss.at_the_edge]
    assert len(found) >= 4, [judge.judge(case) for case in chosen]


COLUMNS_ALIKE = cases.Case(  # whose logits differ by a rounding of S, which is .001 of them
    338482, n=2, d=32, drawn=(2, 0, 32), place="collapsed", pairs="correlated", temperature=0.05,
    layouts=("contiguous", "one row expanded"), upstream="ones", backend="one_pass",
    settings={"alpha": 0.5, "depth": 1, "cooling": 0.999, "detach_target": False},
)  # fmt: skip
ROWS_ALIKE = cases.Case(  # whose roundings of log Σ exp add up, over rows and levels
    183189, n=64, d=33, drawn=(64, 0, 33), pairs="aligned", length=0.01, temperature=0.05,
    learnable="float32", bound=None, reduction="mean",
    settings={"alpha": 0.623, "depth": 16, "cooling": 0.0, "detach_target": False},
)  # fmt: skip


@pytest.mark.parametrize(
    ("case", "change"),
    [(COLUMNS_ALIKE, tilts("keys", 1.0)), (ROWS_ALIKE, tilts("temperature", 1e-4))],
    ids=["columns alike", "rows alike"],
)
def test_what_a_rounding_explains_is_no_miss_and_more_is(case, change, monkeypatch):
    miss = judge.judge(case)
    assert miss is None or miss.rounding
    wrong(monkeypatch, case.loss, change)
    assert not judge.judge(case).at_the_edge


@pytest.mark.parametrize("loss", cases.LOSSES)
def test_one_rounding_is_about_what_eager_errs_by(loss):
    """Where nothing cancels; and one of no size is none."""
    case = next(
        c for c in (cases.draw(seed, (loss,), ("tiled",), 16) for seed in range(10**6))
        if c.dtype == "float32" and c.n > 4 and not c.second and c.settings.get("depth", 0) < 5
    ).but(specials=(), place="sphere", pairs="independent", temperature=0.5, frozen="",
          learnable="", length=1.0, bound=1.0, upstream="ones", reduction="none")  # fmt: skip
    inputs = case.inputs()
    true = judge.truth_of(case, *inputs, exact=True)
    none = judge.true_loss(case, truth.Rounding(0.0, 1))
    same = judge.evaluate(case, none, *(x.double() for x in inputs), None)
    eager = dict.fromkeys(true, 0.0)
    for draw in range(judge.FIRST):
        for name, error in judge.another_draw(case, *inputs, true, draw).items():
            eager[name] = max(eager[name], error)
    for name, shaken in judge.rounded_once(case, *inputs).items():
        torch.testing.assert_close(same[name], true[name], rtol=1e-12, atol=1e-12)
        assert eager[name] / 4 < shaken < 20 * eager[name], (case, name, shaken / eager[name])


def test_a_fields_row_without_a_normal_mass_has_no_target():
    update = fields.Call("update", (4, 5, 6, 7, 8), 1.0, 0.01, "independent", 0)
    loss = fields.Call("loss", (4, 10), 0.15, 1.0, "independent", 1)
    case = fields.FieldCase(
        163289, "dense", "bfloat16", "tiled", "float32", 12, 6, 3, "identity", "none",
        (update, loss),
    )  # fmt: skip
    assert fields.judge(case) is None


# ---- compiled kernels, executed: in a process of their own, where Triton is no interpreter -------

EXECUTED = """
import warnings
warnings.simplefilter("ignore")
from dataclasses import replace
from bench.compiled.execute import capture
from bench.compiled.execute.compile import program
from bench.fuzz import cases, fields, judge, shrink

plain = {"n": 20, "d": 16, "drawn": (20, 0, 16), "settings": {}}
loss = cases.Case(3, "info_nce", "sm_90", "bfloat16", **plain, temperature=0.2)
learnable = loss.but(backend="sm_80", learnable="float32", dtype="float32")
divided = loss.but(loss="similarity_logsumexp", single=False, splits=2, **plain | {"n": 70,
                   "drawn": (70, 0, 16)}, upstream="ones")
for case in (loss, learnable, divided):
    miss = judge.judge(case)
    assert miss is None, (case, miss)
call = fields.Call("step", (1, 2, 3), 0.5, 0.2, "correlated", 0)
field = fields.FieldCase(1, "dense", "bfloat16", "sm_80", "float32", 5, 8, 1, "labels", "mean",
                         (call,))
assert fields.judge(field) is None

def changed(launch, target, cache):
    found = program(launch, target, cache)
    return replace(found, ptx=found.ptx.replace(*change))

capture.program = changed
change = ("bar.sync \t0;", "")
miss = judge.judge(divided)
assert miss is not None and miss.kind.startswith("violation: "), miss
smaller, again = shrink.shrink(divided, miss, tries=12)
assert again.kind == miss.kind and smaller.backend == "sm_90", (smaller, again)
change = ("0f3FB8AA3B", "0f3FB80000")  # log₂ e, a little off
for wrong in (loss, learnable):
    miss = judge.judge(wrong)
    assert miss is not None and "error" in miss.kind, miss
assert fields.judge(field) is not None
print("fine")
"""


def without_the_interpreter(*arguments):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, cwd=ROOT
    )


def test_executed_kernels_are_judged_and_what_they_violate_is_a_miss():
    pytest.importorskip("triton")
    done = without_the_interpreter("-c", EXECUTED)
    assert done.stdout == "fine\n", done.stdout + done.stderr[-2000:]


def test_executed_and_interpreted_kernels_do_not_mix(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(Exception, match="triton, which is interpreted here, and sm_80"):
        command.main(["--backend", "triton", "--backend", "sm_80"])
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(Exception, match="nothing to compile for sm_90"):
        command.main(["--backend", "sm_90"])


@pytest.mark.parametrize("part", range(PARTS))
def test_three_thousand_cases(part):
    """The same ones every time; in the interpreter, which is slow, one in forty."""
    size = MAKE_TEST // PARTS
    seeds = range(part * size, (part + 1) * size)
    everything = command.Choice(cases.LOSSES, CPU, SMALL, True)
    interpreted = command.Choice(cases.LOSSES, ("triton",), 10, False)
    one = command.run(everything, [s for s in seeds if s % 40], shown=3)
    two = command.run(interpreted, [s for s in seeds if s % 40 == 0], shown=3)
    report = "\n\n".join([*one.snippets, *two.snippets, one.table(), two.table()])
    assert not one.kinds + two.kinds, report
