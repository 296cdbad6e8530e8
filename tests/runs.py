"""Quick training runs, and what they leave, for the tests of training."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

import rkdo.train
from rkdo.config import TrainConfig
from rkdo.data import load_data
from rkdo.evaluate import LABELS
from rkdo.record import Run
from rkdo.train import train

ROOT = Path(__file__).parent.parent
SHORT = TrainConfig(epochs=2, steps_per_epoch=3, batch_size=16, checkpoint_every=2, device="cpu")
COMMAND = ["--epochs", "2", "--steps-per-epoch", "3", "--batch-size", "16", "--device", "cpu"]
METRICS = dict.fromkeys(LABELS, 0.5)


class SmallEncoder(nn.Module):
    """An encoder with batch norm and a projector, of a millionth of ResNet-18's cost."""

    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Conv2d(3, 8, 5, stride=4), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(),
            nn.Linear(392, 16),
        )  # fmt: skip
        self.projector = nn.Linear(16, 8)

    def forward(self, images):
        return nn.functional.normalize(self.projector(self.backbone(images)), dim=1)


def quicken(patch):
    patch.setattr(rkdo.train, "build_encoder", lambda config: SmallEncoder())
    patch.setattr(rkdo.train, "evaluate", lambda encoder, data, config: dict(METRICS))


def quick_run(folder):
    """`SHORT`, trained without a stop into the folder, with what `quicken` puts in place."""
    with pytest.MonkeyPatch.context() as patch:
        quicken(patch)
        train(SHORT, folder)
    return folder


def assert_same(a, b, where="checkpoint"):
    """Bit for bit, all the way down."""
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype, where
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}[{key!r}]")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{where}[{i}]")
    else:
        assert a == b, where


def state_of(folder):
    """The checkpoint, less what depends on how long anything took."""
    saved = Run(folder).load_checkpoint()
    assert saved is not None
    del saved["metrics_size"]
    return saved


def metrics_of(folder):
    """The metrics, less what depends on how long anything took."""
    lines = Run(folder).read_metrics()
    return [{k: v for k, v in line.items() if k != "images_per_second"} for line in lines]


def signal_at(monkeypatch, step, signum):
    """Send `signum` to this process while `step` is being written down."""
    write = Run.write_metrics

    def write_and_signal(run, values):
        write(run, values)
        if values["step"] == step:
            os.kill(os.getpid(), signum)

    monkeypatch.setattr(Run, "write_metrics", write_and_signal)


def environment(**more):
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    threads = str(torch.get_num_threads())
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "OMP_NUM_THREADS": threads,
        **more,
    }


def torchrun(folder, *arguments):
    return subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
            "-m", "rkdo", "train", "--out", str(folder), *arguments,
        ],
        env=environment(OMP_NUM_THREADS="1"), capture_output=True, text=True, timeout=180,
    )  # fmt: skip


def write_digits(root, n_train, n_test):
    """Real digits as a folder of PNGs: few, so that evaluating them is quick."""
    for part, n in (("train", n_train), ("test", n_test)):
        images = getattr(load_data(TrainConfig()), part)
        for i in range(n):
            folder = root / part / str(int(images.labels[i]) % 2)
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(images[i][0].numpy()).save(folder / f"{i:03}.png")
