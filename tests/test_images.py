"""Pixels of every kind of file, and which files a folder holds."""

import io
import os
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from rkdo.errors import UserError
from rkdo.images import find_images, read_image, unreadable

RAMP = np.arange(256, dtype=np.uint8).reshape(16, 16)


def saved(tmp_path, image, name, **settings):
    path = tmp_path / name
    image.save(path, **settings)
    return path


def grey(path):  # of three equal channels
    pixels = read_image(path)
    assert pixels.dtype == torch.uint8
    assert torch.equal(pixels[0], pixels[1])
    assert torch.equal(pixels[0], pixels[2])
    return pixels[0].numpy()


def png(tmp_path, rows, depth, colour, name="made.png"):
    """A PNG of raw rows: some depths are read but not written by Pillow."""
    height, width = len(rows), len(rows[0]) * 8 // depth // (3 if colour == 2 else 1)

    def chunk(kind, data):
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + bytes(row) for row in rows))
    path = tmp_path / name
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    )
    return path


# ---- every mode is scaled right ------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["png", "tif", "pgm"])
def test_16_bits_are_scaled_to_8(tmp_path, kind):
    wide = Image.fromarray(RAMP.astype(np.uint16) * 257)
    assert np.array_equal(grey(saved(tmp_path, wide, f"a.{kind}")), RAMP)


def test_16_bits_are_rounded(tmp_path):
    wide = np.array([[0, 128, 129, 65_535 - 129, 65_535 - 128, 65_535]], dtype=np.uint16)
    assert grey(saved(tmp_path, Image.fromarray(wide), "a.png")).tolist() == [
        [0, 0, 1, 254, 255, 255]
    ]


def test_a_big_endian_tiff_has_the_pixels_of_a_little_endian_one(tmp_path):
    wide = RAMP.astype(">u2") * 257
    path = tmp_path / "a.tif"
    Image.frombytes("I;16B", (16, 16), wide.tobytes()).save(path)
    assert np.array_equal(grey(path), RAMP)


def test_a_16_bit_tiff_whose_zero_is_white_is_inverted(tmp_path):
    wide = Image.fromarray(RAMP.astype(np.uint16) * 257)
    path = saved(tmp_path, wide, "a.tif", tiffinfo={262: 0})
    assert np.array_equal(grey(path), 255 - RAMP)


