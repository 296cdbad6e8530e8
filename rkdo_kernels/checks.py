"""Argument errors: the argument's name, what came, what was wanted."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
LARGEST = 2**63  # whole numbers below are such as a tensor can have
SLACK = 1.01  # rows may pass the bound by what rounding to bfloat16 adds


def embeddings(queries: Tensor, keys: Tensor) -> None:
    for name, x in (("queries", queries), ("keys", keys)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
        if x.layout != torch.strided:
            raise TypeError(f"{name} must be a dense tensor, got layout {x.layout}")
        if x.dtype not in FLOATS:
            raise TypeError(
                f"{name} must be float32, bfloat16, float16 or float64, got {dtype_name(x)}"
            )
        if x.dim() != 2:
            raise ValueError(f"{name} must be [rows, dim], got shape {list(x.shape)}")
        if x.shape[0] == 0 or x.shape[1] == 0:
            raise ValueError(f"{name} must not be empty, got shape {list(x.shape)}")
    if keys.device != queries.device:
        raise ValueError(f"keys are on {keys.device}, queries on {queries.device}: want one device")
    if keys.dtype != queries.dtype:
        raise TypeError(
            f"keys are {dtype_name(keys)}, queries {dtype_name(queries)}: want one dtype"
        )
    if keys.shape[1] != queries.shape[1]:
        raise ValueError(
            f"keys {list(keys.shape)} must have the dim of queries {list(queries.shape)}"
        )


def as_many(name: str, queries: Tensor, keys: Tensor) -> None:
    if queries.shape[0] != keys.shape[0]:
        raise ValueError(
            f"{name} needs as many keys as queries, got keys {list(keys.shape)} for queries "
            f"{list(queries.shape)}"
        )


def pairing(queries: Tensor, keys: Tensor, positive_offset: int | None) -> int:
    """The offset from a query's row to its positive's, checked against the shapes."""
    n, m = queries.shape[0], keys.shape[0]
    if positive_offset is None:
        if n != m:
            raise ValueError(
                f"keys {list(keys.shape)} must match queries {list(queries.shape)}; "
                "more keys need positive_offset"
            )
        return 0
    integer("positive_offset", positive_offset, at_least=0)
    if positive_offset + n > m:
        raise ValueError(
            f"positive_offset must leave {n} positives among {m} keys, got {positive_offset}"
        )
    return positive_offset


def temperature(value: float | Tensor) -> None:
    if isinstance(value, Tensor):
        if value.numel() != 1 or not value.is_floating_point():
            raise TypeError(
                "temperature must be a number or a floating tensor of one element, got "
                f"{dtype_name(value)} {list(value.shape)}"
            )
        if not readable(value):
            return  # a bad one gives NaN
        value = float(value.detach())
    elif isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"temperature must be a number or a tensor, got {type(value).__name__}")
    if not (0 < value <= sys.float_info.max and 1 / value < math.inf):
        raise ValueError(f"temperature must be positive and finite, got {shown(value)}")


def number(
    name: str, value: Any, at_least: float, at_most: float = math.inf, below: float = math.inf
) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not (at_least <= value <= at_most and value < below):
        end = f"{below})" if below < math.inf else f"{at_most}]"
        raise ValueError(f"{name} must be in [{at_least}, {end}, got {shown(value)}")


def integer(name: str, value: Any, at_least: int, below: int = LARGEST) -> None:
    if isinstance(value, bool) or not isinstance(value, int | torch.SymInt):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value < at_least:
        raise ValueError(f"{name} must be at least {at_least}, got {shown(value)}")
    if isinstance(value, int) and value >= below:  # a symbolic one is a size or an int64
        limit = "2**63" if below == LARGEST else below
        raise ValueError(f"{name} must be below {limit}, got {shown(value)}")


def shown(value: Any) -> str:
    """A number as an error names it: Python writes out no int of thousands of digits."""
    if isinstance(value, int) and value.bit_length() > 1024:
        return f"{'-' if value < 0 else ''}an int of {value.bit_length()} bits"
    return f"{value}"


def flag(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {type(value).__name__}")


def choice(name: str, value: Any, choices: Sequence[str]) -> None:
    if value not in choices:
        wanted = ", ".join(repr(c) for c in choices)
        raise ValueError(f"{name} must be one of {wanted}, got {value!r}")


def bound(value: float | None, x: Tensor) -> None:
    """Of products of x, which are float32 numbers at least."""
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"bound must be a number or None, got {type(value).__name__}")
    if not (0 < value <= sys.float_info.max and 1 / value < math.inf):
        raise ValueError(f"bound must be positive and finite, or None, got {shown(value)}")
    info = torch.finfo(wide(x))
    if not info.tiny <= value <= info.max:
        raise ValueError(
            f"bound must be None or in [{info.tiny:.4g}, {info.max:.4g}], {info.dtype}'s normal "
            f"numbers, for {dtype_name(x)} rows, got {value}"
        )


def within_bound(
    queries: Tensor, keys: Tensor, bound: float, names: tuple[str, str] = ("queries", "keys")
) -> Tensor | None:
    """Holds every |S_ij| to `bound`, in O((N + M) D), by the rows' lengths.

    A row that is too long raises where it can be read (see `readable`); elsewhere the result is [N]
    factors for the loss: 1, or NaN for a row that may pass the bound.
    """
    queries, keys = queries.detach(), keys.detach()
    can_read = readable(queries) and readable(keys)
    if can_read and quickly_within(queries, keys, SLACK * bound):
        return None
    queries_length, longest = lengths(queries), lengths(keys).amax()
    product = queries_length * longest
    # An infinite key times a zero query is NaN, and NaN must pass here to poison its row only.
    if not can_read:
        return torch.where(product > SLACK * bound, float("nan"), 1.0)
    if bool((product > SLACK * bound).any()):
        row = int(torch.nan_to_num(product, nan=0).argmax())
        raise ValueError(
            f"{names[0]}[{row}] has length {float(queries_length[row]):.4g} and the longest of "
            f"{names[1]} {float(longest):.4g}: their product must not pass "
            f"bound={bound:g}. Normalise the rows, or give a larger bound, or bound=None for losses"
        )
    return None


def quickly_within(queries: Tensor, keys: Tensor, most: float) -> bool:
    """Whether float32's squares show it, less than any of which hides lengths of up to √(D tiny);
    on a CPU float64's take up to ten times as long."""
    product = 1.0
    for x in (queries, keys):
        longest = torch.linalg.vector_norm(x, dim=1, dtype=wide(x)).amax()
        product *= float(longest) + math.sqrt(x.shape[1] * torch.finfo(wide(x)).tiny)
    return product <= most


