"""Loaders on small archives in the real formats; order and augmentations as functions of a seed."""

import hashlib
import itertools
import pickle

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier
from torchvision import datasets

from rkdo.augment import augmentation
from rkdo.batches import Batches, PlainViews, TwoViews, loading, plain_view, training_loader
from rkdo.config import TrainConfig
from rkdo.data import TensorImages, load_data
from rkdo.errors import UserError

CPU = torch.device("cpu")


def views_of(images, config, *keys, seed=0):
    """Both views of the images `keys`, (epoch, index)."""
    return TwoViews(images, augmentation(config), seed).__getitems__(keys)[:2]


def joined(lists):
    return list(itertools.chain.from_iterable(lists))


def md5(path):
    return hashlib.md5(path.read_bytes()).hexdigest()


def random_images(n, size, seed):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (n, 3, size, size), dtype=np.uint8)


# --- digits ---------------------------------------------------------------------------------------


def test_digits_are_the_real_ones_split_without_overlap():
    data = load_data(TrainConfig())
    assert (len(data.train.labels), len(data.test.labels), data.classes) == (1437, 360, 10)
    assert data.train[0].shape == (1, 32, 32)
    assert data.train[0].dtype == torch.uint8
    seen = {image.numpy().tobytes() for image in data.train.images}
    assert not any(image.numpy().tobytes() in seen for image in data.test.images)
    counts = torch.bincount(data.test.labels)
    assert counts.min() >= 34  # every class is held out alike


def test_digits_enlarged_are_still_the_digits_of_scikit_learn():
    from sklearn.datasets import load_digits

    data = load_data(TrainConfig())
    small = torch.nn.functional.avg_pool2d(data.test.images.float(), 4) / 255 * 16
    bunch = load_digits()
    nearest = KNeighborsClassifier(1).fit(bunch.data, bunch.target)
    assert nearest.score(small.flatten(1).numpy(), data.test.labels.numpy()) > 0.98


def test_an_augmented_digit_stays_the_digit_it_is():
    data = load_data(TrainConfig())
    plain = plain_view(TrainConfig())
    reference = torch.stack([plain(data.train[i])[0].flatten() for i in range(1437)])
    nearest = KNeighborsClassifier(5).fit(reference.numpy(), data.train.labels.numpy())
    seen = views_of(data.test, TrainConfig(), *((0, i) for i in range(360)))[0][:, 0].flatten(1)
    assert nearest.score(seen.numpy(), data.test.labels.numpy()) > 0.6
    flipped = nearest.score(seen.view(-1, 32, 32).flip(2).flatten(1), data.test.labels.numpy())
    assert flipped < 0.5  # so flipping, had it been among them, would have shown


# --- the real formats -----------------------------------------------------------------------------


@pytest.fixture
def cifar10(tmp_path, monkeypatch):
    """CIFAR-10's own files with 4 images each, whose checksums torchvision is told to expect."""
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    names = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
    images, labels = {}, {}
    for seed, name in enumerate(names):
        n = 4 if name != "test_batch" else 12
        images[name] = random_images(n, 32, seed)
        labels[name] = [(seed + i) % 10 for i in range(n)]
        entry = {
            "batch_label": name,
            "labels": labels[name],
            "data": images[name].reshape(n, 3072),
            "filenames": [f"{i}.png" for i in range(n)],
        }
        (folder / name).write_bytes(pickle.dumps(entry, protocol=2))
    meta = {"label_names": list("abcdefghij"), "num_cases_per_batch": 4, "num_vis": 3072}
    (folder / "batches.meta").write_bytes(pickle.dumps(meta, protocol=2))
    kind = datasets.CIFAR10
    monkeypatch.setattr(kind, "train_list", [[name, md5(folder / name)] for name in names[:5]])
    monkeypatch.setattr(kind, "test_list", [["test_batch", md5(folder / "test_batch")]])
    monkeypatch.setattr(kind, "meta", {**kind.meta, "md5": md5(folder / "batches.meta")})
    return tmp_path, images, labels


def test_cifar10_is_read_as_it_was_written(cifar10):
    root, images, labels = cifar10
    data = load_data(TrainConfig(dataset="cifar10", data_dir=str(root)))
    written = np.concatenate([images[f"data_batch_{i}"] for i in range(1, 6)])
    assert np.array_equal(data.train.images.numpy(), written)
    assert data.train.labels.tolist() == joined(labels[f"data_batch_{i}"] for i in range(1, 6))
    assert np.array_equal(data.test.images.numpy(), images["test_batch"])
    assert data.test.labels.tolist() == labels["test_batch"]


