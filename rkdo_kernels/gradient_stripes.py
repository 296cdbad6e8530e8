"""Wide embeddings: ∂L/∂S by stripes in bfloat16, which stay in the cache, then matrix products.

A program that owns rows of a wide gradient keeps a part of its columns, and computes S anew for
every part. Here S is computed once a gradient, and the products with G are left to the library.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .levels import add_shares
from .needs import BOTH, Needs, rooms
from .primitives import LOG2E, block_values, leave_out, load_rows, row_polynomials


@triton.jit
def _gradient_stripe(
    queries_ptr,  # [N, D]           in
    keys_ptr,  # [M, D]              in
    scale_ptr,  # []                 in, c
    weights_ptr,  # [N, DEGREE + 1]  in, fp32
    levels_ptr,  # [N]               in, bf16: see levels.py
    stripe_ptr,  # [stop_i − start_i, stop_j − start_j]  out
    queries_stride,
    keys_stride,
    n,
    m,
    dim,
    unit,  # 1 / b
    exclude_a,
    exclude_b,
    start_i,
    stop_i,
    start_j,
    stop_j,
    DEGREE: tl.constexpr,
    EXCLUDE: tl.constexpr,
    LEVEL: tl.constexpr,  # whether rows have one
    UNIT: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNKS: tl.constexpr,
    FULL: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """One program per tile:  G_ij − level_i,  G_ij = exp(c S_ij) Σ_k weights_ik (S_ij / b)^k, 0 on
    the excluded diagonals, for start_i ≤ i < stop_i and start_j ≤ j < stop_j."""
    across = tl.cdiv(stop_j - start_j, COLS)
    first_i = start_i + tl.program_id(0) // across * ROWS
    first_j = start_j + tl.program_id(0) % across * COLS
    s = tl.zeros([ROWS, COLS], tl.float32)
    for start in range(0, dim, WIDTH):
        q = load_rows(
            queries_ptr, queries_stride, first_i, n, start, dim, ROWS, WIDTH, FULL, True, UPCAST
        )
        k = load_rows(
            keys_ptr, keys_stride, first_j, m, start, dim, COLS, WIDTH, FULL, True, UPCAST
        )
        s = tl.dot(q, tl.trans(k), s, input_precision=PRECISION)
    scale = tl.load(scale_ptr).to(tl.float32) * LOG2E
    e = tl.exp2(s * scale)
    u = s if UNIT else s * unit
    weights = row_polynomials(weights_ptr, first_i, n, ROWS, DEGREE, True)
    g = tl.zeros([ROWS, COLS], tl.float32) + weights[DEGREE]
    for power in tl.static_range(1, DEGREE + 1):
        g = g * u + weights[DEGREE - power]
    g = leave_out(e * g, first_i, first_j, exclude_a, exclude_b, EXCLUDE, ROWS, COLS)
    if LEVEL:
        g -= block_values(levels_ptr, 1, first_i, n, ROWS, 1, True).to(tl.float32)
    i = first_i + tl.arange(0, ROWS)
    j = first_j + tl.arange(0, COLS)
    at = (i - start_i).to(tl.int64)[:, None] * (stop_j - start_j) + (j - start_j)[None, :]
    mask = (i < stop_i)[:, None] & (j < stop_j)[None, :]
    tl.store(stripe_ptr + at, g.to(stripe_ptr.dtype.element_ty), mask=mask)


def pays(queries: Tensor) -> bool:
    """Whether a gradient is wide enough, and bfloat16, whose range holds ∂L/∂S."""
    return queries.dtype == torch.bfloat16 and queries.shape[1] >= launch.STRIPE_DIM


def moments_backward(
    queries: Tensor,
    keys: Tensor,
    scale: Tensor,
    bound: float,
    weights: Tensor,
    exclude: list[int],
    at_positive: Tensor | None = None,
    needs: Needs = BOTH,
    level: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """A ∂L/∂S that one stripe holds is formed once, for both gradients."""
    queries, keys = launch.rows_contiguous(queries), launch.rows_contiguous(keys)
    run = Stripes(queries, keys, scale, bound, weights.contiguous(), exclude, level)
    n, m = queries.shape[0], keys.shape[0]
    d_queries, d_keys = rooms(queries, keys, needs)
    rows = launch.stripe(n, m)
    cols = launch.stripe(m, n) if rows < n else m
    room = queries.new_empty(max(rows * m, n * cols))
    with float32_sums:
        for start in range(0, n if needs[0] else 0, rows):
            stop = min(start + rows, n)
            g = run.stripe(room, start, stop, 0, m)
            multiply(g, keys, d_queries[start:stop])
        for start in range(0, m if needs[1] else 0, cols):
            stop = min(start + cols, m)
            if rows < n or not needs[0]:
                g = run.stripe(room, 0, n, start, stop)
            multiply(g.T, queries, d_keys[start:stop])
    for gradient, to_queries, need in zip((d_queries, d_keys), (True, False), needs, strict=True):
        if need and (at_positive is not None or level is not None):
            add_shares(gradient, to_queries, queries, keys, exclude, at_positive, level)
    return d_queries, d_keys


def multiply(g: Tensor, x: Tensor, out: Tensor) -> None:
    """g x of bfloat16 operands in float32: nothing is rounded before all is added up."""
    if x.device.type == "cuda" and torch.version.hip is None:
        torch.mm(g, x, out_dtype=torch.float32, out=out)
    else:
        torch.mm(g.float(), x.float(), out=out)


class Float32Sums:
    """Within, parts of a product of bfloat16 matrices are added up in float32.

    The setting is the process's: the first thread to enter keeps what it was, the last to leave
    restores it.
    """

    def __init__(self) -> None:
        self.lock, self.inside, self.before = threading.Lock(), 0, (True, True)

    def __enter__(self) -> None:
        setting: Any = torch.backends.cuda.matmul
        with self.lock:
            if self.inside == 0:
                self.before = (
                    setting.allow_bf16_reduced_precision_reduction,
                    setting.allow_bf16_reduced_precision_reduction_split_k,
                )
                setting.allow_bf16_reduced_precision_reduction = (False, self.before[1])
            self.inside += 1

    def __exit__(self, *_: object) -> None:
        setting: Any = torch.backends.cuda.matmul
        with self.lock:
            self.inside -= 1
            if self.inside == 0:
                setting.allow_bf16_reduced_precision_reduction = self.before


float32_sums = Float32Sums()


class Stripes:
    """Launches for parts of one ∂L/∂S."""

    def __init__(
        self,
        queries: Tensor,
        keys: Tensor,
        scale: Tensor,
        bound: float,
        weights: Tensor,
        exclude: list[int],
        level: Tensor | None,
    ) -> None:
        levels = queries if level is None else level.contiguous()
        self.config = launch.config("gradient_stripe", queries)
        self.tensors = queries, keys, scale, weights, levels
        self.numbers = (
            queries.stride(0), keys.stride(0), queries.shape[0], *keys.shape, 1 / bound,
            *launch.excluded(exclude),
        )  # fmt: skip
        self.constants = {
            "DEGREE": weights.shape[1] - 1,
            "EXCLUDE": len(exclude),
            "LEVEL": level is not None,
            "UNIT": bound == 1,
            "ROWS": self.config.rows,
            "COLS": self.config.cols,
            **launch.dims(queries, self.config.width),
            **self.config.options,
        }

    def stripe(self, room: Tensor, start_i: int, stop_i: int, start_j: int, stop_j: int) -> Tensor:
        """G of these rows and columns, in `room`."""
        n, m, config = stop_i - start_i, stop_j - start_j, self.config
        g = room[: n * m].view(n, m)
        _gradient_stripe[(triton.cdiv(n, config.rows) * triton.cdiv(m, config.cols),)](
            *self.tensors, g, *self.numbers, start_i, stop_i, start_j, stop_j, **self.constants
        )
        return g
