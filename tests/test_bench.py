"""Measuring: what is wrong is called wrong, what fails is a result, what was measured is kept."""

import json
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest
import torch

from bench import accuracy, cases, contenders, measure, memory, plot, record, report, session
from bench.__main__ import main
from bench.contenders import Contender
from bench.errors import BenchError
from bench.record import Result
from rkdo_kernels import reference, rkdo_loss

EFFORT = measure.Effort(seconds=0.05, rounds=3, least=2, memory=False)
ROWS = reference.rkdo_loss


def contender(name, loss):
    return Contender(name, lambda n, device: loss, ROWS)


def case(*others, name="tiny", shapes=((16, 8),)):
    standard = (contenders.eager(ROWS), contenders.ours(rkdo_loss, ROWS))
    return cases.Case(name, (*standard, *others), shapes=shapes)


def measured(*others, n=16):
    found = measure.measure(case(*others), n, 8, "fp32", "cpu", EFFORT, {"device": "test"})
    return {result.contender: result for result in found}


def result(contender="ours", n=64, p50=1.0, **others):
    values = {"status": "ok", "peak_bytes": 10_000_000, "floor": 0.1, "device": "test"}
    return Result("rkdo_loss", contender, n, 64, "fp32", p50=p50, **{**values, **others})


def write(path, results):
    path.write_text("".join(json.dumps(asdict(x)) + "\n" for x in results))
    return path


def complaint(capsys, arguments):
    assert main([str(x) for x in arguments]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    return lines[0]


# ---- measuring -----------------------------------------------------------------------------------


def test_every_contender_is_timed_and_judged():
    found = measured(contenders.chunked(ROWS), contenders.products(ROWS))
    assert set(found) == {"eager", "ours", "chunked", "floor"}
    for name, x in found.items():
        assert x.status == "ok"
        assert 0 < x.p20 <= x.p50 <= x.p80
        assert x.samples >= EFFORT.least
        assert (x.value_error is None) == (name == "floor")
        assert x.floor == found["floor"].p50
    assert found["chunked"].detail == "chunk 64"


@pytest.mark.parametrize(
    "loss",
    [
        lambda q, k: 1.001 * rkdo_loss(q, k),
        lambda q, k: rkdo_loss(k, q),
        lambda q, k: rkdo_loss(q, k.detach()) + 0 * k.sum(),
        lambda q, k: rkdo_loss(q, k) * float("nan"),
    ],
    ids=["scaled", "swapped", "no gradient to the keys", "NaN"],
)
def test_a_wrong_contender_is_wrong_and_not_fast(loss):
    found = measured(contender("fast", loss))
    assert found["fast"].status == "wrong"
    assert found["ours"].status == "ok"
    assert report.ratio_to_ours(found["fast"], list(found.values())) is None
    assert "WRONG" in report.table(found.values())


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), "oom"),
        (MemoryError(), "oom"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: not enough memory"), "oom"),
        (contenders.Unavailable("needs a GPU"), "unavailable"),
        (ValueError("broken\nand more"), "failed"),
    ],
)
def test_what_cannot_run_is_a_result(error, status):
    def loss(queries, keys):
        raise error

    found = measured(contender("poor", loss))
    assert found["poor"].status == status
    assert "\n" not in found["poor"].detail
    assert found["ours"].status == "ok"


def test_what_fails_after_the_first_call_is_a_result_too():
    calls = []

    def loss(queries, keys):
        calls.append(1)
        if len(calls) > 2:
            raise torch.OutOfMemoryError
        return rkdo_loss(queries, keys)

    found = measured(contender("late", loss))
    assert found["late"].status == "oom"
    assert found["late"].p50 is None
    assert found["ours"].p50


