"""Launches go to the device of their tensors, with what it has; what it cannot do is said."""

import threading
import traceback
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accuracy import sample_views

pytest.importorskip("triton")
from rkdo_kernels import (
    ResponseField,
    field_ops,
    gradient_stripes,
    info_nce,
    kernels,
    launch,
    ops,
    quadrature,
    rkdo_loss,
    small,
)
from rkdo_kernels.launch_tables import CONFIGS, TABLES, line

DEVICES = {  # architecture and bytes of shared memory a program: the table
    ("sm_75", 64 << 10): "sm_75",
    ("sm_80", 163 << 10): "sm_80",
    ("sm_86", 99 << 10): "sm_86",
    ("sm_87", 163 << 10): "sm_80",
    ("sm_89", 99 << 10): "sm_86",
    ("sm_90", 227 << 10): "sm_90",
    ("sm_100", 227 << 10): "sm_100",
    ("sm_103", 227 << 10): "sm_100",
    ("sm_120", 99 << 10): "sm_86",
    ("gfx90a", 64 << 10): "gfx942",
    ("gfx942", 64 << 10): "gfx942",
    ("gfx950", 160 << 10): "gfx942",
    ("gfx1100", 64 << 10): "gfx1100",
    ("sm_80", 48 << 10): "",
    ("sm_70", 96 << 10): "",
}
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@pytest.mark.parametrize(("architecture", "shared"), DEVICES)
def test_a_table_follows_from_what_a_device_has(architecture, shared):
    found = launch.Device("stub", architecture, shared).table
    assert found == DEVICES[architecture, shared]
    assert not found or TABLES[found].shared <= shared


@pytest.mark.parametrize("table", [x for x in TABLES if x.startswith("gfx")])
def test_no_launch_on_amd_limits_registers(table):
    """`maxnreg` is no option there: a launch refuses it."""
    for kernel, size, wide in CONFIGS:
        if (kernel, size, not wide) in CONFIGS:
            options = line(table, kernel, size, 4096 if wide else 16).options
            assert set(options) == {"num_warps", "num_stages", "enable_fp_fusion"}


@pytest.fixture
def gpu(monkeypatch):
    """Tensors that say that they are on a GPU, of a kind and with memory as told."""

    def stub(architecture, shared=64 << 10, dtype=FP32, index=1):
        found = launch.Device("Stub 3000", architecture, shared)
        monkeypatch.setattr(launch, "triton_status", lambda: "compiled")
        monkeypatch.setattr(launch, "device", lambda at: {1: found}[at])
        monkeypatch.setattr(launch, "refusal", launch.refusal.__wrapped__)
        monkeypatch.setattr(launch, "warn_of", launch.warn_of.__wrapped__)
        return SimpleNamespace(device=torch.device("cuda", index), dtype=dtype)

    return stub


@pytest.mark.parametrize(
    ("architecture", "shared", "dtype", "said"),
    [
        ("sm_75", 64 << 10, BF16, "bfloat16 needs sm_80 or newer, Stub 3000 (sm_75) is older"),
        ("sm_70", 96 << 10, FP32, "need sm_75 or newer, Stub 3000 (sm_70) is older"),
        ("sm_80", 48 << 10, FP32, "need 101376 bytes of shared memory"),
    ],
)
def test_what_a_device_cannot_do_is_said(architecture, shared, dtype, said, gpu):
    x = gpu(architecture, shared, dtype)
    with pytest.raises(RuntimeError) as raised:
        launch.backend_for("triton", x)
    assert said in str(raised.value)
    with pytest.warns(UserWarning, match="PyTorch tiles run instead") as warned:
        assert launch.backend_for("auto", x) == "tiled"
    assert said in str(warned[0].message)


def test_a_warning_comes_once(monkeypatch):
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for _ in range(3):
            launch.warn_of("of this test")
    assert len(seen) == 1


@pytest.mark.parametrize("dtype", [FP16, FP32])
def test_what_it_can_do_runs(dtype, gpu):
    x = gpu("sm_75", dtype=dtype)
    assert launch.backend_for("auto", x) == launch.backend_for("triton", x) == "triton"


def test_the_current_device_is_that_of_tensors_without_index(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 5)
    assert launch.device_index(SimpleNamespace(device=torch.device("cuda"))) == 5
    assert launch.device_index(SimpleNamespace(device=torch.device("cuda", 2))) == 2


# ---- the device of the tensors -------------------------------------------------------------------


