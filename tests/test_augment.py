"""Random views: each number's range and distribution, and each change of colour or place alone."""

import math

import numpy as np
import pytest
import torch
from torchvision.transforms.v2 import RandomResizedCrop
from torchvision.transforms.v2 import functional as wanted

from rkdo import augment
from rkdo.augment import CROPS, DRAWS, augmentation, draws
from rkdo.config import TrainConfig

PHOTOGRAPHS = augmentation(TrainConfig(dataset="cifar10"))
DIGITS = augmentation(TrainConfig())
AFTER = 2 * CROPS + 2  # the draws before are the rectangle's


def image(channels=3, height=32, width=32, seed=0):
    rng = np.random.default_rng(seed)
    smooth = rng.integers(0, 256, (channels, 4, 4)).astype(np.float32)
    x = torch.nn.functional.interpolate(
        torch.from_numpy(smooth)[None], size=(height, width), mode="bicubic"
    )
    return x[0].round().clamp(0, 255).to(torch.uint8)


def nothing(rows=1):
    """Draws that leave a photograph as it is."""
    u = np.full((rows, DRAWS), 0.5)
    u[:, :CROPS] = 1.0  # all of the area
    u[:, AFTER : AFTER + 2] = 0.99  # neither mirrored nor in other colours
    u[:, AFTER + 10] = 0.99  # nor grey
    return u


def pixels(views):  # from 0 to 255
    return (views + 1) * 127.5


# ---- random numbers ------------------------------------------------------------------------------


def test_draws_are_uniform_and_tell_nothing_of_one_another():
    seeds = [draws(seed, [(e, i) for e in range(4) for i in range(50)], v) for seed in (0, 1)
             for v in (0, 1)]  # fmt: skip
    u = np.concatenate(seeds)
    assert u.shape == (800, DRAWS)
    counts = np.histogram(u, 20, (0, 1))[0]
    expected = u.size / 20
    assert ((counts - expected) ** 2 / expected).sum() < 43.8  # chi², 19 degrees, one in a thousand
    correlated = np.corrcoef(u.reshape(4, 200, DRAWS).transpose(1, 2, 0).reshape(-1, 4).T)
    assert abs(correlated - np.eye(4)).max() < 0.06
    assert abs(np.corrcoef(u.T) - np.eye(DRAWS)).max() < 0.2
    assert len(np.unique(u)) == u.size


@pytest.mark.parametrize("seed", [0, 2**63 - 1])
def test_draws_are_the_same_again_and_whatever_is_beside_them(seed):
    alone = draws(seed, [(3, 17)], 1)
    beside = draws(seed, [(0, 0), (3, 17), (17, 3)], 1)
    assert np.array_equal(alone[0], beside[1])
    assert not np.array_equal(beside[1], beside[2])


@pytest.mark.parametrize("make", [DIGITS, PHOTOGRAPHS], ids=["digits", "photographs"])
@pytest.mark.parametrize("threads", [1, 2])
def test_a_view_has_the_same_bits_in_every_batch(make, threads):
    """In one of 1, of 7 and of 300, whose sums could be split among threads."""
    images = [image(1 if make is DIGITS else 3, seed=i) for i in range(300)]
    u = draws(5, [(0, i) for i in range(300)], 0)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        whole = make(images, u)
        assert torch.equal(make(images[11:18], u[11:18]), whole[11:18])
        assert torch.equal(make(images[5:6], u[5:6]), whole[5:6])
    finally:
        torch.set_num_threads(before)


def test_large_images_have_the_same_bits_alone():
    make = augmentation(TrainConfig(dataset="folder", image_size=224))
    images = [image(3, 250, 300, seed=i) for i in range(3)]
    u = draws(5, [(0, i) for i in range(3)], 0)
    assert torch.equal(make(images[1:2], u[1:2]), make(images, u)[1:2])


# ---- photographs ---------------------------------------------------------------------------------


