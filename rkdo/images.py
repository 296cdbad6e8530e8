"""Image files: which there are, and their pixels as 8-bit RGB."""

from pathlib import Path

from PIL import Image
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms.v2.functional import pil_to_tensor

from rkdo.errors import UserError


def find_images(folder: Path) -> list[Path]:
    """The files below `folder` whose names are those of images, by their path."""
    found = [path for path in folder.rglob("*") if path.name.lower().endswith(IMG_EXTENSIONS)]
    return sorted(found, key=lambda path: path.relative_to(folder).parts)


def read_image(path: Path) -> Tensor:  # [3, H, W] uint8
    """A file's pixels.

    Raises:
        UserError: the file is not a readable image.
    """
    try:
        with Image.open(path) as image:
            return pil_to_tensor(image.convert("RGB"))
    except OSError as error:
        said = " ".join(str(error).split())
        raise UserError(f"{path} is not a readable image: {said}") from error
