"""Measuring: what is wrong is called wrong, what fails is a result, what was measured is kept."""

import math
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from bench_results import complaint, result, write

from bench import (
    accuracy,
    apart,
    cases,
    contenders,
    fields,
    measure,
    memory,
    record,
    report,
    session,
)
from bench.contenders import Contender
from rkdo_kernels import reference, rkdo_loss

ROOT = Path(__file__).parent.parent
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


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_eager_is_as_accurate_as_eager_in_every_dtype(dtype):
    """And ours is held to float32's loss where it returns one."""
    halved = contenders.ours(lambda q, k: rkdo_loss(q, k).bfloat16().float(), ROWS)
    every = case(contenders.chunked(ROWS), cases.replace(halved, name="halved"))
    found = {x.contender: x for x in measure.measure(every, 700, 16, dtype, "cpu", EFFORT, {})}
    assert {x.contender: x.status for x in found.values()} == {
        "eager": "ok", "ours": "ok", "chunked": "ok", "halved": "wrong",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), "oom"),
        (MemoryError(), "oom"),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate"), "oom"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"), "oom"),
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


def test_running_out_of_memory_for_real_is_a_result():
    def loss(queries, keys):
        return rkdo_loss(queries, keys) + torch.empty(1 << 50).sum()

    found = measured(contender("greedy", loss))
    assert (found["greedy"].status, found["greedy"].detail) == ("oom", "out of memory")
    assert found["greedy"].p50 is None
    assert found["ours"].status == "ok"
    assert "OOM out of memory" in report.table(found.values())


def test_a_variant_that_does_not_fit_is_not_taken(monkeypatch):
    called = []

    def make(n, device, variant):
        def loss(queries, keys):
            if variant > 64:
                raise MemoryError
            called.append(variant)
            return rkdo_loss(queries, keys)

        return loss

    def seconds(step, device, repeats=1):
        step()
        return 1e-3 * called[-1]

    monkeypatch.setattr(measure, "seconds", seconds)
    chunky = Contender("chunky", make, ROWS, variants=(4, 16, 64, 256))
    assert measure.best_variant(chunky, cases.two_views(300, 8, torch.float32, "cpu")) == 4
    assert set(called) == {64, 16, 4}


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


@pytest.mark.parametrize("name", ["field_dense", "field_dense_bf16", "field_snapshot"])
def test_a_fields_contenders_do_the_same_job(name, monkeypatch):
    monkeypatch.setattr(fields, "SAMPLES", 500)
    found = next(x for x in cases.CASES if x.name == name)
    results = measure.measure(found, 64, fields.DIM, "fp32", "cpu", EFFORT, {}, skip={"compiled"})
    assert {x.contender: x.status for x in results} == {"eager": "ok", "ours": "ok", "floor": "ok"}
    steps = [
        x.make(64, torch.device("cpu")) for x in found.contenders if x.name in ("eager", "ours")
    ]
    for seed in range(6):  # and take the same steps
        views = [x.detach() for x in cases.two_views(64, 64, torch.float32, "cpu", seed).values()]
        a, b = (step(*views) for step in steps)
        torch.testing.assert_close(a, b, rtol=2e-3 if name.endswith("bf16") else 1e-5, atol=1e-6)


def test_blocks_of_rows_are_the_whole_loss():
    inputs = cases.two_views(50, 8, torch.float64, "cpu")
    whole = accuracy.evaluate(contenders.mean_of(ROWS, True), inputs)
    blocks = accuracy.evaluate(contenders.in_chunks(ROWS, True, 16), inputs)
    for name, true in whole.items():
        torch.testing.assert_close(blocks[name], true)


def test_one_lucky_draw_of_eager_is_no_limit(monkeypatch):
    """Where eager's gradients are exact by luck, what it has on other draws is allowed still."""
    cold = partial(reference.rkdo_loss, temperature=0.01, depth=1)
    entrant = Contender("ours", lambda n, device: None, cold)
    inputs = cases.two_views(19, 24, torch.float32, "cpu")
    true = accuracy.truth(entrant, inputs, torch.float64)
    lucky = {True: {name: x.float() for name, x in true.items()}}
    worse = accuracy.on_draws(entrant, inputs, true)
    errors = worse(dict.fromkeys(true, 0.0))

    def used(share, worse):
        found = {name: x + share * errors[name] for name, x in true.items()}
        return accuracy.judge(found, lucky, true, True, worse).limit_used

    assert used(1.5, None) > 1 >= used(1.5, worse)
    assert used(5.0, worse) > 1
    assert used(math.nan, worse) > 1
    monkeypatch.setattr(accuracy, "FEW", 18)
    assert accuracy.on_draws(entrant, inputs, true) is None


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


