"""Training and evaluating encoders with recursive KL divergence optimization and its relatives."""

from rkdo.config import TrainConfig
from rkdo.errors import Stopped, TrainingError, UserError

__all__ = ["Stopped", "TrainConfig", "TrainingError", "UserError"]