def test_a_damaged_cifar10_is_refused(cifar10):
    root, *_ = cifar10
    path = root / "cifar-10-batches-py" / "data_batch_3"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"--data-dir .* holds no intact cifar10"):
        load_data(TrainConfig(dataset="cifar10", data_dir=str(root)))


def test_cifar100_is_read_with_its_fine_labels(tmp_path, monkeypatch):
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    images = {"train": random_images(20, 32, 1), "test": random_images(12, 32, 2)}
    fine = {"train": [5 * i for i in range(20)], "test": list(range(12))}
    for name, pixels in images.items():
        entry = {
            "data": pixels.reshape(-1, 3072),
            "fine_labels": fine[name],
            "coarse_labels": [0] * len(pixels),
        }
        (folder / name).write_bytes(pickle.dumps(entry, protocol=2))
    names = [f"class {i}" for i in range(100)]
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": names}, protocol=2))
    kind = datasets.CIFAR100
    for name in ("train", "test"):
        monkeypatch.setattr(kind, f"{name}_list", [[name, md5(folder / name)]])
    monkeypatch.setattr(kind, "meta", {**kind.meta, "md5": md5(folder / "meta")})
    data = load_data(TrainConfig(dataset="cifar100", data_dir=str(tmp_path)))
    assert np.array_equal(data.train.images.numpy(), images["train"])
    assert data.train.labels.tolist() == fine["train"]
    assert np.array_equal(data.test.images.numpy(), images["test"])


def test_stl10_is_read_from_its_column_major_binaries(tmp_path, monkeypatch):
    folder = tmp_path / "stl10_binary"
    folder.mkdir()
    images = {"train": random_images(14, 96, 3), "test": random_images(12, 96, 4)}
    labels = {name: [i % 10 + 1 for i in range(len(images[name]))] for name in images}  # 1 to 10
    for name, pixels in images.items():
        (folder / f"{name}_X.bin").write_bytes(pixels.transpose(0, 1, 3, 2).tobytes())
        (folder / f"{name}_y.bin").write_bytes(bytes(labels[name]))
    (folder / "unlabeled_X.bin").write_bytes(b"")
    (folder / "class_names.txt").write_text("\n".join("abcdefghij"))
    kind = datasets.STL10
    for part in ("train_list", "test_list"):
        files = [[name, md5(folder / name)] for name, _ in getattr(kind, part)]
        monkeypatch.setattr(kind, part, files)
    config = TrainConfig(dataset="stl10", data_dir=str(tmp_path))
    data = load_data(config)
    assert np.array_equal(data.train.images.numpy(), images["train"])
    assert data.train.labels.tolist() == [label - 1 for label in labels["train"]]
    assert np.array_equal(data.test.images.numpy(), images["test"])
    assert views_of(data.train, config, (0, 3))[0].shape == (1, 3, 64, 64)
    assert plain_view(config)(data.test[0]).shape == (3, 64, 64)


@pytest.mark.parametrize("dataset", ["cifar10", "cifar100", "stl10", "folder"])
def test_missing_images_are_one_line(dataset, tmp_path):
    with pytest.raises(UserError, match="--data-dir") as caught:
        load_data(TrainConfig(dataset=dataset, data_dir=str(tmp_path / "nowhere")))
    assert "\n" not in str(caught.value)


# --- views ----------------------------------------------------------------------------------------


def test_views_depend_on_seed_epoch_and_index_alone():
    data = load_data(TrainConfig())
    views = TwoViews(data.train, augmentation(TrainConfig()), seed=7)
    first, second, index = views.__getitems__([(3, 11)])
    assert index.tolist() == [11]
    assert not torch.equal(first, second)
    torch.manual_seed(123)
    again = views.__getitems__([(0, 0), (3, 11), (3, 12)])  # whatever else is in the batch
    assert torch.equal(again[0][1], first[0])
    assert torch.equal(again[1][1], second[0])
    same = TensorImages(data.train.images[11].expand(20, -1, -1, -1), torch.zeros(20))
    others = [
        views_of(same, TrainConfig(), key, seed=seed)[0]
        for seed, key in [(7, (3, 12)), (7, (4, 11)), (8, (3, 11))]
    ]
    assert not any(torch.equal(other, first) for other in others)


