"""The losses as modules, for those who configure an objective once and call it every step."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from . import checks, losses
from .constants import plain


class PairLoss(nn.Module):
    """A loss of queries and keys with its settings: the keyword arguments of `function`.

    Settings are checked here, shapes in `forward`. A temperature that is an nn.Parameter becomes
    one of the module's parameters, so that an optimizer finds it.

    Raises:
        TypeError, ValueError: a setting that `function` does not take.
    """

    function: ClassVar[Callable[..., Tensor]]

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        signature = inspect.signature(self.function)
        checks.choice("backend", settings.get("backend", "auto"), losses.BACKENDS)
        offset = plain(settings.get("positive_offset"))
        if offset is not None:
            checks.integer("positive_offset", offset, at_least=0)
        square = "positive_offset" not in signature.parameters or settings.get("symmetric") is True
        pair = torch.zeros(1, 1, device="cpu"), torch.zeros(2 - square, 1, device="cpu")
        trial = {**settings, "backend": "reference"}
        if not square:
            trial["positive_offset"] = 1 if offset is None else min(offset, 1)
        if isinstance(settings.get("temperature"), Tensor) and settings["temperature"].is_meta:
            trial["temperature"] = 1.0
        signature.bind(*pair, **trial)
        type(self).function(*pair, **trial)
        temperature = settings.get("temperature", signature.parameters["temperature"].default)
        if isinstance(temperature, Tensor) and not isinstance(temperature, nn.Parameter):
            self.register_buffer("temperature", temperature)
        else:
            self.temperature = temperature
        self.settings = {k: v for k, v in settings.items() if k != "temperature"}

    def forward(
        self,
        queries: Tensor,  # [N, D]
        keys: Tensor,  # [M, D]
        positive_offset: int | None = None,
    ) -> Tensor:  # [] or [N]
        """The loss of queries and keys, as `function` documents it.

        Args:
            queries, keys: rows of embeddings.
            positive_offset: the positive of query i is key i + offset: another than the setting's,
                for a batch that is a part of all keys.

        Raises:
            ValueError, TypeError, RuntimeError: as `function`.
        """
        settings = self.settings
        if positive_offset is not None:
            settings = {**settings, "positive_offset": positive_offset}
        return type(self).function(queries, keys, temperature=self.temperature, **settings)

    def extra_repr(self) -> str:
        settings = {"temperature": self.temperature, **self.settings}
        return ", ".join(f"{k}={v}" for k, v in settings.items())


class RKDOLoss(PairLoss):
    """`rkdo_loss` with its keyword arguments as settings."""

    function = staticmethod(losses.rkdo_loss)


class IConLoss(PairLoss):
    """`icon_loss` with its keyword arguments as settings."""

    function = staticmethod(losses.icon_loss)


class InfoNCELoss(PairLoss):
    """`info_nce` with its keyword arguments as settings."""

    function = staticmethod(losses.info_nce)


class NTXentLoss(PairLoss):
    """`nt_xent` with its keyword arguments as settings."""

    function = staticmethod(losses.nt_xent)