def test_every_launcher_runs_on_the_device_of_its_tensors(monkeypatch):
    entered = []
    monkeypatch.setattr(launch, "guard", lambda x: entered.append(x.device) or inside)
    places = [*vars(kernels).items(), *vars(field_ops.implementation("triton")).items()]
    launchers = {
        name: f for name, f in places
        if getattr(f, "__module__", "").startswith("rkdo_kernels") and hasattr(f, "__wrapped__")
    }  # fmt: skip
    wanted = {*dir(ops.tiled), *field_ops.implementation("triton").__all__}
    assert wanted >= {"moments", "dense_pass"}
    for module in (kernels, field_ops.implementation("triton")):
        used = set(getattr(module, "__all__", [])) or set(launchers) & set(vars(module))
        assert used <= set(launchers)
    x = SimpleNamespace(device=torch.device("cuda", 1))
    for name, launcher in launchers.items():
        with pytest.raises((TypeError, AttributeError)):  # the stub is no tensor
            launcher(x)
        assert entered.pop() == x.device, name
    assert len(launchers) == 15


class Inside:
    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None


inside = Inside()


def test_the_guard_makes_it_current(monkeypatch):
    made = []
    monkeypatch.setattr(torch.cuda, "device", lambda device: made.append(device) or inside)
    with launch.guard(SimpleNamespace(device=torch.device("cuda", 1))):
        assert made == [torch.device("cuda", 1)]
    with launch.guard(torch.zeros(1)):
        assert len(made) == 1


# ---- settings and tables -------------------------------------------------------------------------


def test_stripes_add_up_in_float32_whatever_is_set(monkeypatch):
    setting, seen = torch.backends.cuda.matmul, []
    mm = torch.mm
    monkeypatch.setattr(launch, "STRIPE_DIM", 32)

    def watched(*args, **kwargs):
        seen.append(setting.allow_bf16_reduced_precision_reduction)
        return mm(*args, **kwargs)

    monkeypatch.setattr(torch, "mm", watched)
    views = {k: x.requires_grad_() for k, x in sample_views(130, 32, BF16).items()}
    loss = rkdo_loss(**views, backend="triton", reduction="none")
    for before in (True, False):
        setting.allow_bf16_reduced_precision_reduction = (before, before)
        try:
            torch.autograd.grad(loss.sum(), list(views.values()), retain_graph=True)
            assert setting.allow_bf16_reduced_precision_reduction is before
            assert setting.allow_bf16_reduced_precision_reduction_split_k is before
        finally:
            setting.allow_bf16_reduced_precision_reduction = True
    assert len(seen) == 4
    assert not any(seen)


def test_the_setting_is_restored_by_the_last_thread_to_leave():
    setting, sums = torch.backends.cuda.matmul, gradient_stripes.float32_sums
    first, second = threading.Event(), threading.Event()

    def other():
        with sums:
            first.set()
            second.wait(10)

    thread = threading.Thread(target=other)
    with sums:
        thread.start()
        assert first.wait(10)
    assert not setting.allow_bf16_reduced_precision_reduction  # the other needs it
    second.set()
    thread.join()
    assert setting.allow_bf16_reduced_precision_reduction


@pytest.mark.parametrize("backend", ["triton", "tiled"])
def test_operators_make_no_table(backend, monkeypatch):
    """Made within, it would lie in the memory of a CUDA graph that is being recorded."""
    table, asked = quadrature.table, []

    def watched(*settings):
        asked.append(settings)
        assert not any("_library" in Path(x.filename).parts for x in traceback.extract_stack())
        return table(*settings)

    monkeypatch.setattr(quadrature, "table", watched)
    monkeypatch.setattr(small, "MAX_ENTRIES", 0)
    for single in (launch.SINGLE, 0):
        monkeypatch.setattr(launch, "SINGLE", single)
        for loss in (rkdo_loss, info_nce):
            views = {k: x.requires_grad_() for k, x in sample_views(8, 16, FP32).items()}
            loss(**views, backend=backend).backward()
    assert len(asked) == 4


@pytest.mark.parametrize("mode", ["meta", "fake"])
def test_a_table_asked_for_in_a_mode_is_kept_with_its_numbers(mode):
    from torch._subclasses.fake_tensor import FakeTensorMode

    settings = 3, (2.0, 2.05 if mode == "fake" else 2.06), 0.5, 1.0, torch.device("cpu")
    with torch.device("meta") if mode == "meta" else FakeTensorMode():
        quadrature.table(*settings)
    kept = quadrature.table(*settings)
    assert type(kept) is torch.Tensor
    assert kept.device.type == "cpu"
    assert kept.isfinite().all()


def test_a_field_steps_on_its_device(monkeypatch):
    """The field's launchers enter the guard too, through its operators."""
    entered = []
    monkeypatch.setattr(launch, "guard", lambda x: entered.append(x.device) or inside)
    views = {k: x.requires_grad_() for k, x in sample_views(8, 16, FP32).items()}
    field = ResponseField.dense(8)
    field.step(*views.values(), slice(0, 8), backend="triton").backward()
    assert entered == [torch.device("cpu")]
