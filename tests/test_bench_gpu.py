"""`python -m bench gpu` without a GPU: its own code runs, on a stand-in for torch.cuda."""

import json
import os
import time
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from bench_results import complaint

from bench import cases, gpu, gpu_checks, gpu_timing, measure, memory, record, session
from bench.__main__ import main
from rkdo_kernels import ResponseField, launch

EFFORT = measure.Effort(seconds=0.02, rounds=2, least=2)


class Event:
    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.at = time.perf_counter()

    def elapsed_time(self, end):
        return 1e3 * (end.at - self.at)


class Graph:
    """Runs nothing: the numbers stay those of the capture."""

    def replay(self):
        pass


STAND_IN = {
    "is_available": lambda: True,
    "synchronize": lambda: None,
    "empty_cache": lambda: None,
    "get_device_name": lambda: "NVIDIA H200",
    "get_device_capability": lambda: (9, 0),
    "get_device_properties": lambda index: SimpleNamespace(L2_cache_size=1 << 20),
    "memory_allocated": lambda: 1000,
    "max_memory_allocated": lambda: 3000,
    "reset_peak_memory_stats": lambda: None,
    "current_stream": lambda: SimpleNamespace(wait_stream=lambda other: None),
    "Stream": lambda: SimpleNamespace(wait_stream=lambda other: None),
    "stream": lambda stream: nullcontext(),
    "CUDAGraph": Graph,
    "graph": lambda graph: nullcontext(),
    "Event": Event,
}


@pytest.fixture
def machine(monkeypatch):
    """An H200, as far as the benchmark can see; its tensors are a CPU's."""
    for name, stand_in in STAND_IN.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    for module in (gpu_checks, gpu_timing):
        monkeypatch.setattr(module, "DEVICE", "cpu")
    monkeypatch.setattr(launch, "triton_status", lambda: "compiled")
    monkeypatch.setattr(record, "driver", lambda: "580")
    small = tuple(
        cases.replace(case, inputs=lambda n, d, dtype, device: cases.two_views(n, d, dtype, "cpu"))
        for case in cases.CASES
    )
    monkeypatch.setattr(gpu, "CASES", small)
    monkeypatch.setattr(gpu, "EFFORT", EFFORT)
    slow = frozenset({"compiled"})
    plan = (("rkdo_loss", "bf16", ((16, 8), (32, 8)), slow), ("depth", "bf16", ((16, 8),), slow))
    monkeypatch.setattr(gpu, "PLAN", plan)
    checks = [("a", passing), ("b", failing), ("accuracy c", passing)]
    monkeypatch.setattr(gpu_checks, "run", lambda: (gpu_checks.guarded(*x) for x in checks))


def passing():
    return gpu_checks.Check("a", True, "fine")


def failing():
    raise RuntimeError("out of its mind\nin many lines")


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_planned_problem_is_a_case():
    known = {case.name: case for case in cases.CASES}
    for name, dtype, shapes, skip in gpu.PLAN:
        assert dtype in measure.DTYPES
        assert skip <= {"compiled"}
        assert known[name]
        assert len(set(shapes)) == len(shapes)
    assert len({(x[0], x[1], shape) for x in gpu.PLAN for shape in x[2]}) == sum(
        len(x[2]) for x in gpu.PLAN
    )


# ---- the command ---------------------------------------------------------------------------------


def test_checks_then_speed_then_a_summary(machine, tmp_path, capsys):
    assert main(["gpu", "--out", str(tmp_path)]) == 1  # for the failing check alone
    shown = capsys.readouterr().out
    assert "FAILED  b: RuntimeError: out of its mind\n" in shown
    assert "2 of 3 checks passed" in shown
    assert shown.splitlines()[-1].startswith("summary: 2 of 3 checks passed, ")
    assert [x["passed"] for x in lines(tmp_path / "checks.jsonl")] == [True, False, True]
    results = record.read(tmp_path / "results.jsonl")
    assert {x.case for x in results} == {"rkdo_loss", "depth"}
    assert {x.device for x in results} == {"NVIDIA H200"}
    found = {x.contender: x for x in results if x.case == "rkdo_loss" and x.n == 32}
    assert set(found) == {"eager", "chunked", "ours", "eager, graph", "ours, graph"}
    for name, x in found.items():
        assert x.status == "ok", x
        assert x.driver == "580"
        assert 0 < x.p20 <= x.p50 <= x.p80
        assert x.wall > 0
        assert x.peak_bytes == (None if "graph" in name else 2000)
        assert x.floor == pytest.approx(32 * 32 * 3 / (132 * 16 * 1.755e9))
    assert (tmp_path / "results-rkdo_loss-d8-bf16.png").exists()