def test_contenders_take_turns_and_change_their_order():
    order = []

    def traced(name):
        def loss(queries, keys):
            order.append(name)
            return rkdo_loss(queries, keys)

        return contender(name, loss)

    measured(traced("a"), traced("b"))
    runs = "".join(order)
    assert "ab" in runs.replace("aa", "a").replace("bb", "b")
    assert runs.rstrip("a") != runs or runs.rstrip("b") != runs
    last = [name for i, name in enumerate(runs) if i == 0 or runs[i - 1] != name]
    assert len(last) >= 4  # never one to its end and then the other


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("make", [contenders.fused_cross_entropy, contenders.attention])
def test_pytorchs_own_operators_do_the_same_job(make, symmetric):
    def rows(q, k, **others):
        return reference.info_nce(q, k, temperature=0.1, **others)

    entrant = make(0.1, rows, symmetric)
    inputs = cases.two_views(48, 16, torch.float32, "cpu")
    found = accuracy.evaluate(entrant.make(48, torch.device("cpu")), inputs)
    truth = accuracy.truth(entrant, inputs, torch.float64)
    for name, true in truth.items():
        torch.testing.assert_close(found[name].double(), true, atol=2e-6, rtol=2e-5)


def test_blocks_of_rows_are_the_whole_loss():
    inputs = cases.two_views(50, 8, torch.float64, "cpu")
    whole = accuracy.evaluate(contenders.mean_of(ROWS, True), inputs)
    blocks = accuracy.evaluate(contenders.in_chunks(ROWS, True, 16), inputs)
    for name, true in whole.items():
        torch.testing.assert_close(blocks[name], true)


def test_memory_is_the_peak_above_the_inputs():
    held = 48 << 20

    def loss(queries, keys):
        block = torch.ones(held // 4)
        return rkdo_loss(queries, keys) + 0 * block.sum()

    greedy = contender("greedy", loss)
    peak = memory.on_cpu(case(greedy), greedy, None, 16, 8, "fp32")
    batches = 1 << 20  # Linux adds pages to the resident set in batches, one a processor
    assert held - batches <= peak < held + (16 << 20)


def test_memory_is_measured_in_a_process_of_its_own():
    rkdo = next(x for x in cases.CASES if x.name == "rkdo_loss")
    eager = next(x for x in rkdo.contenders if x.name == "eager")
    matrix = 4 * 512 * 512
    assert memory.apart(rkdo, eager, None, 512, 64, "fp32") > 8 * matrix


# ---- files ---------------------------------------------------------------------------------------


def test_a_partial_run_keeps_what_it_measured(tmp_path):
    def stop(queries, keys):
        raise KeyboardInterrupt

    problems = [
        session.Problem(case(), 16, 8, "fp32"),
        session.Problem(case(contender("stop", stop), name="second"), 16, 8, "fp32"),
        session.Problem(case(name="never"), 16, 8, "fp32"),
    ]
    path = tmp_path / "partial.jsonl"
    results = session.measure_all(problems, "cpu", EFFORT, record.Writer(path))
    assert record.read(path) == results
    assert {x.case for x in results} == {"tiny"}
    assert {x.contender for x in results} == {"eager", "ours"}
    assert results[0].commit
    assert results[0].versions["torch"]


def test_a_result_file_is_never_overwritten(tmp_path, capsys):
    path = write(tmp_path / "there.jsonl", [result()])
    before = path.read_bytes()
    said = complaint(capsys, ["--quick", "--case", "depth", "--out", path])
    assert "exists already" in said
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("not json", "is not JSON"),
        ("{}", "is not a result"),
        ('{"schema": 99}', "has schema 99, wanted 1"),
        ('{"schema": 1, "case": "x"}', "has other fields"),
    ],
)
def test_a_file_of_another_schema_is_one_line(tmp_path, capsys, text, said):
    path = tmp_path / "odd.jsonl"
    path.write_text(text + "\n")
    assert said in complaint(capsys, ["plot", path])
    assert said in complaint(capsys, ["--against", path])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--case", "nonesuch"], "unknown case 'nonesuch': rkdo_loss"),
        (["--device", "abacus"], "unknown device 'abacus': cpu or cuda"),
        (["--contender", "nobody"], "no contender 'nobody'"),
        (["--dtype", "fp7"], "unknown dtype 'fp7'"),
        (["--n", "7"], "nothing to measure"),
        (["--against", "missing.jsonl"], "no such result file"),
        (["static", "--target", "sm_1"], "unknown target 'sm_1'"),
        (["plot", "missing.jsonl"], "no such result file"),
    ],
)
def test_bad_arguments_are_one_line(capsys, arguments, said):
    assert said in complaint(capsys, arguments)


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_the_gpu_command_needs_a_gpu(tmp_path, capsys):
    assert "no GPU" in complaint(capsys, ["gpu", "--out", tmp_path])


