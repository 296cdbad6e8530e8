"""Kernel: rows of the recursion's loss, and of its gradient, from their moments.

What quadrature.py does, in float64, for a block of rows that a program has just summed up, or for
sums that several programs have left in parts.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .primitives import load_rows

TINY64 = tl.constexpr(2.2250738585072014e-308)


@triton.jit
def _recursion_rows(
    queries_ptr,  # [N, D]                  in
    keys_ptr,  # [M, D]                     in
    table_ptr,  # see quadrature.table      in, fp64
    moments_ptr,  # [parts, N, DEGREE + 1]  in, fp32
    loss_ptr,  # [N]                        out, fp64
    weights_ptr,  # [N, DEGREE + 1]         out, fp64
    at_positive_ptr,  # [N]                 out, fp64
    queries_stride,
    keys_stride,
    n,
    m,
    dim,
    positive_offset,
    parts,
    DEGREE: tl.constexpr,
    NODES: tl.constexpr,
    DEPTH: tl.constexpr,
    DETACH: tl.constexpr,
    WIDTH: tl.constexpr,
    COUNT: tl.constexpr,
):
    """One program per COUNT rows."""
    recursion_rows(
        queries_ptr, keys_ptr, table_ptr, moments_ptr, loss_ptr, weights_ptr, at_positive_ptr,
        queries_stride, keys_stride, tl.program_id(0) * COUNT, n, m, dim, positive_offset, parts,
        DEGREE, NODES, DEPTH, DETACH, WIDTH, COUNT,
    )  # fmt: skip


@triton.jit
def recursion_rows(
    queries_ptr,
    keys_ptr,
    table_ptr,
    moments_ptr,
    loss_ptr,
    weights_ptr,
    at_positive_ptr,
    queries_stride,
    keys_stride,
    first,
    n,
    m,
    dim,
    positive_offset,
    parts,
    DEGREE: tl.constexpr,
    NODES: tl.constexpr,  # DEGREE + 1 or more: tensors want a power of 2
    DEPTH: tl.constexpr,
    DETACH: tl.constexpr,
    WIDTH: tl.constexpr,
    COUNT: tl.constexpr,
):
    """Rows first .. first + COUNT; see quadrature.recursion for the mathematics.

    1 − p_t follows p's own recursion, as does r_t = p_t / e at the nodes; E_t = q_t / e,
    w_t = log p_t − log q_t and b_t = w_t + (1 − α) b_{t+1}.
    """
    i = first + tl.arange(0, COUNT)
    kept = i < n
    node = tl.arange(0, NODES)
    real = node <= DEGREE
    growth_ptr = table_ptr + (DEGREE + 1) * (DEGREE + 1)
    scales_ptr = growth_ptr + (DEPTH + 1) * (DEGREE + 1)
    alpha = tl.load(scales_ptr + DEPTH + 1)
    s = pair_similarities(
        queries_ptr, queries_stride, keys_ptr, keys_stride, first, n, m, dim, positive_offset,
        WIDTH, COUNT,
    )  # fmt: skip
    row = i.to(tl.int64) * (DEGREE + 1)
    mu = tl.zeros([COUNT, NODES], tl.float64)
    for power in tl.static_range(DEGREE + 1):
        moment = tl.zeros([COUNT], tl.float64)
        for part in range(parts):
            at = moments_ptr + part * tl.cast(n, tl.int64) * (DEGREE + 1) + row + power
            moment += tl.load(at, mask=kept, other=0.0).to(tl.float64)
        to_power = tl.load(table_ptr + node * (DEGREE + 1) + power, mask=real, other=0.0)
        mu += moment[:, None] * to_power[None, :]

    loss = tl.zeros([COUNT], tl.float64)
    at_positive = tl.zeros([COUNT], tl.float64)
    g = tl.zeros([COUNT, NODES], tl.float64)
    below = tl.zeros([COUNT], tl.float64)  # 1 − p
    r = tl.zeros([COUNT, NODES], tl.float64)
    qs = ()
    es = ()
    logs = ()
    log_ratios = ()
    for t in tl.static_range(DEPTH + 1):
        c = tl.load(scales_ptr + t)
        growth = tl.load(growth_ptr + t * (DEGREE + 1) + node, mask=real, other=1.0)[None, :]
        inverse = tl.exp(-c * s)
        odds = tl.sum(mu * growth, 1) * inverse
        q = 1 / (odds + 1)
        e = growth * (inverse * q)[:, None]
        if t > 0:
            change = odds * q - below  # p − q
            w = log1p(change / q)
            log_ratio = tl.log(tl.maximum(r / e, TINY64))
            loss += (q + change) * w + tl.sum(mu * r * log_ratio, 1)
            at_positive -= c * change
            g += c * (e - r)
            logs = logs + (w,)
            log_ratios = log_ratios + (log_ratio,)
        below = (1 - alpha) * below + alpha * (odds * q)
        r = (1 - alpha) * r + alpha * e
        qs = qs + (q,)
        es = es + (e,)
    if not DETACH:
        b = tl.zeros([COUNT, NODES], tl.float64)
        b_positive = tl.zeros([COUNT], tl.float64)
        for step in tl.static_range(DEPTH):
            c = tl.load(scales_ptr + (DEPTH - 1 - step))
            q = qs[DEPTH - 1 - step]
            e = es[DEPTH - 1 - step]
            b = log_ratios[DEPTH - 1 - step] + (1 - alpha) * b
            b_positive = logs[DEPTH - 1 - step] + (1 - alpha) * b_positive
            pull = tl.sum(mu * e * b, 1) + q * b_positive
            g += (c * alpha) * e * (b - pull[:, None])
            at_positive += (c * alpha) * q * (b_positive - pull)
    tl.store(loss_ptr + i, loss, mask=kept)
    tl.store(at_positive_ptr + i, at_positive, mask=kept)
    for power in tl.static_range(DEGREE + 1):
        to_power = tl.load(table_ptr + node * (DEGREE + 1) + power, mask=real, other=0.0)
        tl.store(weights_ptr + row + power, tl.sum(g * to_power[None, :], 1), mask=kept)


@triton.jit
def pair_similarities(
    queries_ptr,
    queries_stride,
    keys_ptr,
    keys_stride,
    first,
    n,
    m,
    dim,
    positive_offset,
    WIDTH: tl.constexpr,
    COUNT: tl.constexpr,
):  # [COUNT], fp64
    """Σ_d q_id k_jd with j = i + positive_offset, of fp32 products; 0 past the last row."""
    s = tl.zeros([COUNT], tl.float64)
    for start in range(0, dim, WIDTH):
        q = load_rows(
            queries_ptr, queries_stride, first, n, start, dim, COUNT, WIDTH, False, True, True
        )
        k = load_rows(
            keys_ptr, keys_stride, first + positive_offset, m, start, dim, COUNT, WIDTH, False,
            True, True,
        )  # fmt: skip
        s += tl.sum((q * k).to(tl.float64), 1)
    return s


@triton.jit
def log1p(x):
    """With x's digits: the rounding of 1 + x cancels in log(1 + x) / ((1 + x) − 1)."""
    y = 1 + x
    exact = y == 1
    return tl.where(exact, x, tl.log(y) * (x / tl.where(exact, 1.0, y - 1)))
