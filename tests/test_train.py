"""Training on real digits; stopping, killing and resuming it; two ranks against one."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from runs import (
    COMMAND,
    METRICS,
    SHORT,
    assert_same,
    environment,
    metrics_of,
    quick_run,
    quicken,
    signal_at,
    state_of,
    torchrun,
    write_digits,
)
from torch import nn

import rkdo.train
from rkdo.config import TrainConfig
from rkdo.errors import Stopped, TrainingError, UserError
from rkdo.record import Run
from rkdo.train import train


@pytest.fixture(autouse=True)
def _clean_up(tmp_path):
    """A checkpoint of ResNet-18 has 130 MB: pytest would keep hundreds of them."""
    yield
    shutil.rmtree(tmp_path)


@pytest.fixture
def quick(monkeypatch):
    """A small encoder and an evaluation that takes no time: for what happens around them."""
    quicken(monkeypatch)


@pytest.fixture(scope="module", name="quick_run")
def once_quick_run(tmp_path_factory):
    return quick_run(tmp_path_factory.mktemp("quick") / "run")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """`SHORT`, trained without a stop and with its real evaluation."""
    folder = tmp_path_factory.mktemp("uninterrupted") / "run"
    train(SHORT, folder)
    return folder


def test_training_on_digits_learns_and_leaves_a_whole_run(tmp_path):
    config = replace(SHORT, epochs=1, steps_per_epoch=12, batch_size=32, evaluate_every=0)
    metrics = train(config, tmp_path / "run")
    losses = [line["loss"] for line in metrics if "loss" in line]
    assert len(losses) == 12
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3])
    assert [line["step"] for line in metrics if "knn" in line] == [0, 12]
    assert {path.name for path in (tmp_path / "run").iterdir()} == {
        "config.json", "metrics.jsonl", "curves.png", "checkpoint.pt", "encoder.safetensors",
    }  # fmt: skip
    about = json.loads((tmp_path / "run" / "config.json").read_text())
    assert TrainConfig.from_dict(about["config"], "") == config
    assert about["versions"]["torch"] == torch.__version__.split("+")[0]
    assert (tmp_path / "run" / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_the_exported_encoder_is_a_torchvision_resnet(uninterrupted):
    from safetensors.torch import load_file
    from torchvision.models import resnet18

    network = resnet18()
    network.fc = nn.Identity()
    network.load_state_dict(load_file(uninterrupted / "encoder.safetensors"))
    trained = state_of(uninterrupted)["encoder"]
    assert torch.equal(network.layer4[1].conv2.weight, trained["backbone.layer4.1.conv2.weight"])


def test_training_twice_gives_the_same_bits(quick_run, tmp_path, quick):
    train(SHORT, tmp_path / "run")
    assert_same(state_of(tmp_path / "run"), state_of(quick_run))


def test_another_seed_gives_another_encoder(quick_run, tmp_path, quick):
    train(replace(SHORT, seed=43), tmp_path / "run")
    with pytest.raises(AssertionError, match="encoder"):
        assert_same(
            state_of(tmp_path / "run")["encoder"], state_of(quick_run)["encoder"], "encoder"
        )


@pytest.mark.parametrize("method", ["icon", "infonce"])
@pytest.mark.parametrize("stem", ["imagenet", "cifar"])
def test_every_method_and_stem_trains(method, stem, tmp_path, monkeypatch):
    monkeypatch.setattr(rkdo.train, "evaluate", lambda encoder, data, config: dict(METRICS))
    metrics = train(replace(SHORT, method=method, stem=stem, epochs=1), tmp_path / "run")
    assert all(line["loss"] > 0 for line in metrics if "loss" in line)


# --- stopping -------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [0, 1, 3, 5, 6])
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_run_resumes_to_the_same_bits(step, signum, quick_run, tmp_path, quick):
    folder = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        signal_at(patch, step, signum)
        with pytest.raises(
            Stopped, match=rf"step {step}; rkdo train --resume --out .*run"
        ) as caught:
            train(SHORT, folder)
    assert caught.value.signum == signum
    assert state_of(folder)["step"] == step  # saved within the step in which it was asked to
    train(SHORT, folder, resume=True)
    assert_same(state_of(folder), state_of(quick_run))
    losses = [line for line in metrics_of(folder) if "loss" in line]
    assert losses == [line for line in metrics_of(quick_run) if "loss" in line]
    assert [line["step"] for line in metrics_of(folder) if "nmi" in line] == [0, 6]


def test_resnet_stopped_and_resumed_gives_the_same_bits(uninterrupted, tmp_path, monkeypatch):
    """The whole thing: ResNet-18, its optimizer, its evaluations."""
    folder = tmp_path / "run"
    for step in (1, 4):
        with monkeypatch.context() as patch:
            signal_at(patch, step, signal.SIGTERM)
            with pytest.raises(Stopped):
                train(SHORT, folder, resume=folder.exists())
    train(SHORT, folder, resume=True)
    assert_same(state_of(folder), state_of(uninterrupted))
    assert metrics_of(folder) == metrics_of(uninterrupted)


def test_a_signal_during_evaluation_stops_at_once_and_the_evaluation_is_made_on_resuming(
    quick_run, tmp_path, monkeypatch
):
    def evaluate(encoder, data, config):
        os.kill(os.getpid(), signal.SIGTERM)
        for _ in range(1000):  # another thread may take the signal, which then takes a moment
            time.sleep(0.01)
        pytest.fail("the evaluation went on")

    quicken(monkeypatch)
    monkeypatch.setattr(rkdo.train, "evaluate", evaluate)
    with pytest.raises(Stopped):
        train(SHORT, tmp_path / "run")
    assert metrics_of(tmp_path / "run") == []
    quicken(monkeypatch)
    train(SHORT, tmp_path / "run", resume=True)
    assert metrics_of(tmp_path / "run") == metrics_of(quick_run)


def test_the_signal_handlers_are_put_back(quick_run, tmp_path, monkeypatch):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    quicken(monkeypatch)
    train(SHORT, tmp_path / "run")
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


# --- resuming -------------------------------------------------------------------------------------


def test_a_run_killed_between_checkpoints_drops_the_lines_written_since(quick_run, tmp_path, quick):
    folder = tmp_path / "run"

    class Killed(BaseException):
        pass

    write = Run.write_metrics

    def write_then_die(run, values):
        write(run, values)
        if values["step"] == 5:
            raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "write_metrics", write_then_die)
        with pytest.raises(Killed):
            train(SHORT, folder)
    assert state_of(folder)["step"] == 4
    assert [line["step"] for line in metrics_of(folder)] == [0, 1, 2, 3, 4, 5]
    with (folder / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 6, "lo')  # a line cut short
    train(SHORT, folder, resume=True)
    assert_same(state_of(folder), state_of(quick_run))
    assert [line["step"] for line in metrics_of(folder)] == [0, 1, 2, 3, 4, 5, 6, 6]


def test_a_machine_that_dies_before_the_rename_leaves_the_last_checkpoint(
    quick_run, tmp_path, quick
):
    folder = tmp_path / "run"
    replace_file = os.replace
    seen = []

    def dies_the_second_time(source, target):
        if Path(target).name == "checkpoint.pt":
            seen.append(target)
            if len(seen) == 2:
                raise OSError("the machine has died")
        replace_file(source, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "replace", dies_the_second_time)
        with pytest.raises(
            UserError, match=r"checkpoint\.pt cannot be written: the machine has died"
        ):
            train(SHORT, folder)
    assert state_of(folder)["step"] == 2
    train(SHORT, folder, resume=True)
    assert_same(state_of(folder), state_of(quick_run))
    assert not list(folder.glob(".*"))


def test_a_run_without_a_checkpoint_starts_from_the_beginning(quick_run, tmp_path, quick):
    run = Run(tmp_path / "run")
    run.create(SHORT)
    run.close()
    train(SHORT, tmp_path / "run", resume=True)
    assert_same(state_of(tmp_path / "run"), state_of(quick_run))


def test_a_finished_run_can_be_given_more_epochs(quick_run, tmp_path, quick):
    train(replace(SHORT, epochs=1), tmp_path / "run")
    train(SHORT, tmp_path / "run", resume=True)
    assert_same(state_of(tmp_path / "run"), state_of(quick_run))
    assert Run(tmp_path / "run").read_config() == SHORT
    with pytest.raises(UserError, match="--epochs must be at least the 2 already begun, got 1"):
        train(replace(SHORT, epochs=1), tmp_path / "run", resume=True)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_an_existing_run_is_left_alone_unless_told(tmp_path, quick):
    folder = tmp_path / "run"
    train(replace(SHORT, epochs=1), folder)
    before = contents(folder)
    with pytest.raises(UserError, match=r"already holds a run: pass --resume .* or --overwrite"):
        train(SHORT, folder)
    with pytest.raises(UserError, match=r"--lr 0\.1 conflicts .* which has 0\.001"):
        train(replace(SHORT, lr=0.1), folder, resume=True)
    with pytest.raises(UserError, match="--batch-size must be at most"):  # found before deleting
        train(replace(SHORT, batch_size=5000, steps_per_epoch=None), folder, overwrite=True)
    assert contents(folder) == before
    train(replace(SHORT, seed=1), folder, overwrite=True)
    assert Run(folder).read_config().seed == 1
    assert [line["step"] for line in metrics_of(folder)] == [0, 1, 2, 3, 4, 5, 6, 6]


@pytest.mark.parametrize("damage", ["cut", "foreign tensor", "pickle", "other shapes", "empty"])
def test_a_checkpoint_that_is_not_one_is_refused_and_kept(damage, quick_run, tmp_path, quick):
    folder = tmp_path / "run"
    run = Run(folder)
    run.create(SHORT)
    run.close()
    whole = (quick_run / "checkpoint.pt").read_bytes()
    match damage:
        case "cut":
            run.checkpoint.write_bytes(whole[: len(whole) // 2])
        case "empty":
            run.checkpoint.write_bytes(b"")
        case "foreign tensor":
            torch.save({"state_dict": {"weight": torch.zeros(3)}}, run.checkpoint)
        case "pickle":
            torch.save({"format": "rkdo-checkpoint", "model": nn.Linear(2, 2)}, run.checkpoint)
        case "other shapes":
            saved = Run(quick_run).load_checkpoint()
            saved["encoder"]["backbone.0.weight"] = torch.zeros(8, 3, 3, 3)
            run.save_checkpoint(saved)
    before = contents(folder)
    with pytest.raises(UserError, match=r"checkpoint\.pt (is damaged|is not a|does not fit)"):
        train(SHORT, folder, resume=True)
    assert contents(folder) == before


def test_a_checkpoint_is_tensors_and_primitives_alone(quick_run):
    saved = torch.load(quick_run / "checkpoint.pt", weights_only=True)
    assert (saved["format"], saved["version"], saved["step"]) == ("rkdo-checkpoint", 3, 6)


@pytest.mark.parametrize("poison", ["loss", "gradient"])
def test_a_loss_that_is_not_finite_stops_before_it_does_harm(poison, tmp_path, monkeypatch, quick):
    build = rkdo.train.build_objective

    class Poisoned(nn.Module):
        def __init__(self, config, field):
            super().__init__()
            self.objective = build(config, field)
            self.calls = 0

        def forward(self, queries, keys, index, done):
            self.calls += 1
            loss = self.objective(queries, keys, index, done)
            if self.calls < 4:
                return loss
            root = (queries - queries.detach()).abs().sum().sqrt()  # 0, with an infinite slope
            return loss + (float("nan") if poison == "loss" else root)

    monkeypatch.setattr(rkdo.train, "build_objective", Poisoned)
    with pytest.raises(TrainingError, match=r"^step 4: the loss is") as caught:
        train(SHORT, tmp_path / "run")
    assert "\n" not in str(caught.value)
    saved = state_of(tmp_path / "run")
    assert saved["step"] == 2
    assert all(value.isfinite().all() for value in saved["encoder"].values())


# --- other processes ------------------------------------------------------------------------------


def start(folder, *arguments):
    command = [sys.executable, "-m", "rkdo", "train", "--out", str(folder), *arguments]
    return subprocess.Popen(
        command, env=environment(), stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def wait_until(holds, process):
    while not holds():
        if process.poll() is not None:
            raise AssertionError(f"ended before it was killed: {process.communicate()}")
        time.sleep(0.002)


def lines(folder):
    path = folder / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def test_a_run_killed_again_and_again_ends_with_the_same_bits(uninterrupted, tmp_path):
    """SIGKILL before the first checkpoint, in the middle of writing one, and between two."""
    folder = tmp_path / "run"
    partial = folder / ".checkpoint.pt.partial"
    moments = [
        lambda: (folder / "config.json").exists(),
        lambda: lines(folder) == 2,
        partial.exists,
        lambda: (folder / "checkpoint.pt").exists() and lines(folder) >= 4,
    ]
    for i, moment in enumerate(moments):
        resume = ["--resume"] if i else [*COMMAND, "--checkpoint-every", "1"]
        process = start(folder, *resume)
        wait_until(moment, process)
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
    process = start(folder, "--resume", "--checkpoint-every", "2")
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    assert metrics_of(folder) == metrics_of(uninterrupted)
    assert_same(state_of(folder), state_of(uninterrupted))


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_command_saves_and_says_how_to_go_on(signum, code, tmp_path):
    folder = tmp_path / "run"
    process = start(folder, "--batch-size", "16", "--device", "cpu")
    wait_until(lambda: lines(folder) >= 3, process)
    process.send_signal(signum)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == code
    step = state_of(folder)["step"]
    assert errors.splitlines()[-1] == (
        f"rkdo: stopped after step {step}; rkdo train --resume --out {folder} goes on"
    )
    assert "Traceback" not in errors


def test_two_ranks_give_what_one_gives(tmp_path):
    """Float64, the whole of ResNet-18 with its batch norms, Adam, four steps.

    The learning rate is small because Adam divides by |gradient| + 1e-8: at 1e-3 a rounding error
    of 8e-17 in a gradient near 0 moves its weight by 8e-12, whoever made the error.
    """
    write_digits(tmp_path / "data", n_train=64, n_test=20)
    config = replace(
        SHORT, dataset="folder", data_dir=str(tmp_path / "data"), image_size=32, lr=1e-5,
        steps_per_epoch=2, dtype="float64",
    )  # fmt: skip
    train(config, tmp_path / "one")
    finished = torchrun(
        tmp_path / "two", *COMMAND, "--steps-per-epoch", "2", "--dtype", "float64", "--lr", "1e-5",
        "--dataset", "folder", "--data-dir", config.data_dir, "--image-size", "32",
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.count("linear probe accuracy") == 1  # one rank speaks
    one, two = state_of(tmp_path / "one")["encoder"], state_of(tmp_path / "two")["encoder"]
    assert one.keys() == two.keys()
    torch.manual_seed(config.seed)
    before = rkdo.train.build_encoder(config).double().state_dict()
    assert all((one[name] - before[name]).abs().max() > 1e-6 for name in one)
    errors = {name: (one[name] - two[name]).abs().max().item() for name in one}
    assert max(errors.values()) <= 1e-12, errors
    losses = [
        [line["loss"] for line in metrics_of(tmp_path / name) if "loss" in line]
        for name in ("one", "two")
    ]
    assert len(losses[0]) == 4
    assert losses[1] == pytest.approx(losses[0], rel=0, abs=1e-12)


def test_a_batch_that_ranks_cannot_share_is_one_line(tmp_path):
    finished = torchrun(tmp_path / "run", *COMMAND, "--batch-size", "15")
    assert finished.returncode != 0
    said = [line for line in finished.stderr.splitlines() if line.startswith("rkdo: ")]
    assert said == [
        "rkdo: error: --batch-size must be divisible by the number of ranks, got 15 for 2"
    ]
    assert not (tmp_path / "run").exists()


# --- what a run vouches for -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "damage",
    [
        {"step": "x"}, {"step": 1.5}, {"step": -5}, {"optimizer": None}, {"metrics_size": -3},
        {"metrics_size": "x"}, {"evaluated": None}, {"images": None}, {"losses": None},
        {"losses": (1,)}, {"loss_sum": None}, {"field": {}},
    ],
    ids=str,
)  # fmt: skip
def test_a_checkpoint_with_a_foreign_value_does_not_fit(damage, quick_run, tmp_path, monkeypatch):
    quicken(monkeypatch)
    folder = shutil.copytree(quick_run, tmp_path / "run")
    saved = torch.load(folder / "checkpoint.pt", weights_only=True)
    Run(folder).save_checkpoint({**saved, **damage})
    with pytest.raises(UserError, match=r"does not fit"):
        train(SHORT, folder, resume=True)


@pytest.mark.parametrize("damage", ["lost", "cut", "not JSON"])
def test_metrics_before_the_checkpoint_must_be_there(damage, quick_run, tmp_path, monkeypatch):
    quicken(monkeypatch)
    folder = shutil.copytree(quick_run, tmp_path / "run")
    metrics = folder / "metrics.jsonl"
    whole = metrics.read_bytes()
    match damage:
        case "lost":
            metrics.unlink()
        case "cut":
            metrics.write_bytes(whole[:-10])
        case "not JSON":
            metrics.write_bytes(b"\xff" + whole[1:])
    before = metrics.read_bytes() if metrics.exists() else None
    with pytest.raises(UserError, match=r"metrics\.jsonl (must hold|holds a line)"):
        train(SHORT, folder, resume=True)
    assert (metrics.read_bytes() if metrics.exists() else None) == before


def test_a_run_does_not_go_on_with_other_images(quick_run, tmp_path, monkeypatch):
    quicken(monkeypatch)
    folder = shutil.copytree(quick_run, tmp_path / "run")
    saved = torch.load(folder / "checkpoint.pt", weights_only=True)
    Run(folder).save_checkpoint({**saved, "images": saved["images"] + 1})
    with pytest.raises(UserError, match=r"--data-dir must hold the \d+ training images"):
        train(SHORT, folder, resume=True)
