"""What changes over the training: alpha and the temperature; and when the loss has levelled off."""

import math
from collections.abc import Sequence

from rkdo.config import TrainConfig


def alpha_at(config: TrainConfig, done: float) -> float:
    """alpha when the share `done` of the training lies behind: from ALPHA to ALPHA_FINAL."""
    final = config.alpha_final or 0.0
    match config.alpha_schedule:
        case "constant":
            return config.alpha
        case "linear":
            left = 1 - done
        case "cosine":
            left = (1 + math.cos(math.pi * done)) / 2
    return final + (config.alpha - final) * left


def temperature_at(config: TrainConfig, done: float) -> float:
    """τ (1 − β t/T),  β = TEMPERATURE_DECAY and t/T = `done`."""
    return config.first_temperature * (1 - config.temperature_decay * done)


def scheduled_at(config: TrainConfig, done: float) -> dict[str, float]:
    """What a schedule has made of the settings that it changes, for the metrics."""
    found = {}
    if config.alpha_schedule != "constant":
        found["alpha"] = alpha_at(config, done)
    if config.temperature_decay:
        found["temperature"] = temperature_at(config, done)
    return found


def levelled_off(config: TrainConfig, losses: Sequence[float]) -> bool:
    """Whether over the last STOP_WINDOW epochs `losses` fall by less than STOP_SLOPE an epoch."""
    if config.stop_slope is None or len(losses) < config.stop_window:
        return False
    return slope(losses[-config.stop_window :]) > -config.stop_slope


def slope(values: Sequence[float]) -> float:
    """Of the least-squares line through (0, values[0]), (1, values[1]), ..; at least two."""
    middle, mean = (len(values) - 1) / 2, math.fsum(values) / len(values)
    rise = math.fsum((i - middle) * (value - mean) for i, value in enumerate(values))
    return rise / math.fsum((i - middle) ** 2 for i in range(len(values)))