@pytest.mark.parametrize("dataset", ["digits", "cifar10"])
def test_views_leave_the_global_generators_alone(dataset):
    data = load_data(TrainConfig())
    before, numpys = torch.get_rng_state(), np.random.get_state()[1].copy()
    views_of(data.train, TrainConfig(dataset=dataset), (0, 0))
    assert torch.equal(torch.get_rng_state(), before)
    assert np.array_equal(np.random.get_state()[1], numpys)


def test_workers_make_the_same_batches():
    data = load_data(TrainConfig())
    batches = Batches(n_images=1437, batch_size=8, steps_per_epoch=2, epochs=2, seed=1, start=1)
    alone = list(training_loader(data.train, TrainConfig(workers=0), batches, CPU))
    helped = list(training_loader(data.train, TrainConfig(workers=2), batches, CPU))
    assert len(alone) == len(helped) == 3
    for a, b in zip(alone, helped, strict=True):
        assert a[0].shape == (8, 3, 32, 32)
        assert torch.equal(a[0], b[0])
        assert torch.equal(a[1], b[1])
        assert torch.equal(a[2], b[2])


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_say_which_images_they_are_of(workers):
    data = load_data(TrainConfig())
    batches = Batches(n_images=1437, batch_size=8, steps_per_epoch=2, epochs=2, seed=1, start=1)
    loader = training_loader(data.train, TrainConfig(workers=workers), batches, CPU)
    for keys, (first, _, index) in zip(batches, loader, strict=True):
        assert index.dtype == torch.int64
        assert index.tolist() == [key[1] for key in keys]
        alone = views_of(data.train, TrainConfig(), keys[3], seed=TrainConfig().seed)
        assert torch.equal(first[3], alone[0][0])


def test_the_evaluation_view_of_an_image_of_the_right_size_is_the_image():
    data = load_data(TrainConfig())
    view = PlainViews(data.test, plain_view(TrainConfig()))[5]
    assert torch.allclose((view + 1) / 2 * 255, data.test[5].expand(3, -1, -1).float(), atol=1e-4)


def test_beside_a_gpu_processes_prepare_images_unless_told_otherwise(monkeypatch):
    gpu = torch.device("cuda")
    monkeypatch.setattr("os.cpu_count", lambda: 6)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert loading(TrainConfig(), CPU) == {"num_workers": 0, "pin_memory": False}
    assert loading(TrainConfig(), gpu) == {"num_workers": 6, "pin_memory": True}
    assert loading(TrainConfig(workers=1), gpu) == {"num_workers": 1, "pin_memory": True}
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert loading(TrainConfig(), gpu)["num_workers"] == 3
    monkeypatch.setattr("os.cpu_count", lambda: 64)
    assert loading(TrainConfig(), gpu)["num_workers"] == 8


# --- order ----------------------------------------------------------------------------------------


def test_an_epoch_sees_every_image_once_and_drops_the_incomplete_batch():
    batches = list(Batches(n_images=23, batch_size=5, steps_per_epoch=4, epochs=2, seed=3))
    assert [len(batch) for batch in batches] == [5] * 8
    for epoch in (0, 1):
        keys = joined(batches[4 * epoch : 4 * epoch + 4])
        assert {key[0] for key in keys} == {epoch}
        assert len({key[1] for key in keys}) == 20
    orders = [[key[1] for key in joined(batches[4 * e : 4 * e + 4])] for e in (0, 1)]
    assert orders[0] != orders[1]
    assert orders[0] != sorted(orders[0])


@pytest.mark.parametrize("n_ranks", [2, 3])
def test_the_ranks_slices_in_turn_are_the_batch_of_one(n_ranks):
    settings = {"n_images": 40, "batch_size": 6, "steps_per_epoch": 4, "epochs": 2, "seed": 3}
    whole = list(Batches(**settings))
    slices = [list(Batches(**settings, rank=r, n_ranks=n_ranks)) for r in range(n_ranks)]
    assert [joined(parts) for parts in zip(*slices, strict=True)] == whole


@pytest.mark.parametrize("start", [0, 1, 3, 4, 7, 8])
def test_starting_late_gives_the_rest_of_the_same_order(start):
    settings = {"n_images": 23, "batch_size": 5, "steps_per_epoch": 4, "epochs": 2, "seed": 3}
    late = Batches(**settings, start=start)
    assert list(late) == list(Batches(**settings))[start:]
    assert len(late) == 8 - start
