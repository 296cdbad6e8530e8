"""What both kinds of response field hold: tensors by name, and a lock."""

from __future__ import annotations

import torch
from torch import Tensor

from .turns import Turns

anywhere = torch.inference_mode(False)  # as a decorator: what is made may be written in any mode


class State:
    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.turns, self.tensors = Turns(), tensors

    def to(self, device: torch.device) -> None:
        """Moves the tensors. Such as inference mode has made, which nothing outside it may write,
        become others."""
        for name, x in self.tensors.items():
            x = x.to(device)
            self.tensors[name] = x.clone() if x.is_inference() else x
        self.renewed()

    def renewed(self) -> None:
        """The tensors are others, or have other values: whatever was derived from them is too."""
