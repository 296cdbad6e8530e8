"""What a run has trained, loaded by other programs: the encoder, and embeddings of images."""

import csv
import os
import resource
import signal
import subprocess
import sys
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from PIL import Image
from runs import METRICS, ROOT, environment, write_digits
from safetensors.torch import save_file
from torch import nn

import rkdo
from rkdo import embed as embedding
from rkdo.__main__ import main
from rkdo.batches import plain_view
from rkdo.config import TrainConfig
from rkdo.data import load_data
from rkdo.encoder import build_encoder
from rkdo.evaluate import extract
from rkdo.files import partial_of
from rkdo.images import find_images, read_image
from rkdo.record import Run
from rkdo.train import train

KINDS = {
    "imagenet": {},
    "cifar": {"stem": "cifar", "image_size": 16},
    "float64": {"dtype": "float64", "image_size": 24},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("digits")
    write_digits(root, 40, 20)
    return root


@pytest.fixture(scope="module")
def runs(folder, tmp_path_factory):
    """A run of one step of each kind, and what evaluation computes of its test images."""
    made = {}
    for kind, settings in KINDS.items():
        config = TrainConfig(
            **{"dataset": "folder", "data_dir": str(folder), "image_size": 32, **settings},
            epochs=1, steps_per_epoch=1, batch_size=4, device="cpu",
        )  # fmt: skip
        run = Run(tmp_path_factory.mktemp(kind) / "run")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("rkdo.train.evaluate", lambda *given: dict(METRICS))
            train(config, run.folder)
        encoder = build_encoder(config).to(getattr(torch, config.dtype))
        encoder.load_state_dict(run.load_checkpoint()["encoder"])
        run.checkpoint.unlink()  # it has 130 MB, and nothing below needs it
        made[kind] = run.folder, extract(encoder.backbone, load_data(config).test, config)
    return made


@pytest.fixture(scope="module")
def run(runs):
    return runs["imagenet"][0]


def python(*arguments, **more):
    return subprocess.run(
        [sys.executable, *arguments],
        env=environment(), capture_output=True, text=True, timeout=120, cwd=ROOT, **more,
    )  # fmt: skip


TWO_LINES = """
import sys, torch, rkdo
from pathlib import Path
from PIL import Image

run, images = sys.argv[1:]
state = torch.get_rng_state()
encoder = rkdo.load_encoder(run, device="cpu")
paths = sorted(Path(images).rglob("*.png"))
views = torch.stack([encoder.transform(path) for path in paths])
for path, view in zip(paths, views, strict=True):
    assert torch.equal(encoder.transform(str(path)), view)
    assert torch.equal(encoder.transform(Image.open(path)), view)
with torch.no_grad():
    rows = encoder(views)
assert not encoder.training and not encoder.backbone.bn1.training
assert torch.equal(torch.get_rng_state(), state)
assert rows.shape == (len(paths), encoder.width)
torch.save((rows, encoder.stem, encoder.image_size), run + ".rows")
"""


@pytest.fixture(scope="module")
def loaded(runs, folder):
    """What a fresh process computes of the test images: from each run's folder, and from its
    encoder's file alone."""
    paths = []
    for run, _ in runs.values():
        alone = run.parent / "renamed.safetensors"
        alone.write_bytes((run / "encoder.safetensors").read_bytes())
        paths += [run, alone]
    each = "\n".join(f"sys.argv[1] = {str(path)!r}\n{TWO_LINES}" for path in paths)
    process = python("-c", f"import sys\n{each}", "", str(folder / "test"))
    assert process.returncode == 0, process.stderr
    return {path: torch.load(f"{path}.rows", weights_only=True) for path in paths}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("alone", [False, True], ids=["folder", "file alone"])
def test_two_lines_in_a_fresh_process_give_what_evaluation_computes(kind, alone, runs, loaded):
    run, truth = runs[kind]
    rows, stem, size = loaded[run.parent / "renamed.safetensors" if alone else run]
    assert (stem, size) == (KINDS[kind].get("stem", "imagenet"), KINDS[kind].get("image_size", 32))
    assert rows.dtype == (torch.float64 if kind == "float64" else torch.float32)
    assert np.array_equal(rows.double().numpy(), truth)


def test_an_encoder_of_another_version_of_rkdo_is_loaded(run, tmp_path):
    (tmp_path / "config.json").write_text('{"config": {"a setting": "of another version"}}')
    (tmp_path / "encoder.safetensors").write_bytes((run / "encoder.safetensors").read_bytes())
    assert rkdo.load_encoder(tmp_path, device="cpu").image_size == 32


def test_an_encoder_is_a_module_like_any_other(run, runs):
    encoder = rkdo.load_encoder(str(run), device=torch.device("cpu"))
    assert isinstance(encoder, nn.Module)
    assert encoder.width == 512
    head = nn.Linear(encoder.width, 3)
    head(encoder(torch.zeros(2, 3, 32, 32))).sum().backward()  # it can be trained on
    assert all(p.grad is not None for p in encoder.parameters())
    assert encoder.double()(torch.zeros(2, 3, 32, 32)).dtype == torch.float64
    with pytest.raises(TypeError, match=r"got torch.uint8: encoder.transform prepares images"):
        encoder(torch.zeros(2, 3, 32, 32, dtype=torch.uint8))
    for shape in ((3, 32, 32), (2, 1, 32, 32)):
        with pytest.raises(ValueError, match=r"images must be \[N, 3, H, W\], got"):
            encoder(torch.zeros(shape))


def test_the_transform_is_evaluations(run):
    encoder = rkdo.load_encoder(run, device="cpu")
    view = plain_view(TrainConfig(image_size=32))
    rng = np.random.default_rng(0)
    for shape in ((1, 40, 50), (3, 8, 9), (5, 3, 50, 40)):
        image = torch.from_numpy(rng.integers(0, 256, shape, dtype=np.uint8))
        assert torch.equal(encoder.transform(image), view(image))
    pixels = rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)
    colour = torch.from_numpy(pixels).permute(2, 0, 1)
    assert torch.equal(encoder.transform(Image.fromarray(pixels)), view(colour))
    grey = torch.from_numpy(pixels[None, :, :, 0].copy())
    assert torch.equal(encoder.transform(Image.fromarray(pixels[:, :, 0])), view(grey))
    black_and_white = Image.fromarray(pixels[:, :, 0] > 99)
    assert torch.equal(encoder.transform(black_and_white), view(255 * (grey > 99).byte()))
    turned = Image.fromarray(pixels)
    turned.getexif()[0x0112] = 6  # to be shown turned by 90°
    assert torch.equal(encoder.transform(turned), view(colour.flip(1).transpose(1, 2)))