def test_memory_is_measured_of_chosen_contenders_too():
    rkdo = session.only(next(x for x in cases.CASES if x.name == "rkdo_loss"), ["ours"])
    ours = next(x for x in rkdo.contenders if x.name == "ours")
    assert memory.apart(rkdo, ours, None, 64, 64, "fp32") is not None


# ---- processes -----------------------------------------------------------------------------------


def test_times_come_from_a_new_process(monkeypatch):
    monkeypatch.setattr(measure, "times", None)  # here, but not there
    rkdo = session.only(cases.named("rkdo_loss"), ["eager", "ours"])
    chosen = {"skip": frozenset({"eager"}), "apart": True}
    found = list(measure.measure(rkdo, 64, 64, "fp32", "cpu", EFFORT, {"threads": 7}, **chosen))
    assert [(x.contender, x.status, x.threads) for x in found] == [
        ("ours", "ok", 7), ("floor", "ok", 7),
    ]  # fmt: skip
    assert all(x.p50 and x.peak_bytes is None for x in found)
    assert found[0].floor == found[1].p50


@pytest.mark.parametrize("status", ["oom", "failed"])
def test_a_contender_that_ends_its_process_is_a_result(monkeypatch, status):
    """As where the system kills what takes too much memory: the others are measured without it."""
    fatal = apart.Died(-signal.SIGKILL if status == "oom" else 1)

    def dying(work, name, kept, *what):
        for contender in ("ours", "eager", "greedy", "chunked"):
            if contender in kept and contender == "greedy":
                raise fatal
            if contender in kept:
                yield record.Result(name, contender, 16, 8, "fp32", "ok", p50=1.0), None

    monkeypatch.setattr(measure, "stream", dying)
    four = case(contender("greedy", None), contenders.chunked(ROWS))
    found = list(measure.measure(four, 16, 8, "fp32", "cpu", EFFORT, {}, apart=True))
    ok = {"ours": "ok", "eager": "ok", "chunked": "ok"}
    assert {x.contender: x.status for x in found} == {**ok, "greedy": status}
    assert len(found) == 4
    assert [x.detail for x in found if x.status != "ok"] == [str(fatal)]


def test_times_outlive_the_process_that_measures_memory(monkeypatch):
    def dying(*_):
        raise apart.Died(-signal.SIGKILL)

    monkeypatch.setattr(memory, "apart", dying)
    effort = measure.Effort(seconds=0.05, rounds=3, least=2)
    for x in measure.measure(case(), 16, 8, "fp32", "cpu", effort, {}):
        assert (x.status, x.peak_bytes) == ("ok", None)
        assert x.p50
        assert x.detail.startswith("no peak: the process")


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
    writer = record.Writer(path)
    assert not session.measure_all(problems, "cpu", EFFORT, writer)
    results = writer.results
    assert record.read(path) == results
    assert {x.case for x in results} == {"tiny"}
    assert {x.contender for x in results} == {"eager", "ours"}
    assert results[0].commit
    assert results[0].versions["torch"]


