"""Alpha and the temperature over the training; when the loss counts as levelled off."""

import math

import numpy as np
import pytest

from rkdo.config import TrainConfig
from rkdo.schedule import alpha_at, levelled_off, scheduled_at, slope, temperature_at


@pytest.mark.parametrize(
    ("settings", "at"),
    [
        ({}, {0.0: 0.5, 0.3: 0.5, 1.0: 0.5}),
        ({"alpha_schedule": "linear"}, {0.0: 0.5, 0.5: 0.25, 1.0: 0.0}),
        ({"alpha_schedule": "linear", "alpha_final": 0.9}, {0.0: 0.5, 0.5: 0.7, 1.0: 0.9}),
        (
            {"alpha_schedule": "cosine", "alpha_final": 0.1},
            {0.0: 0.5, 0.25: 0.3 + 0.2 * math.sqrt(0.5), 0.5: 0.3, 1.0: 0.1},
        ),
    ],
    ids=str,
)
def test_alpha_goes_from_its_first_to_its_final_value(settings, at):
    config = TrainConfig(**settings)
    assert {done: alpha_at(config, done) for done in at} == pytest.approx(at)


@pytest.mark.parametrize(
    ("settings", "first"),
    [({}, 0.5), ({"method": "infonce"}, 0.1), ({"method": "icon", "temperature": 0.3}, 0.3)],
    ids=str,
)
def test_the_temperature_falls_in_equal_steps(settings, first):
    assert temperature_at(TrainConfig(**settings), 0.7) == first
    config = TrainConfig(temperature_decay=0.4, **settings)
    falling = [temperature_at(config, done) for done in (0.0, 0.5, 1.0)]
    assert falling == pytest.approx([first, 0.8 * first, 0.6 * first])


@pytest.mark.parametrize("n", [2, 3, 10])
def test_the_slope_is_that_of_least_squares(n):
    values = np.random.default_rng(n).normal(size=n)
    assert slope(values.tolist()) == pytest.approx(np.polyfit(range(n), values, 1)[0])


def test_a_loss_has_levelled_off_when_its_last_epochs_fall_too_little():
    config = TrainConfig(stop_slope=0.1, stop_window=3)
    assert not levelled_off(TrainConfig(), [1.0] * 9)  # nobody asked
    assert not levelled_off(config, [1.0, 1.0])  # too few to tell
    assert levelled_off(config, [1.0, 1.0, 1.0])
    assert levelled_off(config, [1.0, 2.0, 3.0])  # it rises
    assert not levelled_off(config, [3.0, 2.0, 1.0])
    assert levelled_off(config, [9.0, 5.0, 1.0, 0.95, 0.9])  # what came before does not count
    assert not levelled_off(config, [1.0, 1.0, 1.0, 0.7, 0.4])
    assert not levelled_off(TrainConfig(stop_slope=0.5, stop_window=3), [2.0, 1.5, 1.0])


def test_only_what_changes_is_told():
    assert scheduled_at(TrainConfig(), 0.5) == {}
    assert scheduled_at(TrainConfig(alpha_schedule="linear"), 0.5) == {"alpha": 0.25}
    decaying = TrainConfig(temperature_decay=0.5, temperature=0.2)
    assert scheduled_at(decaying, 0.5) == {"temperature": pytest.approx(0.15)}