def lengths(x: Tensor) -> Tensor:  # [N, D] -> [N]
    """Of squares that are numbers, whatever the entries are."""
    if x.dtype != torch.float64 and x.device.type != "mps":
        return torch.linalg.vector_norm(x, dim=1, dtype=torch.float64)
    info = torch.finfo(wide(x))
    largest = x.to(wide(x)).abs().amax(1).clamp(info.tiny, info.max)
    return torch.linalg.vector_norm(x / largest[:, None], dim=1, dtype=wide(x)) * largest


def fits(numbers: int, dtype: torch.dtype, device: torch.device, what: str, instead: str) -> None:
    """Raises a MemoryError for more numbers than the device can ever hold."""
    if device.type == "cuda":
        most = torch.cuda.mem_get_info(device)[1]
    elif device.type == "cpu" and hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        most = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    else:
        most = LARGEST - 1  # of any tensor
    size = numbers * dtype.itemsize
    if size > most:
        raise MemoryError(
            f"{what} has {size / 1e9:.4g} GB in {str(dtype)[6:]}, {device} {most / 1e9:.4g} GB: "
            f"{instead}"
        )


def readable(x: Tensor) -> bool:
    """Whether Python may look at numbers: on a CPU, where that waits for no device, and unless they
    are symbols of torch.compile's or rows that torch.func.vmap goes over."""
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(x):
        if functorch.is_batchedtensor(x):
            return False
        x = functorch.get_unwrapped(x)
    return True


def wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def dtype_name(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")
