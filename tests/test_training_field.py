"""Training with a response field: its state, its rhythm, its measures and its picture."""

import copy
import shutil
import signal
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from ranks import on_two_ranks
from runs import (
    SHORT,
    assert_same,
    metrics_of,
    quicken,
    signal_at,
    state_of,
    torchrun,
    write_digits,
)
from torch.nn.functional import normalize

import rkdo.encoder
import rkdo.field
import rkdo.train
from rkdo.__main__ import main
from rkdo.batches import Batches
from rkdo.config import TrainConfig
from rkdo.data import load_data
from rkdo.errors import Stopped, UserError
from rkdo.field import TrainingField, sample
from rkdo.ranks import Ranks
from rkdo.record import Run
from rkdo.train import train
from rkdo_kernels import ResponseField

LONG = replace(SHORT, epochs=4, projection=8)  # what the quick encoder gives
KINDS = {
    "dense float32": {"recursion": "dense"},
    "dense bfloat16": {"recursion": "dense", "field_dtype": "bfloat16"},
    "snapshot": {"recursion": "snapshot", "history": 2},
    "dense by epoch": {"recursion": "dense", "update_every": "epoch"},
    "snapshot by epoch": {"recursion": "snapshot", "update_every": "epoch"},
}
ALONE = Ranks(0, 1, torch.device("cpu"))


@pytest.fixture(autouse=True)
def _quick(monkeypatch, tmp_path):
    quicken(monkeypatch)
    yield
    shutil.rmtree(tmp_path)  # a dense checkpoint has megabytes


