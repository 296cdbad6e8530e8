"""Kernel: rows of the recursion's loss, and of its gradient, from their moments.

What quadrature.py does, in float64, for a block of rows that a program has just summed up, or for
sums that several programs have left in parts.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .primitives import load_rows

PASTS = 5  # of every t: q at the positive, 1 / Z, w at the positive, pull twice over
Q, SHARE, W, PULL = (tl.constexpr(what) for what in range(PASTS - 1))
WORDS = tl.constexpr(PASTS)
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
    pasts_ptr,  # [depth + 1, PASTS, N]     room: see PASTS, fp64
    queries_stride,
    keys_stride,
    n,
    m,
    dim,
    positive_offset,
    parts,
    depth,
    DEGREE: tl.constexpr,
    DETACH: tl.constexpr,
    COUNT: tl.constexpr,
):
    """One program per COUNT rows."""
    recursion_rows(
        queries_ptr, keys_ptr, table_ptr, moments_ptr, loss_ptr, weights_ptr, at_positive_ptr,
        pasts_ptr, queries_stride, keys_stride, tl.program_id(0) * COUNT, n, m, dim,
        positive_offset, parts, depth, DEGREE, DETACH, COUNT,
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
    pasts_ptr,
    queries_stride,
    keys_stride,
    first,
    n,
    m,
    dim,
    positive_offset,
    parts,
    depth,
    DEGREE: tl.constexpr,
    DETACH: tl.constexpr,
    COUNT: tl.constexpr,
):
    """Rows first .. first + COUNT, a row a thread; see quadrature.recursion for the mathematics.

    1 − p_t follows p's own recursion, as does r_t = p_t / e at the nodes; E_t = q_t / e and
    w_t = log p_t − log q_t. Forward in t alone, and t by t in a loop, so that the registers that it
    takes do not grow with depth:

        ∂loss/∂S = Σ_{t>0} (c_t (q_t − p_t) + y_t w_t) − Σ_{t<depth} c_t q_t pull_t
        y_t = (1 − α) y_{t−1} + α c_{t−1} q_{t−1},  pull_s = Σ_{t>s} α (1 − α)^(t−1−s) Σ_j q_s w_t
    """
    i = first + tl.arange(0, COUNT)
    kept = i < n
    growth_ptr = table_ptr + (DEGREE + 1) * (DEGREE + 1)
    scales_ptr = growth_ptr + (depth + 1) * (DEGREE + 1)
    alpha = tl.load(scales_ptr + depth + 1)
    s = pair_similarities(
        queries_ptr, queries_stride, keys_ptr, keys_stride, first, n, m, dim, positive_offset, COUNT
    )
    zero = tl.zeros([COUNT], tl.float64)
    mu = repeat(zero, DEGREE + 1)
    row = i.to(tl.int64) * (DEGREE + 1)
    for power in tl.static_range(DEGREE + 1):
        moment = zero
        for part in range(parts):
            at = moments_ptr + part * tl.cast(n, tl.int64) * (DEGREE + 1) + row + power
            moment += tl.load(at, mask=kept, other=0.0).to(tl.float64)
        added = ()
        for node in tl.static_range(DEGREE + 1):
            added = added + (mu[node] + moment * tl.load(table_ptr + node * (DEGREE + 1) + power),)
        mu = added

    loss = zero
    at_positive = zero
    below = zero  # 1 − p
    y_positive = zero
    for t in range(depth + 1):
        c = tl.load(scales_ptr + t)
        others = zero
        for node in tl.static_range(DEGREE + 1):
            others += mu[node] * tl.load(growth_ptr + t * (DEGREE + 1) + node)
        inverse = tl.exp(-c * s)
        odds = others * inverse
        q = 1 / (odds + 1)
        change = tl.where(t > 0, odds * q - below, 0.0)  # p − q
        w = log1p(change / q)
        loss += (q + change) * w
        at_positive -= c * change
        if not DETACH:
            at_positive += y_positive * w
            y_positive += alpha * (c * q - y_positive)
        below += alpha * (odds * q - below)
        put(pasts_ptr, Q, t, i, n, q)
        put(pasts_ptr, SHARE, t, i, n, inverse * q)
        put(pasts_ptr, W, t, i, n, w)
    tl.store(loss_ptr + i, loss, mask=kept)  # not kept: below every register is needed
    tl.store(at_positive_ptr + i, at_positive, mask=kept)
    tl.debug_barrier()  # where threads outnumber rows, several hold a row, and one of them stores

    loss = zero
    r = repeat(zero, DEGREE + 1)
    y = repeat(zero, DEGREE + 1)
    g = repeat(zero, DEGREE + 1)
    for t in range(depth + 1):
        c = tl.load(scales_ptr + t)
        share = get(pasts_ptr, SHARE, t, i, n)
        weighted = ()
        next_r = ()
        next_y = ()
        next_g = ()
        for node in tl.static_range(DEGREE + 1):
            e = tl.load(growth_ptr + t * (DEGREE + 1) + node) * share
            log_ratio = tl.log(tl.maximum(tl.where(t > 0, r[node], e) / e, TINY64))
            weighted = weighted + (mu[node] * log_ratio,)
            loss += r[node] * (mu[node] * log_ratio)
            change = tl.where(t > 0, c * (e - r[node]), 0.0)
            next_r = next_r + (r[node] + alpha * (e - r[node]),)
            if DETACH:
                next_g = next_g + (g[node] + change,)
                next_y = next_y + (zero,)
            else:
                next_g = next_g + (g[node] + change + y[node] * log_ratio,)
                next_y = next_y + (y[node] + alpha * (c * e - y[node]),)
        r = next_r
        y = next_y
        g = next_g
        if not DETACH:
            w = get(pasts_ptr, W, t, i, n)
            factor = alpha
            for back in range(t):
                past = t - 1 - back
                pull = zero
                for node in tl.static_range(DEGREE + 1):
                    growth = tl.load(growth_ptr + past * (DEGREE + 1) + node)
                    pull += weighted[node] * growth
                pull = get(pasts_ptr, Q, past, i, n) * w + get(pasts_ptr, SHARE, past, i, n) * pull
                pull *= factor
                if back > 0:
                    pull += get(pasts_ptr, PULL + (t - 1) % 2, past, i, n)
                put(pasts_ptr, PULL + t % 2, past, i, n, pull)
                factor *= 1 - alpha
            tl.debug_barrier()
    loss += tl.load(loss_ptr + i, mask=kept, other=0.0)
    at_positive = tl.load(at_positive_ptr + i, mask=kept, other=0.0)
    if not DETACH:
        for t in range(depth):
            pull = tl.load(scales_ptr + t) * get(pasts_ptr, PULL + depth % 2, t, i, n)
            at_positive -= get(pasts_ptr, Q, t, i, n) * pull
            pull *= get(pasts_ptr, SHARE, t, i, n)
            next_g = ()
            for node in tl.static_range(DEGREE + 1):
                growth = tl.load(growth_ptr + t * (DEGREE + 1) + node)
                next_g = next_g + (g[node] - growth * pull,)
            g = next_g
    tl.debug_barrier()
    tl.store(loss_ptr + i, loss, mask=kept)
    tl.store(at_positive_ptr + i, at_positive, mask=kept)
    for power in tl.static_range(DEGREE + 1):
        weight = zero
        for node in tl.static_range(DEGREE + 1):
            weight += g[node] * tl.load(table_ptr + node * (DEGREE + 1) + power)
        tl.store(weights_ptr + row + power, weight, mask=kept)


@triton.jit
def put(pasts_ptr, what, t, i, n, x):
    at = pasts_ptr + (WORDS * t + what) * tl.cast(n, tl.int64) + i
    tl.store(at, x, mask=i < n)


@triton.jit
def get(pasts_ptr, what, t, i, n):
    at = pasts_ptr + (WORDS * t + what) * tl.cast(n, tl.int64) + i
    return tl.load(at, mask=i < n, other=0.0)


@triton.jit
def repeat(x, COUNT: tl.constexpr):
    result = ()
    for _ in tl.static_range(COUNT):
        result = result + (x,)
    return result


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
    COUNT: tl.constexpr,
):  # [COUNT], fp64
    """Σ_d q_id k_jd with j = i + positive_offset, of fp32 products; 0 past the last row."""
    s = tl.zeros([COUNT], tl.float64)
    for start in range(0, dim, 16):
        q = load_rows(
            queries_ptr, queries_stride, first, n, start, dim, COUNT, 16, False, True, True
        )
        k = load_rows(
            keys_ptr, keys_stride, first + positive_offset, m, start, dim, COUNT, 16, False, True,
            True,
        )  # fmt: skip
        s += tl.sum((q * k).to(tl.float64), 1)
    return s


@triton.jit
def log1p(x):
    """With x's digits: the rounding of 1 + x cancels in log(1 + x) / ((1 + x) − 1)."""
    y = 1 + x
    exact = y == 1
    return tl.where(exact, x, tl.log(y) * (x / tl.where(exact, 1.0, y - 1)))