# ---- against another file ------------------------------------------------------------------------


def both(ours, **others):
    return [result("eager", p50=8.0), result("ours", p50=ours, **others)]


@pytest.mark.parametrize(
    ("now", "worse"),
    [
        (both(1.04), 0),
        (both(1.06), 1),
        (both(1.0, peak_bytes=10_900_000), 0),  # less than a megabyte is no growth
        (both(1.0, peak_bytes=12_000_000), 1),
        (both(None, status="oom"), 1),
        ([result("eager", p50=16.0), result("ours", p50=2.0)], 0),  # a slower machine
        ([result("eager", p50=8.0)], 0),
    ],
)
def test_against_fails_past_five_percent(tmp_path, capsys, now, worse):
    before = write(tmp_path / "before.jsonl", both(1.0))
    after = write(tmp_path / "after.jsonl", now)
    assert main(["--against", str(before), "--with", str(after)]) == bool(worse)
    assert len(report.against(both(1.0), now)[0]) == worse


def test_on_a_gpu_times_are_compared_as_they_are():
    before = [result("eager", p50=8.0, driver="1"), result(p50=1.0, driver="1")]
    after = [result("eager", p50=16.0, driver="1"), result(p50=1.06, driver="1")]
    assert len(report.against(before, after)[0]) == 1


# ---- table and pictures --------------------------------------------------------------------------


def test_the_table_and_its_sentences():
    results = [
        *both(2.0),
        result("compiled", p50=4.0),
        result("chunked", p50=None, status="oom", detail="out of memory"),
    ]
    lines = report.table(results).splitlines()
    assert "4.00" in next(x for x in lines if "eager" in x)
    assert "OOM" in next(x for x in lines if "chunked" in x)
    assert report.ratios(results)[0].startswith("rkdo_loss N=64 d=64 fp32: eager ÷ ours = 4.00")
    depths = [replace(result(f"ours depth {k}", p50=p), case="depth") for k, p in ((1, 2), (8, 3))]
    assert report.ratios(depths) == ["ours: depth 8 ÷ depth 1 = 1.50"]


def test_pictures_come_from_files_alone(tmp_path):
    pytest.importorskip("matplotlib")
    results = [
        x
        for n in (64, 1024, 4096)
        for x in (
            result("eager", n=n, p50=8e-9 * n**2, status="oom" if n > 1024 else "ok"),
            result("ours", n=n, p50=1e-9 * n**2),
        )
    ]
    path = write(tmp_path / "results.jsonl", results)
    (picture,) = plot.draw([path], tmp_path / "pictures")
    assert picture.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(BenchError, match="nothing to draw"):
        plot.draw([write(tmp_path / "one.jsonl", [result()])], tmp_path)


def test_quick_is_quick():
    chosen = SimpleNamespace(case=None, contender=None, dtype=None, n=None, quick=True)
    problems = session.pick_problems(chosen, "cpu")
    assert [(x.case.name, x.n) for x in problems] == [
        ("rkdo_loss", 64), ("rkdo_loss", 1024), ("rkdo_loss", 4096), ("depth", 2048),
    ]  # fmt: skip
