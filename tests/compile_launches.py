"""Compiles every launch that public calls make, as it was launched, and prints what fails.

    python tests/compile_launches.py losses|fields TARGET

Triton's interpreter runs what its compiler refuses. Run without TRITON_INTERPRET.
"""

import sys
from functools import partial
from types import ModuleType

import torch
import triton
from torch.nn.functional import normalize
from triton.compiler import ASTSource

import rkdo_kernels as rk
from bench.targets import TARGETS
from rkdo_kernels import ResponseField, field_ops, kernels, launch, ops, small

KINDS = {
    torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64",
    torch.int64: "i64", torch.int32: "i32",
}  # fmt: skip
LAUNCHES = {}


class Recorder:
    """Stands for a kernel, and keeps what it is launched with as Triton specialises it."""

    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        return self.launch

    def launch(self, *arguments, **given):
        names = self.kernel.arg_names
        options = {name: given.pop(name) for name in [*given] if name not in names}
        values = dict(zip(names, arguments, strict=False)) | given
        assert set(values) == set(names), (self.kernel, set(values) ^ set(names))
        signature, constants, divisible = {}, {}, {}
        for at, name in enumerate(names):
            value = values[name]
            if isinstance(value, torch.Tensor):
                signature[name] = f"*{KINDS[value.dtype]}"
            elif name.isupper() or (type(value) is int and value == 1):
                signature[name], constants[name] = "constexpr", value
            else:
                signature[name] = "fp32" if isinstance(value, float) else "i32"
            number = value.data_ptr() if isinstance(value, torch.Tensor) else value
            if name not in constants and isinstance(number, int) and number % 16 == 0:
                divisible[(at,)] = [["tt.divisibility", 16]]
        kept = self.kernel, signature, constants, divisible, options
        LAUNCHES[repr((self.kernel.fn.__name__, *kept[1:]))] = kept


def record(target):
    """Puts recorders in the place of all kernels, and launches them as for the target."""
    amd = TARGETS[target].amd
    launch.config = lambda kernel, x: launch.launch_config(kernel, x, target)
    launch.dims = lambda x, width=None: launch.dims_for(x, not amd, width)
    launch.gradient_precision = partial(gradient_precision, amd)
    launch.backend_for = lambda name, x: "triton"
    ops.implementation = lambda backend: kernels
    small.MAX_ENTRIES = 0
    field_ops.implementation("triton")  # imports its kernels
    modules = [x for name, x in sys.modules.items() if name.startswith("rkdo_kernels.")]
    recorders = {}
    for module in modules:
        assert isinstance(module, ModuleType)
        for name, kernel in list(vars(module).items()):
            if name.startswith("_") and hasattr(kernel, "arg_names"):
                known = recorders.setdefault(id(kernel), Recorder(kernel))
                setattr(module, name, known)
    return {recorder.kernel.fn.__name__ for recorder in recorders.values()}


def gradient_precision(amd, x):
    if amd:
        return "ieee"
    return "tf32" if x.dtype == torch.float16 else "tf32x3"


def views(n, m, d, dtype):
    return [normalize(torch.randn(k, d), dim=1).to(dtype).requires_grad_() for k in (n, m)]


