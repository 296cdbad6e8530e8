"""Half precision: rounded once on the way in, once on the way out, after everything is added up."""

import pytest
import torch
from accuracy import DEVICE, DTYPES, assert_as_accurate
from torch.nn.functional import normalize

from rkdo_kernels import icon_loss, info_nce, nt_xent, one_pass, reference, rkdo_loss, small

pytestmark = pytest.mark.usefixtures("poisoned")
HALVES = DTYPES[1:]
BACKENDS = ("tiled", "triton", "reference")


def nt_xent_rows(**views):
    if torch.is_tensor(views.get("temperature")) and views["temperature"].dim():
        views["temperature"] = views["temperature"].repeat(2, 1)  # one an image: see accuracy.py
    return reference.nt_xent(**views)


LOSSES = {
    "rkdo": (rkdo_loss, reference.rkdo_loss, {}),
    "icon": (icon_loss, reference.icon_loss, {}),
    "icon-student": (icon_loss, reference.icon_loss, {"kernel": "student"}),
    "info_nce": (info_nce, reference.info_nce, {}),
    "symmetric": (info_nce, reference.info_nce, {"symmetric": True}),
    "nt_xent": (nt_xent, nt_xent_rows, {}),
}
MODES = {  # settings for both functions, settings for ours
    "fast": ({"temperature": 0.5}, {}),
    "cold": ({"temperature": 0.02}, {}),
    "direct": ({"temperature": 0.5}, {"bound": None}),
    "learnable": ({}, {}),
}


def collapsed(n, d, dtype, cosine=0.999):
    """Rows that all lie near one direction, as at the start of training."""
    generator = torch.Generator().manual_seed(0)
    centre = normalize(torch.randn(1, d, generator=generator, dtype=torch.float64), dim=1)
    views = {}
    for name in ("queries", "keys"):
        away = torch.randn(n, d, generator=generator, dtype=torch.float64)
        away = normalize(away - (away @ centre.T) * centre, dim=1)
        views[name] = (cosine * centre + (1 - cosine**2) ** 0.5 * away).to(DEVICE, dtype)
    return views


@pytest.fixture(params=["as it comes", "tiles"])
def path(request, monkeypatch):
    if request.param == "tiles":
        monkeypatch.setattr(small, "MAX_ENTRIES", 0)
        monkeypatch.setattr(one_pass, "fits", lambda *_: False)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", LOSSES)
def test_a_collapsed_batch(name, mode, backend, dtype, path):
    function, eager, settings = LOSSES[name]
    both, ours = MODES[mode]
    views = collapsed(33, 24, dtype)
    if mode == "learnable":
        views["temperature"] = torch.tensor(0.25, device=DEVICE, dtype=dtype)
    assert_as_accurate(
        lambda **x: function(**x, **settings, **both, **ours, backend=backend, reduction="none"),
        lambda **x: eager(**x, **settings, **both),
        views,
        scale=1 / both.get("temperature", 0.25),
    )


def test_no_copy_of_the_inputs_in_float32_waits_for_the_backward_pass():
    """What autograd keeps of bfloat16 inputs is them, and numbers a row."""
    for function, settings in (
        (info_nce, {"symmetric": True}),
        (info_nce, {"temperature": torch.tensor(0.1, requires_grad=True)}),
        (nt_xent, {"temperature": 0.02}),
        (icon_loss, {}),
    ):
        kept = []
        leaves = [x.requires_grad_() for x in collapsed(70, 64, torch.bfloat16).values()]
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x, kept=kept: kept.append(x) or x, lambda x: x
        ):
            function(*leaves, backend="tiled", reduction="none", **settings)
        wide = [x for x in kept if x.dtype != torch.bfloat16 and x.numel() >= 70 * 64]
        assert not [x.shape for x in wide if x.untyped_storage().nbytes() > 70 * 64]