def test_an_interruption_while_memory_is_measured_keeps_the_times(monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(memory, "apart", stop)
    effort = measure.Effort(seconds=0.05, rounds=3, least=2)
    results = measure.measure(case(), 16, 8, "fp32", "cpu", effort, {})
    found = [next(results), next(results)]
    assert [x.contender for x in found] == ["eager", "ours"]
    assert all(x.status == "ok" and x.p50 and x.peak_bytes is None for x in found)
    with pytest.raises(KeyboardInterrupt):
        next(results)


def test_ctrl_c_leaves_a_valid_file(tmp_path):
    path = tmp_path / "results.jsonl"
    command = ["-m", "bench", "--case", "rkdo_loss", "--contender", "ours", "--out", str(path)]
    run = subprocess.Popen(
        [sys.executable, *command], cwd=ROOT, start_new_session=True, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored under "make &"
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not (path.exists() and path.read_text().endswith("\n")) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(run.pid, signal.SIGINT)  # as a terminal does: every process of the group
    shown, said = run.communicate(timeout=60)
    kept = record.read(path)
    assert run.returncode == 130
    assert f"interrupted: {len(kept)} results are kept" in said
    assert "Traceback" not in said
    assert all(x.contender in shown for x in kept)


def test_a_run_that_measured_nothing_leaves_no_file(tmp_path):
    def stop(queries, keys):
        raise KeyboardInterrupt

    problem = session.Problem(case(contender("stop", stop)), 16, 8, "fp32")
    writer = record.Writer(tmp_path / "none.jsonl")
    assert not session.measure_all([problem], "cpu", EFFORT, writer)
    assert not writer.path.exists()


def test_dirty_is_about_the_code_that_is_measured(tmp_path, monkeypatch):
    def git(*arguments):
        identity = ["-c", "user.name=x", "-c", "user.email=x@example.org"]
        subprocess.run(["git", "-C", tmp_path, *identity, *arguments], check=True)

    monkeypatch.setattr(record, "__file__", str(tmp_path / "bench" / "record.py"))
    assert record.revision() == ("unknown", None)
    for name in ("bench/results", "rkdo_kernels"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("bench/record.py", "rkdo_kernels/ops.py", "README.md", "bench/results/a.jsonl"):
        (tmp_path / name).write_text("a")
    git("init", "--quiet")
    git("add", "README.md")
    git("commit", "--quiet", "-m", "someone else's")
    assert record.revision() == ("unknown", None)
    git("add", ".")
    git("commit", "--quiet", "-m", "all")
    commit, dirty = record.revision()
    assert (len(commit), dirty) == (40, False)
    (tmp_path / "README.md").write_text("b")
    (tmp_path / "bench/results/b.jsonl").write_text("b")
    assert record.revision() == (commit, False)
    (tmp_path / "rkdo_kernels/new.py").write_text("b")
    assert record.revision() == (commit, True)


def test_a_result_file_is_never_overwritten(tmp_path, capsys):
    path = write(tmp_path / "there.jsonl", [result()])
    before = path.read_bytes()
    said = complaint(capsys, ["--quick", "--case", "depth", "--out", path])
    assert "exists already" in said
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "holds no result"),
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
    good = write(tmp_path / "good.jsonl", [result()])
    assert said in complaint(capsys, ["--against", good, "--with", path])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--case", "nonesuch"], "unknown case 'nonesuch': rkdo_loss"),
        (["--device", "abacus"], "unknown device 'abacus': cpu or cuda"),
        (["--contender", "nobody"], "no contender 'nobody'"),
        (["--dtype", "fp7"], "unknown dtype 'fp7'"),
        (["--n", "7"], "nothing to measure"),
        (["--n", "many"], "argument --n: must be a whole number from 1 on, got many"),
        (["--n", "0"], "argument --n: must be a whole number from 1 on, got 0"),
        (["--threads", "0"], "argument --threads: must be a whole number from 1 on, got 0"),
        (["fuzz", "--cases", "0"], "argument --cases: must be a whole number from 1 on, got 0"),
        (["fuzz", "--cases", "-5"], "--cases: must be a whole number from 1 on, got -5"),
        (["fuzz", "--largest", "0"], "--largest: must be a whole number from 1 on, got 0"),
        (["fuzz", "--minutes", "0"], "argument --minutes: must be a number above 0, got 0"),
        (["fits", "--every", "0"], "argument --every: must be a whole number from 1 on, got 0"),
        (["static", "--kernel", "_moments"], "kernels: "),
        (["nonesuch"], "unrecognized arguments: nonesuch"),
        (["--against", "missing.jsonl"], "no such result file"),
        (["--with", "missing.jsonl"], "--with needs --against"),
        (["plot", "."], "cannot be read"),
        (["gpu"], "--out"),
        (["static", "--target", "sm_1"], "unknown target 'sm_1'"),
        (["plot", "missing.jsonl"], "no such result file"),
    ],
)
def test_bad_arguments_are_one_line(capsys, arguments, said):
    assert said in complaint(capsys, arguments)


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_the_gpu_command_needs_a_gpu(tmp_path, capsys):
    assert "no GPU" in complaint(capsys, ["gpu", "--out", tmp_path])


def test_quick_is_quick():
    chosen = SimpleNamespace(case=None, contender=None, dtype=None, n=None, quick=True)
    problems = session.pick_problems(chosen, "cpu")
    assert [(x.case.name, x.n) for x in problems] == [
        ("rkdo_loss", 64), ("rkdo_loss", 1024), ("rkdo_loss", 4096), ("depth", 2048),
        ("field_dense", 4096), ("field_snapshot", 1024),
    ]  # fmt: skip
