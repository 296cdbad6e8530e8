"""Other draws of eager PyTorch's rounding: what an error may be, not what one machine made of it.

Where few numbers count, their errors cancel by luck on one machine and not on another: a loss of
three rows had 2.5e-8 in one order of its sums and 1.7e-7 in the next, a cold gradient 2e-5 and
1.6e-4. No order is more exact than another, so that what a correct kernel may have is eager's
worst over several; over a dozen it hardly depends on the machine.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

DRAWS = 12
Results = dict[str, Tensor]


@dataclass(frozen=True)
class Draw:
    """The same inputs with the embeddings' dimensions in another order; every second time others
    that lie next to them, so that the truth is another too."""

    inputs: Results
    order: Tensor
    moved: bool

    def in_order(self, results: Results) -> Results:
        """Results on the inputs as they were, with dimensions in this draw's order."""
        return {name: x[..., self.order] if embeds(name) else x for name, x in results.items()}


def embeds(name: str) -> bool:
    """Whether the tensor so named, an input or its gradient, has a column for each dimension."""
    return name.endswith(("queries", "keys"))


def draws(inputs: Results, ulps: Sequence[int] = (1,)) -> Iterator[Draw]:
    """DRAWS of them; inputs are moved by about as many units in the last place, in turn."""
    embeddings = {name: x.detach() for name, x in inputs.items() if embeds(name)}
    d = next(iter(embeddings.values())).shape[-1]
    for number in range(DRAWS):
        generator = torch.Generator().manual_seed(number)
        order, moved = torch.randperm(d, generator=generator), number % 2 == 1
        others = {}
        for name, x in embeddings.items():
            order = order.to(x.device)
            others[name] = x[..., order]
            if moved:
                near = ulps[number // 2 % len(ulps)] * torch.finfo(x.dtype).eps
                noise = torch.randn(x.shape, generator=generator).to(x.device, x.dtype)
                others[name] = others[name] * (1 + near * noise)
        yield Draw({**inputs, **others}, order, moved)


def worst(
    errors: dict[str, float],
    inputs: Results,
    true: Results,
    truth: Callable[[Results], Results],
    errors_on: Callable[[Results, Results], dict[str, float]],
    ulps: Sequence[int] = (1,),
) -> dict[str, float]:
    """By name the largest of `errors` and eager's own over the draws, `errors_on(inputs, truth)`.
    `true` is the truth for the inputs as they are; an error that is no number counts for nothing.
    """
    largest = dict(errors)
    for draw in draws(inputs, ulps):
        exact = truth(draw.inputs) if draw.moved else draw.in_order(true)
        exact = {name: exact[name] for name in errors}
        for name, error in errors_on(draw.inputs, exact).items():
            if math.isfinite(error):
                largest[name] = max(largest[name], error)
    return largest