def test_all_well_is_0(machine, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_checks, "run", lambda: (x for x in [passing()]))
    assert main(["gpu", "--out", str(tmp_path)]) == 0


def test_what_breaks_off_does_not_stop_the_rest(machine, tmp_path, capsys, monkeypatch):
    def broken(n, d, dtype, device):
        if n == 32:
            raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore")
        return cases.two_views(n, d, dtype, "cpu")

    monkeypatch.setattr(gpu, "CASES", [cases.replace(x, inputs=broken) for x in cases.CASES])
    monkeypatch.setattr(gpu_checks, "run", failing)
    assert main(["gpu", "--out", str(tmp_path)]) == 1
    shown = capsys.readouterr().out
    assert "checks broke off: RuntimeError: out of its mind\n" in shown
    assert "speed broke off: RuntimeError: CUDA error: an illegal memory access" in shown
    assert "2 parts broken off" in shown.splitlines()[-1]
    kept = record.read(tmp_path / "results.jsonl")
    assert {x.n for x in kept} == {16}
    assert f"{len(kept)} results" in shown.splitlines()[-1]


def test_time_that_runs_out_ends_both_parts(machine, tmp_path, capsys):
    assert main(["gpu", "--out", str(tmp_path), "--minutes", "0"]) == 0
    shown = capsys.readouterr()
    assert "out of time for checks" in shown.out
    assert "out of time: the rest is not measured" in shown.err
    assert "summary: 1 of 1 checks passed, 0 results" in shown.out


def test_ctrl_c_still_sums_up(machine, tmp_path, capsys, monkeypatch):
    def stop():
        yield passing()
        raise KeyboardInterrupt

    monkeypatch.setattr(gpu_checks, "run", stop)
    assert main(["gpu", "--out", str(tmp_path)]) == 130
    assert "summary: 1 of 1 checks passed, 0 results" in capsys.readouterr().out


def test_what_a_gpu_run_needs_is_said_in_one_line(machine, tmp_path, capsys, monkeypatch):
    (tmp_path / "checks.jsonl").touch()
    assert "exists already" in complaint(capsys, ["gpu", "--out", tmp_path])
    assert "cannot be a folder" in complaint(capsys, ["gpu", "--out", tmp_path / "checks.jsonl"])
    monkeypatch.setattr(launch, "triton_status", lambda: "interpreted")
    assert "Triton is interpreted" in complaint(capsys, ["gpu", "--out", tmp_path / "new"])
    assert not (tmp_path / "new").exists()


def test_out_of_memory_while_memory_is_measured_is_a_result(machine, monkeypatch):
    def starved(step):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(memory, "on_gpu", starved)
    found = list(
        measure.measure(session.only(gpu.CASES[0], ["ours"]), 16, 8, "fp32", "cuda", EFFORT, {})
    )
    assert [(x.status, x.p50) for x in found] == [("oom", None)]


# ---- the checks ----------------------------------------------------------------------------------


def test_the_checks_pass_on_a_cpu(machine, monkeypatch):
    """Every kind of check, on the tiles: the code that judges the kernels is itself in order."""
    monkeypatch.setattr(launch, "triton_status", lambda: "missing")
    monkeypatch.setattr(gpu_checks, "BEYOND", 70)
    monkeypatch.setattr(gpu_checks, "RERUNS", 2)
    monkeypatch.setattr(gpu_checks, "SHAPES", ((1, 1, "bf16"), (3, 31, "fp16"), (33, 20, "fp32")))
    monkeypatch.setattr(gpu_checks, "two_views", fewer_rows)
    monkeypatch.setattr(gpu_timing, "replayed", recomputed)
    for label, check in gpu_checks.plan():
        if not label.startswith("offsets"):  # gigabytes
            answer = gpu_checks.guarded(label, check)
            assert answer.passed, answer
            assert answer.name == label


