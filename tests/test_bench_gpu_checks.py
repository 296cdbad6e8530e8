"""What the checks of `bench gpu` notice, on a CPU's tensors."""

import itertools
import os
import sys
from dataclasses import replace

import pytest
import torch

from bench import fields, measure, static_table
from bench.gpu import (
    checks,
    device,
    sanitizer,
    shared_cases,
    situations,
    speed,
)
from bench.gpu.outcome import NotApplicable
from bench.gpu.sizes import FULL
from bench.gpu.stand_in import StandIn
from rkdo_kernels import ResponseField

PATH, N, D = "rkdo, moments", 33, 64


@pytest.fixture(autouse=True)
def stand_in(monkeypatch):
    found = StandIn(gpus=2)
    monkeypatch.setattr(device, "CURRENT", [found])
    return found


WAYS = {
    "accurate": lambda: checks.accurate(PATH, N, D, "bf16"),
    "every loss": lambda: checks.every_loss(("info_nce", "field, bf16"), N, D, "fp16"),
    "far apart": lambda: checks.far_apart("rkdo, direct", 21, 80),
    "snapshots": lambda: checks.snapshots(N, 60),
    "second GPU": lambda: situations.second_gpu(PATH, N, D, "bf16"),
    "compiled": lambda: situations.compiled_first(PATH, N, D, "bf16"),
    "emulator's case": lambda: shared_cases.emulator_case(shared_cases.emulated(1)[0][0]),
    "fuzzer's cases": lambda: shared_cases.fuzz_batch("0"),
    "poisoned": lambda: situations.poisoned(PATH, N, D, "bf16"),
}
BITS = {
    "bitwise": lambda: situations.bitwise(PATH, N, D, "bf16", 3),
    "stripes": lambda: situations.stripes("info_nce", N, D, 2),
    "graph": lambda: situations.in_a_graph(PATH, N, D, "fp32"),
    "side stream": lambda: situations.side_stream(PATH, N, D, 3),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_wrong_number_is_noticed(way, stand_in):
    assert WAYS[way]().passed
    stand_in.fault = "wrong"
    assert not WAYS[way]().passed


@pytest.mark.parametrize("way", BITS)
def test_other_bits_are_noticed(way, stand_in):
    assert BITS[way]().passed
    stand_in.fault = "unsteady"
    assert not BITS[way]().passed


def test_a_setting_that_is_left_changed_is_noticed(monkeypatch):
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_bf16_reduced_precision_reduction
    inner = situations.accuracy.evaluate

    def careless(*arguments):
        matmul.allow_bf16_reduced_precision_reduction = False
        return inner(*arguments)

    monkeypatch.setattr(situations.accuracy, "evaluate", careless)
    outcome = situations.stripes("info_nce", N, D, 2)
    assert not outcome.passed
    assert "a setting of PyTorch's is left changed" in outcome.detail
    assert matmul.allow_bf16_reduced_precision_reduction == before


def test_a_refused_launch_is_named_and_the_others_still_run(monkeypatch):
    def refused(*arguments):
        raise RuntimeError("out of resource: shared memory, Required: 248320\nmore")

    paths = checks.paths()
    paths["info_nce"] = replace(paths["info_nce"], make=lambda n, device: refused)
    monkeypatch.setattr(checks, "paths", lambda: paths)
    outcome = checks.every_loss(("info_nce", PATH), N, D, "bf16")
    assert not outcome.passed
    assert outcome.detail == (
        "info_nce: RuntimeError: out of resource: shared memory, Required: 248320"
    )


def test_a_current_gpu_that_changes_is_noticed(monkeypatch, stand_in):
    numbers = itertools.count()
    monkeypatch.setattr(stand_in, "current_index", lambda: next(numbers))
    outcome = situations.second_gpu(PATH, N, D, "bf16")
    assert (outcome.passed, outcome.detail) == (False, "GPU 2 is current, it was 0")


def test_a_plausible_number_for_a_row_past_the_bound_is_noticed(monkeypatch):
    assert checks.bad_row(PATH, N, D).passed
    paths = checks.paths()
    trusting = replace(paths[PATH], make=lambda n, device: lambda q, k: (q * k).sum())
    monkeypatch.setattr(checks, "paths", lambda: {PATH: trusting})
    assert not checks.bad_row(PATH, N, D).passed


def test_an_error_for_it_is_wrong_where_reading_waits(monkeypatch, stand_in):
    inner = checks.accuracy.evaluate

    def evaluate(*arguments):
        monkeypatch.setattr(stand_in, "place", lambda index=0: torch.device("cuda"))
        return inner(*arguments)

    monkeypatch.setattr(checks.accuracy, "evaluate", evaluate)
    assert not checks.bad_row(PATH, N, D).passed


def test_a_host_that_waits_is_noticed(monkeypatch):
    assert situations.no_waiting(PATH, N, D).passed
    paths = checks.paths()
    loss = paths[PATH].make(N, torch.device("cpu"))

    def waiting(queries, keys):
        value = loss(queries, keys)
        return value + 0 * value.item()

    slow = replace(paths[PATH], make=lambda n, device: waiting)
    monkeypatch.setattr(situations, "paths", lambda: {PATH: slow})
    with pytest.raises(RuntimeError, match="synchronizing"):
        situations.no_waiting(PATH, N, D)


def test_memory_that_is_read_unwritten_is_noticed(monkeypatch):
    paths = checks.paths()

    def careless(queries, keys):
        return (queries * keys).sum() + 0 * torch.empty(1).sum()

    wrong = replace(paths[PATH], make=lambda n, device: careless)
    monkeypatch.setattr(situations, "paths", lambda: {PATH: wrong})
    outcome = situations.poisoned(PATH, N, D, "fp32")
    assert not outcome.passed
    assert "nan" in outcome.detail
    assert not torch.are_deterministic_algorithms_enabled()


def test_n_squared_numbers_are_noticed(monkeypatch, stand_in):
    monkeypatch.setattr(StandIn, "rehearsal", False)
    assert situations.little_memory(PATH, 2000, 16).passed
    monkeypatch.setattr(stand_in, "peak", lambda step: 2 * 2000**2)
    assert not situations.little_memory(PATH, 2000, 16).passed


@pytest.mark.parametrize("wrong", ["step", "stored"])
def test_a_wrong_update_of_the_field_is_noticed(monkeypatch, wrong):
    assert checks.updated("bf16", 40).passed
    if wrong == "step":  # a step that forgets a part of alpha
        inner = ResponseField.step

        def step(self, *views, alpha, **others):
            return inner(self, *views, alpha=0.9 * alpha, **others)

        monkeypatch.setattr(ResponseField, "step", step)
    else:  # rounded to the nearest, always down where alpha is small
        rows = ResponseField.rows
        monkeypatch.setattr(ResponseField, "rows", lambda self, index: 0.99 * rows(self, index))
    assert not checks.updated("bf16", 40).passed


def test_rows_far_apart_are_far_apart(monkeypatch):
    seen = []

    def look(loss, inputs):
        keys = inputs["keys"]
        seen.append((keys.stride(), (len(keys) - 1) * keys.stride(0)))
        raise MemoryError

    monkeypatch.setattr(checks.accuracy, "evaluate", look)
    with pytest.raises(MemoryError):
        checks.far_apart(PATH, 9, 1 << 10)
    assert seen == [((1 << 10, 1), 8 << 10)]
    assert (FULL.apart_n - 1) * FULL.stride > 1 << 31
    assert FULL.beyond**2 > 1 << 31


def test_everything_is_checked():
    assert set(FULL.paths) == set(checks.paths())
    assert set(FULL.every) == set(checks.paths())
    assert {16, 33, 64, 128, 192, 256, 512} <= set(FULL.dims)
    assert FULL.reruns == 250
    assert set(FULL.predicted) == set(static_table.LOSSES)
    known = {x.name for x in speed.CASES}
    assert {x[1] for x in speed.PLAN} <= known
    assert all(x[2] in measure.DTYPES for x in speed.PLAN)
    assert set(FULL.profiled) <= known


# ---- the emulator's and the fuzzer's cases -------------------------------------------------------


def test_a_tensor_arrives_as_it_lies_and_its_gradient_comes_back():
    room = torch.arange(70.0)
    x = room[3:].as_strided((4, 5), (11, 2)).requires_grad_()
    y = shared_cases.moved(x, torch.device("cpu"))
    assert y.data_ptr() != x.data_ptr()
    assert (y.stride(), y.storage_offset()) == (x.stride(), 3)
    assert torch.equal(x, y)
    (y * y).sum().backward()
    assert torch.equal(x.grad, 2 * x)


def test_public_names_go_by_the_device_and_come_back(monkeypatch):
    import rkdo_kernels

    before = rkdo_kernels.info_nce
    with shared_cases.public_names(fields):
        assert rkdo_kernels.info_nce is not before
        views = checks.views(N, D, "fp32")
        value = rkdo_kernels.info_nce(**views, temperature=torch.tensor(0.2))
        assert torch.equal(value, before(**views, temperature=torch.tensor(0.2)))
        field = fields.ResponseField.dense(N)
        step = field.step(*views.values(), torch.arange(N), alpha=0.5, temperature=0.5)
        assert torch.isfinite(step)
        assert field.rows(slice(0, 2)).shape == (2, N)
    assert rkdo_kernels.info_nce is before
    assert fields.ResponseField is ResponseField


# ---- sanitizer -----------------------------------------------------------------------------------

TOOL = """#!/bin/sh
echo "========= COMPUTE-SANITIZER"
[ "$2" = memcheck ] && shift 4 && "$@" && echo "========= ERROR SUMMARY: 0 errors" && exit 0
[ "$2" = racecheck ] && echo "========= Race reported between Write access at _k and Read" && \
  echo "========= RACECHECK SUMMARY: 1 hazard displayed" && exit 86
exit 3
"""


def test_the_sanitizer_runs_a_call_and_its_findings_fail(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sanitizer.sysconfig, "get_paths", lambda: {"purelib": str(tmp_path)})
    with pytest.raises(NotApplicable, match="compute-sanitizer is not installed"):
        sanitizer.check("memcheck", "info_nce")
    tool = tmp_path / "nvidia" / "cu13" / "bin" / "compute-sanitizer"
    tool.parent.mkdir(parents=True)
    tool.write_text(TOOL)
    tool.chmod(0o755)
    assert sanitizer.installed() == str(tool)
    monkeypatch.setattr(sanitizer.sysconfig, "get_paths", lambda: {"purelib": "/nowhere"})
    monkeypatch.setenv("CUDA_HOME", str(tool.parent.parent))
    assert sanitizer.installed() == str(tool)
    monkeypatch.setenv("PATH", f"/usr/bin:/bin:{os.path.dirname(sys.executable)}")
    outcome = sanitizer.check("memcheck", "info_nce")
    assert (outcome.passed, outcome.detail) == (True, "ERROR SUMMARY: 0 errors")
    outcome = sanitizer.check("racecheck", "info_nce")
    assert not outcome.passed
    assert "1 hazard" in outcome.detail
    assert "Race reported between Write" in outcome.detail
    assert not sanitizer.check("synccheck", "info_nce").passed