@pytest.mark.parametrize(
    ("image", "error", "said"),
    [
        (torch.zeros(3, 8, 8), TypeError, "image must be uint8, 0 to 255, got torch.float32"),
        (torch.zeros(8, 8, dtype=torch.uint8), ValueError, r"1 or 3, H, W\], got \[8, 8\]"),
        (torch.zeros(4, 8, 8, dtype=torch.uint8), ValueError, r"got \[4, 8, 8\]"),
        (torch.zeros(3, 0, 8, dtype=torch.uint8), ValueError, r"got \[3, 0, 8\]"),
        (np.zeros((8, 8, 3), np.uint8), TypeError, "a PIL image or a uint8 tensor, got ndarray"),
        (Image.new("RGBA", (8, 8)), ValueError, "of mode 1, L, RGB, got RGBA: pass the file's"),
        (Image.new("I;16", (8, 8)), ValueError, "got I;16"),
        ("nowhere.png", rkdo.UserError, "nowhere.png is not a readable image"),
    ],
    ids=[
        "float32",
        "two dimensions",
        "four channels",
        "empty",
        "array",
        "RGBA",
        "16 bits",
        "no file",
    ],
)
def test_what_is_no_image_is_said(image, error, said, run):
    with pytest.raises(error, match=said):
        rkdo.load_encoder(run, device="cpu").transform(image)