def fewer_rows(n, *rest, **others):
    return cases.two_views(min(n, 70), *rest, **others)


def recomputed(step):
    """As a graph's replay: into the same tensors."""
    kept = step()

    def replay():
        for old, new in zip(kept, step(), strict=True):
            old.copy_(new)

    replay.kept = kept
    return replay


def test_rows_far_apart_are_far_apart(machine, monkeypatch):
    contender = gpu_checks.paths()["rkdo, moments"]
    seen = []

    def look(loss, inputs):
        keys = inputs["keys"]
        seen.append((keys.stride(), (len(keys) - 1) * keys.stride(0)))
        raise MemoryError

    monkeypatch.setattr(gpu_checks.accuracy, "evaluate", look)
    answer = gpu_checks.guarded("far", lambda: gpu_checks.far_apart("far", contender))
    assert not answer.passed
    assert seen[0][0] == (1 << 20, 1)
    assert seen[0][1] > 1 << 31


def test_a_wrong_graph_and_a_wrong_rerun_are_noticed(machine, monkeypatch):
    contender = gpu_checks.paths()["info_nce"]
    answer = gpu_checks.in_a_graph("graph", contender)  # the stand-in replays nothing
    assert (answer.passed, answer.detail) == (False, "differs from the call without")
    calls = []

    def unsteady(queries, keys):
        calls.append(1)
        return (queries * keys).sum() * len(calls)

    monkeypatch.setattr(gpu_checks, "RERUNS", 3)
    other = gpu_checks.Contender("unsteady", lambda n, device: unsteady, contender.rows)
    assert not gpu_checks.bitwise("bitwise", other).passed


@pytest.mark.parametrize("wrong", ["step", "stored"])
def test_a_wrong_update_of_the_field_is_noticed(machine, monkeypatch, wrong):
    assert gpu_checks.updated("field", torch.bfloat16, 40).passed
    if wrong == "step":  # a step that forgets a part of alpha
        inner = ResponseField.step

        def step(self, *views, alpha, **others):
            return inner(self, *views, alpha=0.9 * alpha, **others)

        monkeypatch.setattr(ResponseField, "step", step)
    else:  # rounded to the nearest, always down where alpha is small
        rows = ResponseField.rows
        monkeypatch.setattr(ResponseField, "rows", lambda self, index: 0.99 * rows(self, index))
    assert not gpu_checks.updated("field", torch.bfloat16, 40).passed


def crash():
    os.kill(os.getpid(), 9)


def hang():
    time.sleep(60)


def illegal():
    raise RuntimeError("CUDA error: an illegal memory access was encountered")


def test_a_check_that_takes_its_process_along_costs_only_itself(monkeypatch):
    plan = [
        ("first", passing), ("illegal", illegal), ("second", passing), ("crash", crash),
        ("hang", hang), ("third", passing), ("wrong", failing), ("fourth", passing),
    ]  # fmt: skip
    monkeypatch.setattr(gpu_checks, "START", "fork")
    monkeypatch.setattr(gpu_checks, "DEVICE", "cpu")
    monkeypatch.setattr(gpu_checks, "plan", lambda: plan)
    started = []
    monkeypatch.setattr(gpu_checks, "broken", lambda: started.append(1) or len(started) == 1)
    answers = list(gpu_checks.run(wait=6))
    assert [x.passed for x in answers] == [True, False, True, False, False, True, False, True]
    assert [x.detail for x in answers if not x.passed] == [
        "RuntimeError: CUDA error: an illegal memory access was encountered",
        "its process died",
        "no answer in 6 s",
        "RuntimeError: out of its mind",
    ]
