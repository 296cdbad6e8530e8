"""Compiled kernels, executed: every one of them, in a selection of calls; cache, judge, command.

Kernels are compiled in other processes: here Triton may be its interpreter.
"""

import ast
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
from bench.__main__ import main
from bench.call_list import every, label
from bench.compiled.execute import command, judge
from bench.compiled.execute.judge import Judged, Score

ROOT = Path(__file__).parent.parent
ELSEWHERE = ("rkdo, one launch, bf16", "rkdo direct in parts, bf16", "gathered: in parts, bf16")


def python(*arguments, **variables):
    """The process, without the interpreter that the session's tests run in."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **variables}
    return subprocess.run(
        [sys.executable, "-W", "ignore", *arguments], env=environment, cwd=ROOT,
        capture_output=True, text=True, timeout=900,
    )  # fmt: skip


def kernels():
    """Names of what is launched, as the source has them."""
    found = set()
    for path in (ROOT / "rkdo_kernels").glob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            decorated = isinstance(node, ast.FunctionDef) and node.decorator_list
            if decorated and ast.unparse(node.decorator_list[0]).startswith("triton.jit"):
                found |= {node.name} if node.name.startswith("_") else set()
    return found


def test_every_kernel_as_sm_90_has_it():
    done = python("-m", "bench", "execute", "--target", "sm_90", "--quick", "--jobs", "2")
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    count, calls = len(kernels()), sum(call.quick for call in every())
    assert f"sm_90: {count} of {count} kernels executed; {calls} of {calls} calls" in done.stdout


def test_some_kernels_as_sm_80_has_them():
    parts = [x for part in ELSEWHERE for x in ("--case", part)]
    done = python("-m", "bench", "execute", "--target", "sm_80", "--jobs", "2", *parts)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    calls = sum(any(part in label(call) for part in ELSEWHERE) for call in every())
    assert f"; {calls} of {calls} calls within the yardstick without a viol" in done.stdout
    assert calls >= len(ELSEWHERE)


def test_calls_that_have_missed():
    """G's largest entries, which tf32 cuts off, and a distance of 256 of bfloat16's squares."""
    parts = ("rkdo direct, fp16, 200×64", "icon student wide, bf16")
    done = python("-m", "bench", "execute", "--target", "sm_90", "--jobs", "2",
                  *(x for part in parts for x in ("--case", part)))  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert "2 of 2 calls within the yardstick" in done.stdout


LAUNCHED = """
from bench.call_list import every
from bench.compiled.launches import kernel_names, launches_for

for target in ("sm_90", "sm_80"):
    for calls in (every(), [call for call in every() if call.quick]):
        names = set()
        with launches_for(target, lambda launch: names.add(launch.name)):
            for call in calls:
                call.ours()
        print(*sorted(names))
print(*sorted(kernel_names()))
"""


def test_no_kernel_is_launched_by_no_call():
    """Whether a new one is executed, nightly and here."""
    done = python("-c", LAUNCHED)
    assert done.returncode == 0, done.stderr[-2000:]
    for line in done.stdout.splitlines():
        assert set(line.split()) == kernels()


# ---- what is reported ----------------------------------------------------------------------------


WITHOUT_BARRIERS = """
import sys
from dataclasses import replace
from bench.call_list import every, label
from bench.compiled.execute import capture, judge
from bench.compiled.execute.compile import default_cache, program

def changed(launch, target, cache):
    found = program(launch, target, cache)
    return replace(found, ptx=found.ptx.replace(*sys.argv[1:]))

capture.program = changed
call = next(x for x in every() if label(x).startswith("rkdo, one launch, bf16"))
found = judge.judge(call, "sm_90", "it", default_cache())
print(found.passed, len(found.violations) > 0, all(x.passed for x in found.scores.values()))
"""


@pytest.mark.parametrize(
    ("change", "seen"),
    [
        (("bar.sync", "bar.sync"), "True False True"),
        (("bar.sync \t0;", ""), "False True"),
        (("ex2.approx.ftz.f32", "neg.ftz.f32"), "False (True|False) False"),
    ],
    ids=["nothing", "barriers", "exponentials"],
)
def test_wrong_code_is_seen(change, seen):
    done = python("-c", WITHOUT_BARRIERS, *change)
    assert re.match(seen, done.stdout), done.stdout + done.stderr[-2000:]


def call_of(start):
    return next(x for x in every() if label(x).startswith(start))


@pytest.mark.parametrize(
    "start", ["info_nce, bf16", "moments learnable", "field of bf16, gathered"]
)
def test_the_yardstick_refuses_what_is_a_little_off(start):
    call = call_of(start)
    right = call.eager(torch.float32)
    if call.dtype == "bf16":
        right |= {k: right[k].to(torch.bfloat16) for k in ("queries", "keys")}
    assert all(score.passed for score in judge.scored(call, right).values())
    for name in right:
        scores = judge.scored(call, right)
        off = 1.5 * scores[name].allowed * float(right[name].abs().max())
        for error in (off, float("nan")):
            wrong = right[name].clone().double()
            wrong.view(-1)[0] += error
            outcome = right | {name: wrong.to(right[name].dtype)}
            found = judge.scored(call, outcome)
            assert [k for k, v in found.items() if not v.passed] == [name]
    with pytest.raises(ValueError, match="results are"):
        judge.scored(call, {"value": right.popitem()[1]})


def test_what_is_wrong_is_told():
    fine = Judged("rkdo, fp32, 2×3", "sm_90", ("_a", "_a", "_b"), {"value": Score(1e-8, 1e-7)})
    assert fine.passed
    assert command.line(fine)[-2:] == ("ok", "_a×2 _b")
    missed = replace(fine, scores={"value": Score(2e-7, 1e-7), "keys": Score(float("nan"), 1e-7)})
    violated = replace(fine, violations=("a race",) * 6)
    failed = replace(fine, scores={}, failure="ValueError: no")
    empty = replace(fine, scores={})
    assert not any(x.passed for x in (missed, violated, failed, empty))
    assert command.line(missed)[-2] == "value misses; keys misses"
    assert command.line(violated)[-2] == "6 violated"
    assert command.troubles(violated)[-1].endswith("and 2 more")
    assert command.troubles(failed) == ["sm_90, rkdo, fp32, 2×3: ValueError: no"]
    found = command.summary("sm_90", [fine, missed, violated], {"_a", "_b", "_c"})
    assert found.startswith("sm_90: 2 of 3 kernels executed (not _c); 1 of 3 calls")
    assert command.unseen("sm_80", [fine], {"_a"}) == {"_a"}


def at_work(target, label, cache):
    if label == "dies":
        os._exit(3)
    return Judged(label, target, ("_a",), {"value": Score(0.0, 1.0)})


def test_a_process_that_dies_costs_one_call(tmp_path):
    tasks = [("sm_90", name, tmp_path) for name in ("one", "dies", "two", "three")]
    found = {x.call: x for x in command.execute_all(tasks, 2, at_work)}
    assert set(found) == {"one", "dies", "two", "three"}
    assert [name for name, x in found.items() if not x.passed] == ["dies"]
    assert found["dies"].failure == command.DIED


# ---- programs are kept by what they follow from --------------------------------------------------


KEYS = """
import importlib, pathlib, sys
from dataclasses import replace
import torch
from bench.compiled.execute import compile
from bench.compiled.launches import Catcher