def test_what_is_no_encoder_is_one_line(run, tmp_path):
    def said(path, **how):
        with pytest.raises(rkdo.UserError) as caught:
            rkdo.load_encoder(path, **{"device": "cpu", **how})
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "nowhere is neither the folder of a run nor" in said(tmp_path / "nowhere")
    assert "holds no run" in said(tmp_path)
    unfinished = Run(tmp_path / "unfinished")
    unfinished.create(TrainConfig())
    unfinished.close()
    assert "no encoder.safetensors yet: it is written when training" in said(unfinished.folder)
    good = (run / "encoder.safetensors").read_bytes()
    for content in (b"", b"x", good[:100], good[:-8], b"\xff" * 64):
        (tmp_path / "bad.safetensors").write_bytes(content)
        assert "bad.safetensors is damaged or not a safetensors" in said(
            tmp_path / "bad.safetensors"
        )
    assert "--device cuda" in said(run, device="cuda") or torch.cuda.is_available()
    assert "device tpu cannot be used" in said(run, device="tpu")


ABOUT = {"architecture": "resnet18", "stem": "imagenet", "image_size": "32"}


@pytest.mark.parametrize(
    ("tensors", "about", "said"),
    [
        ({}, None, "its metadata lacks architecture, image_size, stem"),
        ({}, {**ABOUT, "architecture": "vit"}, "must hold a resnet18, its metadata says vit"),
        ({}, {**ABOUT, "stem": "vgg"}, "--stem must be one of imagenet, cifar, got vgg"),
        ({}, {**ABOUT, "image_size": "large"}, "metadata must be of an encoder of rkdo"),
        ({}, {**ABOUT, "image_size": "-4"}, "--image-size must be at least 8, got -4"),
        ({}, {**ABOUT, "stem": "cifar"}, "does not hold the tensors of a resnet18"),
        ({"conv1.weight": torch.zeros(3)}, ABOUT, "does not hold the tensors of a resnet18"),
        ({"conv1.weight": torch.zeros(64, 3, 7, 7).half()}, ABOUT, "float32 or float64 tensors"),
        ({"another": torch.zeros(3)}, ABOUT, "does not hold the tensors of a resnet18"),
    ],
    ids=str,
)
def test_a_foreign_file_is_one_line(tensors, about, said, tmp_path):
    backbone = build_encoder(TrainConfig()).backbone.state_dict()
    path = tmp_path / "foreign.safetensors"
    save_file({**backbone, **tensors}, path, metadata=about)
    with pytest.raises(rkdo.UserError, match=said) as caught:
        rkdo.load_encoder(path, device="cpu")
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


# ---- rkdo embed ----------------------------------------------------------------------------------


def embed(run, data, out, *more):
    return main(
        ["embed", str(run), "--data", str(data), "--out", str(out), "--device", "cpu", *more]
    )


