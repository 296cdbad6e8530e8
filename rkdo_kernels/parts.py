"""Where several programs share one walk: each stores its part of the result, a launch adds them."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .launch import Config
from .primitives import store_rows


@triton.jit
def store_part(x_ptr, i, n, start, dim, x, WIDTH: tl.constexpr, SPLIT: tl.constexpr):
    """Into [n, dim], or into this split's of [splits, n, dim]."""
    if SPLIT:
        x_ptr += tl.program_id(2).to(tl.int64) * n * dim
    store_rows(x_ptr, i, n, start, dim, x, WIDTH)


@triton.jit
def at_partners(
    at_positive_ptr,  # [N]
    i,
    n,
    x_ptr,  # [count, D]
    stride,
    partner,
    count,
    start,
    dim,
    WIDTH: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """at_positive_i x_partner, fp32 [ROWS, WIDTH]; 0 without a pair. The first split has it."""
    if SPLIT:
        n = tl.where(tl.program_id(2) == 0, n, 0)
    here = (i < n) & (partner >= 0) & (partner < count)
    g = tl.load(at_positive_ptr + i, mask=here, other=0.0).to(tl.float32)
    return g[:, None] * partners(x_ptr, stride, partner, here, start, dim, WIDTH)


@triton.jit
def partners(x_ptr, stride, partner, here, start, dim, WIDTH: tl.constexpr):
    """Their rows' columns start .. start + WIDTH, fp32; 0 where a row has none."""
    d = start + tl.arange(0, WIDTH)
    at = x_ptr + partner.to(tl.int64)[:, None] * stride + d[None, :]
    x = tl.load(at, mask=here[:, None] & (d < dim)[None, :], other=0.0)
    return x.to(tl.float32)


@triton.jit
def _add_parts(
    parts_ptr,  # [splits, count]  in, fp32
    total_ptr,  # [count]          out
    count,
    splits,
    BLOCK: tl.constexpr,
):
    """One program per BLOCK entries: Σ_s parts_s, in the order of s."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for split in range(splits):
        total += tl.load(
            parts_ptr + split * tl.cast(count, tl.int64) + at, mask=at < count, other=0.0
        )
    tl.store(total_ptr + at, total.to(total_ptr.dtype.element_ty), mask=at < count)


def shared(
    gradient: Tensor, config: Config, chunks: int, to_queries: bool, walked: int, fit: int = 16
) -> tuple[tuple[int, int, int], Tensor, int]:
    """The grid of a gradient's launch, where it stores, and how many rows a split walks over; `fit`
    as in `launch.splits`."""
    own, other = (config.rows, config.cols) if to_queries else (config.cols, config.rows)
    blocks = triton.cdiv(len(gradient), own)
    step = other * config.steps
    splits, span = launch.split(blocks * chunks, walked, step, config.warps, gradient, fit)
    return (blocks, chunks, splits), room(gradient, splits), span


def room(result: Tensor, splits: int) -> Tensor:  # [splits, *result.shape] fp32, or the result
    return result if splits == 1 else result.new_empty(splits, *result.shape, dtype=torch.float32)


def add(parts: Tensor, result: Tensor) -> None:
    """What `room` made into the result."""
    if parts is result:
        return
    _add_parts[(triton.cdiv(result.numel(), 1024),)](
        parts, result, result.numel(), len(parts), BLOCK=1024, num_warps=4, enable_fp_fusion=True
    )
