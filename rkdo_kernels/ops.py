"""The operators: shapes for the compiler, gradients, autocast, and dispatch to kernels or tiles.

Row results are float64 (float32 on MPS, which has no float64): they are [N, few], and their digits
decide the accuracy of everything computed from them. Scales are tensors, so that nothing has to
read a learnable one; no operator has a gradient for them: rows.py adds it from their outputs.

Gradients leave the operators in float32 (float64 for float64 inputs), and go to the stand-ins
`to_queries` and `to_keys` if these are given: see stand_ins.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor
from torch.library import custom_op

from . import chebyshev, quadrature, tiled
from .needs import asked, handed, rooms
from .once import no_second_derivative, once
from .ratios import log_ratios


def row_dtype(x: Tensor) -> torch.dtype:
    return torch.float32 if x.device.type == "mps" else torch.float64


def product_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def implementation(backend: str) -> ModuleType:
    if backend == "triton":
        from . import kernels

        return kernels
    return tiled


def row_mean(
    sums: Tensor,  # [N]
    count: int,
    queries: Tensor,
    backend: str,
    dtype: torch.dtype = torch.float32,
) -> Tensor | None:  # [N]
    """Of a row's `count` entries, where kernels round ∂L/∂S for its product: see levels.py."""
    if backend != "triton" or queries.element_size() != 2:
        return None
    return (sums / max(1, count)).to(dtype)


def row_level(sums: Tensor, count: int, queries: Tensor, backend: str) -> Tensor | None:  # [N]
    return row_mean(sums, count, queries, backend, torch.bfloat16)


def given(*levels: Tensor | None) -> list[Tensor]:
    """What kernels take that tiles do not."""
    return [x for x in levels if x is not None]


# ---- row moments ---------------------------------------------------------------------------------


@custom_op("rkdo_kernels::moments", mutates_args=())
def moments(
    queries: Tensor,  # [N, D]
    keys: Tensor,  # [M, D]
    scale: Tensor,  # [], c_0
    bound: float,
    degree: int,
    exclude: Sequence[int],
    backend: str,
    to_queries: Tensor | None = None,
    to_keys: Tensor | None = None,
) -> Tensor:  # [N, degree + 1]
    """M_ik = Σ_j exp(c_0 S_ij) (S_ij / b)^k, but for the diagonals in `exclude`."""
    rows = implementation(backend).moments(queries, keys, scale, bound, degree, list(exclude))
    return rows.to(row_dtype(queries))


def rounded_scale(scale: Tensor, bound: float, queries: Tensor, backend: str) -> Tensor:  # []
    """c_0 as `moments` multiplies by it."""
    dtype = product_dtype(queries)
    if backend == "triton":
        return (scale.to(dtype) * math.log2(math.e)).to(scale.dtype) * math.log(2)
    return (scale * bound).to(dtype).to(scale.dtype) / bound


@custom_op("rkdo_kernels::moments_backward", mutates_args=())
def moments_backward(
    queries: Tensor,
    keys: Tensor,
    scale: Tensor,
    bound: float,
    weights: Tensor,  # [N, degree + 1]
    exclude: Sequence[int],
    at_positive: Tensor | None,  # [N]
    needs: Sequence[bool],  # the gradients to form; here and below another has no entries
    backend: str,
    level: Tensor | None = None,  # [N], see `row_level`
) -> tuple[Tensor, Tensor]:
    """Through ∂L/∂S_ij = exp(c_0 S_ij) Σ_k weights_ik (S_ij / b)^k, but for the diagonals in
    `exclude`: at_positive on the first, if it is given, and 0."""
    weights = weights.to(product_dtype(queries))
    if at_positive is not None:
        at_positive = at_positive.to(weights.dtype)
    return implementation(backend).moments_backward(
        queries, keys, scale, bound, weights, list(exclude), at_positive, needs, *given(level)
    )


@moments.register_fake
def _(queries, keys, scale, bound, degree, exclude, backend, to_queries=None, to_keys=None):
    return queries.new_empty(queries.shape[0], degree + 1, dtype=row_dtype(queries))


@moments_backward.register_fake
def _(queries, keys, scale, bound, weights, exclude, at_positive, needs, backend, level=None):
    return rooms(queries, keys, needs, product_dtype(queries))


