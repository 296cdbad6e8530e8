"""What the machine code must be like, and that the gates see a kernel that is not like that.

Everything is compiled in other processes: here Triton may be its interpreter.
"""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench import sass

pytest.importorskip("triton")
ROOT = Path(__file__).parent.parent

GATES = """
import dataclasses, json
from bench import gates, static
from bench.static_table import compile_all

def wanted():
    for case in static.cases():
        for dtype in ("bf16", "fp32"):
            if dtype in case.dtypes:
                yield static.Entry(case.name, dtype, case.dims[0], "sm_90")
    others = [x for x in static.cases() if x.name.startswith(("moments", "single", "gradient"))]
    for k, case in enumerate(others):
        for target in ("sm_80", "sm_100", "gfx942", "sm_80")[k % 3 : k % 3 + 2]:  # two of three
            yield static.Entry(case.name, "bf16", case.dims[0], target)
    for target in ("sm_80", "sm_90", "sm_100", "gfx942"):
        for dim in (16, 512):
            yield static.Entry("single_launch k=4", "fp32", dim, target)
    for name in ("softmax_sums", "softmax_sums_bwd dk", "recursion_bwd dq", "recursion_bwd dk"):
        yield static.Entry(name, "fp32", 64, "sm_80")
        yield static.Entry(name, "fp16", 512, "sm_90")
        yield static.Entry(name, "fp32", 512, "sm_100")
        yield static.Entry(name, "bf16", 512, "gfx942")
    for variant in static.VARIANTS[1:]:
        yield static.Entry("moments_fwd k=4", "bf16", 64, "sm_90", variant)
        yield static.Entry("recursion_bwd dq", "bf16", 64, "sm_90", variant)

if __name__ == "__main__":
    results = {}
    for entry, found in compile_all(wanted(), 2):
        name = " ".join(map(str, dataclasses.astuple(entry)))
        results[name] = {"compile": found} if isinstance(found, str) else gates.failures(found)
    print(json.dumps(results))
"""

TAMPERED = """
import dataclasses, importlib.util, json, pathlib, re, sys
from bench import gates, static
from rkdo_kernels import launch, moments

case = next(x for x in static.cases() if x.name == "moments_fwd k=4")
failures = lambda *a, **k: gates.failures(static.compile_case(*a, **k))
results = {"untouched": failures(case, "bf16", 64, "sm_90")}

source = pathlib.Path(moments.__file__).read_text().replace("from .", "from rkdo_kernels.")
source = source.replace("from rkdo_kernels. import", "from rkdo_kernels import")
path = pathlib.Path(sys.argv[1]) / "tampered.py"
path.write_text(re.sub(r"tl\\.store\\(", "tl.atomic_add(", source))
spec = importlib.util.spec_from_file_location("tampered", path)
module = importlib.util.module_from_spec(spec)
sys.modules["tampered"] = module  # where dataclasses look
spec.loader.exec_module(module)
atomic = dataclasses.replace(case, function=module._moments_fwd)
results["atomic"] = failures(atomic, "bf16", 64, "sm_90")
results["atomic, AMD"] = failures(atomic, "bf16", 64, "gfx942")

results["spills"] = failures(case, "bf16", 64, "sm_90", config=launch.Config(256, 128, 4, 2))
results["too much shared memory"] = failures(
    case, "bf16", 512, "sm_90", config=launch.Config(128, 128, 8, 7)
)

specialise = static.specialise
def without_divisibility(*arguments):
    source = specialise(*arguments)
    source.attrs.clear()
    return source
static.specialise = without_divisibility
results["no divisibility"] = failures(case, "bf16", 64, "sm_90")
results["no divisibility, AMD"] = failures(case, "bf16", 64, "gfx942")
static.specialise = specialise

dims_for = launch.dims_for
launch.dims_for = lambda *a, **k: {**dims_for(*a, **k), "PRECISION": "tf32"}
tile_of = static.tile_of
static.tile_of = lambda constants, *a: tile_of({**constants, "PRECISION": "tf32x3"}, *a)
results["one pass of tf32"] = failures(case, "fp32", 64, "sm_90")
launch.dims_for, static.tile_of = dims_for, tile_of
print(json.dumps(results))
"""