folder = pathlib.Path(sys.argv[1])
sys.path.insert(0, str(folder))

SOURCE = '''
import triton
import triton.language as tl
FACTOR = tl.constexpr(3)

@triton.jit
def helper(x):
    return x * {number}

@triton.jit
def _kernel(x_ptr, n, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    x = helper(tl.load(x_ptr + at, mask=at < n))
    tl.store(x_ptr + at, x{end}, mask=at < n)
'''

def launched(name, number="2.0", end="", x=torch.ones(40), n=33, size=64, **options):
    (folder / f"{name}.py").write_text(SOURCE.format(number=number, end=end))
    importlib.invalidate_caches()
    got = []
    Catcher(importlib.import_module(name)._kernel, got.append)[(1,)](x, n, SIZE=size, **options)
    return got[0]

def key(launch, target="sm_90"):
    return compile.key(launch, target)

here = key(launched("a", num_warps=4))
assert key(launched("a", num_warps=4)) == here
others = {
    "of a callee": launched("b", number="2.5", num_warps=4),
    "of its own": launched("c", end=" + FACTOR", num_warps=4),
    "dtype": launched("a", x=torch.ones(40, dtype=torch.bfloat16), num_warps=4),
    "divisible": launched("a", n=48, num_warps=4),
    "alignment": launched("a", x=torch.ones(41)[1:], num_warps=4),
    "constant": launched("a", size=128, num_warps=4),
    "one": launched("a", n=1, num_warps=4),
    "option": launched("a", num_warps=8),
}
keys = {name: key(launch) for name, launch in others.items()}
keys["target"] = key(launched("a", num_warps=4), "sm_80")
keys["here"] = here
assert len(set(keys.values())) == len(keys), keys
compile.triton.__version__ += "0"
assert key(launched("a", num_warps=4)) != here

launch, cache = launched("a", num_warps=4), folder / "cache"
first = compile.program(launch, "sm_90", cache)
compile.compiled = None  # nobody compiles any more
assert compile.program(launch, "sm_90", cache) == first
assert ".target sm_90" in first.ptx and first.warps == 4
assert len(list(cache.iterdir())) == 1
print("fine")
"""


def test_programs_are_kept_by_all_that_they_follow_from(tmp_path):
    done = python("-c", KEYS, str(tmp_path))
    assert done.stdout == "fine\n", done.stderr[-2000:]


# ---- the command ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--target", "sm_70"], "unknown target 'sm_70': sm_90, sm_80"),
        (["--target", "gfx942"], "unknown target 'gfx942'"),
        (["--jobs", "0"], "--jobs must be at least 1, got 0"),
        (["--faults", "-1"], "--faults must be at least 0, got -1"),
        (["--kernels"], "ambiguous|unrecognized"),
        ([], "TRITON_INTERPRET=1 is set: there is nothing to compile"),
    ],
)
def test_bad_arguments_are_named(arguments, said, capsys, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert main(["execute", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("bench: ")
    assert error.count("\n") == 1
    assert any(part in error for part in said.split("|"))


def test_names_that_no_call_has():
    done = python("-m", "bench", "execute", "--kernel", "moments")
    assert done.returncode == 2
    assert done.stderr.startswith("bench: unknown kernel 'moments': _add_means, ")
    done = python("-m", "bench", "execute", "--case", "logsumexp", "--kernel", "_add_parts")
    assert done.returncode == 2
    assert "no call of these names launches these kernels" in done.stderr


def test_labels_are_unique():
    labels = [label(call) for call in every()]
    assert len(set(labels)) == len(labels)
