"""A trained encoder, loaded from what a run has written, with the view of images that it takes."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torchvision.transforms.v2.functional import pil_to_tensor

from rkdo.batches import plain_view
from rkdo.config import TrainConfig
from rkdo.encoder import FEATURES, Encoder
from rkdo.errors import UserError
from rkdo.images import read_image
from rkdo.ranks import find_device
from rkdo.record import Run

ARCHITECTURE = "resnet18"
MODES = ("1", "L", "RGB")  # of images whose numbers say by themselves how bright they are


class Transform:
    """An image to what the network takes, exactly as evaluation does it: resized, its middle cut
    out, three channels from -1 to 1."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.view = plain_view(TrainConfig(image_size=size))

    def __call__(self, image: str | Path | Image.Image | Tensor) -> Tensor:
        """Of a file, a PIL image, or uint8 [..., 1 or 3, H, W]: float32 [..., 3, size, size].

        Raises:
            UserError: the file is not a readable image.
            TypeError: none of these, or a tensor of another dtype.
            ValueError: a tensor of another shape, or a PIL image of a mode other than 1, L and RGB.
        """
        if isinstance(image, str | Path):
            return self.view(read_image(Path(image)))
        if isinstance(image, Image.Image):
            return self.view(_pixels(image))
        if not isinstance(image, Tensor):
            kind = type(image).__name__
            raise TypeError(f"image must be a path, a PIL image or a uint8 tensor, got {kind}")
        if image.dtype != torch.uint8:
            raise TypeError(f"image must be uint8, 0 to 255, got {image.dtype}")
        if image.dim() < 3 or image.shape[-3] not in (1, 3) or 0 in image.shape:
            raise ValueError(f"image must be [..., 1 or 3, H, W], got {list(image.shape)}")
        return self.view(image)


class LoadedEncoder(nn.Module):
    """A trained backbone: images that `transform` has prepared to their embeddings."""

    def __init__(self, backbone: nn.Module, stem: str, image_size: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.stem = stem
        self.transform = Transform(image_size)

    @property
    def width(self) -> int:
        """Length of an embedding."""
        return FEATURES

    @property
    def image_size(self) -> int:
        """Side of the square images that `transform` gives."""
        return self.transform.size

    def forward(self, images: Tensor) -> Tensor:  # [N, 3, H, W] -> [N, width]
        """The images are taken to the encoder's device and dtype.

        Raises:
            TypeError, ValueError: they are not what `transform` gives: floats [N, 3, H, W].
        """
        if not images.is_floating_point():
            kind = f"got {images.dtype}: encoder.transform prepares images"
            raise TypeError(f"images must be floats from -1 to 1, {kind}")
        if images.dim() != 4 or images.shape[1] != 3:
            raise ValueError(f"images must be [N, 3, H, W], got {list(images.shape)}")
        weight = next(self.backbone.parameters())
        return self.backbone(images.to(weight.device, weight.dtype))


def load_encoder(run: str | Path, *, device: str | torch.device = "auto") -> LoadedEncoder:
    """The encoder that a run has trained, in evaluation mode.

    Args:
        run: The run's folder, or its encoder.safetensors wherever that lies now.
        device: Where to put it. auto: a GPU if there is one.

    Raises:
        UserError: `run` is no such folder or file, its training has not ended yet, or there is no
            such device.
    """
    path = _find(Path(run))
    saved = _read(path)
    with torch.device("meta"):  # draws no random numbers
        backbone = Encoder(saved.stem).backbone
    try:
        backbone.load_state_dict(saved.tensors, assign=True)
    except RuntimeError as error:
        raise UserError(f"{path} does not hold the tensors of a {ARCHITECTURE}") from error
    return LoadedEncoder(backbone, saved.stem, saved.image_size).to(_device(device)).eval()


@dataclass(frozen=True)
class _Saved:
    stem: str
    image_size: int
    tensors: dict[str, Tensor]


def _find(run: Path) -> Path:
    """The file of the encoder, which says all that is needed: settings change between versions."""
    if not run.exists():
        raise UserError(f"{run} is neither the folder of a run nor its encoder.safetensors")
    if not run.is_dir():
        return run
    encoder = Run(run).encoder
    if encoder.exists():
        return encoder
    if (run / "config.json").exists():
        raise UserError(f"{run} has no {encoder.name} yet: it is written when training ends")
    raise UserError(f"{run} holds no run: no {encoder}")


def _read(path: Path) -> _Saved:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            about = file.metadata() or {}
            # Copies: what is read from the file itself would change with it.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, ValueError) as error:
        said = " ".join(str(error).split())
        raise UserError(f"{path} is damaged or not a safetensors file: {said}") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
    missing = {"architecture", "stem", "image_size"} - about.keys()
    if missing:
        raise UserError(
            f"{path} is not an encoder of rkdo: its metadata lacks {', '.join(sorted(missing))}"
        )
    if about["architecture"] != ARCHITECTURE:
        raise UserError(
            f"{path} must hold a {ARCHITECTURE}, its metadata says {about['architecture'][:40]}"
        )
    kinds = {tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()}
    if kinds not in ({torch.float32}, {torch.float64}):
        raise UserError(f"{path} must hold float32 or float64 tensors alone")
    try:
        settings: dict[str, Any] = {"stem": about["stem"], "image_size": int(about["image_size"])}
        config = TrainConfig(**settings)
    except (UserError, ValueError) as error:
        raise UserError(f"{path}: its metadata must be of an encoder of rkdo: {error}") from error
    return _Saved(config.stem, config.size, tensors)


def _device(device: str | torch.device) -> torch.device:
    if device in ("auto", "cpu", "cuda"):
        return find_device(str(device))
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {device} cannot be used: {str(error).splitlines()[0]}") from error


def _pixels(image: Image.Image) -> Tensor:  # [1 or 3, H, W] uint8
    if image.mode not in MODES or "transparency" in image.info:
        kind = f"{image.mode} with transparency" if image.mode in MODES else image.mode
        raise ValueError(
            f"image must be of mode {', '.join(MODES)}, got {kind}: pass the file's path, which is "
            "read as training reads it, or convert it"
        )
    upright = ImageOps.exif_transpose(image)
    return pil_to_tensor(upright.convert("L") if upright.mode == "1" else upright)
