"""Image files: which there are, and their pixels as 8-bit RGB whatever they are stored as."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor
from tqdm import tqdm

from rkdo.errors import UserError
from rkdo.interrupt import held

FORMATS = {  # of Pillow, with the pixels of a picture
    "AVIF", "BMP", "DIB", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TGA", "TIFF", "WEBP",
}  # fmt: skip
EXTENSIONS = tuple(sorted(
    extension for extension, kind in Image.registered_extensions().items()
    if kind in FORMATS and kind in Image.OPEN
))  # fmt: skip
AT_ONCE = 4096  # files that are handed to the threads that look for unreadable ones
PHOTOMETRIC, BITS = 262, 258  # tags of a TIFF
DEEP = ("I;16", "I;16B", "I;16L", "I;16N")
OF_16_BITS = ("PNG", "PPM")  # which Pillow may open as mode I, 0 to 65,535


def find_images(folder: Path, name: str = "--data-dir") -> list[Path]:
    """The files below `folder` whose names are those of images, by their path; hidden ones aside.
    `name` is what the folder is called in an error.

    Raises:
        UserError: there is no such folder, it cannot be listed, or it holds no images.
    """
    found = [path for path in find_files(folder, name) if is_image(path)]
    if not found:
        kinds = "jpg, png, gif, tif, webp and their like"
        raise UserError(f"{name} must hold images ({kinds}), there are none below {folder}")
    return found


def is_image(path: Path) -> bool:
    """Whether a file's name is that of an image, and not a hidden one's."""
    return path.suffix.lower() in EXTENSIONS and not path.name.startswith(".")


def find_files(folder: Path, name: str = "--data-dir") -> list[Path]:
    """All files below `folder` by their path, but hidden ones and those in hidden folders.

    Raises:
        UserError: there is no such folder, or it cannot be listed.
    """
    if not folder.is_dir():
        what = f"{folder} is a file" if folder.exists() else f"there is no folder {folder}"
        raise UserError(f"{name} must be a folder of images, {what}")
    found: list[Path] = []
    seen: set[str] = set()  # a link may lead back up

    def refuse(error: OSError) -> None:
        raise UserError(f"{name}: {error.filename} cannot be listed: {error.strerror}")

    for root, folders, files in os.walk(folder, onerror=refuse, followlinks=True):
        real = os.path.realpath(root)
        folders[:] = [] if real in seen else sorted(f for f in folders if not f.startswith("."))
        if real not in seen:
            found += [Path(root, file) for file in files if not file.startswith(".")]
        seen.add(real)
    return sorted(found, key=lambda path: path.relative_to(folder).parts)


def read_image(path: Path) -> Tensor:  # [3, H, W] uint8
    """A file's pixels, upright as its EXIF says, on white where they are transparent; of an
    animation the first picture. 16 bits a channel are scaled to 8, floats in [0, 1] to 0 to 255.

    Raises:
        UserError: the file is not a readable image, or nobody can say how bright its numbers are.
    """
    return pil_to_tensor(_decode(path))


def unreadable(paths: Sequence[Path]) -> dict[Path, str]:
    """Those of the files that `read_image` refuses, and why: all are decoded, on every core (a
    JPEG at an eighth of its size, which needs all of its bytes but not all of the time)."""
    found: dict[Path, str] = {}
    with held():  # it may have a thread that watches it
        progress = tqdm(desc="looking at the images", total=len(paths), leave=False, unit="image",
                        delay=1)  # fmt: skip
    with progress, ThreadPoolExecutor(os.cpu_count()) as pool:
        for first in range(0, len(paths), AT_ONCE):
            group = paths[first : first + AT_ONCE]
            with held():
                faults = pool.map(_fault, group)
            for path, fault in zip(group, faults, strict=True):
                if fault:
                    found[path] = fault
                progress.update()
    return found


def _fault(path: Path) -> str:
    try:
        _decode(path, small=True)
    except UserError as error:
        return str(error).removeprefix(f"{path} ")
    return ""


def _decode(path: Path, small: bool = False) -> Image.Image:
    try:
        with path.open("rb") as file, Image.open(file) as image:
            if small:
                image.draft("RGB", (1, 1))
            return _as_rgb(image, path)
    except (UserError, MemoryError):
        raise
    except Exception as error:  # whatever a damaged file makes Pillow's readers stumble over
        said = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, UnidentifiedImageError):  # whose words are about a Python object
            said = "its first bytes are of no known format"
            said = said if path.stat().st_size else "it is empty"
        if isinstance(error, Image.DecompressionBombError):
            most = 2 * (Image.MAX_IMAGE_PIXELS or 0) // 10**6
            said = f"it has more than {most} million pixels: make it smaller"
        raise UserError(f"{path} is not a readable image: {said}") from error


def _as_rgb(image: Image.Image, path: Path) -> Image.Image:
    mode, white, inverted = image.mode, 1.0, False
    if mode in (*DEEP, "I", "F"):
        white, inverted = _white(image, path)
    image = ImageOps.exif_transpose(image)
    if mode in (*DEEP, "I", "F"):
        return Image.fromarray(_to_8_bits(np.asarray(image), white, inverted, path)).convert("RGB")
    if image.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in image.info:
        image = image.convert("LA") if image.mode == "La" else image
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _white(image: Image.Image, path: Path) -> tuple[float, bool]:
    """The number that stands for white, and whether it is black instead."""
    tags = getattr(image, "tag_v2", {})
    inverted = tags.get(PHOTOMETRIC) == 0
    if image.mode == "F":
        return 1.0, inverted
    if image.mode in DEEP:
        return 2.0 ** tags.get(BITS, (16,))[0] - 1, inverted
    if image.format in OF_16_BITS:
        return 65_535.0, False
    raise UserError(
        f"{path} holds whole numbers of 32 bits or with a sign, which do not say what is white: "
        "save it with 8 or 16 bits"
    )


def _to_8_bits(values: np.ndarray, white: float, inverted: bool, path: Path) -> np.ndarray:
    low, high = float(values.min()), float(values.max())
    if not (low >= 0 and high <= white):
        raise UserError(f"{path} must hold numbers from 0 to {white:g}, got {low:g} to {high:g}")
    shares = values.astype(np.float64) / white
    return np.rint(255 * (1 - shares if inverted else shares)).astype(np.uint8)
