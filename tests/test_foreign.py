"""Files and settings that rkdo did not write: one line, never a traceback."""

import copy
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from runs import SHORT, SmallEncoder, quick_run, quicken

from rkdo.__main__ import main
from rkdo.config import AT_MOST, TrainConfig
from rkdo.errors import UserError
from rkdo.record import Run
from rkdo.state import State
from rkdo.train import train

NESTED = 200_000


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return quick_run(tmp_path_factory.mktemp("foreign") / "run")


@pytest.fixture
def run(whole, tmp_path, monkeypatch):
    quicken(monkeypatch)
    return Run(shutil.copytree(whole, tmp_path / "run"))


def resume(run, capsys):
    """What `rkdo train --resume` says, and its exit code."""
    code = main(["train", "--out", str(run.folder), "--resume"])
    _, err = capsys.readouterr()
    said = [line for line in err.splitlines() if line.startswith("rkdo: ")]
    assert "Traceback" not in err
    return code, said


def leaves(values, path=()):
    """Where in nested dicts, lists and tuples everything is, the containers too."""
    items = []
    if isinstance(values, dict):
        items = list(values.items())
    elif isinstance(values, list | tuple):
        items = list(enumerate(values))
    for key, value in items:
        yield (*path, key)
        yield from leaves(value, (*path, key))


def replaced(values, path, foreign):
    if not path:
        return foreign
    key, *rest = path
    copied = list(values) if isinstance(values, tuple) else copy.copy(values)
    copied[key] = replaced(values[key], rest, foreign)
    return tuple(copied) if isinstance(values, tuple) else copied


FOREIGN = {
    "none": None,
    "tensor": torch.zeros(2, 3),
    "text": "x",
    "list": [],
    "dict": {},
    "negative": -1,
    "infinite": float("inf"),
    "complex": torch.zeros(8, dtype=torch.complex64),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_whatever_stands_wherever_in_a_checkpoint_it_fits_or_is_one_line(kind, run):
    saved = run.load_checkpoint()
    places = [place for place in leaves(saved) if place[0] not in ("format", "version")]
    assert ("optimizer", "state", 0, "exp_avg") in places
    refused = 0
    for place in places:
        encoder = SmallEncoder()
        adam = torch.optim.Adam(encoder.parameters(), lr=SHORT.lr, weight_decay=SHORT.weight_decay)
        state = State(encoder, adam, images=saved["images"])
        said = ""
        try:
            state.restore(replaced(saved, place, FOREIGN[kind]), SHORT, run.checkpoint, 3)
        except UserError as error:
            said = str(error)
            refused += 1
        assert len(said.splitlines()) <= 1, place
    assert refused > len(places) / 2


@pytest.mark.parametrize("name", ["exp_avg", "exp_avg_sq", "step"])
def test_moments_of_another_shape_do_not_fit(name, run, capsys):
    saved = run.load_checkpoint()
    saved["optimizer"]["state"][2][name] = torch.zeros(3, 7)
    run.save_checkpoint(saved)
    code, said = resume(run, capsys)
    assert code == 2
    assert "does not fit" in said[0]


@pytest.mark.parametrize("version", [torch.zeros(2), torch.tensor(3), None, "3", 3.0, True, 99])
def test_another_version_is_one_line(version, run, capsys):
    run.save_checkpoint({**run.load_checkpoint(), "version": version})
    code, said = resume(run, capsys)
    assert code == 2
    assert "has version" in said[0]
    assert len(said[0]) < 300


@pytest.mark.parametrize("brackets", ["[", '{"a":'])
@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl"])
def test_json_that_is_nested_deeply_is_one_line(brackets, name, run, capsys):
    path = run.folder / name
    path.write_text(brackets * NESTED + "\n" + path.read_text())
    code, said = resume(run, capsys)
    assert code == 2
    assert str(path) in said[0]
    assert len(said) == 1


@pytest.mark.parametrize(
    "line", ["5", "[]", "null", '"x"', "{}", '{"step": 1}', '{"step": "x", "epoch": 1}',
             '{"step": 1, "epoch": {}}', '{"step": true, "epoch": 1}'],
)  # fmt: skip
def test_a_line_of_metrics_that_is_none_is_one_line(line, run, capsys):
    lines = run.metrics.read_bytes().splitlines(keepends=True)
    lines[1] = line.encode().ljust(len(lines[1]) - 1) + b"\n"
    run.metrics.write_bytes(b"".join(lines))
    code, said = resume(run, capsys)
    assert code == 2
    assert "metrics.jsonl holds a line that is not a step's metrics" in said[0]
    with pytest.raises(UserError, match="is not a step's metrics"):
        run.read_metrics()


@pytest.mark.parametrize("name", AT_MOST)
def test_absurd_numbers_are_refused(name):
    for value in (AT_MOST[name] + 1, 10**12, 10**40):
        with pytest.raises(UserError, match=f"must be at most {AT_MOST[name]}, got {value}"):
            TrainConfig(**{name: value})


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--depth 3 --recursion dense", "--depth 3 needs --recursion batch, got dense"),
        ("--depth=3 --recursion snapshot", "--depth 3 needs --recursion batch, got snapshot"),
        ("--no-detach-target --method icon", "--detach-target False needs --method rkdo, got icon"),
        ("--alpha 0.5 --method infonce", "--alpha 0.5 needs --method rkdo, got infonce"),
        ("--field_dtype auto", "--field-dtype auto needs --recursion dense or snapshot, got batch"),
        ("--debias 0.2", "--debias 0.2 needs --method icon or a part of it"),
        ("--epoch 3", "did you mean --epochs?"),
        ("--temprature 0.5", "did you mean --temperature?"),
        ("--batchsize=64", "did you mean --batch-size?"),
        ("--resum", "did you mean --resume?"),
    ],
)
def test_a_flag_that_nothing_reads_is_refused_at_its_default_too(arguments, said, tmp_path, capsys):
    assert main(["train", "--out", str(tmp_path / "out"), *arguments.split()]) == 2
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(("word", "meant"), [("trian", "train"), ("eval", "evaluate")])
def test_a_command_that_is_almost_one(word, meant, capsys):
    assert main([word]) == 2
    assert capsys.readouterr().err.endswith(f"; did you mean {meant}?\n")