def test_draws_can_leave_a_photograph_as_it_is():
    x = image()
    assert torch.equal(pixels(PHOTOGRAPHS([x], nothing())).round()[0], x.float())


def test_images_of_any_size_become_square_views():
    images = [image(3, 40, 90), image(3, 7, 33), image(3, 500, 20), image(3, 1, 1)]
    views = PHOTOGRAPHS(images, draws(0, [(0, i) for i in range(4)], 0))
    assert views.shape == (4, 3, 32, 32)
    assert views.dtype == torch.float32
    assert views.min() >= -1
    assert views.max() <= 1


def test_rectangles_have_the_areas_and_shapes_they_should():
    u = draws(1, [(0, i) for i in range(2000)], 0)
    found = np.array([augment._rectangle(row, 100, 120) for row in u])
    top, left, height, width = found.T
    assert top.min() == left.min() == 0
    assert (top + height).max() == 100
    assert (left + width).max() == 120
    share = height * width / 12_000
    assert 0.19 < share.min() < 0.22
    assert share.max() > 0.95
    drawn = RandomResizedCrop(32, scale=(0.2, 1.0))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs = [drawn.make_params([torch.empty(1, 100, 120)]) for _ in range(2000)]
    assert abs(share.mean() - np.mean([x["height"] * x["width"] for x in theirs]) / 12_000) < 0.02
    ratio = np.log(width / height)
    assert abs(abs(ratio).max() - math.log(4 / 3)) < 0.02
    assert abs(ratio.mean()) < 0.03


def test_of_a_long_image_the_middle_is_taken():
    u = draws(1, [(0, i) for i in range(50)], 0)
    u[:, :CROPS] = 1.0
    assert {augment._rectangle(row, 10, 300) for row in u} == {(0, 143, 10, 13)}
    assert {augment._rectangle(row, 300, 10) for row in u} == {(143, 0, 13, 10)}


def test_half_are_mirrored_a_fifth_are_grey_and_four_fifths_have_other_colours():
    n = 1500
    u = draws(2, [(0, i) for i in range(n)], 0)
    u[:, :CROPS] = 1.0
    u[:, CROPS:AFTER] = 0.5
    x = image(seed=3)
    views = pixels(PHOTOGRAPHS([x] * n, u))
    grey = ((views.amax(1) - views.amin(1)).flatten(1).amax(1) < 1e-3).double().mean()
    assert abs(grey - 0.2) < 0.04
    same = (views.round() == x).flatten(1).all(1) | (views.round() == x.flip(2)).flatten(1).all(1)
    assert abs(same.double().mean() - 0.2 * 0.8) < 0.04
    mirrored = (views - x.flip(2)).abs().mean((1, 2, 3)) < (views - x).abs().mean((1, 2, 3))
    assert abs(mirrored.double().mean() - 0.5) < 0.05


@pytest.mark.parametrize(
    ("change", "name", "factors"),
    [
        (0, "brightness", (0.6, 1.0, 1.4)),
        (1, "contrast", (0.6, 1.0, 1.4)),
        (2, "saturation", (0.6, 1.0, 1.4)),
        (3, "hue", (-0.1, 0.0, 0.1)),
    ],
)
def test_each_change_of_colour_is_torchvisions(change, name, factors):
    x = image(seed=4)
    u = nothing(3)
    u[:, AFTER + 1] = 0.0
    u[:, AFTER + 6 + change] = (0.0, 0.5, 1.0)
    found = pixels(PHOTOGRAPHS([x] * 3, u))
    for view, factor in zip(found, factors, strict=True):
        true = getattr(wanted, f"adjust_{name}")(x.float() / 255, factor) * 255
        # The mean grey of contrast is torchvision's of whole numbers, this one's is not.
        assert (view - true).abs().max() < (0.6 if name == "contrast" else 0.01), factor