@pytest.fixture(scope="module", params=KINDS)
def whole(request, tmp_path_factory):
    """The settings of a field, and four epochs of them without a stop."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    config = replace(LONG, **KINDS[request.param])
    with pytest.MonkeyPatch.context() as patch:
        quicken(patch)
        train(config, folder)
    yield config, folder
    shutil.rmtree(folder.parent)


# --- resuming -------------------------------------------------------------------------------------


def test_two_epochs_and_two_more_give_the_same_bits(whole, tmp_path):
    config, folder = whole
    train(replace(config, epochs=2), tmp_path / "run")
    train(config, tmp_path / "run", resume=True)
    assert_same(state_of(tmp_path / "run"), state_of(folder))


@pytest.mark.parametrize("step", [0, 3, 5, 12])
def test_a_stopped_run_resumes_to_the_same_bits(whole, step, tmp_path):
    config, folder = whole
    with pytest.MonkeyPatch.context() as patch:
        signal_at(patch, step, signal.SIGTERM)
        with pytest.raises(Stopped):
            train(config, tmp_path / "run")
    assert state_of(tmp_path / "run")["step"] == step
    train(config, tmp_path / "run", resume=True)
    assert_same(state_of(tmp_path / "run"), state_of(folder))
    losses = [
        [line for line in metrics_of(x) if "loss" in line] for x in (tmp_path / "run", folder)
    ]
    assert losses[0] == losses[1]


def test_a_run_killed_between_checkpoints_goes_back_to_the_fields_last(whole, tmp_path):
    config, folder = whole
    write = Run.write_metrics

    class Killed(BaseException):
        pass

    def write_then_die(run, values):
        write(run, values)
        if values["step"] == 5:
            raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "write_metrics", write_then_die)
        with pytest.raises(Killed):
            train(config, tmp_path / "run")
    assert state_of(tmp_path / "run")["step"] == 4
    train(config, tmp_path / "run", resume=True)
    assert_same(state_of(tmp_path / "run"), state_of(folder))


def test_schedules_and_icon_resume_to_the_same_bits(tmp_path):
    config = replace(
        LONG, recursion="dense", alpha_schedule="cosine", alpha_final=0.1, temperature_decay=0.5,
        icon_weight=0.2,
    )  # fmt: skip
    train(config, tmp_path / "whole")
    with pytest.MonkeyPatch.context() as patch:
        signal_at(patch, 7, signal.SIGTERM)
        with pytest.raises(Stopped):
            train(config, tmp_path / "run")
    train(config, tmp_path / "run", resume=True)
    assert_same(state_of(tmp_path / "run"), state_of(tmp_path / "whole"))


def test_a_checkpoint_of_another_field_does_not_fit(whole, tmp_path):
    config, folder = whole
    saved = torch.load(folder / "checkpoint.pt", weights_only=True)
    other = TrainingField(replace(config, projection=8), 9, torch.zeros(9), ALONE)
    for field in (None, {}, {"field": {}, "waiting": []}, other.state_dict()):
        run = shutil.copytree(folder, tmp_path / "run", dirs_exist_ok=True)
        Run(run).save_checkpoint({**saved, "field": field})
        with pytest.raises(UserError, match="does not fit"):
            train(config, run, resume=True)


# --- what the field takes up ----------------------------------------------------------------------


@pytest.mark.parametrize("every", ["step", "epoch"])
def test_the_field_takes_up_the_images_that_training_saw(every, tmp_path):
    config = replace(LONG, epochs=1, recursion="dense", update_every=every)
    train(config, tmp_path / "run")
    labels = load_data(config).train.labels
    trained = TrainingField(config, len(labels), labels, ALONE)
    trained.load_state_dict(state_of(tmp_path / "run")["field"])
    batches = list(Batches(len(labels), 16, steps_per_epoch=3, epochs=1, seed=config.seed))
    joint = torch.zeros(len(labels), len(labels), dtype=torch.bool)  # seen together
    seen = torch.tensor(batches)[..., 1]
    for index in seen if every == "step" else [seen.flatten()]:
        joint[index[:, None], index] = True
    rows = trained.field.rows(torch.arange(len(labels)))
    assert torch.equal(rows > 0, joint | torch.eye(len(labels), dtype=torch.bool))
    assert trained.waiting == []


def batch(seed, index):
    generator = torch.Generator().manual_seed(seed)
    queries, keys = torch.randn(2, len(index), 8, generator=generator, dtype=torch.float64)
    return normalize(queries, dim=1), normalize(keys, dim=1), torch.tensor(index)


def test_by_epoch_the_field_waits_and_takes_up_the_epoch_as_one_batch():
    config = TrainConfig(recursion="dense", dtype="float64", update_every="epoch", projection=8)
    training, wanted = TrainingField(config, 9, torch.zeros(9), ALONE), dense(9)
    batches = [batch(0, [1, 5, 3]), batch(1, [0, 8, 2])]
    for x in batches:
        loss = training.loss(*x, temperature=0.5, alpha=0.5)
        assert loss.item() == pytest.approx(wanted.loss(*x, temperature=0.5).item(), rel=1e-14)
    assert torch.equal(training.field.rows(torch.arange(9)), wanted.rows(torch.arange(9)))
    training.end_epoch(temperature=0.4, alpha=0.2)
    wanted.update(*map(torch.cat, zip(*batches, strict=True)), temperature=0.4, alpha=0.2)
    after = training.field.rows(torch.arange(9))
    assert torch.equal(after, wanted.rows(torch.arange(9)))
    training.end_epoch(temperature=0.4, alpha=0.2)  # nothing is left to take up
    assert torch.equal(training.field.rows(torch.arange(9)), after)


def test_by_step_the_field_takes_up_every_batch_at_once():
    config = TrainConfig(recursion="dense", dtype="float64", projection=8)
    training, wanted = TrainingField(config, 9, torch.zeros(9), ALONE), dense(9)
    for x in (batch(0, [1, 5, 3]), batch(1, [0, 5, 2])):
        loss = training.loss(*x, temperature=0.4, alpha=0.2)
        assert loss.item() == pytest.approx(wanted.loss(*x, temperature=0.4).item(), rel=1e-14)
        wanted.update(*x, temperature=0.4, alpha=0.2)
        assert torch.equal(training.field.rows(torch.arange(9)), wanted.rows(torch.arange(9)))
    training.end_epoch(temperature=0.4, alpha=0.2)
    assert torch.equal(training.field.rows(torch.arange(9)), wanted.rows(torch.arange(9)))


def dense(n):
    return ResponseField.dense(n, dtype=torch.float64)


def test_schedules_go_by_the_steps_of_the_whole_training(tmp_path, monkeypatch):
    came = {"loss": [], "end_epoch": []}

    def record(name):
        method = getattr(TrainingField, name)

        def recording(self, *args):
            came[name] += args[-2:]  # temperature, alpha
            return method(self, *args)

        monkeypatch.setattr(TrainingField, name, recording)

    record("loss")
    record("end_epoch")
    settings = {"alpha_schedule": "linear", "alpha_final": 0.2, "temperature_decay": 0.4}
    train(replace(LONG, recursion="dense", update_every="epoch", **settings), tmp_path / "run")
    for name, steps in (("loss", range(12)), ("end_epoch", (2, 5, 8, 11))):
        wanted = [(0.5 - 0.2 * t / 12, 0.5 - 0.3 * t / 12) for t in steps]
        assert came[name] == pytest.approx(np.ravel(wanted).tolist())


def test_a_field_that_no_memory_holds_is_one_line(tmp_path, monkeypatch, capsys):
    class Small:
        dense = staticmethod(lambda n, **given: ResponseField.dense(10**7, **given))

    monkeypatch.setattr(rkdo.field, "ResponseField", Small)
    out = ["--out", str(tmp_path / "run"), "--device", "cpu"]
    assert main(["train", "--recursion", "dense", *out]) == 2
    err = capsys.readouterr().err
    assert err.startswith("rkdo: error: --recursion dense must fit the memory: ")
    assert err.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks at Linux's mappings")
def test_checkpoints_hold_no_second_field_in_memory(tmp_path):
    trained = TrainingField(replace(LONG, recursion="dense"), 600, torch.zeros(600).long(), ALONE)
    values = trained.state_dict()["field"]
    assert values["matrix"].data_ptr() == trained.field._tensors["matrix"].data_ptr()
    run = Run(tmp_path)
    run.save_checkpoint({"field": values})
    loaded = run.load_checkpoint()
    address = loaded["field"]["matrix"].data_ptr()
    mapped = (line.split() for line in Path("/proc/self/maps").read_text().splitlines())
    files = [
        name for extent, *_, name in mapped
        if int(extent.split("-")[0], 16) <= address < int(extent.split("-")[1], 16)
    ]  # fmt: skip
    assert files == [str(run.checkpoint)]


# --- two ranks ------------------------------------------------------------------------------------

SHARED = {"dtype": "float64", "projection": 8}
TWO = {
    "dense": {"recursion": "dense", **SHARED},
    "snapshot": {"recursion": "snapshot", "field_dtype": "float64", "history": 3, **SHARED},
    "dense by epoch": {"recursion": "dense", "update_every": "epoch", **SHARED},
    "snapshot by epoch": {"recursion": "snapshot", "update_every": "epoch", **SHARED},
}
LABELS = torch.arange(9) % 2  # so many that one rank holds more


def run_part(training, steps):
    """Two batches of four images an epoch, of which this rank has its slice; the losses."""
    size, rank = training.ranks.size, training.ranks.rank
    losses = []
    for step in steps:
        order = torch.randperm(9, generator=torch.Generator().manual_seed(step // 2))
        index = order[4 * (step % 2) :][:4].tolist()
        own = [x.chunk(size)[rank] for x in batch(step, index)]
        losses.append(training.loss(*own, temperature=0.3, alpha=0.4))
        if step % 2:
            training.end_epoch(temperature=0.3, alpha=0.4)
    return torch.stack(losses).tolist()


def share(rank, folder):
    ranks = Ranks(rank, 2, torch.device("cpu"))
    results = {}
    for name, settings in TWO.items():
        training = TrainingField(TrainConfig(**settings), len(LABELS), LABELS, ranks)
        losses = run_part(training, range(5))
        saved = training.state_dict()
        assert (saved is None) == (rank == 1)
        again = TrainingField(TrainConfig(**settings), len(LABELS), LABELS, ranks)
        again.load_state_dict(torch.load(f"{folder}/{name}.pt", weights_only=True))
        results[name] = {
            "losses": losses, "measures": training.measures(), "saved": saved,
            "went on": run_part(again, [5, 6]), "later": again.state_dict(),
        }  # fmt: skip
    return results


def test_two_ranks_hold_what_one_holds(tmp_path):
    """In float64; a checkpoint of one rank goes on on two, and is written by one."""
    alone = {}
    for name, settings in TWO.items():
        training = TrainingField(TrainConfig(**settings), len(LABELS), LABELS, ALONE)
        losses, saved = run_part(training, range(5)), copy.deepcopy(training.state_dict())
        torch.save(saved, tmp_path / f"{name}.pt")
        alone[name] = {
            "losses": losses, "measures": training.measures(), "saved": saved,
            "went on": run_part(training, [5, 6]), "later": training.state_dict(),
        }  # fmt: skip
    ranks = on_two_ranks(share, tmp_path)
    for name, wanted in alone.items():
        for found in (rank[name] for rank in ranks):
            for part in ("losses", "measures", "went on"):
                assert found[part] == pytest.approx(wanted[part], abs=1e-12), (name, part)
        for part in ("saved", "later"):
            assert_close(ranks[0][name][part], wanted[part], f"{name} {part}")


def assert_close(a, b, where):
    """To 1e-12, all the way down."""
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype, where
        assert a.shape == b.shape, where
        assert (a.double() - b.double()).abs().max() <= 1e-12, where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_close(a[key], b[key], f"{where}[{key!r}]")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for x, y in zip(a, b, strict=True):
            assert_close(x, y, where)
    else:
        assert a == b, where


def test_training_with_a_field_on_two_ranks_gives_what_one_gives(tmp_path):
    """ResNet-18 in float64 with Adam; the second epoch goes on on two ranks from one's file."""
    write_digits(tmp_path / "data", n_train=64, n_test=20)
    config = replace(
        SHORT, dataset="folder", data_dir=str(tmp_path / "data"), image_size=32, lr=1e-5,
        steps_per_epoch=2, dtype="float64", recursion="dense", epochs=1,
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rkdo.train, "build_encoder", rkdo.encoder.build_encoder)
        train(config, tmp_path / "two")
        train(replace(config, epochs=2), tmp_path / "one")
    finished = torchrun(tmp_path / "two", "--resume", "--epochs", "2")
    assert finished.returncode == 0, finished.stderr
    one, two = state_of(tmp_path / "one"), state_of(tmp_path / "two")
    for part in ("encoder", "field"):
        assert_close(two[part], one[part], part)
    assert two["losses"] == pytest.approx(one["losses"], rel=0, abs=1e-12)


