"""The command line: what is refused, in one line and without a trace on the disk."""

import json
import sys

import pytest

from rkdo.__main__ import main
from rkdo.config import TrainConfig
from rkdo.record import Run


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("", "train, evaluate, embed, field"),
        ("tune", "train"),
        ("train", "--out"),
        ("train --out OUT --dataset mnist", "--dataset"),
        ("train --out OUT --batch-size many", "--batch-size"),
        ("train --out OUT --batch-size 1", "--batch-size must be at least 2, got 1"),
        ("train --out OUT --temperature 0", "--temperature must be at least 1e-6, got 0.0"),
        ("train --out OUT --epochs -3", "--epochs must be at least 1, got -3"),
        ("train --out OUT --batch-size 5000", "at most the 1437 training images, got 5000"),
        ("train --out OUT --steps-per-epoch 23", "--steps-per-epoch must be at most 22"),
        ("train --out OUT --colour red", "--colour"),
        ("train --out OUT --resume", "OUT holds no run"),
        ("train --out OUT --resume --overwrite", "exclude each other"),
        ("train --out FILE", "must be a folder, FILE is a file"),
        ("train --out FILE/run", "FILE/run cannot be written: Not a directory"),
        ("train --out OUT --dataset cifar10 --data-dir HERE", "HERE holds no intact cifar10"),
        (
            "train --out OUT --dataset folder --data-dir HERE",
            "--out must not lie in --data-dir, got OUT in HERE",
        ),
        ("train --out OUT --data-dir HERE", "--data-dir HERE needs --dataset cifar10 or"),
        ("train --out OUT --download", "--download True needs --dataset cifar10 or"),
        ("train --out OUT --resume --skip-unreadable", "OUT holds no run"),
        ("train --out=OUT --resume --evaluate-dir HERE", "OUT holds no run"),
        ("check-data HERE", "there are none below HERE"),
        ("check-data FILE", "must be a folder of images, FILE is a file"),
        ("evaluate", "PATH"),
        ("evaluate OUT", "OUT holds no run"),
        ("evaluate OUT --protocol mine", "--protocol"),
        ("train --out OUT --recursion sparse", "--recursion"),
        (
            "train --out OUT --recursion dense --method icon",
            "--recursion dense needs --method rkdo",
        ),
        ("train --out OUT --history 2", "--history 2 needs --recursion snapshot, got batch"),
        ("train --out OUT --alpha-final 0.1", "--alpha-final 0.1 needs --alpha-schedule linear or"),
        ("embed OUT --data HERE", "--out"),
        ("embed OUT --data HERE --out HERE/x.txt", "--out must end in .npy or .csv, got HERE/x"),
        ("embed OUT --data HERE --out HERE/no/x.npy", "there is no folder HERE/no"),
        ("embed OUT --data HERE/no --out HERE/x.npy", "there is no folder HERE/no"),
        ("embed OUT --data HERE --out HERE/x.npy", "--data must hold images (jpg, "),
        ("embed OUT --data HERE --out HERE/x.npy --workers -1", "--workers must be at least 0"),
        ("embed OUT --data HERE --out HERE/x.npy --batch-size 0", "--batch-size must be at least"),
        ("field", "PATH"),
        ("field OUT", "OUT holds no run"),
        ("field OUT --out HERE/x.jpg", "--out must end in .png, got HERE/x.jpg"),
        ("train --out=", "--out must name a folder, got ''"),
        ("field OUT --classes 0", "--classes must be at least 1, got 0"),
    ],
)
def test_bad_input_is_one_clear_line_and_exit_code_2(arguments, said, tmp_path, capsys):
    file = tmp_path / "file"
    file.write_text("mine")
    places = {"OUT": tmp_path / "out", "FILE": file, "HERE": tmp_path}
    for name, path in places.items():
        arguments, said = arguments.replace(name, str(path)), said.replace(name, str(path))
    assert (
        main(
            [
                *arguments.split(),
                *(["--device", "cpu"] if "--out" in arguments and "field" not in arguments else []),
            ]
        )
        == 2
    )
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("rkdo: error: ")
    assert err.count("\n") == 1
    assert said in err
    assert file.read_text() == "mine"
    assert list(tmp_path.iterdir()) == [file]


def test_a_folder_of_something_else_is_not_written_into(tmp_path, capsys):
    (tmp_path / "thesis.tex").write_text("mine")
    assert main(["train", "--out", str(tmp_path)]) == 2
    assert "is not empty" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_resuming_takes_the_settings_of_the_run(tmp_path, monkeypatch):
    run = Run(tmp_path / "run")
    run.create(TrainConfig(method="icon", epochs=3, dataset="stl10", download=True))
    run.close()
    calls = []

    def train(config, out, **how):
        calls.append((config, out, how))
        return [{"linear_probe": 0.1}]

    monkeypatch.setattr("rkdo.train.train", train)
    assert main(["train", "--out", str(run.folder), "--resume", "--epochs", "9"]) == 0
    config = TrainConfig(method="icon", epochs=9, dataset="stl10", download=True)
    assert calls == [(config, run.folder, {"resume": True, "overwrite": False, "wait": False})]


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"config": {}}', json.dumps({"config": {"dataset": "digits"}})]
)
def test_a_config_that_is_not_one_is_one_line(content, tmp_path, capsys):
    (tmp_path / "config.json").write_text(content)
    assert main(["train", "--out", str(tmp_path), "--resume"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert str(tmp_path / "config.json") in err


def test_help_names_every_setting(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["train", "--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for name in TrainConfig().to_dict():
        assert "--" + name.replace("_", "-") in text
    assert "--steps-per-epoch 11" in text  # the paper's protocol


def test_a_library_that_is_missing_is_one_line(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tyro", None)
    assert main(["train"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("rkdo: error: needs tyro, which is not installed")
    assert err.count("\n") == 1
