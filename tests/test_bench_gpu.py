"""`python -m bench gpu` without a GPU: the whole command on a stand-in, whole and broken."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from bench_results import complaint
from stand_in import FIRST, execute, found_in

from bench import record
from bench.errors import BenchError
from bench.gpu import clocks, command, plan, runner
from bench.gpu.outcome import FAILED, LEFT_OUT, NOT_APPLICABLE, PASSED, Setup
from rkdo_kernels import launch

ROOT = Path(__file__).parent.parent
PLAIN = {  # nothing that is set for the tests alone
    k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "PYTEST_CURRENT_TEST")
}


def rehearsal(folder):
    command = [sys.executable, "-m", "bench", "gpu", "--rehearse", "--out", str(folder)]
    return subprocess.Popen(
        command, cwd=ROOT, env=PLAIN, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored under "make &"
    )  # fmt: skip


def test_the_rehearsal_runs_every_step(tmp_path):
    out, err = (process := rehearsal(tmp_path)).communicate(timeout=500)
    assert process.returncode == 0, out + err
    found = found_in(tmp_path)
    assert set(found) == {x.name for x in plan.every(rehearsal=True)}
    bad = [x for x in found.values() if x.verdict not in (PASSED, NOT_APPLICABLE)]
    assert not bad
    why = {x.detail for x in found.values() if x.verdict == NOT_APPLICABLE}
    assert why <= {"one GPU", "compute-sanitizer is not installed"}
    assert {x.stage for x in found.values()} == set(plan.STAGES)
    assert all(x.rehearsal for x in found.values())
    results = [json.loads(x) for x in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert {"ours", "ours, graph", "eager", "chunked"} <= {x["contender"] for x in results}
    for x in results:
        assert x["status"] in ("ok", "unavailable"), x
        assert x["status"] != "ok" or (x["floor"] > 0 and x["wall"] > 0 and x["p50"] > 0)
    summary = (tmp_path / "summary.md").read_text()
    assert "complete" in summary
    for part in ("Rates", "Checks", "Not applicable", "Kernels", "Speed", "Verdicts"):
        assert f"\n## {part}\n" in summary
    last = out.splitlines()[-1]
    assert last.startswith("summary: ")
    assert "REHEARSAL" in last


def test_a_rehearsal_is_no_result(tmp_path, capsys):
    line = {"case": "rkdo_loss", "contender": "ours", "n": 64, "d": 64, "dtype": "bf16"}
    line |= {"status": "ok", "p50": 1e-6, "schema": 1, "rehearsal": True}
    (tmp_path / "gpu-x.jsonl").write_text(json.dumps(line) + "\n")
    with pytest.raises(BenchError, match="is of a rehearsal: it is no result"):
        record.read(tmp_path / "gpu-x.jsonl")
    assert "is of a rehearsal" in complaint(capsys, ["plot", tmp_path / "gpu-x.jsonl"])


def test_faults_cost_one_check_each(tmp_path, monkeypatch):
    faults = dict.fromkeys(FIRST, "")
    faults |= zip(sorted(FIRST), ("crash", "hang", "error", "wrong", "broken"), strict=False)
    faults["2 reruns bitwise: rkdo, moments, bf16, 33×64"] = "unsteady"
    hanging = next(k for k, v in faults.items() if v == "hang")
    every = plan.every

    def impatient(rehearsal):
        limits = {hanging: 5.0}
        return [plan.replace(x, limit=limits.get(x.name, 200)) for x in every(rehearsal)]

    monkeypatch.setattr(plan, "every", impatient)
    status, found = execute(tmp_path, faults=faults)
    assert status == 1
    assert set(found) == FIRST
    details = {
        "crash": "its process died: ", "hang": "no answer in 5 s", "error": "RuntimeError: CUDA",
        "wrong": "", "broken": "RuntimeError: CUDA error: the device is lost", "unsteady": "",
    }  # fmt: skip
    for name, x in found.items():
        if fault := faults[name]:
            assert x.verdict == FAILED, (fault, x)
            assert x.detail.startswith(details[fault]), (fault, x)
        else:
            assert x.verdict == (NOT_APPLICABLE if "second GPU" in name else PASSED), x
    assert "correctness: every check passes: " in (tmp_path / "summary.md").read_text()


def test_a_lost_device_ends_the_run(tmp_path, capsys):
    name = "CUDA graph: rkdo, moments, fp32, 17×64"
    status, found = execute(tmp_path / "out", faults={name: "lost"}, gone=str(tmp_path / "gone"))
    assert status == 1
    assert found[name].verdict == FAILED
    left = [x for x in found.values() if x.verdict == LEFT_OUT]
    assert len(left) >= 5
    assert all(x.detail.startswith("the device is lost: RuntimeError: CUDA error") for x in left)
    assert set(found) == FIRST
    assert "the device is lost: " in (tmp_path / "out" / "summary.md").read_text()
    assert "the device is lost: " in capsys.readouterr().out


def test_two_gpus(tmp_path):
    name = "second GPU: rkdo, moments, bf16, 33×64"
    status, found = execute(tmp_path / "two", {name}, gpus=2)
    assert (status, found[name].verdict) == (0, PASSED)
    status, found = execute(tmp_path / "one", {name})
    assert (status, found[name].verdict, found[name].detail) == (0, NOT_APPLICABLE, "one GPU")
    assert "one GPU: second GPU" in (tmp_path / "one" / "summary.md").read_text()


def test_a_full_disk_ends_nothing(tmp_path, capsys, monkeypatch):
    class FullDisk(command.Journal):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            self.checks = open("/dev/full", "w")  # noqa: SIM115
            self.writer.file = open("/dev/full", "w")  # noqa: SIM115

    monkeypatch.setattr(command, "Journal", FullDisk)
    names = {"rate: memory", "speed: depth, bf16, 16×64"}
    settings = command.Settings(
        tmp_path, setup=Setup(rehearsal=True), only=lambda check: check.name in names
    )
    assert command.execute(settings) == 1
    shown = capsys.readouterr()
    assert shown.err.count("checks.jsonl cannot be written: No space left on device") == 1
    assert shown.err.count("results.jsonl cannot be written: No space left on device") == 1
    assert "summary: 2 of 2 checks passed" in shown.out
    assert "ours depth 8" in (tmp_path / "summary.md").read_text()


def test_ctrl_c_leaves_what_there_is(tmp_path):
    process = rehearsal(tmp_path)
    deadline = time.monotonic() + 200
    while not (tmp_path / "summary.md").exists():  # from the first check on
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.05)
    assert "under way" in (tmp_path / "summary.md").read_text()
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, out + err
    assert "Traceback" not in err
    assert found_in(tmp_path)
    assert "interrupted" in (tmp_path / "summary.md").read_text()
    assert "interrupted" in out.splitlines()[-1]


# ---- time ----------------------------------------------------------------------------------------


def checks_of(stage, count=3):
    return [x for x in plan.every(rehearsal=True) if x.stage == stage][:count]


def test_a_check_that_would_pass_its_stages_end_is_left_out():
    process = runner.Runner(Setup(rehearsal=True), clocks.Watch(None), time.monotonic() + 600)
    found = list(process.stage(checks_of("correctness"), time.monotonic()))
    assert [x.verdict for x in found] == [LEFT_OUT] * 3
    assert {x.detail for x in found} == {"no time left for its stage"}


def test_what_hangs_is_broken_off_when_the_time_is_over():
    checks = checks_of("correctness", 1)
    setup = Setup(rehearsal=True, faults={checks[0].name: "hang"})
    process = runner.Runner(setup, clocks.Watch(None), time.monotonic() - runner.GRACE + 1)
    (found,) = process.stage(checks, time.monotonic() + 600)
    assert (found.verdict, found.detail) == (LEFT_OUT, "broken off: the time is over")
    assert not process.lanes


def test_too_little_time_runs_the_rates_alone(tmp_path, monkeypatch):
    """By the plan: a clock that is an hour fast lets a slow machine end what was chosen."""
    fast = SimpleNamespace(monotonic=lambda: time.monotonic() + 3600)
    monkeypatch.setattr(command, "time", fast)
    names = {"rate: memory", "CUDA graph: rkdo, moments, fp32, 17×64"}
    status, found = execute(tmp_path, names, minutes=0.2)
    assert status == 1  # a rehearsal is to run everything
    assert {x: y.verdict for x, y in found.items()} == dict(
        zip(sorted(names), (LEFT_OUT, PASSED), strict=True)
    )
    assert "does not fit into 0.2 minutes" in (tmp_path / "summary.md").read_text()


# ---- the command line ----------------------------------------------------------------------------


def test_what_a_run_needs_is_said_in_one_line(tmp_path, capsys, monkeypatch):
    out = ["gpu", "--rehearse", "--out"]
    (tmp_path / "checks.jsonl").touch()
    assert "exists already" in complaint(capsys, [*out, tmp_path])
    assert "cannot be a folder" in complaint(capsys, [*out, tmp_path / "checks.jsonl"])
    new = tmp_path / "new"
    assert "--minutes: must be a number above 0, got 0" in complaint(
        capsys, [*out, new, "--minutes", "0"]
    )
    assert "invalid choice: 'luck'" in complaint(capsys, [*out, new, "--only", "luck"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no GPU" in complaint(capsys, ["gpu", "--out", new])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(launch, "triton_status", lambda: "interpreted")
    assert "Triton is interpreted" in complaint(capsys, ["gpu", "--out", new])
    assert not new.exists()
