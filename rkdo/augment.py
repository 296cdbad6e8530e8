"""Random views of images, a batch at a time.

Each view depends on (seed, epoch, image, which view) alone: its random numbers are a stream of
their own, and no arithmetic runs over the batch. So it does not matter to a run's bits how many
ranks or workers share a batch.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from torchvision.transforms.v2 import functional as resizing

from rkdo.config import TrainConfig

VIEWS = 2  # version of what is drawn here: a run ends with the views that it began with
CROPS = 10  # attempts at a rectangle that lies in the image
Draws = NDArray[np.float64]  # [views, DRAWS], uniform from 0 to 1
DRAWS = 33
Augment = Callable[[Sequence[Tensor], Draws], Tensor]


def draws(seed: int, keys: Sequence[tuple[int, int]], view: int) -> Draws:
    """Random numbers for one view of each of the images `keys`, (epoch, index)."""
    streams = (
        np.random.Philox(key=[seed, epoch], counter=[0, view, index, 0]) for epoch, index in keys
    )
    return np.stack([np.random.Generator(stream).random(DRAWS) for stream in streams])


def augmentation(config: TrainConfig) -> Augment:
    """uint8 images [1 or 3, H, W] and their random numbers to views, float32
    [views, 3, size, size] from -1 to 1."""
    if config.dataset == "digits":
        return _digits
    return lambda images, u: _photographs(images, u, config.size)


# ---- photographs ---------------------------------------------------------------------------------


def _photographs(images: Sequence[Tensor], u: Draws, size: int) -> Tensor:
    """SimCLR's: a rectangle of the image, mirrored or not, in other colours or none."""
    cut = [
        resizing.resized_crop(
            image, *_rectangle(row, image.shape[-2], image.shape[-1]), [size, size], antialias=True
        )
        for image, row in zip(images, u, strict=True)
    ]
    x = torch.stack(cut).float().div_(255).expand(-1, 3, -1, -1).contiguous()
    u = u[:, 2 * CROPS + 2 :]
    flipped = _rows(u[:, 0] < 0.5)
    x[flipped] = x[flipped].flip(-1)
    jittered, order = u[:, 1] < 0.8, u[:, 2:6].argsort(1)
    factors = torch.from_numpy(np.concatenate([0.6 + 0.8 * u[:, 6:9], 0.2 * u[:, 9:10] - 0.1], 1))
    factors = factors.float()[:, :, None, None, None]
    for place in range(4):
        for change, jitter in enumerate((_brightness, _contrast, _saturation, _hue)):
            rows = _rows(jittered & (order[:, place] == change))
            if len(rows):
                x[rows] = jitter(x[rows], factors[rows, change])
    grey = _rows(u[:, 10] < 0.2)
    x[grey] = _grey(x[grey]).expand(-1, 3, -1, -1)
    return x.mul_(2).sub_(1)


def _rectangle(u: Draws, height: int, width: int) -> tuple[int, int, int, int]:
    """Top, left, height and width of 0.2 to 1 of the area, between 3:4 and 4:3."""
    tries = zip(0.2 + 0.8 * u[:CROPS], np.log(0.75) * (1 - 2 * u[CROPS : 2 * CROPS]), strict=True)
    for share, log_ratio in tries:
        side = math.sqrt(share * height * width)
        h, w = round(side * math.exp(-log_ratio / 2)), round(side * math.exp(log_ratio / 2))
        if 0 < h <= height and 0 < w <= width:
            break
    else:  # a very long image: its middle
        h, w = min(height, round(width / 0.75)), min(width, round(height / 0.75))
        return (height - h) // 2, (width - w) // 2, h, w
    top, left = u[2 * CROPS : 2 * CROPS + 2] * (height - h + 1, width - w + 1)
    return int(top), int(left), h, w


def _brightness(x: Tensor, factor: Tensor) -> Tensor:
    return (x * factor).clamp_(0, 1)


def _contrast(x: Tensor, factor: Tensor) -> Tensor:
    return _blend(x, _mean_grey(x), factor)


def _saturation(x: Tensor, factor: Tensor) -> Tensor:
    return _blend(x, _grey(x), factor)