# --- stopping early -------------------------------------------------------------------------------


def test_training_stops_where_the_loss_has_levelled_off_and_may_go_on(tmp_path, capfd):
    config = replace(LONG, stop_slope=1e9, stop_window=2, evaluate_every=0)
    train(config, tmp_path / "run")
    assert "levelled off (--stop-slope)" in capfd.readouterr().err
    steps = [line["step"] for line in metrics_of(tmp_path / "run")]
    assert steps == [0, 1, 2, 3, 4, 5, 6, 6]  # two epochs, and the evaluations around them
    assert (tmp_path / "run" / "encoder.safetensors").exists()
    train(config, tmp_path / "run", resume=True)  # it is still as level
    assert [line["step"] for line in metrics_of(tmp_path / "run")] == steps
    train(replace(config, stop_slope=None), tmp_path / "run", resume=True)
    train(replace(config, stop_slope=None), tmp_path / "whole")
    went_on, never_stopped = state_of(tmp_path / "run"), state_of(tmp_path / "whole")
    assert_same(went_on, never_stopped)
    losses = [line["loss"] for line in metrics_of(tmp_path / "whole") if "loss" in line]
    assert went_on["losses"] == pytest.approx(np.reshape(losses, (4, 3)).mean(1).tolist())


def test_training_that_has_no_window_of_epochs_yet_does_not_stop(tmp_path):
    train(replace(LONG, stop_slope=1e9, stop_window=5), tmp_path / "run")
    assert state_of(tmp_path / "run")["step"] == 12


