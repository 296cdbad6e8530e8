"""Compiles every launch that public calls make, as it was launched, and prints what fails.

    python tests/compile_launches.py losses|fields TARGET

Triton's interpreter runs what its compiler refuses. Run without TRITON_INTERPRET.
"""

import sys
from functools import partial

import torch
import triton
from torch.nn.functional import normalize

import rkdo_kernels as rk
from bench.compiled.execute.compile import default_cache, program
from bench.compiled.launches import Launch, kernel_names, launches_for
from bench.targets import TARGETS
from rkdo_kernels import ResponseField, launch


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
    direct, student = partial(rkdo, bound=None), partial(icon, kernel="student")
    for n, d, losses in (
        (320, 64, every),
        (1, 1, (rkdo, direct, student, partial(nce, symmetric=True))),
        (320, 256, (rkdo, nce, rk.nt_xent)),
    ):
        for loss in losses:
            loss(*views(n, n, d, torch.bfloat16)).sum().backward()
    for loss in (rkdo, nce, icon, partial(rkdo, bound=None)):
        loss(*views(65, 300, 40, torch.float32), positive_offset=100).backward()
    launch.splits = lambda *_: 2  # as where there are fewer programs than processors
    for loss in (rkdo, nce, rk.nt_xent, partial(nce, symmetric=True), direct, student,
                 partial(nce, bound=None)):  # fmt: skip
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


def wrong_with(received: Launch, target: str) -> str:
    """In words; empty if nothing is."""
    if "enable_fp_fusion" not in received.options:
        return "leaves fp fusion to Triton's version"
    try:
        shared = allocated(received, target)
    except Exception as error:
        while error.__cause__:
            error = error.__cause__
        return f"{type(error).__name__}: {str(error)[-200:]}"
    if shared > TARGETS[target].shared_limit:
        return f"wants {shared} bytes of shared memory"
    return ""


def allocated(received: Launch, target: str) -> int:
    """Bytes of shared memory, of a launch compiled: as far as PTX and from its cache on NVIDIA."""
    gpu = TARGETS[target].gpu
    if gpu.backend == "cuda":
        return program(received, target, default_cache()).shared
    return triton.compile(received.source, target=gpu, options=received.options).metadata.shared


if __name__ == "__main__":
    what, target = sys.argv[1:]
    received: dict[str, Launch] = {}
    with launches_for(target, lambda x: received.setdefault(x.compiled_from, x)):
        {"losses": losses, "fields": fields}[what]()
    for x in received.values():
        if wrong := wrong_with(x, target):
            print("WRONG", x.name, x.constants, wrong, flush=True)
    seen = {x.name for x in received.values()}
    print(len(received), "launches of", " ".join(sorted(seen)))
    print("not launched:", " ".join(sorted(kernel_names() - seen)))