LAUNCHES = """
import dataclasses, json
import torch
from bench import static
from rkdo_kernels import gradient_stripes, kernels, levels, moments, moments_gradient, ops
from rkdo_kernels import recursion, single_launch, small, softmax_sums, symmetric
from rkdo_kernels.losses import icon_loss, info_nce, rkdo_loss

seen = {}

class Recorder:
    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        def launch(*arguments, **constants):
            names = self.kernel.arg_names
            seen[self.kernel.fn.__name__] = {
                name: str(x.dtype) for name, x in zip(names, arguments) if hasattr(x, "dtype")
            }
        return launch

for module in (
    gradient_stripes, levels, moments, moments_gradient, recursion, single_launch, softmax_sums,
    symmetric,
):
    for name in list(vars(module)):
        if name.startswith("_") and hasattr(getattr(module, name), "arg_names"):
            setattr(module, name, Recorder(getattr(module, name)))

cases = {}
for case in static.cases():
    kernel = case.function.kernel
    constants = {x: 1 for x in kernel.arg_names if x.isupper()}
    plain = dataclasses.replace(case, function=kernel)
    signature = static.specialise(plain, "bf16", constants, "aligned").signature
    cases[kernel.fn.__name__] = {k: v for k, v in signature.items() if v.startswith("*")}

ops.implementation = lambda backend: kernels
row_mean = ops.row_mean
ops.row_mean = lambda sums, count, x, _, *more: row_mean(sums, count, x, "triton", *more)
small.MAX_ENTRIES = 0
x = torch.nn.functional.normalize(torch.randn(8, 64), dim=1).bfloat16()
for loss in (
    lambda q, k: icon_loss(q, k, kernel="student"), lambda q, k: rkdo_loss(q, k),
    lambda q, k: rkdo_loss(q, k, bound=None), lambda q, k: info_nce(q, k, symmetric=True),
    lambda q, k: info_nce(q, k, bound=None),
    lambda q, k: rkdo_loss(q, k, reduction="none").sum(),
    lambda q, k: rkdo_loss(q.repeat(1, 4), k.repeat(1, 4), bound=4.2, reduction="none").sum(),
):
    q, k = x.clone().requires_grad_(), x.clone().requires_grad_()
    loss(q, k).backward()
print(json.dumps([cases, seen]))
"""


def run(script, *arguments, folder):
    """What the script prints last, with Triton's compiler and a cache of its own."""
    path = folder / "script.py"
    path.write_text(script)
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(folder / "cache"), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, str(path), *map(str, arguments)],
        env=environment, cwd=ROOT, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_kernels_pass_the_gates(tmp_path):
    results = run(GATES, folder=tmp_path)
    assert len(results) > 50
    assert {name: found for name, found in results.items() if found} == {}


def test_gates_see_tampering(tmp_path):
    results = run(TAMPERED, tmp_path, folder=tmp_path)
    gates = {
        "atomic": "atomics",
        "atomic, AMD": "atomics",
        "spills": "spills",
        "too much shared memory": "fits",
        "no divisibility": "16-byte loads",
        "no divisibility, AMD": "16-byte loads",
        "one pass of tf32": "passes",
    }
    assert results.pop("untouched") == {}
    assert set(results) == set(gates)
    assert {name: found for name, found in results.items() if gates[name] not in found} == {}


def test_signatures_are_those_of_the_launchers(tmp_path):
    """Static analysis compiles what a call would: every pointer's type, float64 tables too."""
    analysed, launched = run(LAUNCHES, folder=tmp_path)
    types = {"*bf16": "torch.bfloat16", "*fp32": "torch.float32", "*fp64": "torch.float64"}
    assert set(launched) == set(analysed) | {"_add_means", "_add_shares", "_column_sums"}
    for kernel in analysed:
        arguments = launched[kernel]
        read = {k: types[v] for k, v in analysed[kernel].items() if "square" not in k}
        assert {k: v for k, v in arguments.items() if "square" not in k} == read, kernel


# ---- reading machine code ------------------------------------------------------------------------

TILE = sass.Tile(
    own=64, other=64, threads=128, wave=32, similarity=sass.Product(64, 1, 2), gradient=None,
    chunks=1,
)  # fmt: skip


def sass_text(lines):
    return "\n".join(f"  /*{16 * i:04x}*/   {line} ;" for i, line in enumerate(lines))


