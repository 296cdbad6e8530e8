"""The public losses, on every path and backend, against the yardstick, golden values and float64."""

from contextlib import nullcontext

import pytest
import torch
from accuracy import DEVICE, DTYPES, assert_as_accurate, compare, evaluate, sample_views
from golden_cases import CASES, LOSSES, golden_inputs, golden_truth, settings_of

from rkdo_kernels import (
    icon_loss,
    info_nce,
    reference,
    rkdo_loss,
    similarity_logsumexp,
    similarity_moments,
    small,
)

pytestmark = pytest.mark.usefixtures("poisoned")

PATHS = {  # of rkdo_loss; the others have "moments" (a fixed shift) and "direct" (a running maximum)
    "small": {"backend": "tiled"},
    "moments-tiled": {"backend": "tiled"},
    "moments-triton": {"backend": "triton"},
    "direct-tiled": {"backend": "tiled", "bound": None},
    "direct-triton": {"backend": "triton", "bound": None},
}
if DEVICE != "cpu":
    del PATHS["small"]
BACKENDS = ("tiled", "triton")
SHAPES = [(1, 1), (3, 31), (64, 64), (129, 200)]
FUNCTIONS = {
    "rkdo": (rkdo_loss, reference.rkdo_loss, {}),
    "rkdo-detached": (rkdo_loss, reference.rkdo_loss, {"detach_target": True}),
    "icon": (icon_loss, reference.icon_loss, {}),
    "icon-student": (icon_loss, reference.icon_loss, {"kernel": "student"}),
    "info_nce": (info_nce, reference.info_nce, {"temperature": 0.2}),
}


@pytest.fixture
def on_path(monkeypatch):
    def choose(path):
        if path != "small":
            monkeypatch.setattr(small, "MAX_ENTRIES", 0)
        return PATHS[path]

    return choose


def paths_of(name):
    return [path for path in PATHS if path != "small" or name.startswith("rkdo")]


def hold(function, eager, inputs, path, *, truth=None, **settings):
    """Holds `function` on a path to the yardstick; settings go to both functions."""
    temperature = settings.get("temperature", 0.5)
    assert_as_accurate(
        lambda **x: function(**x, **settings, **path, reduction="none"),
        lambda **x: eager(**x, **settings),
        inputs,
        scale=1 / float(inputs.get("temperature", temperature)),
        truth=truth,
    )


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_golden_values(case, path, on_path):
    function, eager = LOSSES[case["loss"]]
    settings, inputs = settings_of(case), golden_inputs(case)
    path, scale = on_path(path), 1 / case["temperature"]
    ours = evaluate(lambda **x: function(**x, **settings, **path, reduction="none"), inputs)
    naive = evaluate(lambda **x: eager(**x, **settings), inputs)
    compare(ours, naive, golden_truth(case), scale)


@pytest.mark.parametrize("aligned", [False, True], ids=["independent", "aligned"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "d"), SHAPES)
@pytest.mark.parametrize(
    ("name", "path"), [(name, path) for name in FUNCTIONS for path in paths_of(name)]
)
def test_as_accurate_as_eager(name, path, n, d, dtype, aligned, on_path):
    function, eager, settings = FUNCTIONS[name]
    hold(function, eager, sample_views(n, d, dtype, aligned=aligned), on_path(path), **settings)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("detach_target", [False, True], ids=["flowing", "detached"])
@pytest.mark.parametrize("depth", [1, 3, 8])
@pytest.mark.parametrize("alpha", [0, 0.2, 0.5, 1])
@pytest.mark.parametrize("temperature", [0.01, 0.05, 0.2, 1.0])
def test_rkdo_settings(temperature, alpha, depth, detach_target, path, on_path):
    hold(
        rkdo_loss, reference.rkdo_loss, sample_views(19, 24, m=21, aligned=depth == 3),
        on_path(path), temperature=temperature, alpha=alpha, depth=depth, cooling=0.3,
        detach_target=detach_target, positive_offset=2,
    )  # fmt: skip