def test_embeddings_are_those_of_evaluation_in_a_fresh_process(runs, folder, tmp_path):
    run, truth = runs["imagenet"]
    out = tmp_path / "x.npy"
    process = python(
        "-m", "rkdo", "embed", str(run), "--data", str(folder / "test"), "--out", str(out),
        "--device", "cpu", "--workers", "2",
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    assert process.stderr == ""
    assert process.stdout.splitlines() == [
        "20 embeddings of length 512", f"written: {out}, {tmp_path / 'x.names.txt'}"
    ]  # fmt: skip
    assert np.array_equal(np.load(out).astype(np.float64), truth)


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_of_run_is_embedded(kind, runs, folder, tmp_path):
    run, truth = runs[kind]
    assert embed(run / "encoder.safetensors", folder / "test", tmp_path / "x.npy") == 0
    assert np.array_equal(np.load(tmp_path / "x.npy").astype(np.float64), truth)
    names = (tmp_path / "x.names.txt").read_text().splitlines()
    found = sorted((folder / "test").rglob("*.png"))
    assert names == [path.relative_to(folder / "test").as_posix() for path in found]
    assert sorted(os.listdir(tmp_path)) == ["x.names.txt", "x.npy"]


@pytest.mark.parametrize("kind", ["imagenet", "float64"])
def test_a_csv_holds_the_same_numbers(kind, runs, folder, tmp_path):
    run, truth = runs[kind]
    assert embed(run, folder / "test", tmp_path / "x.csv") == 0
    header, *lines = csv.reader((tmp_path / "x.csv").open(newline=""))
    assert header == ["name", *map(str, range(512))]
    dtype = np.float64 if kind == "float64" else np.float32
    assert np.array_equal(np.array([line[1:] for line in lines]).astype(dtype), truth.astype(dtype))
    assert [line[0] for line in lines] == [
        path.relative_to(folder / "test").as_posix() for path in find_images(folder / "test")
    ]


def scatter(folder):
    """Images here and below, of two suffixes and of names that a list or a CSV might break."""
    names = ["b.png", "a/z.PNG", "a/b/deep.jpg", "a-b.png", 'comma, "quoted".png', "ä é 猫.png"]
    for i, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20 + i, 30), (10 * i, 0, 99)).save(folder / name)
    (folder / "notes.txt").write_text("no image")
    return names


def test_any_folder_is_embedded_in_one_order(run, tmp_path):
    images = tmp_path / "images"
    names = scatter(images)
    for out in ("1.npy", "2.csv"):
        assert embed(run, images, tmp_path / out, "--batch-size", "4") == 0
    listed = (tmp_path / "1.names.txt").read_text(encoding="utf-8").splitlines()
    assert listed == sorted(names, key=lambda name: name.split("/"))
    _, *lines = csv.reader((tmp_path / "2.csv").open(newline="", encoding="utf-8"))
    assert [line[0] for line in lines] == listed
    encoder = rkdo.load_encoder(run, device="cpu")
    with torch.no_grad():
        views = torch.stack([encoder.transform(read_image(images / name)) for name in listed])
        rows = torch.cat([encoder(part) for part in views.split(4)])
    assert np.array_equal(np.load(tmp_path / "1.npy"), rows.numpy())
    assert np.array_equal(np.array([line[1:] for line in lines], np.float32), rows.numpy())


def test_names_that_are_not_utf_8_come_through(run, tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    Image.new("RGB", (20, 20)).save(tmp_path / "plain.png")
    os.rename(tmp_path / "plain.png", os.fsencode(images) + b"/\xe9.png")
    for out in ("x.npy", "x.csv"):
        assert embed(run, images, tmp_path / out) == 0
    assert (tmp_path / "x.names.txt").read_bytes() == b"\xe9.png\n"
    assert b"\n\xe9.png," in (tmp_path / "x.csv").read_bytes()


def test_a_name_with_a_line_break_wants_a_csv(run, tmp_path, capsys):
    images = tmp_path / "images"
    images.mkdir()
    Image.new("RGB", (20, 20)).save(images / "two\nlines.png")
    assert embed(run, images, tmp_path / "x.npy") == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "--out X.csv is for names with line breaks" in err
    assert embed(run, images, tmp_path / "x.csv") == 0
    _, line = csv.reader((tmp_path / "x.csv").open(newline=""))
    assert line[0] == "two\nlines.png"


@pytest.mark.parametrize("workers", ["0", "2"])
def test_an_unreadable_image_is_one_line_or_skipped(workers, run, tmp_path, capsys):
    images, out = tmp_path / "images", tmp_path / "x.npy"
    names = scatter(images)
    bad = images / "a" / "bad.png"
    bad.write_bytes((images / "b.png").read_bytes()[:60])
    assert embed(run, images, out, "--workers", workers) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"rkdo: error: {bad} is not a readable image")
    assert said.count("\n") == 1
    assert list(tmp_path.iterdir()) == [images]
    skip = ("--skip-unreadable", "--batch-size", "2", "--workers", workers)
    assert embed(run, images, out, *skip) == 0
    said = capsys.readouterr().out
    assert f"unreadable images skipped: 1, the first is {bad}" in said
    assert f"{len(names)} embeddings of length 512" in said
    listed = (tmp_path / "x.names.txt").read_text(encoding="utf-8").splitlines()
    assert listed == sorted(names, key=lambda name: name.split("/"))
    encoder = rkdo.load_encoder(run, device="cpu")
    for name, row in zip(listed, np.load(out), strict=True):  # not a row is shifted
        with torch.no_grad():
            true = encoder(encoder.transform(images / name)[None])[0].numpy()
        np.testing.assert_allclose(row, true, rtol=1e-4, atol=1e-5)


