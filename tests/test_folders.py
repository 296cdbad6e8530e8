"""Folders of images: with labels and without, with files that cannot be read."""

import numpy as np
import pytest
from PIL import Image

from rkdo.augment import augmentation
from rkdo.batches import TwoViews, plain_view
from rkdo.config import TrainConfig
from rkdo.data import Skipped, find_unreadable, load_data, load_training
from rkdo.errors import UserError


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(5)
    for part, n in (("train", 6), ("test", 6)):
        for kind in ("cat", "dog"):
            (tmp_path / part / kind).mkdir(parents=True)
            for i in range(n):
                pixels = rng.integers(0, 256, (20 + i, 30, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / part / kind / f"{i}.png")
    return tmp_path


def test_a_folder_of_pngs_is_read_pixel_for_pixel(folder):
    config = TrainConfig(dataset="folder", data_dir=str(folder), image_size=16)
    data = load_data(config)
    assert data.train.labels.tolist() == [0] * 6 + [1] * 6
    written = np.asarray(Image.open(folder / "train" / "dog" / "1.png"))
    assert np.array_equal(data.train[7].permute(1, 2, 0).numpy(), written)
    assert TwoViews(data.train, augmentation(config), 0).__getitems__([(0, 7), (0, 1)])[
        0
    ].shape == (2, 3, 16, 16)
    assert plain_view(config)(data.train[7]).shape == (3, 16, 16)


def test_a_folder_may_call_its_test_images_val(folder):
    (folder / "test").rename(folder / "val")
    data = load_data(TrainConfig(dataset="folder", data_dir=str(folder)))
    assert len(data.test.labels) == 12


def test_a_broken_png_is_named(folder):
    broken = folder / "train" / "cat" / "0.png"
    broken.write_bytes(broken.read_bytes()[:100])
    data = load_data(TrainConfig(dataset="folder", data_dir=str(folder)))
    with pytest.raises(UserError, match=r"cat/0\.png is not a readable image"):
        data.train[0]


def test_a_folder_whose_classes_differ_is_refused(folder):
    (folder / "test" / "dog").rename(folder / "test" / "wolf")
    with pytest.raises(UserError, match="must hold the same classes"):
        load_data(TrainConfig(dataset="folder", data_dir=str(folder)))


def test_fewer_training_images_than_neighbours_are_refused(folder):
    for path in (folder / "train").glob("*/[2-5].png"):
        path.unlink()
    with pytest.raises(UserError, match="at least 5 training images, got 4"):
        load_data(TrainConfig(dataset="folder", data_dir=str(folder)))


def test_too_few_test_images_are_refused(folder):
    for path in (folder / "test" / "dog").glob("[1-5].png"):
        path.unlink()
    with pytest.raises(UserError, match="12 test images, got 2 and 7"):
        load_data(TrainConfig(dataset="folder", data_dir=str(folder)))


# --- folders without labels, and with unreadable files --------------------------------------------


def folder_config(root, **settings):
    return TrainConfig(dataset="folder", data_dir=str(root), image_size=16, **settings)


@pytest.fixture
def unlabelled(tmp_path):
    root = tmp_path / "any"
    for i, name in enumerate(["1.png", "deep/er/2.png", "deep/3.jpg", "z/4.png"]):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 20), (9 * i, 9 * i, 9 * i)).save(root / name, quality=100)
    return root


def test_a_folder_without_labels_is_all_its_images(unlabelled):
    data = load_training(folder_config(unlabelled))
    assert (len(data.images), data.labels, data.judged) == (4, None, None)
    assert [int(data.images[i].max()) for i in range(4)] == [0, 18, 9, 27]
    with pytest.raises(UserError, match=r"has no labels .* --evaluate-dir names a folder that has"):
        load_data(folder_config(unlabelled))


def test_what_has_no_labels_may_be_evaluated_elsewhere(unlabelled, folder):
    data = load_training(folder_config(unlabelled, evaluate_dir=str(folder)))
    assert (len(data.images), data.labels) == (4, None)
    assert (len(data.judged.train), len(data.judged.test), data.judged.classes) == (12, 12, 2)
    with pytest.raises(UserError, match="--evaluate-dir must hold the folders train and test"):
        load_training(folder_config(unlabelled, evaluate_dir=str(unlabelled)))


def test_what_has_labels_may_be_evaluated_elsewhere_too(folder, tmp_path):
    other = tmp_path / "other"
    for part in ("train", "test"):
        (other / part).mkdir(parents=True)
        (folder / part / "cat").rename(other / part / "lynx")
        (folder / part / "dog").rename(other / part / "wolf")
        for kind in ("cat", "dog"):
            (folder / part / kind).mkdir()
            Image.new("L", (16, 16)).save(folder / part / kind / "0.png")
    data = load_training(folder_config(folder, evaluate_dir=str(other)))
    assert data.labels.tolist() == [0, 1]  # though two are too few to evaluate on
    assert len(data.judged.test) == 12


def test_flat_folders_train_and_test_say_what_is_missing(tmp_path):
    for part in ("train", "test"):
        (tmp_path / part).mkdir()
        Image.new("L", (16, 16)).save(tmp_path / part / "0.png")
    with pytest.raises(UserError, match=r"images without labels: --data-dir .*/train\)"):
        load_training(folder_config(tmp_path))


def test_unreadable_files_are_found_before_anything_is_trained(unlabelled, folder):
    assert find_unreadable(TrainConfig()) == Skipped()
    assert find_unreadable(folder_config(unlabelled)) == Skipped()
    (unlabelled / "deep" / "bad.png").write_bytes(b"no image")
    (folder / "test" / "cat" / "0.png").write_bytes(b"no image")
    settings = {"evaluate_dir": str(folder)}
    with pytest.raises(UserError, match=r"^--data-dir: 1 of 5 images .*deep/bad\.png is not a re"):
        find_unreadable(folder_config(unlabelled, **settings))
    (unlabelled / "deep" / "bad.png").unlink()
    with pytest.raises(UserError, match=r"^--evaluate-dir: 1 of 24 images cannot .*cat/0\.png is"):
        find_unreadable(folder_config(unlabelled, **settings))


def test_an_error_names_the_first_of_many_unreadable_files(tmp_path):
    for i in range(9):
        (tmp_path / f"{i}.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"9 of 9 .*/4\.png is .*; and 4 more \(--skip-unreadable"):
        find_unreadable(folder_config(tmp_path))


def test_what_is_skipped_is_left_out_wherever_it_is(unlabelled, folder):
    (unlabelled / "deep" / "bad.png").write_bytes(b"no image")
    (folder / "train" / "dog" / "3.png").write_bytes(b"no image")
    config = folder_config(unlabelled, evaluate_dir=str(folder), skip_unreadable=True)
    skipped = find_unreadable(config)
    assert skipped == Skipped(("deep/bad.png",), ("train/dog/3.png",))
    data = load_training(config, skipped)
    assert len(data.images) == 4
    assert data.judged.train.labels.tolist() == [0] * 6 + [1] * 5
    for images in (data.images, data.judged.train):
        assert all(images[i].shape[0] == 3 for i in range(len(images)))