# --- measures and the picture ---------------------------------------------------------------------


def test_a_sample_is_in_the_order_of_labels_and_spread_over_the_classes():
    labels = torch.tensor([2, 0, 1, 2, 0, 4, 2, 3, 0])
    assert sample(len(labels), labels, classes=3, images=2).tolist() == [1, 4, 0, 3, 5]
    assert sample(len(labels), labels, classes=1, images=5).tolist() == [1, 4, 8]
    everything = sample(len(labels), labels, classes=99, images=99)
    assert labels[everything].tolist() == sorted(labels.tolist())


def test_measures_are_what_their_definitions_say():
    labels = torch.tensor([0, 1, 0, 1, 1, 0])
    config = TrainConfig(recursion="dense", dtype="float64", projection=8)
    training = TrainingField(config, len(labels), labels, ALONE)
    assert training.measures() == {"field_entropy": 0.0, "field_purity": 1.0}  # the identity
    training.loss(*batch(0, [5, 1, 2, 3, 0]), temperature=0.2, alpha=0.7)
    p = training.field.rows(torch.arange(6)).double().numpy()
    logs = np.log(np.where(p > 0, p, 1))
    own = np.equal.outer(labels.numpy(), labels.numpy())
    assert training.measures() == pytest.approx(
        {"field_entropy": -(p * logs).sum(1).mean(), "field_purity": (p * own).sum(1).mean()}
    )