def losses():
    t = torch.tensor(0.3, requires_grad=True)
    rkdo, nce, icon = rk.rkdo_loss, rk.info_nce, rk.icon_loss
    every = [
        rkdo, partial(rkdo, detach_target=True), partial(rkdo, temperature=t),
        partial(rkdo, bound=None), partial(rkdo, bound=None, detach_target=True),
        partial(rkdo, bound=None, depth=8), partial(rkdo, alpha=0.0), partial(rkdo, alpha=1.0),
        partial(rkdo, temperature=0.1), partial(rkdo, reduction="none"),
        nce, partial(nce, symmetric=True), partial(nce, bound=None), partial(nce, temperature=t),
        partial(nce, temperature=t, symmetric=True), partial(nce, reduction="none"),
        icon, partial(icon, bound=None), partial(icon, kernel="student"),
        rk.nt_xent, partial(rk.nt_xent, bound=None), partial(rk.nt_xent, temperature=t),
        partial(rk.similarity_logsumexp, temperature=0.3, exclude_self=True),
        partial(rk.similarity_logsumexp, temperature=0.01),
        partial(rk.similarity_moments, temperature=0.3, degree=3),
    ]  # fmt: skip
    for n, d in ((320, 64), (1, 1), (320, 256)):
        for loss in every if d < 256 else (rkdo, nce, rk.nt_xent):
            loss(*views(n, n, d, torch.bfloat16)).sum().backward()
    for loss in (rkdo, nce, icon, partial(rkdo, bound=None)):
        loss(*views(65, 300, 40, torch.float32), positive_offset=100).backward()
    launch.splits = lambda *_: 2  # as where there are fewer programs than processors
    direct = partial(rkdo, bound=None), partial(nce, bound=None), partial(icon, kernel="student")
    for loss in (rkdo, nce, rk.nt_xent, partial(nce, symmetric=True), *direct):
        loss(*views(320, 320, 64, torch.bfloat16)).sum().backward()


def fields():
    index = torch.arange(199, 0, -3)
    splits = launch.splits
    bf16, fp32 = torch.bfloat16, torch.float32
    labels, neighbours = torch.arange(200) % 7, torch.eye(200).to_sparse_csr()
    for field, n, d, dtype, where in (
        (ResponseField.dense(256, dtype=bf16), 64, 64, bf16, slice(64, 128)),
        (ResponseField.dense(64), 64, 64, fp32, slice(0, 64)),
        (ResponseField.dense(200, dtype=bf16), 64, 64, bf16, index[:64]),
        (ResponseField.dense(200), 67, 40, fp32, index),
        (ResponseField.dense(200), 64, 200, bf16, index[:64]),
        (ResponseField.dense(1), 1, 1, bf16, slice(0, 1)),
        (ResponseField.snapshot(200, 64, history=3, initial=labels), 64, 64, bf16, index[:64]),
        (ResponseField.snapshot(200, 40, history=4), 67, 40, fp32, index),
        (ResponseField.snapshot(200, 200, history=1, initial=neighbours, dtype=fp32), 64, 200,
         bf16, index[:64]),
        (ResponseField.snapshot(1, 1, history=1), 1, 1, fp32, slice(0, 1)),
    ):  # fmt: skip
        queries, keys = views(n, n, d, dtype)
        launch.splits = splits
        field.step(queries, keys, where).backward()
        field.loss(queries.detach(), keys.detach(), where)
        field.update(queries, keys, where)
        field.loss(queries, keys, where, reduction="none").sum().backward()
        launch.splits = lambda *_: 2
        field.step(queries, keys, where).backward()


def compiled(target, kernel, signature, constants, divisible, options):
    """What is wrong with it, in words."""
    if "enable_fp_fusion" not in options:
        return "leaves fp fusion to Triton's version"
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=divisible)
    try:
        found = triton.compile(source, target=TARGETS[target].gpu, options=options)
    except Exception as error:
        while error.__cause__:
            error = error.__cause__
        return f"{type(error).__name__}: {str(error)[-200:]}"
    if found.metadata.shared > TARGETS[target].shared_limit:
        return f"wants {found.metadata.shared} bytes of shared memory"
    return ""


if __name__ == "__main__":
    what, target = sys.argv[1:]
    every = record(target)
    {"losses": losses, "fields": fields}[what]()
    for kept in LAUNCHES.values():
        if wrong := compiled(target, *kept):
            print("WRONG", kept[0].fn.__name__, kept[2], wrong, flush=True)
    seen = {kept[0].fn.__name__ for kept in LAUNCHES.values()}
    print(len(LAUNCHES), "launches of", " ".join(sorted(seen)))
    print("not launched:", " ".join(sorted(every - seen)))
