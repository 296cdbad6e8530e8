"""What an import brings along, and what is left without Triton; each in a process of its own."""

import os
import subprocess
import sys

WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None
import torch
import rkdo_kernels
from rkdo_kernels import *
queries, keys = torch.eye(200, requires_grad=True), torch.eye(200, requires_grad=True)
for loss in (rkdo_loss, icon_loss, info_nce):
    for bound in (1.0, None):
        for backend in ("auto", "tiled", "reference"):
            value = loss(queries, keys, bound=bound, backend=backend)
            value.backward()
            assert value.isfinite() and queries.grad.isfinite().all() and queries.grad.any()
            queries.grad = None
for loss in (rkdo_loss, icon_loss, info_nce):
    try:
        loss(queries, keys, backend="triton")
    except RuntimeError as error:
        assert "needs Triton" in str(error), error
    else:
        raise AssertionError("another backend ran")
assert RKDOLoss()(queries, keys).isfinite()
"""

LIGHT = """
import sys, torch
torch_brings = set(sys.modules)
import rkdo_kernels, rkdo_kernels.distributed
brought = {name.split(".")[0] for name in set(sys.modules) - torch_brings}
heavy = {"numpy", "torchvision", "triton", "scipy", "sklearn", "rkdo", "matplotlib"}
print(*sorted(brought & heavy))
"""


def run(code):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    process = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr
    return process.stdout.strip()


def test_losses_run_without_triton():
    run(WITHOUT_TRITON)


def test_the_import_brings_torch_alone():
    assert run(LIGHT) == ""


def test_every_public_name_is_there():
    import rkdo_kernels

    assert sorted(rkdo_kernels.__all__) == rkdo_kernels.__all__
    assert all(hasattr(rkdo_kernels, name) for name in rkdo_kernels.__all__)