def test_metrics_tell_of_the_field_at_every_epochs_end(whole):
    config, folder = whole
    told = [line for line in metrics_of(folder) if "field_entropy" in line]
    assert [line["epoch"] for line in told] == [1, 2, 3, 4]
    assert all("loss" in line for line in told)
    entropy = [line["field_entropy"] for line in told]
    assert 0 < entropy[0] < entropy[-1]
    assert all(0 < line["field_purity"] < 1 for line in told)
    trained = TrainingField(config, 1437, load_data(config).train.labels, ALONE)
    trained.load_state_dict(state_of(folder)["field"])
    assert trained.measures() == {name: told[-1][name] for name in trained.measures()}


def test_the_command_draws_the_field(whole, tmp_path, capsys):
    _, folder = whole
    assert main(["field", str(folder)]) == 0
    assert capsys.readouterr().out == f"written: {folder / 'field.png'}\n"
    assert main(["field", str(folder), "--out", str(tmp_path / "few.png"), "--classes", "3"]) == 0
    pictures = [imread(path) for path in (folder / "field.png", tmp_path / "few.png")]
    assert pictures[0].shape == pictures[1].shape
    assert not np.array_equal(*pictures)
    (folder / "field.png").unlink()


def test_a_run_whose_field_cannot_be_drawn_is_one_line(whole, tmp_path, capsys):
    _, folder = whole
    run = shutil.copytree(folder, tmp_path / "run")
    (tmp_path / "file").write_text("mine")
    saved = torch.load(run / "checkpoint.pt", weights_only=True)

    def said(*arguments):
        assert main(["field", str(run), *arguments]) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1
        return err

    assert "--images must be at least 1, got 0" in said("--images", "0")
    assert "cannot be written: Not a directory" in said("--out", str(tmp_path / "file" / "f.png"))
    Run(run).save_checkpoint({**saved, "field": {}})
    assert "does not fit" in said()
    (run / "checkpoint.pt").unlink()
    assert "has no checkpoint yet" in said()
    Run(run).write_config(LONG)
    assert "has no field: it was trained with --recursion batch" in said()
    (run / "config.json").unlink()
    assert "holds no run" in said()