def test_48_bit_colours_are_scaled_to_24(tmp_path):
    colours = np.stack([RAMP, RAMP.T, 255 - RAMP], 2).astype(">u2") * 257
    found = read_image(png(tmp_path, [row.tobytes() for row in colours], 16, 2))
    assert np.array_equal(found.permute(1, 2, 0).numpy(), colours // 257)


@pytest.mark.parametrize(("depth", "white"), [(1, 1), (2, 3), (4, 15)])
def test_few_bits_fill_the_range(tmp_path, depth, white):
    found = grey(png(tmp_path, [[0b00011011]], depth, 0))
    values = [0b00011011 >> shift & white for shift in range(8 - depth, -1, -depth)]
    assert found.tolist() == [[value * 255 // white for value in values]]


def test_floats_from_0_to_1_are_scaled_to_255(tmp_path):
    image = Image.fromarray((RAMP / 255).astype(np.float32))
    assert np.array_equal(grey(saved(tmp_path, image, "a.tif")), RAMP)


@pytest.mark.parametrize("off", [-0.1, 1.5, 255.0, float("nan"), float("inf")])
def test_floats_beyond_0_to_1_are_refused(tmp_path, off):
    values = np.full((4, 4), 0.5, np.float32)
    values[1, 2] = off
    path = saved(tmp_path, Image.fromarray(values), "a.tif")
    with pytest.raises(UserError, match=r"a\.tif must hold numbers from 0 to 1, got"):
        read_image(path)
    assert list(unreadable([path])) == [path]


def test_whole_numbers_of_32_bits_are_refused(tmp_path):
    path = saved(tmp_path, Image.fromarray(RAMP.astype(np.int32) * 1000), "a.tif")
    with pytest.raises(UserError, match=r"a\.tif holds whole numbers of 32 bits"):
        read_image(path)


def test_black_and_white_and_8_bit_greys_are_themselves(tmp_path):
    assert np.array_equal(grey(saved(tmp_path, Image.fromarray(RAMP), "a.png")), RAMP)
    black_and_white = Image.fromarray(RAMP > 99)
    assert black_and_white.mode == "1"
    assert np.array_equal(grey(saved(tmp_path, black_and_white, "b.png")), 255 * (RAMP > 99))


def test_colours_and_a_palette_of_them_are_themselves(tmp_path):
    colours = np.stack([RAMP, RAMP.T, 255 - RAMP], 2)
    for name, image in (
        ("a.png", Image.fromarray(colours)),
        ("b.png", Image.fromarray(colours).quantize(256)),
    ):
        found = read_image(saved(tmp_path, image, name)).permute(1, 2, 0).numpy()
        assert np.array_equal(found, np.asarray(image.convert("RGB"))), name
    assert np.array_equal(read_image(tmp_path / "a.png").permute(1, 2, 0).numpy(), colours)


def test_inks_become_light(tmp_path):
    inks = np.zeros((8, 24, 4), np.uint8)
    inks[:, :8, 0] = 255  # cyan
    inks[:, 16:, 3] = 255  # black; white between them
    found = read_image(saved(tmp_path, Image.fromarray(inks, "CMYK"), "a.tif"))
    assert found[:, 4, [4, 12, 20]].T.tolist() == [[0, 255, 255], [255] * 3, [0] * 3]


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB", "L", "1"])
def test_what_is_transparent_shows_white(tmp_path, mode):
    """And not whatever colour stands below: half of the picture, which is black there."""
    colours = np.zeros((4, 8, 4), np.uint8)
    colours[:, 4:] = (200, 200, 200, 255)
    if mode == "1":
        colours[:, 4:] = 255
    image = Image.fromarray(colours).convert("LA" if mode == "LA" else "RGBA")
    settings = {}
    if mode in ("RGB", "L", "1", "P"):
        image = image.convert("RGB").quantize(2) if mode == "P" else image.convert(mode)
        clear = image.getpixel((0, 0))
        settings["transparency"] = clear
    assert image.mode == mode
    found = grey(saved(tmp_path, image, "a.png", **settings))
    assert found[:, :4].tolist() == [[255] * 4] * 4
    assert found[:, 4:].tolist() == [[255 if mode == "1" else 200] * 4] * 4


def test_half_transparent_is_half_white(tmp_path):
    colours = np.full((2, 2, 4), (100, 100, 100, 128), np.uint8)
    assert abs(int(grey(saved(tmp_path, Image.fromarray(colours), "a.png"))[0, 0]) - 177) <= 1


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photograph_stands_upright(tmp_path, orientation):
    pixels = np.zeros((16, 32), np.uint8)
    pixels[:8, :16] = 255  # the picture's upper left, as it should be seen
    turned = {
        1: pixels, 2: pixels[:, ::-1], 3: pixels[::-1, ::-1], 4: pixels[::-1], 5: pixels.T,
        6: np.rot90(pixels), 7: pixels[::-1, ::-1].T, 8: np.rot90(pixels, -1),
    }[orientation]  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.fromarray(np.ascontiguousarray(turned))
    path = saved(tmp_path, image, "a.jpg", exif=exif, quality=100)
    found = grey(path).astype(int)
    assert found.shape == (16, 32)
    assert abs(found - pixels).max() < 20


@pytest.mark.parametrize("kind", ["gif", "webp", "png", "tif"])
def test_of_an_animation_the_first_picture_is_taken(tmp_path, kind):
    first, second = (Image.new("RGB", (8, 8), colour) for colour in ("black", "white"))
    settings = {"save_all": True, "append_images": [second]}
    if kind == "webp":
        settings["lossless"] = True
    path = saved(tmp_path, first, f"a.{kind}", **settings)
    with Image.open(path) as image:
        assert image.n_frames == 2
    assert read_image(path).max() == 0


# ---- what is no image is refused by name ---------------------------------------------------------


def damaged(tmp_path):
    good = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(
        good, "JPEG"
    )
    content = good.getvalue()
    flat = png(tmp_path, [RAMP[i].tobytes() for i in range(16)], 8, 0, "good.png").read_bytes()
    huge = bytearray(flat)
    huge[16:24] = struct.pack(">II", 60_000, 60_000)
    huge[29:33] = struct.pack(">I", zlib.crc32(bytes(huge[12:29])))
    found = {
        "empty.png": b"",
        "text.jpg": b"hello",
        "half.jpg": content[: len(content) // 2],
        "head.jpg": content[:20],
        "half.png": flat[: len(flat) // 2],
        "flipped.png": flat[:60] + bytes([flat[60] ^ 255]) + flat[61:],
        "bomb.png": bytes(huge),
    }
    for name, bytes_ in found.items():
        (tmp_path / name).write_bytes(bytes_)
    return found


def test_damaged_files_are_refused_by_name_and_found_beforehand(tmp_path):
    names = damaged(tmp_path)
    for name in names:
        with pytest.raises(UserError, match=name.replace(".", r"\.")) as caught:
            read_image(tmp_path / name)
        assert "\n" not in str(caught.value)
    paths = find_images(tmp_path)
    found = unreadable(paths)
    assert {path.name for path in found} == set(names)
    assert "good.png" in {path.name for path in paths}
    assert all(str(tmp_path) not in why for why in found.values())


def test_a_file_that_cannot_be_opened_is_refused_by_name(tmp_path):
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere.png")
    assert list(unreadable([tmp_path / "gone.png"])) == [tmp_path / "gone.png"]
    with pytest.raises(UserError, match=r"gone\.png is not a readable image"):
        read_image(tmp_path / "gone.png")


# ---- which files there are -----------------------------------------------------------------------


def test_images_are_found_at_any_depth_in_one_order(tmp_path):
    for name in ("b/2.png", "b/10.JPG", "a/c/1.jpeg", "z.png", "b/.hidden.png", ".cache/x.png",
                 "b/._2.png", "notes.txt", "a.png"):  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "b" / "up").symlink_to(tmp_path)  # a circle
    found = [path.relative_to(tmp_path).as_posix() for path in find_images(tmp_path)]
    assert found == ["a/c/1.jpeg", "a.png", "b/10.JPG", "b/2.png", "z.png"]


def test_a_folder_without_images_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("none")
    with pytest.raises(UserError, match=r"must hold images \(jpg, .*there are none below"):
        find_images(tmp_path)
    with pytest.raises(UserError, match="there is no folder"):
        find_images(tmp_path / "nowhere")


def test_a_folder_that_cannot_be_listed_is_refused(tmp_path, monkeypatch):
    (tmp_path / "shut").mkdir()
    scan = os.scandir

    def refuse(folder):
        if str(folder).endswith("shut"):  # root may read everything
            raise PermissionError(13, "Permission denied", str(folder))
        return scan(folder)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UserError, match="shut cannot be listed"):
        find_images(tmp_path)


def test_a_tiff_of_12_bits_is_white_at_4095(tmp_path):
    """Written by hand, as Pillow reads such files only: two numbers in three bytes."""
    row = bytes([0x00, 0x08, 0x00, 0xFF, 0xF4, 0x00])  # 0x000, 0x800, 0xFFF, 0x400
    tags = [(256, 4), (257, 1), (258, 12), (259, 1), (262, 1), (273, 8), (277, 1), (278, 1),
            (279, len(row))]  # fmt: skip
    entries = b"".join(struct.pack("<HHIHH", tag, 3, 1, value, 0) for tag, value in tags)
    listed = struct.pack("<H", len(tags)) + entries + bytes(4)
    path = tmp_path / "12.tif"
    path.write_bytes(b"II*\0" + struct.pack("<I", 8 + len(row)) + row + listed)
    with Image.open(path) as image:
        assert image.mode == "I;16"
    assert read_image(path)[0, 0].tolist() == [0, 128, 255, 64]