def _moments_setup(ctx, inputs, output):
    queries, keys, scale, ctx.bound, ctx.degree, ctx.exclude, ctx.backend, *_ = inputs
    ctx.save_for_backward(queries, keys, scale, output)


def _moments_gradient(ctx, d_moments):
    """∂L/∂S = e (c_0 h + h'/b) with h(u) = Σ_k ∂L/∂M_k u^k: coefficients of one polynomial."""
    queries, keys, scale, sums = ctx.saved_tensors
    weights = scale * d_moments
    if ctx.degree:
        k = torch.arange(1, ctx.degree + 1, dtype=weights.dtype, device=weights.device)
        slope = torch.nn.functional.pad(d_moments[:, 1:] * (k / ctx.bound), (0, 1))
        weights = weights + slope
    needs = asked(ctx, 7)
    count = keys.shape[0] - len(ctx.exclude)
    level = row_level((weights * sums).sum(1), count, queries, ctx.backend)
    gradients = moments_backward(
        queries, keys, scale, ctx.bound, weights, ctx.exclude, None, needs, ctx.backend, level
    )
    return handed(ctx, gradients, 7)


moments.register_autograd(_moments_gradient, setup_context=_moments_setup)


# ---- row and column sums -------------------------------------------------------------------------


@custom_op("rkdo_kernels::both_sums", mutates_args=())
def both_sums(
    queries: Tensor,  # [N, D]
    keys: Tensor,  # [M, D]
    scale: float,  # c
    exclude: Sequence[int],
    paired: bool,
    backend: str,
    to_queries: Tensor | None = None,
    to_keys: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # [N], [M], [N] or [0]
    """Σ_j e_ij and Σ_i e_ij with e = exp(c S), but for the diagonals in `exclude`.

    If `paired`, then S on the first of them too, where every row has an entry.
    """
    sums = implementation(backend).both_sums(queries, keys, scale, list(exclude))
    rows, cols = (x.to(row_dtype(queries)) for x in sums)
    if not paired:
        return rows, cols, rows.new_empty(0)
    positives = keys.narrow(0, exclude[0], queries.shape[0])
    product = queries.to(product_dtype(queries)) * positives
    return rows, cols, product.sum(1, dtype=rows.dtype)


@custom_op("rkdo_kernels::both_sums_backward", mutates_args=())
def both_sums_backward(
    queries: Tensor,
    keys: Tensor,
    scale: float,
    row_weights: Tensor,  # [N], ∂L/∂rows
    col_weights: Tensor,  # [M], ∂L/∂cols
    exclude: Sequence[int],
    at_positive: Tensor | None,  # [N]
    needs: Sequence[bool],
    backend: str,
    row_means: Tensor | None = None,  # [N], near the mean of a row's e, where kernels need them
    col_means: Tensor | None = None,  # [M], and of a column's
) -> tuple[Tensor, Tensor]:
    """Through ∂L/∂S_ij = c e_ij (row_weights_i + col_weights_j), but for the diagonals in
    `exclude`: at_positive on the first, if it is given, and 0."""
    dtype = product_dtype(queries)
    weights = ((scale * x).to(dtype) for x in (row_weights, col_weights))
    if at_positive is not None:
        at_positive = at_positive.to(dtype)
    return implementation(backend).both_sums_backward(
        queries, keys, scale, *weights, list(exclude), at_positive, needs,
        *given(row_means, col_means),
    )  # fmt: skip


@both_sums.register_fake
def _(queries, keys, scale, exclude, paired, backend, to_queries=None, to_keys=None):
    rows = queries.new_empty(queries.shape[0], dtype=row_dtype(queries))
    positive = rows.new_empty(queries.shape[0] if paired else 0)
    return rows, rows.new_empty(keys.shape[0]), positive


@both_sums_backward.register_fake
def _(queries, keys, scale, row_weights, col_weights, exclude, at_positive, needs, backend,
      row_means=None, col_means=None):  # fmt: skip
    return rooms(queries, keys, needs, product_dtype(queries))


def _both_sums_setup(ctx, inputs, output):
    queries, keys, ctx.scale, ctx.exclude, ctx.paired, ctx.backend, *_ = inputs
    ctx.save_for_backward(queries, keys, *output[:2])


def _both_sums_gradient(ctx, d_rows, d_cols, d_positive):
    queries, keys, rows, cols = ctx.saved_tensors
    needs = asked(ctx, 6)
    means = (
        row_mean(x, len(others) - len(ctx.exclude), queries, ctx.backend)
        for x, others in ((rows, cols), (cols, rows))
    )
    gradients = both_sums_backward(
        queries, keys, ctx.scale, d_rows, d_cols, ctx.exclude, d_positive if ctx.paired else None,
        needs, ctx.backend, *means,
    )  # fmt: skip
    return handed(ctx, gradients, 6)


both_sums.register_autograd(_both_sums_gradient, setup_context=_both_sums_setup)


@custom_op("rkdo_kernels::self_sums", mutates_args=())
def self_sums(
    images: Tensor,  # [N, D]
    scale: float,
    backend: str,
    to_images: Tensor | None = None,
) -> Tensor:  # [N]
    """Σ_{j≠i} exp(c S_ij), S = images imagesᵀ."""
    return implementation(backend).self_sums(images, scale).to(row_dtype(images))


@custom_op("rkdo_kernels::self_sums_backward", mutates_args=())
def self_sums_backward(
    images: Tensor,
    scale: float,
    weights: Tensor,  # [N]
    backend: str,
    means: Tensor | None = None,  # [N], near the mean of a row's exp(c S), where kernels need them
) -> Tensor:
    """G images, G_ij = c exp(c S_ij) (weights_i + weights_j): S_ij and S_ji are one number."""
    weights = (scale * weights).to(product_dtype(images))
    return implementation(backend).self_sums_backward(images, scale, weights, *given(means))


@self_sums.register_fake
def _(images, scale, backend, to_images=None):
    return images.new_empty(images.shape[0], dtype=row_dtype(images))


@self_sums_backward.register_fake
def _(images, scale, weights, backend, means=None):
    return images.new_empty(images.shape, dtype=product_dtype(images))


def _self_sums_setup(ctx, inputs, output):
    images, ctx.scale, ctx.backend, _ = inputs
    ctx.save_for_backward(images, output)


def _self_sums_gradient(ctx, d_sums):
    images, sums = ctx.saved_tensors
    means = row_mean(sums, len(sums) - 1, images, ctx.backend)
    gradient = self_sums_backward(images, ctx.scale, d_sums, ctx.backend, means)
    to_images = ctx.needs_input_grad[3:]  # missing where it is None
    if any(to_images):
        return None, None, None, gradient
    return gradient, *[None] * (2 + len(to_images))


self_sums.register_autograd(_self_sums_gradient, setup_context=_self_sums_setup)


# ---- the recursion, on moments -------------------------------------------------------------------


@custom_op("rkdo_kernels::recursion_moments", mutates_args=())
def recursion_by_table(
    queries: Tensor,  # [N, D]
    keys: Tensor,  # [M, D]
    table: Tensor,  # see quadrature.table
    scales: Sequence[float],  # c_t for t = 0..depth
    alpha: float,
    bound: float,
    degree: int,
    exclude: Sequence[int],
    detach_target: bool,
    needs: Sequence[bool],
    backend: str,
    to_queries: Tensor | None = None,
    to_keys: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Σ_t KL(p_t ‖ q_t) by row, [N]; then what the gradient needs.

    Key i + exclude[0] is row i's positive, the other diagonals in `exclude` do not count. Returns
    loss, then the coefficients [N, degree + 1] and the gradient at the positive [N] that
    `moments_backward` takes, or if one is in `needs` the gradients of Σ_i loss_i instead; what is
    not wanted is empty.
    """
    return implementation(backend).recursion_moments(
        queries, keys, list(scales), alpha, bound, degree, list(exclude), detach_target, needs,
        table,
    )  # fmt: skip


@recursion_by_table.register_fake
def _(queries, keys, table, scales, alpha, bound, degree, exclude, detach_target, needs, backend,
      to_queries=None, to_keys=None):  # fmt: skip
    n, nothing = queries.shape[0], queries.new_empty(0, dtype=row_dtype(queries))
    loss = nothing.new_empty(n)
    gradients = rooms(queries, keys, needs, product_dtype(queries))
    if any(needs):
        return loss, nothing, nothing.clone(), *gradients
    return loss, nothing.new_empty(n, degree + 1), loss.clone(), *gradients


def _recursion_moments_setup(ctx, inputs, output):
    queries, keys, _, scales, _, ctx.bound, _, ctx.exclude, _, ctx.formed, ctx.backend, *_ = inputs
    ctx.weight = chebyshev.middle(scales)
    ctx.save_for_backward(queries, keys, *output[1:])


def _recursion_moments_gradient(ctx, d_loss, *_):
    queries, keys, weights, at_positive, *gradients = ctx.saved_tensors
    needs = asked(ctx, 11)
    if any(ctx.formed):  # asked for only where every row's loss weighs the same
        results = [g * d_loss[0].to(g.dtype) for g in gradients]
        return handed(ctx, [once(x, queries, keys) for x in results], 11)
    weight = torch.full((), ctx.weight, dtype=d_loss.dtype, device=d_loss.device)
    at_positive = at_positive * d_loss  # what the others add up to, negated
    count = keys.shape[0] - len(ctx.exclude)
    results = moments_backward(
        queries, keys, weight, ctx.bound, weights * d_loss[:, None], ctx.exclude, at_positive,
        needs, ctx.backend, row_level(-at_positive, count, queries, ctx.backend),
    )  # fmt: skip
    return handed(ctx, results, 11)


recursion_by_table.register_autograd(
    _recursion_moments_gradient, setup_context=_recursion_moments_setup
)


def recursion_moments(
    queries: Tensor,
    keys: Tensor,
    scales: Sequence[float],
    alpha: float,
    bound: float,
    degree: int,
    exclude: Sequence[int],
    detach_target: bool,
    needs: Sequence[bool],
    backend: str,
    to_queries: Tensor | None = None,
    to_keys: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`recursion_by_table`, with the table of these settings."""
    table = quadrature.table(degree, tuple(scales), alpha, bound, queries.device)
    if not torch.compiler.is_compiling():
        table = quadrature.in_mode(table)
    return recursion_by_table(
        queries, keys, table, scales, alpha, bound, degree, exclude, detach_target, needs, backend,
        to_queries, to_keys,
    )  # fmt: skip


# ---- softmax sums --------------------------------------------------------------------------------


@custom_op("rkdo_kernels::softmax_sums", mutates_args=())
def softmax_sums(
    queries: Tensor,  # [N, D]
    keys: Tensor,  # [M, D]
    scales: Tensor,  # [T], c_t
    student: bool,
    exclude: Sequence[int],
    backend: str,
    to_queries: Tensor | None = None,
    to_keys: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # [N], [N, T], [N, T], [N]
    """peak = max_j x, mass_t = Σ_j exp(c_t (x − peak)), slope_t = ∂mass_t/∂c_t, total = Σ_j x.

    x = S, or −log(1 + ‖zq − zk‖²) for `student`. Gradients flow through mass and total: peak is a
    shift, on which c_t peak + log mass_t does not depend.
    """
    sums = implementation(backend).softmax_sums(queries, keys, scales, student, list(exclude))
    peak, mass, slope, total = (x.to(row_dtype(queries)) for x in sums)
    return peak, mass, slope, total


@custom_op("rkdo_kernels::softmax_sums_backward", mutates_args=())
def softmax_sums_backward(
    queries: Tensor,
    keys: Tensor,
    scales: Tensor,
    student: bool,
    exclude: Sequence[int],
    peak: Tensor,  # [N]
    weights: Tensor,  # [N, T], ∂L/∂mass
    total_weight: Tensor,  # [N], ∂L/∂total
    needs: Sequence[bool],
    backend: str,
    level: Tensor | None = None,  # [N], see `row_level`
) -> tuple[Tensor, Tensor]:
    """Through ∂L/∂x_ij = Σ_t weights_it c_t exp(c_t (x_ij − peak_i)) + total_weight_i."""
    rows = (x.to(product_dtype(queries)) for x in (weights, total_weight))
    return implementation(backend).softmax_sums_backward(
        queries, keys, scales, student, list(exclude), peak, *rows, needs, *given(level)
    )


@softmax_sums.register_fake
def _(queries, keys, scales, student, exclude, backend, to_queries=None, to_keys=None):
    n, t = queries.shape[0], scales.shape[0]
    new = queries.new_empty
    dtype = row_dtype(queries)
    return new(n, dtype=dtype), new(n, t, dtype=dtype), new(n, t, dtype=dtype), new(n, dtype=dtype)


@softmax_sums_backward.register_fake
def _(queries, keys, scales, student, exclude, peak, weights, total_weight, needs, backend,
      level=None):  # fmt: skip
    return rooms(queries, keys, needs, product_dtype(queries))


def _softmax_sums_setup(ctx, inputs, output):
    queries, keys, scales, ctx.student, ctx.exclude, ctx.backend, *_ = inputs
    ctx.save_for_backward(queries, keys, scales, *output[:2])


def _softmax_sums_gradient(ctx, d_peak, d_mass, d_slope, d_total):
    queries, keys, scales, peak, mass = ctx.saved_tensors
    needs = asked(ctx, 6)
    level = None
    if not ctx.student:  # whose kernels have no product
        count = keys.shape[0] - len(ctx.exclude)
        level = row_level((d_mass * mass) @ scales + d_total * count, count, queries, ctx.backend)
    gradients = softmax_sums_backward(
        queries, keys, scales, ctx.student, ctx.exclude, peak, d_mass, d_total, needs, ctx.backend,
        level,
    )  # fmt: skip
    return handed(ctx, gradients, 6)


softmax_sums.register_autograd(_softmax_sums_gradient, setup_context=_softmax_sums_setup)


# ---- the recursion, directly ---------------------------------------------------------------------


@custom_op("rkdo_kernels::recursion", mutates_args=())
def recursion(
    queries: Tensor,  # [N, D]
    keys: Tensor,  # [M, D]
    scales: Tensor,  # [T], c_t for t = 0..depth
    alpha: float,
    positive_offset: int,
    detach_target: bool,
    backend: str,
    to_queries: Tensor | None = None,
    to_keys: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Σ_t KL(p_t ‖ q_t) by row, [N], and ∂loss/∂c_t, [N, T]; then what the gradient needs.

    The kernels sum over the keys that are not the positive; its exact share is added here, and here
    is the gradient there, Σ_{t>0} c_t (q_t − p_t) + Σ_{t<depth} c_t q_t (α b_{t+1} − pull_t).
    Returns loss, ∂loss/∂c_t, peak, log mass, pull, and that gradient, [N].
    """
    run, dtype = implementation(backend), row_dtype(queries)
    if run is tiled:  # S of the tiles: another product's rounding would part it from ties
        s = queries.new_empty(queries.shape[0], dtype=dtype)
        sums = run.softmax_sums(queries, keys, scales, False, [positive_offset], s)
    else:
        positives = keys.narrow(0, positive_offset, queries.shape[0])
        s = (queries.to(product_dtype(queries)) * positives).sum(1, dtype=dtype)
        sums = run.softmax_sums(queries, keys, scales, False, [positive_offset])
    peak, mass, slope, _ = (x.to(dtype) for x in sums)
    c, depth = scales.to(dtype), scales.shape[0] - 1
    risen = torch.maximum(peak, s.to(product_dtype(queries)).to(dtype))
    shrink = torch.exp((peak - risen)[:, None] * c)
    slope = shrink * (slope + (peak - risen)[:, None] * mass)  # now from the risen peak
    step = 1 / c.max()  # to which s is known at least, or its rounding alone would decide
    over = torch.where(s < peak, s - risen, (s - risen).clamp(-step, step))
    mass, peak, x = shrink * mass, risen, over[:, None]
    if alpha == 1:  # no target is left at the positive: 0 · log 0 where its product is −∞
        x = torch.where(mass[:, :1] > 0, torch.maximum(x, tiled.bottom(c)), x)
    log_mass = torch.logaddexp(mass.log(), c * x)  # c x passes 0 by float32's rounding of the peak
    loss, pull, tilt = run.recursion(
        queries, keys, scales, alpha, positive_offset, detach_target, peak, log_mass
    )

    others = mass.log() - c * x  # of the odds against the positive
    log_q = -torch.logaddexp(others, torch.zeros_like(others))
    q = log_q.exp()
    t = torch.arange(depth, dtype=dtype, device=queries.device)
    age = t[:, None] - t
    mix = alpha * (1 - alpha) ** age.clamp_min(0) * (age >= 0)
    w = log_ratios(log_q, alpha)
    p = (1 - alpha) ** (t + 1) + q[:, :-1] @ mix.T
    b = torch.zeros_like(w) if detach_target else w @ mix
    through = q[:, :-1] * b
    loss = loss + (p * w).sum(1)
    pull = pull + through
    change = torch.where(w < 30, -q[:, 1:] * torch.expm1(w.clamp_max(30)), q[:, 1:] - p)  # q − p
    at_positive = change @ c[1:] + (through - q[:, :-1] * pull) @ c[:-1]

    # The scales act through log q = c S − log Z: by S where p and q differ, less the row's mean.
    mean = slope * torch.exp(-log_mass) + x * q  # of S − peak under q_t
    tilt = tilt.to(dtype)
    tilt[:, 1:] += change * x
    tilt[:, :-1] += through * x - pull * mean[:, :-1]
    return loss, tilt, peak, log_mass, pull, at_positive


@custom_op("rkdo_kernels::recursion_backward", mutates_args=())
def recursion_backward(
    queries: Tensor,
    keys: Tensor,
    scales: Tensor,
    alpha: float,
    positive_offset: int,
    detach_target: bool,
    peak: Tensor,  # [N]
    log_mass: Tensor,  # [N, T]
    pull: Tensor,  # [N, depth]
    at_positive: Tensor,  # [N]
    weights: Tensor,  # [N], ∂L/∂loss
    needs: Sequence[bool],
    backend: str,
) -> tuple[Tensor, Tensor]:
    rows = (x.to(product_dtype(queries)) for x in (pull, weights, at_positive))
    level = row_level(-at_positive * weights, keys.shape[0] - 1, queries, backend)
    return implementation(backend).recursion_backward(
        queries, keys, scales, alpha, positive_offset, detach_target, peak, log_mass, *rows, needs,
        *given(level),
    )  # fmt: skip


@recursion.register_fake
def _(queries, keys, scales, alpha, positive_offset, detach_target, backend,
      to_queries=None, to_keys=None):  # fmt: skip
    n, t = queries.shape[0], scales.shape[0]
    rows = queries.new_empty(n, dtype=row_dtype(queries))
    table, pull = rows.new_empty(n, t), rows.new_empty(n, t - 1)
    return rows, table, rows.clone(), table.clone(), pull, rows.clone()


@recursion_backward.register_fake
def _(queries, keys, scales, alpha, positive_offset, detach_target, peak, log_mass, pull,
      at_positive, weights, needs, backend):  # fmt: skip
    return rooms(queries, keys, needs, product_dtype(queries))


def _recursion_setup(ctx, inputs, output):
    (queries, keys, scales, ctx.alpha, ctx.positive_offset, ctx.detach_target, ctx.backend,
     *_) = inputs  # fmt: skip
    ctx.save_for_backward(queries, keys, scales, *output[2:])


def _recursion_gradient(ctx, d_loss, *_):
    queries, keys, scales, *rows = ctx.saved_tensors
    needs = asked(ctx, 7)
    gradients = recursion_backward(
        queries, keys, scales, ctx.alpha, ctx.positive_offset, ctx.detach_target, *rows, d_loss,
        needs, ctx.backend,
    )  # fmt: skip
    return handed(ctx, gradients, 7)


recursion.register_autograd(_recursion_gradient, setup_context=_recursion_setup)


for operator in (
    moments_backward, both_sums_backward, self_sums_backward, softmax_sums_backward,
    recursion_backward,
):  # fmt: skip
    operator.register_autograd(no_second_derivative)

for operator in (moments, both_sums, self_sums, recursion_by_table, softmax_sums, recursion):
    for device_type in ("cpu", "cuda"):
        operator.register_autocast(device_type, torch.float32)
