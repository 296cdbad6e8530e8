"""A run on a folder of images of one's own: without labels, with damaged files, to the end."""

import json

import numpy as np
import pytest
from PIL import Image
from runs import (
    METRICS,
    SHORT,
    SmallEncoder,
    assert_same,
    metrics_of,
    quicken,
    state_of,
    write_digits,
)

import rkdo.evaluate
import rkdo.train
from rkdo.__main__ import main
from rkdo.errors import UserError
from rkdo.record import Run
from rkdo.train import train

COMMAND = ["--dataset", "folder", "--image-size", "32", "--epochs", "2", "--batch-size", "8"]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    quicken(monkeypatch)
    monkeypatch.setattr(rkdo.evaluate, "build_encoder", lambda config: SmallEncoder())


@pytest.fixture
def photos(tmp_path):
    root = tmp_path / "photos"
    rng = np.random.default_rng(0)
    for i in range(20):
        folder = root / ("summer" if i % 3 else "winter/ski")
        folder.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (40, 30 + i, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:02}.jpg")
    return root


@pytest.fixture
def damaged(photos):
    bad = photos / "summer" / "07.jpg"
    bad.write_bytes(bad.read_bytes()[:200])
    return photos


def run(root, out, *more):
    return main(["train", "--data-dir", str(root), "--out", str(out), *COMMAND, *more])


@pytest.mark.parametrize("recursion", ["batch", "dense", "snapshot"])
def test_images_without_labels_are_trained_on_and_not_evaluated(
    photos, tmp_path, capsys, recursion
):
    out = tmp_path / "run"
    assert run(photos, out, "--recursion", recursion, "--projection", "8") == 0
    out_, err = capsys.readouterr()
    assert "not evaluated: the images have no labels" in out_
    assert "rkdo: no labels: nothing will be evaluated" in err
    lines = Run(out).read_metrics()
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert ("field_entropy" in lines[-1]) == (recursion != "batch")
    assert "field_purity" not in lines[-1]
    assert {"curves.png", "encoder.safetensors"} <= {path.name for path in out.iterdir()}
    if recursion != "batch":
        assert main(["field", str(out)]) == 0
    assert main(["evaluate", str(out)]) == 2
    assert "has no labels" in capsys.readouterr().err


def test_a_damaged_file_is_said_before_the_run_begins(damaged, tmp_path, capsys):
    out = tmp_path / "run"
    assert run(damaged, out) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("rkdo: error: --data-dir: 1 of 20 images cannot be used: ")
    assert "07.jpg is not a readable image" in said
    assert not out.exists()


def test_check_data_lists_what_is_damaged(damaged, capsys):
    assert main(["check-data", str(damaged)]) == 2
    captured = capsys.readouterr()
    assert captured.out.startswith(str(damaged / "summer" / "07.jpg"))
    assert "1 of 20 images" in captured.err
    (damaged / "summer" / "07.jpg").unlink()
    assert main(["check-data", str(damaged)]) == 0
    assert capsys.readouterr().out == "images that can be used: all 19\n"


def test_pictures_of_every_usual_format_are_found_and_other_files_told(photos, tmp_path, capsys):
    Image.new("RGB", (20, 20)).save(photos / "a.gif")
    Image.new("RGB", (20, 20)).save(photos / "b.jfif", "JPEG")
    (photos / "notes.txt").write_text("of the summer")
    (photos / "empty.png").touch()
    (photos / ".hidden.png").touch()
    assert main(["check-data", str(photos)]) == 2
    out, err = capsys.readouterr()
    first, last = out.splitlines()
    assert first == f"{photos / 'empty.png'} is not a readable image: it is empty"
    assert last == f"1 other files are not used, the first is {photos / 'notes.txt'}"
    assert "1 of 23 images" in err
    assert run(photos, tmp_path / "run", "--skip-unreadable") == 0
    assert f"1 other files are not used, the first is {photos / 'notes.txt'}" in (
        capsys.readouterr().err
    )
    assert Run(tmp_path / "run").load_checkpoint()["images"] == 22


def test_images_beside_the_classes_are_told(tmp_path, capsys):
    write_digits(tmp_path / "data", n_train=20, n_test=20)
    for name in ("train/loose.png", "more/1.png", "train/.checkpoints/1.png"):
        (tmp_path / "data" / name).parent.mkdir(exist_ok=True)
        Image.new("L", (8, 8)).save(tmp_path / "data" / name)
    assert main(["check-data", str(tmp_path / "data")]) == 0
    assert capsys.readouterr().out == (
        f"2 other files are not used, the first is {tmp_path / 'data/more/1.png'}\n"
        "images that can be used: all 40\n"
    )
    (tmp_path / "data/train/cats").mkdir()
    Image.new("L", (8, 8)).save(tmp_path / "data/train/cats/1.png")
    assert main(["check-data", str(tmp_path / "data")]) == 2
    assert "the same classes, only train has cats" in capsys.readouterr().err