def test_changes_of_colour_come_in_every_order():
    x = image(seed=4)
    u = nothing(24)
    u[:, AFTER + 1] = 0.0
    u[:, AFTER + 6 : AFTER + 10] = (1.0, 0.0, 1.0, 1.0)
    orders = {}
    for row, place in enumerate(
        np.random.default_rng(0).permuted(np.tile(range(4), (24, 1)), axis=1)
    ):
        u[row, AFTER + 2 : AFTER + 6] = place / 4
        orders[row] = place.argsort()
    found = pixels(PHOTOGRAPHS([x] * 24, u))
    factors = {"brightness": 1.4, "contrast": 0.6, "saturation": 1.4, "hue": 0.1}
    for row, order in orders.items():
        true = x.float() / 255
        for change in order:
            name = list(factors)[change]
            true = getattr(wanted, f"adjust_{name}")(true, factors[name])
        assert (found[row] - 255 * true).abs().max() < 1.5
    assert len({tuple(order) for order in orders.values()}) > 10


# ---- digits --------------------------------------------------------------------------------------


def still(rows=1):
    """Draws that leave a digit as it is."""
    u = np.full((rows, DRAWS), 0.5)
    u[:, 3] = 0.25 / 0.35  # scale 1
    u[:, 6] = 0.99  # not blurred
    return u


def test_draws_can_leave_a_digit_as_it_is():
    x = image(1)
    views = pixels(DIGITS([x], still()))
    assert views.shape == (1, 3, 32, 32)
    assert (views[0] - x.float()).abs().max() < 0.01


@pytest.mark.parametrize(
    ("draw", "value", "move"),
    [
        (0, 1.0, {"angle": 15.0}),
        (0, 0.0, {"angle": -15.0}),
        (1, 1.0, {"shear": [-12.0, 0.0]}),
        (2, 1.0, {"shear": [0.0, -6.0]}),
        (3, 0.0, {"scale": 0.75}),
        (3, 1.0, {"scale": 1.1}),
        (4, 1.0, {"translate": [3, 0]}),
        (5, 0.0, {"translate": [0, -3]}),
    ],
    ids=str,
)
def test_each_move_of_a_digit_is_torchvisions(draw, value, move):
    x = torch.zeros(1, 32, 32, dtype=torch.uint8)
    x[:, 8:24, 8:24] = image(1, 16, 16)
    u = still()
    u[:, draw] = value
    neutral = {"angle": 0.0, "translate": [0, 0], "scale": 1.0, "shear": [0.0, 0.0]}
    true = wanted.affine(
        x.float(), **{**neutral, **move}, interpolation=wanted.InterpolationMode.BILINEAR
    )
    assert (pixels(DIGITS([x], u))[0, :1] - true).abs().max() < 0.1


def test_three_in_ten_digits_are_blurred_as_torchvision_does():
    x = image(1)
    u = still(3)
    u[:, 6] = (0.29, 0.29, 0.31)
    u[:, 7] = (0.0, 1.0, 1.0)
    found = pixels(DIGITS([x] * 3, u))[:, :1]
    for view, sigma in zip(found, (0.3, 1.5), strict=False):
        true = wanted.gaussian_blur(x.float(), [3, 3], [sigma, sigma])
        assert (view - true).abs().max() < 0.01
    assert (found[2] - x.float()).abs().max() < 0.01


def test_digits_are_brightened_and_contrasted_in_both_orders():
    x = image(1, seed=2)
    u = still(2)
    u[:, 8], u[:, 9] = 1.0, 0.0
    u[:, 10] = (0.2, 0.8)
    found = pixels(DIGITS([x] * 2, u))[:, :1]
    plain = x.float() / 255
    one = wanted.adjust_contrast(wanted.adjust_brightness(plain, 1.3), 0.7)
    two = wanted.adjust_brightness(wanted.adjust_contrast(plain, 0.7), 1.3)
    for view, true in zip(found, (one, two), strict=True):
        assert (view - 255 * true).abs().max() < 1
    assert (found[0] - found[1]).abs().max() > 5