def test_nothing_readable_is_one_line(run, tmp_path, capsys):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "bad.png").write_bytes(b"")
    assert embed(run, tmp_path / "images", tmp_path / "x.npy", "--skip-unreadable") == 2
    assert "none of the 1 images could be read" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["images"]


@contextmanager
def limit_on_files(size):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


OLD = {"x.npy": b"old array", "x.names.txt": b"old names", "x.csv": b"old lines"}


@pytest.mark.parametrize("out", ["x.npy", "x.csv"])
@pytest.mark.parametrize("limit", [10, 3000], ids=["at once", "in the array"])
def test_a_full_disk_leaves_what_was_there(out, limit, run, tmp_path, capsys):
    """A limit on files' size, which the system reports as it does a full disk."""
    images = tmp_path / "images"
    scatter(images)
    for name, content in OLD.items():
        (tmp_path / name).write_bytes(content)
    with limit_on_files(limit):
        assert embed(run, images, tmp_path / out) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "cannot be written: File too large" in said
    found = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    assert found == OLD


def test_too_little_room_is_said_before_the_work(run, tmp_path, monkeypatch, capsys):
    scatter(tmp_path / "images")
    monkeypatch.setattr(
        "rkdo.files.shutil.disk_usage", lambda path: type("Usage", (), {"free": 100})
    )
    monkeypatch.setattr(embedding, "read_image", lambda path: pytest.fail("came too far"))
    assert embed(run, tmp_path / "images", tmp_path / "x.npy") == 2
    assert "for the embeddings, and its disk has 0.0 MB left" in capsys.readouterr().err


def test_a_signal_leaves_nothing_half_written(run, tmp_path, monkeypatch, capsys):
    scatter(tmp_path / "images")
    read, calls = embedding.read_image, []

    def read_and_signal(path):
        calls.append(path)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return read(path)

    monkeypatch.setattr(embedding, "read_image", read_and_signal)
    assert embed(run, tmp_path / "images", tmp_path / "x.npy") == 128 + signal.SIGTERM
    assert capsys.readouterr().err.splitlines()[-1] == "rkdo: stopped"
    assert os.listdir(tmp_path) == ["images"]


def test_an_array_never_stands_beside_other_names(run, tmp_path, monkeypatch):
    """Killed before any of its steps, writing leaves the old pair, the new, or no names."""
    images, out = tmp_path / "images", tmp_path / "x.npy"
    scatter(images)
    assert embed(run, images, out) == 0
    new = out.read_bytes(), embedding.names_of(out).read_bytes()
    pairs = []

    def look(*given):
        names = embedding.names_of(out)
        pairs.append((out.read_bytes(), names.read_bytes() if names.exists() else None))

    for step in ("replace", "fsync"):
        true = getattr(os, step)

        def watched(*given, true=true):
            look()
            result = true(*given)
            look()
            return result

        monkeypatch.setattr(os, step, watched)
    old = b"old array", b"old names"
    out.write_bytes(old[0])
    embedding.names_of(out).write_bytes(old[1])
    assert embed(run, images, out) == 0
    assert pairs[0] == old
    assert pairs[-1] == new
    assert {names for _, names in pairs} == {old[1], None, new[1]}
    assert set(pairs) <= {old, (old[0], None), (new[0], None), new}
    assert not partial_of(out).exists()