def test_resuming_wants_the_settings_and_the_images_of_the_run(photos, tmp_path, capsys):
    out = tmp_path / "run"
    assert run(photos, out, "--epochs", "1") == 0
    resumed = ["train", "--resume", "--epochs", "2", "--out", str(out)]
    assert main([*resumed, "--skip-unreadable"]) == 2
    assert "--skip-unreadable True conflicts with the run being resumed" in capsys.readouterr().err
    moved = photos.rename(tmp_path / "moved")
    (moved / "summer" / "01.jpg").rename(moved / "summer" / "other.jpg")
    assert main([*resumed, "--data-dir", str(moved)]) == 2
    assert "its 20 have other names" in capsys.readouterr().err
    (moved / "summer" / "other.jpg").rename(moved / "summer" / "01.jpg")
    assert main([*resumed, "--data-dir", str(moved)]) == 0
    assert "rkdo: goes on after step 2\n" in capsys.readouterr().err


def test_an_image_damaged_on_the_way_says_how_to_go_on(photos, tmp_path, capsys):
    out = tmp_path / "run"
    assert run(photos, out, "--epochs", "1") == 0
    resumed = ["train", "--resume", "--epochs", "2", "--out", str(out), "--workers", "0"]
    for path in photos.rglob("*.jpg"):
        path.write_bytes(path.read_bytes()[:200])
    assert main(resumed) == 2
    said = capsys.readouterr().err
    assert "put it back, or another image in its place, and go on with --resume" in said
    for path in photos.rglob("*.jpg"):
        Image.new("RGB", (33, 33)).save(path)
    assert main(resumed) == 0


def test_a_run_goes_on_without_the_same_files_to_the_same_bits(damaged, tmp_path, capsys):
    one, two = tmp_path / "one", tmp_path / "two"
    assert run(damaged, one, "--skip-unreadable") == 0
    assert "1 unreadable images are left out" in capsys.readouterr().err
    assert json.loads((one / "skipped.json").read_text()) == {
        "data_dir": ["summer/07.jpg"], "evaluate_dir": [],
    }  # fmt: skip
    assert run(damaged, two, "--skip-unreadable", "--epochs", "1") == 0
    # Mended in between: the run still is without it.
    (damaged / "summer" / "07.jpg").write_bytes((damaged / "summer" / "08.jpg").read_bytes())
    assert main(["train", "--out", str(two), "--resume", "--epochs", "2"]) == 0
    assert_same(state_of(one), state_of(two))
    assert metrics_of(one) == metrics_of(two)


def test_overwriting_forgets_what_was_skipped(damaged, photos, tmp_path):
    out = tmp_path / "run"
    assert run(damaged, out, "--skip-unreadable") == 0
    (damaged / "summer" / "07.jpg").unlink()
    assert run(photos, out, "--overwrite") == 0
    assert not (out / "skipped.json").exists()


@pytest.mark.parametrize(
    "content", [b"{", b"[]", b"{}", b'{"data_dir": "a", "evaluate_dir": []}', b"\xff" * 9]
)
def test_a_foreign_list_of_skipped_files_is_one_line(photos, tmp_path, content):
    config = SHORT.__class__(
        dataset="folder", data_dir=str(photos), image_size=32, epochs=1, batch_size=8
    )
    train(config, tmp_path / "run")
    (tmp_path / "run" / "skipped.json").write_bytes(content)
    with pytest.raises(UserError, match=r"skipped\.json") as caught:
        train(config, tmp_path / "run", resume=True)
    assert "\n" not in str(caught.value)


def test_a_run_with_other_random_views_is_not_gone_on_with(tmp_path):
    train(SHORT, tmp_path / "run")
    path = tmp_path / "run" / "config.json"
    values = json.loads(path.read_text())
    assert values.pop("views") == 2
    path.write_text(json.dumps(values))
    with pytest.raises(UserError, match="began with the random views of another version of rkdo"):
        train(SHORT, tmp_path / "run", resume=True)


def test_half_precision_trains_and_gives_unit_embeddings(tmp_path, monkeypatch):
    seen = []
    objective = rkdo.train.build_objective

    def watched(config, field):
        loss = objective(config, field)

        def call(queries, keys, *rest):
            seen.append(queries)
            return loss(queries, keys, *rest)

        return call

    monkeypatch.undo()  # the real encoder
    monkeypatch.setattr(rkdo.train, "build_objective", watched)
    monkeypatch.setattr(rkdo.train, "evaluate", lambda *_: dict(METRICS))
    losses = {}
    for precision in ("full", "bf16"):
        config = SHORT.__class__(
            epochs=1, steps_per_epoch=2, batch_size=16, precision=precision, device="cpu"
        )
        losses[precision] = [
            line["loss"] for line in train(config, tmp_path / precision) if "loss" in line
        ]
    assert all(queries.dtype.itemsize == 4 for queries in seen)
    for queries in seen:
        assert abs(queries.norm(dim=1) - 1).max() < 1e-6
    assert not (seen[0] == seen[2]).all()
    assert abs(seen[0] - seen[2]).max() < 0.05
    assert losses["full"] == pytest.approx(losses["bf16"], rel=0.05)
