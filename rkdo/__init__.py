"""Training and evaluating encoders with recursive KL divergence optimization and its relatives."""

from typing import TYPE_CHECKING, Any

from rkdo.config import TrainConfig
from rkdo.errors import Stopped, TrainingError, UserError

if TYPE_CHECKING:
    from rkdo.pretrained import LoadedEncoder, load_encoder

__all__ = [
    "LoadedEncoder", "Stopped", "TrainConfig", "TrainingError", "UserError", "load_encoder",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """What needs PyTorch is imported when it is asked for: the command line starts without."""
    if name in ("LoadedEncoder", "load_encoder"):
        from rkdo import pretrained

        return getattr(pretrained, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