def _hue(x: Tensor, turn: Tensor) -> Tensor:
    """By a share `turn` of the circle, at the same value and saturation."""
    red, green, blue = x.unbind(1)
    value, chroma = x.amax(1), x.amax(1) - x.amin(1)
    least = chroma.clamp_min(1e-12)  # a grey has no hue
    sixth = torch.where(
        value == red,
        (green - blue) / least,
        torch.where(value == green, (blue - red) / least + 2, (red - green) / least + 4),
    )
    sixth = sixth + 6 * turn[:, 0]
    falls = [(sixth + first) % 6 for first in (5, 3, 1)]  # of red, green and blue
    return torch.stack([value - chroma * torch.minimum(k, 4 - k).clamp(0, 1) for k in falls], 1)


def _grey(x: Tensor) -> Tensor:  # [views, 1, H, W]
    return 0.2989 * x[:, :1] + 0.587 * x[:, 1:2] + 0.114 * x[:, 2:3]


def _mean_grey(x: Tensor) -> Tensor:  # [views, 1, 1, 1]
    grey = x if x.shape[1] == 1 else _grey(x)
    total = (grey * 65_536).long().sum((1, 2, 3), keepdim=True)  # exact in any order
    return total.float() / (65_536 * grey[0].numel())


def _blend(x: Tensor, other: Tensor, factor: Tensor) -> Tensor:
    return (x * factor + other * (1 - factor)).clamp_(0, 1)


def _rows(chosen: NDArray[np.bool_]) -> Tensor:
    return torch.from_numpy(chosen.nonzero()[0])


# ---- digits --------------------------------------------------------------------------------------


def _digits(images: Sequence[Tensor], u: Draws) -> Tensor:
    """No flips and no large turns: a digit stays the digit it is."""
    x = torch.stack(list(images)).float().div_(255)
    x = _moved(x, u)
    x = _blurred(x, np.where(u[:, 6] < 0.3, 0.3 + 1.2 * u[:, 7], 0))
    bright, contrast = (_column(0.7 + 0.6 * u[:, k]) for k in (8, 9))
    first = _column(u[:, 10]) < 0.5
    one = _blend(_brightness(x, bright), _mean_grey(_brightness(x, bright)), contrast)
    two = _brightness(_contrast(x, contrast), bright)
    return torch.where(first, one, two).expand(-1, 3, -1, -1).mul(2).sub_(1)


def _moved(x: Tensor, u: Draws) -> Tensor:
    """Turned by up to 15°, sheared by 12° and 6°, scaled by 0.75 to 1.1 and shifted by a tenth."""
    size = x.shape[-1]
    turn, across, down = (
        np.deg2rad(most * (2 * u[:, k] - 1)) for k, most in enumerate((15, 12, 6))
    )
    scale = 0.75 + 0.35 * u[:, 3]
    shift = 2 * np.rint(0.1 * size * (2 * u[:, 4:6] - 1)) / size  # whole pixels, in [-1, 1]
    p, q = np.tan(across), np.tan(down)
    cosine, sine = np.cos(turn), np.sin(turn)
    # scale · rotation · [[1, p], [0, 1]] · [[1, 0], [q, 1]], and from the view back to the image
    a, b = scale * (cosine * (1 + p * q) - sine * q), scale * (cosine * p - sine)
    c, d = scale * (sine * (1 + p * q) + cosine * q), scale * (sine * p + cosine)
    area = a * d - b * c
    places = (2 * np.arange(size) + 1) / size - 1  # of the pixels' middles
    to_x = places[None, None, :] - shift[:, 0, None, None]
    to_y = places[None, :, None] - shift[:, 1, None, None]
    a, b, c, d = ((entry / area)[:, None, None] for entry in (a, b, c, d))
    grid = np.stack([d * to_x - b * to_y, a * to_y - c * to_x], 3)
    return F.grid_sample(x, torch.from_numpy(grid).float(), align_corners=False)


def _blurred(x: Tensor, sigma: Draws) -> Tensor:
    """By a Gaussian of three pixels; as it was where `sigma` is 0."""
    share = np.exp(-0.5 / np.maximum(sigma, 1e-3) ** 2)  # of a neighbour, beside the middle's 1
    middle, beside = _column(1 / (1 + 2 * share)), _column(share / (1 + 2 * share))
    for dim in (2, 3):
        n = x.shape[dim]
        padded = F.pad(x, (0, 0, 1, 1) if dim == 2 else (1, 1, 0, 0), mode="reflect")
        x = middle * x + beside * (padded.narrow(dim, 0, n) + padded.narrow(dim, 2, n))
    return x


def _column(values: Draws) -> Tensor:  # [views, 1, 1, 1] float32
    return torch.from_numpy(values).float()[:, None, None, None]