def test_the_hot_loop_of_sass():
    """A prologue, a loop with a mask that interior tiles skip, a guarded load that they do not."""
    lines = [
        "LDC R1, c[0x0][0x28]",
        "@!P0 BRA 0xd0",
        "HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], RZ, !UPT",  # 2: the loop
        *["HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24"] * 3,
        "MUFU.EX2 R20, R20",
        "@P1 BRA 0xa0",
        "FSEL R84, R84, RZ, !P6",
        "FSEL R85, R85, RZ, !P6",
        "@P2 BRA 0xc0",  # 10
        "LDG.E.128 R4, desc[UR14][R2.64]",
        "@!P0 BRA 0x20",
        "EXIT",
        "BRA 0xe0",
    ]
    loop = sass.hot_loop(sass.parse_sass(sass_text(lines)), TILE)
    share = 128 / 64**2
    assert loop.slots == 9 * share
    assert loop.special == share
    assert loop.matrix == 4 * share
    assert loop.loads == {16: share}
    assert loop.kinds == ("wgmma",)
    assert loop.multiply_adds == 1


def test_a_rare_path_that_jumps_back_is_no_loop():
    lines = [
        "@P0 BRA 0x80",
        "HMMA.16816.F32.BF16 R96, R96, R60, RZ",  # 1: where the rare path comes back
        "FADD R1, R1, R2",
        "HMMA.16816.F32.BF16 R96, R96, R60, RZ",  # 3: the loop
        "FADD R1, R1, R2",
        "FADD R1, R1, R2",
        "@P1 BRA 0x30",
        "EXIT",
        "NANOSLEEP 0x64",
        "BRA 0x10",
    ]
    loop = sass.hot_loop(sass.parse_sass(sass_text(lines)), TILE)
    assert loop.slots == 4 * 128 / 64**2
    assert loop.kinds == ("mma",)


def test_a_loop_may_be_left_by_a_call_that_does_not_return():
    lines = [
        "HMMA.16816.F32.BF16 R96, R96, R60, RZ",  # 0: over the keys
        "HMMA.16816.F32.BF16 R96, R96, R60, RZ",  # 1: over the chunks
        "@P0 CALL.REL.NOINC 0x40",
        "BRA 0x10",
        "FADD R1, R1, R2",  # 4
        "@P1 CALL.REL.NOINC 0x70",
        "BRA 0x0",
        "EXIT",
    ]
    tile = dataclasses.replace(TILE, chunks=4)
    loop = sass.hot_loop(sass.parse_sass(sass_text(lines)), tile)
    assert loop.slots == (4 + 3 * 2) * 128 / 64**2  # without the inner jump back


def test_the_hot_loop_of_amd():
    text = """
kernel:
\ts_load_dwordx2 s[2:3], s[0:1], 0x0
.LBB0_1:
\tv_mfma_f32_32x32x8_bf16 v[0:15], v[1:2], v[3:4], 0 ; a comment
\tv_exp_f32_e32 v1, v2
\tglobal_load_dwordx4 v[6:9], v[4:5], off
\tds_read2st64_b64 v[0:3], v1 offset1:16
\ts_cbranch_scc1 .LBB0_1
\tglobal_atomic_add_f32 v1, v2, s[0:1]
\ts_endpgm
"""
    program = sass.parse_amdgcn(text)
    loop = sass.hot_loop(program, TILE)
    share = 128 / 64**2
    assert (loop.slots, loop.special, loop.matrix) == (5 * share, share, share)
    assert (loop.loads, loop.shared) == ({16: share}, {16: share})
    assert sass.forbidden(program) == (["global_atomic_add_f32"], [])


def test_chunks_of_the_embedding_count_as_often_as_they_run():
    lines = [
        "HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], RZ",  # 0: over the keys
        "HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24",  # 1: over the chunks
        "FADD R1, R1, R2",
        "@P1 BRA 0x10",
        "@P0 BRA 0x0",
        "EXIT",
    ]
    tile = sass.Tile(64, 64, 128, 32, sass.Product(64, 1, 2), None, chunks=4)
    loop = sass.hot_loop(sass.parse_sass(sass_text(lines)), tile)
    assert loop.slots == (2 + 3 * 3) * 128 / 64**2
    assert loop.multiply_adds == 1


def test_tensor_memory_may_be_managed_with_atomics_and_traps():
    lines = ["UTCATOMSWS.AND URZ, UR4", "ATOMS.OR RZ, [UR6], R3", "BPT.TRAP 0x1", "BPT.TRAP 0x1"]
    assert sass.forbidden(sass.parse_sass(sass_text(lines))) == ([], [])
    assert sass.forbidden(sass.parse_sass(sass_text(lines[1:]))) == (
        ["ATOMS.OR"], ["BPT.TRAP", "BPT.TRAP"],
    )  # fmt: skip
