"""Kernels of the direct path: softmax sums with a running maximum, and the recursion itself."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .primitives import (
    LOG2E,
    into,
    load_rows,
    on_diagonal,
    row_values,
    similarity_tile,
    store_rows,
    student_distance,
)

LOWEST = tl.constexpr(-1e30)
TINY = tl.constexpr(1.1754943508222875e-38)


@triton.jit
def _softmax_sums_fwd(
    queries_ptr,  # [N, D]         in
    keys_ptr,  # [M, D]            in
    queries_square_ptr,  # [N]     in, ‖zq‖², for STUDENT
    keys_square_ptr,  # [M]        in
    scales_ptr,  # [SCALES]        in, c_t
    peak_ptr,  # [N]               out
    mass_ptr,  # [N, SCALES]       out
    slope_ptr,  # [N, SCALES]      out
    total_ptr,  # [N]              out
    queries_stride,
    keys_stride,
    n,
    m,
    dim,
    exclude_a,
    exclude_b,
    SCALES: tl.constexpr,
    STUDENT: tl.constexpr,
    EXCLUDE: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNKS: tl.constexpr,
    FULL: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """One program per block of rows i, with x = S or −log(1 + ‖zq − zk‖²):

    peak = max_j x,  mass_t = Σ_j exp(c_t (x − peak)),  slope_t = ∂mass_t/∂c_t,  total = Σ_j x
    """
    first_i = tl.program_id(0) * ROWS
    i = first_i + tl.arange(0, ROWS)
    q = load_rows(queries_ptr, queries_stride, first_i, n, 0, dim, ROWS, WIDTH, FULL, True, UPCAST)
    peak = tl.full([ROWS], LOWEST, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    mass = ()
    slope = ()
    for _ in tl.static_range(SCALES):
        mass = mass + (tl.zeros([ROWS], tl.float32),)
        slope = slope + (tl.zeros([ROWS], tl.float32),)
    for first_j in range(0, m, COLS):
        j = first_j + tl.arange(0, COLS)
        k = load_rows(keys_ptr, keys_stride, first_j, m, 0, dim, COLS, WIDTH, FULL, True, UPCAST)
        x = similarity_tile(
            q, k, queries_ptr, queries_stride, first_i, n, keys_ptr, keys_stride, first_j, m,
            dim, ROWS, COLS, WIDTH, CHUNKS, FULL, PRECISION, UPCAST,
        )  # fmt: skip
        if STUDENT:
            x = -tl.log(student_distance(x, queries_square_ptr, i, n, keys_square_ptr, j, m))
        keep = (j < m)[None, :] & (i < n)[:, None]
        if EXCLUDE >= 1:
            keep = keep & (on_diagonal(i, j, exclude_a) == 0)
        if EXCLUDE >= 2:
            keep = keep & (on_diagonal(i, j, exclude_b) == 0)
        total += tl.sum(tl.where(keep, x, 0.0), 1)
        x = tl.where(keep, x, LOWEST)
        risen = tl.maximum(peak, tl.max(x, 1))
        fall = peak - risen
        x = x - risen[:, None]
        new_mass = ()
        new_slope = ()
        for t in tl.static_range(SCALES):
            c = tl.load(scales_ptr + t).to(tl.float32) * LOG2E
            shrink = tl.exp2(fall * c)
            e = tl.where(keep, tl.exp2(x * c), 0.0)
            new_slope = new_slope + (shrink * (slope[t] + fall * mass[t]) + tl.sum(e * x, 1),)
            new_mass = new_mass + (shrink * mass[t] + tl.sum(e, 1),)
        mass = new_mass
        slope = new_slope
        peak = risen
    tl.store(peak_ptr + i, peak, mask=i < n)
    tl.store(total_ptr + i, total, mask=i < n)
    table = i.to(tl.int64) * SCALES
    for t in tl.static_range(SCALES):
        tl.store(mass_ptr + table + t, mass[t], mask=i < n)
        tl.store(slope_ptr + table + t, slope[t], mask=i < n)


@triton.jit
def _softmax_sums_bwd(
    queries_ptr,  # [N, D]            in
    keys_ptr,  # [M, D]               in
    queries_square_ptr,  # [N]        in
    keys_square_ptr,  # [M]           in
    scales_ptr,  # [SCALES]           in
    peak_ptr,  # [N]                  in
    weights_ptr,  # [N, SCALES]       in, ∂L/∂mass
    total_weight_ptr,  # [N]          in, ∂L/∂total
    gradient_ptr,  # [N or M, D]      out
    queries_stride,
    keys_stride,
    n,
    m,
    dim,
    exclude_a,
    exclude_b,
    QUERIES: tl.constexpr,  # the gradient to the queries, else to the keys
    SCALES: tl.constexpr,
    STUDENT: tl.constexpr,
    EXCLUDE: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNKS: tl.constexpr,
    FULL: tl.constexpr,
    PRECISION: tl.constexpr,
    GRADIENT_PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """One program per block of queries or of keys and stripe of WIDTH: G keys or Gᵀ queries.

    For STUDENT x = −log v with v = 1 + ‖zq‖² + ‖zk‖² − 2 S, which depends on the own norm too.
    """
    stripe = tl.program_id(1) * WIDTH
    if QUERIES:
        first_i = tl.program_id(0) * ROWS
        i = first_i + tl.arange(0, ROWS)
        q = load_rows(
            queries_ptr, queries_stride, first_i, n, 0, dim, ROWS, WIDTH, FULL, True, UPCAST
        )
        acc = tl.zeros([ROWS, WIDTH], tl.float32)
        pushed = tl.zeros([ROWS], tl.float32)
        for first_j in range(0, m, COLS):
            j = first_j + tl.arange(0, COLS)
            k = load_rows(
                keys_ptr, keys_stride, first_j, m, 0, dim, COLS, WIDTH, FULL, True, UPCAST
            )
            s = similarity_tile(
                q, k, queries_ptr, queries_stride, first_i, n, keys_ptr, keys_stride, first_j, m,
                dim, ROWS, COLS, WIDTH, CHUNKS, FULL, PRECISION, UPCAST,
            )  # fmt: skip
            g = _softmax_sums_gradient(
                s, queries_square_ptr, keys_square_ptr, scales_ptr, peak_ptr, weights_ptr,
                total_weight_ptr, i, n, j, m, exclude_a, exclude_b, SCALES, STUDENT, EXCLUDE,
            )  # fmt: skip
            pushed += tl.sum(g, 1)
            if CHUNKS > 1:
                k = load_rows(
                    keys_ptr, keys_stride, first_j, m, stripe, dim, COLS, WIDTH, FULL, True, UPCAST
                )
            acc = into(acc, g, k, GRADIENT_PRECISION)
        if STUDENT:
            q = load_rows(
                queries_ptr,
                queries_stride,
                first_i,
                n,
                stripe,
                dim,
                ROWS,
                WIDTH,
                FULL,
                True,
                UPCAST,
            )
            acc -= q.to(tl.float32) * pushed[:, None]
        store_rows(gradient_ptr, i, n, stripe, dim, acc, WIDTH)
    else:
        first_j = tl.program_id(0) * COLS
        j = first_j + tl.arange(0, COLS)
        k = load_rows(keys_ptr, keys_stride, first_j, m, 0, dim, COLS, WIDTH, FULL, True, UPCAST)
        acc = tl.zeros([COLS, WIDTH], tl.float32)
        pushed = tl.zeros([COLS], tl.float32)
        for first_i in range(0, n, ROWS):
            i = first_i + tl.arange(0, ROWS)
            q = load_rows(
                queries_ptr, queries_stride, first_i, n, 0, dim, ROWS, WIDTH, FULL, True, UPCAST
            )
            s = similarity_tile(
                q, k, queries_ptr, queries_stride, first_i, n, keys_ptr, keys_stride, first_j, m,
                dim, ROWS, COLS, WIDTH, CHUNKS, FULL, PRECISION, UPCAST,
            )  # fmt: skip
            g = _softmax_sums_gradient(
                s, queries_square_ptr, keys_square_ptr, scales_ptr, peak_ptr, weights_ptr,
                total_weight_ptr, i, n, j, m, exclude_a, exclude_b, SCALES, STUDENT, EXCLUDE,
            )  # fmt: skip
            pushed += tl.sum(g, 0)
            if CHUNKS > 1:
                q = load_rows(
                    queries_ptr,
                    queries_stride,
                    first_i,
                    n,
                    stripe,
                    dim,
                    ROWS,
                    WIDTH,
                    FULL,
                    True,
                    UPCAST,
                )
            acc = into(acc, tl.trans(g), q, GRADIENT_PRECISION)
        if STUDENT:
            k = load_rows(
                keys_ptr, keys_stride, first_j, m, stripe, dim, COLS, WIDTH, FULL, True, UPCAST
            )
            acc -= k.to(tl.float32) * pushed[:, None]
        store_rows(gradient_ptr, j, m, stripe, dim, acc, WIDTH)


@triton.jit
def _softmax_sums_gradient(
    s,
    queries_square_ptr,
    keys_square_ptr,
    scales_ptr,
    peak_ptr,
    weights_ptr,
    total_weight_ptr,
    i,
    n,
    j,
    m,
    exclude_a,
    exclude_b,
    SCALES: tl.constexpr,
    STUDENT: tl.constexpr,
    EXCLUDE: tl.constexpr,
):
    """∂L/∂x = Σ_t weights_t c_t exp(c_t (x − peak)) + total_weight; for STUDENT that · 2 / v."""
    distance = s
    x = s
    if STUDENT:
        distance = student_distance(s, queries_square_ptr, i, n, keys_square_ptr, j, m)
        x = -tl.log(distance)
    keep = (j < m)[None, :] & (i < n)[:, None]
    if EXCLUDE >= 1:
        keep = keep & (on_diagonal(i, j, exclude_a) == 0)
    if EXCLUDE >= 2:
        keep = keep & (on_diagonal(i, j, exclude_b) == 0)
    x = x - row_values(peak_ptr, 1, i, n)
    g = tl.zeros_like(x) + row_values(total_weight_ptr, 1, i, n)
    for t in tl.static_range(SCALES):
        c = tl.load(scales_ptr + t).to(tl.float32)
        g += (row_values(weights_ptr + t, SCALES, i, n) * c) * tl.exp2(x * (c * LOG2E))
    if STUDENT:
        g = 2.0 * g / distance
    return tl.where(keep, g, 0.0)


@triton.jit
def _recursion_fwd(
    queries_ptr,  # [N, D]             in
    keys_ptr,  # [M, D]                in
    scales_ptr,  # [DEPTH + 1]         in, c_t
    steeper_ptr,  # [DEPTH + 1]        in, c_t − c_0
    peak_ptr,  # [N]                   in
    share_ptr,  # [N]                  in, 1 / mass of q_0
    lighter_ptr,  # [N, DEPTH + 1]     in, log mass_t − log mass_0
    loss_ptr,  # [N]                   out
    pull_ptr,  # [N, DEPTH]            out
    slope_ptr,  # [N, DEPTH + 1]       out
    queries_stride,
    keys_stride,
    n,
    m,
    dim,
    alpha,
    positive_offset,
    DEPTH: tl.constexpr,
    DETACH: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNKS: tl.constexpr,
    FULL: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """One program per block of rows i: sums over the keys that are not the positive.

    With e_t = q_t / q_0, r_t = p_t / q_0 = (1 − α) r_{t−1} + α e_{t−1}, w_t = log r_t − log e_t and
    b_t = w_t + (1 − α) b_{t+1}, x = S − peak:
    loss = Σ_t Σ_j p_t w_t,  pull_t = α Σ_j q_t b_{t+1},
    slope_t = Σ_j x (q_t − p_t + α q_t b_{t+1})
    """
    first_i = tl.program_id(0) * ROWS
    i = first_i + tl.arange(0, ROWS)
    q = load_rows(queries_ptr, queries_stride, first_i, n, 0, dim, ROWS, WIDTH, FULL, True, UPCAST)
    peak = tl.load(peak_ptr + i, mask=i < n, other=0.0)[:, None]
    share = tl.load(share_ptr + i, mask=i < n, other=0.0)[:, None]
    c_0 = tl.load(scales_ptr) * LOG2E
    table = i.to(tl.int64) * (DEPTH + 1)
    loss = tl.zeros([ROWS], tl.float32)
    pull = ()
    slope = (tl.zeros([ROWS], tl.float32),)
    for _ in tl.static_range(DEPTH):
        pull = pull + (tl.zeros([ROWS], tl.float32),)
        slope = slope + (tl.zeros([ROWS], tl.float32),)
    for first_j in range(0, m, COLS):
        j = first_j + tl.arange(0, COLS)
        k = load_rows(keys_ptr, keys_stride, first_j, m, 0, dim, COLS, WIDTH, FULL, True, UPCAST)
        s = similarity_tile(
            q, k, queries_ptr, queries_stride, first_i, n, keys_ptr, keys_stride, first_j, m,
            dim, ROWS, COLS, WIDTH, CHUNKS, FULL, PRECISION, UPCAST,
        )  # fmt: skip
        keep = (j < m)[None, :] & (on_diagonal(i, j, positive_offset) == 0)
        x = tl.where(keep, s - peak, 0.0)
        q_0 = tl.where(keep, tl.exp2(x * c_0) * share, 0.0)
        e = tl.full([ROWS, COLS], 1.0, tl.float32)
        r = tl.zeros([ROWS, COLS], tl.float32)
        ratios = ()
        logs = ()
        new_slope = (slope[0],)
        for t in tl.static_range(1, DEPTH + 1):
            r = (1 - alpha) * r + alpha * e
            ratios = ratios + (e,)
            lighter = tl.load(lighter_ptr + table + t, mask=i < n, other=0.0)[:, None]
            log_e = x * tl.load(steeper_ptr + t) - lighter
            w = tl.log(tl.maximum(r, TINY)) - log_e
            logs = logs + (w,)
            loss += tl.sum(q_0 * r * w, 1)
            e = tl.exp2(log_e * LOG2E)
            new_slope = new_slope + (slope[t] + tl.sum(q_0 * (e - r) * x, 1),)
        slope = new_slope
        if not DETACH:
            b = tl.zeros([ROWS, COLS], tl.float32)
            pulls = ()
            slopes = ()
            for step in tl.static_range(DEPTH):
                b = logs[DEPTH - 1 - step] + (1 - alpha) * b
                through = alpha * q_0 * ratios[DEPTH - 1 - step] * b
                pulls = (pull[DEPTH - 1 - step] + tl.sum(through, 1),) + pulls
                slopes = (slope[DEPTH - 1 - step] + tl.sum(through * x, 1),) + slopes
            pull = pulls
            slope = slopes + (slope[DEPTH],)
    tl.store(loss_ptr + i, loss, mask=i < n)
    tl.store(slope_ptr + table + DEPTH, slope[DEPTH], mask=i < n)
    for t in tl.static_range(DEPTH):
        tl.store(pull_ptr + i.to(tl.int64) * DEPTH + t, pull[t], mask=i < n)
        tl.store(slope_ptr + table + t, slope[t], mask=i < n)


@triton.jit
def _recursion_bwd(
    queries_ptr,  # [N, D]            in
    keys_ptr,  # [M, D]               in
    scales_ptr,  # [DEPTH + 1]        in
    steeper_ptr,  # [DEPTH + 1]       in
    peak_ptr,  # [N]                  in
    share_ptr,  # [N]                 in
    lighter_ptr,  # [N, DEPTH + 1]    in
    pull_ptr,  # [N, DEPTH]           in
    weights_ptr,  # [N]               in, ∂L/∂loss
    at_positive_ptr,  # [N]           in, ∂loss_i/∂S_ij at the positive
    gradient_ptr,  # [N or M, D]      out
    queries_stride,
    keys_stride,
    n,
    m,
    dim,
    alpha,
    positive_offset,
    QUERIES: tl.constexpr,  # the gradient to the queries, else to the keys
    DEPTH: tl.constexpr,
    DETACH: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNKS: tl.constexpr,
    FULL: tl.constexpr,
    PRECISION: tl.constexpr,
    GRADIENT_PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """One program per block of queries or of keys and stripe of WIDTH: G keys or Gᵀ queries."""
    stripe = tl.program_id(1) * WIDTH
    if QUERIES:
        first_i = tl.program_id(0) * ROWS
        i = first_i + tl.arange(0, ROWS)
        q = load_rows(
            queries_ptr, queries_stride, first_i, n, 0, dim, ROWS, WIDTH, FULL, True, UPCAST
        )
        acc = tl.zeros([ROWS, WIDTH], tl.float32)
        for first_j in range(0, m, COLS):
            j = first_j + tl.arange(0, COLS)
            k = load_rows(
                keys_ptr, keys_stride, first_j, m, 0, dim, COLS, WIDTH, FULL, True, UPCAST
            )
            s = similarity_tile(
                q, k, queries_ptr, queries_stride, first_i, n, keys_ptr, keys_stride, first_j, m,
                dim, ROWS, COLS, WIDTH, CHUNKS, FULL, PRECISION, UPCAST,
            )  # fmt: skip
            g = _recursion_gradient(
                s, scales_ptr, steeper_ptr, peak_ptr, share_ptr, lighter_ptr, pull_ptr,
                weights_ptr, at_positive_ptr, i, n, j, m, alpha, positive_offset, DEPTH, DETACH,
            )  # fmt: skip
            if CHUNKS > 1:
                k = load_rows(
                    keys_ptr, keys_stride, first_j, m, stripe, dim, COLS, WIDTH, FULL, True, UPCAST
                )
            acc = into(acc, g, k, GRADIENT_PRECISION)
        store_rows(gradient_ptr, i, n, stripe, dim, acc, WIDTH)
    else:
        first_j = tl.program_id(0) * COLS
        j = first_j + tl.arange(0, COLS)
        k = load_rows(keys_ptr, keys_stride, first_j, m, 0, dim, COLS, WIDTH, FULL, True, UPCAST)
        acc = tl.zeros([COLS, WIDTH], tl.float32)
        for first_i in range(0, n, ROWS):
            i = first_i + tl.arange(0, ROWS)
            q = load_rows(
                queries_ptr, queries_stride, first_i, n, 0, dim, ROWS, WIDTH, FULL, True, UPCAST
            )
            s = similarity_tile(
                q, k, queries_ptr, queries_stride, first_i, n, keys_ptr, keys_stride, first_j, m,
                dim, ROWS, COLS, WIDTH, CHUNKS, FULL, PRECISION, UPCAST,
            )  # fmt: skip
            g = _recursion_gradient(
                s, scales_ptr, steeper_ptr, peak_ptr, share_ptr, lighter_ptr, pull_ptr,
                weights_ptr, at_positive_ptr, i, n, j, m, alpha, positive_offset, DEPTH, DETACH,
            )  # fmt: skip
            if CHUNKS > 1:
                q = load_rows(
                    queries_ptr,
                    queries_stride,
                    first_i,
                    n,
                    stripe,
                    dim,
                    ROWS,
                    WIDTH,
                    FULL,
                    True,
                    UPCAST,
                )
            acc = into(acc, tl.trans(g), q, GRADIENT_PRECISION)
        store_rows(gradient_ptr, j, m, stripe, dim, acc, WIDTH)


@triton.jit
def _recursion_gradient(
    s,
    scales_ptr,
    steeper_ptr,
    peak_ptr,
    share_ptr,
    lighter_ptr,
    pull_ptr,
    weights_ptr,
    at_positive_ptr,
    i,
    n,
    j,
    m,
    alpha,
    positive_offset,
    DEPTH: tl.constexpr,
    DETACH: tl.constexpr,
):
    """weights · q_0 (Σ_{t>0} c_t (e_t − r_t) + w_t y_t − Σ_{t<depth} c_t e_t pull_t), and

    at the positive weights · at_positive;  y_t = (1 − α) y_{t−1} + α c_{t−1} e_{t−1}
    """
    positive = on_diagonal(i, j, positive_offset)
    keep = (j < m)[None, :] & (i < n)[:, None] & (positive == 0)
    x = tl.where(keep, s - row_values(peak_ptr, 1, i, n), 0.0)
    c = tl.load(scales_ptr)
    q_0 = tl.where(keep, tl.exp2(x * (c * LOG2E)) * row_values(share_ptr, 1, i, n), 0.0)
    e = tl.zeros_like(x) + 1.0
    r = tl.zeros_like(x)
    y = tl.zeros_like(x)
    g = tl.zeros_like(x)
    for t in tl.static_range(1, DEPTH + 1):
        r = (1 - alpha) * r + alpha * e
        log_e = x * tl.load(steeper_ptr + t) - row_values(lighter_ptr + t, DEPTH + 1, i, n)
        if not DETACH:
            g -= e * (c * row_values(pull_ptr + (t - 1), DEPTH, i, n))
            y = (1 - alpha) * y + (alpha * c) * e
            g += y * (tl.log(tl.maximum(r, TINY)) - log_e)
        e = tl.exp2(log_e * LOG2E)
        c = tl.load(scales_ptr + t)
        g += c * (e - r)
    g = tl.where(positive, row_values(at_positive_ptr, 1, i, n), q_0 * g)
    return g * row_values(weights_ptr, 1, i, n)


def softmax_sums(
    queries: Tensor, keys: Tensor, scales: Tensor, student: bool, exclude: list[int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # [N], [N, T], [N, T], [N]
    queries, keys = launch.rows_contiguous(queries), launch.rows_contiguous(keys)
    n, dim = queries.shape
    peak, total = queries.new_empty(2, n, dtype=torch.float32)
    mass, slope = queries.new_empty(2, n, len(scales), dtype=torch.float32)
    config = launch.config("softmax_sums", queries)
    _softmax_sums_fwd[(triton.cdiv(n, config.rows),)](
        queries, keys, *squares(queries, keys, student), scales, peak, mass, slope, total,
        queries.stride(0), keys.stride(0), n, keys.shape[0], dim, *launch.excluded(exclude),
        SCALES=len(scales), STUDENT=student, EXCLUDE=len(exclude), **launch.dims(queries),
        ROWS=config.rows, COLS=config.cols, **config.options,
    )  # fmt: skip
    return peak, mass, slope, total


def softmax_sums_backward(
    queries: Tensor,
    keys: Tensor,
    scales: Tensor,
    student: bool,
    exclude: list[int],
    peak: Tensor,
    weights: Tensor,
    total_weight: Tensor,
) -> tuple[Tensor, Tensor]:
    queries, keys = launch.rows_contiguous(queries), launch.rows_contiguous(keys)
    rows = peak.contiguous(), weights.contiguous(), total_weight.contiguous()
    config, dims = launch.config("softmax_sums_bwd", queries), launch.dims(queries)
    results = queries.new_empty(queries.shape), keys.new_empty(keys.shape)
    for gradient, to_queries in zip(results, (True, False), strict=True):
        block = config.rows if to_queries else config.cols
        _softmax_sums_bwd[(triton.cdiv(len(gradient), block), dims["CHUNKS"])](
            queries, keys, *squares(queries, keys, student), scales, *rows, gradient,
            queries.stride(0), keys.stride(0), queries.shape[0], keys.shape[0], queries.shape[1],
            *launch.excluded(exclude), QUERIES=to_queries, SCALES=len(scales), STUDENT=student,
            EXCLUDE=len(exclude), **dims, GRADIENT_PRECISION=launch.gradient_precision(queries),
            ROWS=config.rows, COLS=config.cols, **config.options,
        )  # fmt: skip
    return results


def recursion(
    queries: Tensor,
    keys: Tensor,
    scales: Tensor,
    alpha: float,
    positive_offset: int,
    detach_target: bool,
    peak: Tensor,
    log_mass: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # [N], [N, depth], [N, T]
    queries, keys = launch.rows_contiguous(queries), launch.rows_contiguous(keys)
    n, dim = queries.shape
    depth = len(scales) - 1
    loss = queries.new_empty(n, dtype=torch.float32)
    pull = loss.new_empty(n, depth)
    slope = loss.new_empty(n, depth + 1)
    config = launch.config("recursion", queries)
    _recursion_fwd[(triton.cdiv(n, config.rows),)](
        queries, keys, *row_tables(scales, peak, log_mass), loss, pull, slope, queries.stride(0),
        keys.stride(0), n, keys.shape[0], dim, alpha, positive_offset, DEPTH=depth,
        DETACH=detach_target, **launch.dims(queries), ROWS=config.rows, COLS=config.cols,
        **config.options,
    )  # fmt: skip
    return loss, pull, slope


def recursion_backward(
    queries: Tensor,
    keys: Tensor,
    scales: Tensor,
    alpha: float,
    positive_offset: int,
    detach_target: bool,
    peak: Tensor,
    log_mass: Tensor,
    pull: Tensor,
    weights: Tensor,
    at_positive: Tensor,
) -> tuple[Tensor, Tensor]:
    queries, keys = launch.rows_contiguous(queries), launch.rows_contiguous(keys)
    tables = row_tables(scales, peak, log_mass)
    rows = pull.contiguous(), weights.contiguous(), at_positive.contiguous()
    config, dims = launch.config("recursion_bwd", queries), launch.dims(queries)
    results = queries.new_empty(queries.shape), keys.new_empty(keys.shape)
    for gradient, to_queries in zip(results, (True, False), strict=True):
        block = config.rows if to_queries else config.cols
        _recursion_bwd[(triton.cdiv(len(gradient), block), dims["CHUNKS"])](
            queries, keys, *tables, *rows, gradient, queries.stride(0), keys.stride(0),
            queries.shape[0], keys.shape[0], queries.shape[1], alpha, positive_offset,
            QUERIES=to_queries, DEPTH=len(scales) - 1, DETACH=detach_target, **dims,
            GRADIENT_PRECISION=launch.gradient_precision(queries), ROWS=config.rows,
            COLS=config.cols, **config.options,
        )  # fmt: skip
    return results


def row_tables(scales: Tensor, peak: Tensor, log_mass: Tensor) -> tuple[Tensor, ...]:
    """c_t, c_t − c_0, peak, 1 / mass_0, log mass_t − log mass_0: subtracted before rounding."""
    share = torch.exp(-log_mass[:, 0])
    tables = (scales, scales - scales[0], peak, share, log_mass - log_mass[:, :1])
    return tuple(x.float().contiguous() for x in tables)


def squares(queries: Tensor, keys: Tensor, wanted: bool) -> tuple[Tensor, Tensor]:
    """‖zq_i‖², [N], and ‖zk_j‖², [M], fp32; if they are not wanted, tensors that nobody reads."""
    if not wanted:
        return queries, keys
    return queries.float().square().sum(1), keys.float().square().sum(1)