def test_nothing_is_meant_by_what_is_like_nothing(tmp_path, capsys):
    assert main(["train", "--out", str(tmp_path / "out"), "--qqqq", "3"]) == 2
    assert "did you mean" not in capsys.readouterr().err


def test_the_version(capsys):
    from rkdo_kernels import __version__

    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"rkdo {__version__}\n"


def test_equal_encoders_are_equal_files(run):
    from safetensors import safe_open
    from safetensors.torch import load_file

    tensors = {"b.weight": torch.randn(3, 5), "a": torch.arange(7), "c": torch.ones(2).half()}
    about = {"architecture": "resnet18", "stem": "cifar", "image_size": "32", "more": "ä\n"}
    seen = set()
    for _ in range(20):
        run.save_encoder(tensors, about)
        seen.add(run.encoder.read_bytes())
    assert len(seen) == 1
    loaded = load_file(run.encoder)
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)
    with safe_open(run.encoder, "pt") as file:
        assert file.metadata() == about
    header = run.encoder.read_bytes()[:8]
    assert int.from_bytes(header, "little") % 8 == 0


# --- the last resort ------------------------------------------------------------------------------


def fail(message="no\nfile", kind=KeyError):
    def failing(*arguments, **how):
        raise kind(message)

    return failing


def test_what_nobody_foresaw_is_one_line_and_a_file_in_the_run(run, capsys, monkeypatch):
    monkeypatch.setattr("rkdo.train.train", fail())
    code, said = resume(run, capsys)
    assert code == 1
    written = run.folder / "traceback.txt"
    assert said == [
        f"rkdo: error: rkdo itself failed (KeyError: 'no\\nfile'); the traceback is in {written}"
    ]
    assert "raise kind(message)" in written.read_text()
    monkeypatch.undo()
    quicken(monkeypatch)
    train(SHORT, run.folder, overwrite=True)
    assert not written.exists()


def test_without_a_run_the_file_is_a_temporary_one(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("rkdo.train.train", fail(kind=ZeroDivisionError))
    assert main(["train", "--out", str(tmp_path / "out")]) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    name = re.search(r"the traceback is in (\S+)$", err)[1]
    assert "ZeroDivisionError" in Path(name).read_text()
    assert not (tmp_path / "out").exists()


def test_a_traceback_that_cannot_be_written_is_said(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "none"))
    monkeypatch.setattr("rkdo.train.train", fail())
    assert main(["train", "--out", str(tmp_path / "out")]) == 1
    assert "its traceback could not be written" in capsys.readouterr().err


@pytest.mark.parametrize("error", [
    MemoryError("no"), RuntimeError("DefaultCPUAllocator: not enough memory: 9 bytes"),
    torch.OutOfMemoryError("CUDA out of memory"),
], ids=lambda error: type(error).__name__)  # fmt: skip
def test_too_little_memory_is_no_failure_of_rkdo(error, tmp_path, capsys, monkeypatch):
    def failing(*arguments, **how):
        raise error

    monkeypatch.setattr("rkdo.train.train", failing)
    assert main(["train", "--out", str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err.startswith("rkdo: error: not enough memory: ")


def test_a_config_of_json_that_is_absurd_is_one_line(run, capsys):
    path = run.folder / "config.json"
    about = json.loads(path.read_text())
    about["config"]["projection"] = 10**30
    path.write_text(json.dumps(about))
    code, said = resume(run, capsys)
    assert code == 2
    assert "--projection must be at most" in said[0]
