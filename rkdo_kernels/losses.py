"""The public losses: row sums in, loss out, and nothing of size N × M anywhere.

To add an objective: write it on materialised matrices in reference.py, then here from
`similarity_moments`, `similarity_logsumexp` or the operators behind them.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from . import checks, launch, ops, reference, rows
from .constants import plain
from .problem import Problem

Reduction = Literal["mean", "sum", "none"]
Backend = Literal["auto", "triton", "tiled", "reference"]
Kernel = Literal["gaussian", "student"]
CANCELS = 0.25  # debias from which p's even part and q are subtracted entry by entry, not in sums
REDUCTIONS, BACKENDS, KERNELS = get_args(Reduction), get_args(Backend), get_args(Kernel)


def rkdo_loss(
    queries: Tensor,  # [N, D] unit rows: first views
    keys: Tensor,  # [M, D] unit rows: second views, keys[i + positive_offset] is i's positive
    *,
    temperature: float | Tensor = 0.5,
    alpha: float = 0.5,
    depth: int = 3,
    cooling: float = 0.1,
    detach_target: bool = False,
    bound: float | None = 1.0,
    positive_offset: int | None = None,
    reduction: Reduction = "mean",
    backend: Backend = "auto",
) -> Tensor:  # [] or [N], float32 (float64 for float64 inputs), nats
    """Recursive KL divergence over a batch (Martin 2025, eqs. 1-4).

        p_0 = I,  p_t = (1 − α) p_{t−1} + α q_{t−1}
        loss_i = Σ_{t=1..depth} KL(p_t(·|i) ‖ q_t(·|i))
        q_t = softmax(S / τ_t),  S = queries keysᵀ,  τ_t = τ (1 − cooling · t / depth)

    The gradient flows through p unless `detach_target`. A tensor temperature is learnable. The dot
    product is taken as it is; `bound` ≥ ‖query‖ · ‖key‖ for every pair, or None if there is none.
    `positive_offset` is for more keys than queries: a queue (0), or other ranks' keys.
    backend="reference" is the whole matrix in PyTorch: call its backward pass outside autocast.

    A loss is known to float32's step at 1, 1.2e-7 nats, where it is smaller than that.

    Raises:
        ValueError: shapes or devices that do not fit, temperature ≤ 0, alpha outside [0, 1],
            depth < 1, cooling outside [0, 1), an unknown reduction or backend, and on a CPU rows
            that pass the bound; on a GPU those give a NaN loss.
        TypeError: a tensor that is not dense float32, bfloat16, float16 or float64.
        RuntimeError: backend="triton" where Triton cannot run.
    """
    temperature, bound = plain(temperature), plain(bound)
    alpha, depth, cooling = plain(alpha), plain(depth), plain(cooling)
    checks.number("alpha", alpha, 0, at_most=1)
    checks.integer("depth", depth, at_least=1)
    checks.number("cooling", cooling, 0, below=1)
    checks.flag("detach_target", detach_target)
    checks.choice("reduction", reduction, REDUCTIONS)
    positive_offset = plain(positive_offset)
    problem = Problem(queries, keys, temperature, bound, positive_offset, backend)
    if problem.backend == "reference":
        with problem.materialised():
            losses = reference.rkdo_loss(
                *problem.wide(), temperature=problem.temperature, alpha=alpha,
                depth=depth, cooling=cooling, detach_target=detach_target,
                positive_offset=problem.offset,
            )  # fmt: skip
        return problem.reduce(losses, reduction)
    scales = degree = None
    if not isinstance(temperature, Tensor) and not problem.is_small():
        scales = [1 / (temperature * (1 - cooling * (t / depth))) for t in range(depth + 1)]
        degree = launch.rkdo_degree(scales, alpha, bound, problem.queries.dtype)
    if scales is None or bound is None or degree is None:
        losses = rows.rkdo_direct(problem, alpha, depth, cooling, detach_target)
    else:
        losses = rows.rkdo_from_moments(problem, degree, scales, alpha, detach_target, reduction)
    return problem.reduce(losses, reduction)


def icon_loss(
    queries: Tensor,  # [N, D] unit rows
    keys: Tensor,  # [M, D] unit rows
    *,
    temperature: float | Tensor = 0.5,
    debias: float = 0.2,
    kernel: Kernel = "gaussian",
    bound: float | None = 1.0,
    positive_offset: int | None = None,
    reduction: Reduction = "mean",
    backend: Backend = "auto",
) -> Tensor:  # [] or [N], float32 (float64 for float64 inputs), nats
    """I-Con with a debiased one-hot target (Alshammari et al. 2025).

        loss_i = KL(p(·|i) ‖ q(·|i)),  p = (1 − δ) I + δ / M,  δ = `debias`

    q is the softmax of S / τ ("gaussian": on unit rows that is a Gaussian in the distance) or of
    −log(1 + ‖query − key‖²) / τ ("student": Student's t). Other arguments as in `rkdo_loss`.

    Raises:
        ValueError, TypeError, RuntimeError: as `rkdo_loss`; debias outside [0, 1]; unknown kernel.
    """
    temperature, bound, debias = plain(temperature), plain(bound), plain(debias)
    checks.number("debias", debias, 0, at_most=1)
    checks.choice("kernel", kernel, KERNELS)
    checks.choice("reduction", reduction, REDUCTIONS)
    positive_offset = plain(positive_offset)
    problem = Problem(queries, keys, temperature, bound, positive_offset, backend)
    if problem.backend == "reference":
        with problem.materialised():
            losses = reference.icon_loss(
                *problem.wide(), temperature=problem.temperature, debias=debias,
                kernel=kernel, positive_offset=problem.offset,
            )  # fmt: skip
        return problem.reduce(losses, reduction)
    scale = problem.inverse_temperature()
    student = kernel == "student"
    positive = problem.student_logits() if student else problem.positive_similarities()
    if student or debias > CANCELS:
        odds, total = rows.sums_and_total(problem, student, positive)
        total = total + positive
        if not student and problem.backend == "triton":  # which adds up in float32
            total = total + (problem.total_similarities() - total).detach()
        cross_entropy = rows.from_odds(odds, positive)
    else:
        total = problem.total_similarities()
        cross_entropy = rows.one_hot(problem, reduction)
    m = problem.keys.shape[0]
    share = torch.full_like(scale, debias / m)
    entropy = torch.special.entr(1 - debias + share) + (m - 1) * torch.special.entr(share)
    # Of the positive's logit over p's average; 0 · ∞ where one of those that weigh 0 is −∞.
    surplus = scale * share * (m * positive - total) if debias else 0.0
    return problem.reduce(cross_entropy + surplus - entropy, reduction)


def info_nce(
    queries: Tensor,  # [N, D] unit rows
    keys: Tensor,  # [M, D] unit rows
    *,
    temperature: float | Tensor = 0.1,
    exclude_self: bool = False,
    symmetric: bool = False,
    bound: float | None = 1.0,
    positive_offset: int | None = None,
    reduction: Reduction = "mean",
    backend: Backend = "auto",
) -> Tensor:  # [] or [N], float32 (float64 for float64 inputs), nats
    """InfoNCE (van den Oord et al. 2018):  loss_i = −log softmax(S / τ)_{i, i + positive_offset}.

    `symmetric`, as CLIP has it, is (info_nce(queries, keys) + info_nce(keys, queries)) / 2 from one
    pass over S. MoCo passes cat(keys, queue) and positive_offset=0. `exclude_self` leaves key i out
    of row i; see `nt_xent`. Other arguments as in `rkdo_loss`.

    Raises:
        ValueError, TypeError, RuntimeError: as `rkdo_loss`; exclude_self without another positive;
            symmetric with exclude_self, or with more keys than queries.
    """
    temperature, bound = plain(temperature), plain(bound)
    checks.flag("exclude_self", exclude_self)
    checks.flag("symmetric", symmetric)
    checks.choice("reduction", reduction, REDUCTIONS)
    if symmetric and exclude_self:
        raise ValueError("symmetric and exclude_self do not go together: see nt_xent")
    positive_offset = plain(positive_offset)
    problem = Problem(
        queries, keys, temperature, bound, positive_offset, backend,
        square="symmetric" if symmetric else "",
    )  # fmt: skip
    if symmetric:
        problem.as_one()
    if exclude_self and problem.offset == 0:
        raise ValueError("exclude_self leaves out the positives too: positive_offset must not be 0")
    if problem.backend == "reference":
        with problem.materialised():
            losses = reference.info_nce(
                *problem.wide(), temperature=problem.temperature,
                exclude_self=exclude_self, symmetric=symmetric, positive_offset=problem.offset,
            )  # fmt: skip
    elif symmetric:
        losses = rows.one_hot_both_ways(problem, reduction)
    else:
        losses = rows.one_hot(problem, reduction, exclude=[0] if exclude_self else [])
    return problem.reduce(losses, reduction)


def nt_xent(
    queries: Tensor,  # [N, D] unit rows: first views
    keys: Tensor,  # [N, D] unit rows: second views
    *,
    temperature: float | Tensor = 0.5,
    bound: float | None = 1.0,
    reduction: Reduction = "mean",
    backend: Backend = "auto",
) -> Tensor:  # [] or [2 N], float32 (float64 for float64 inputs), nats
    """NT-Xent (SimCLR, Chen et al. 2020): InfoNCE of every image among the 2N − 1 others.

        loss_i = −log softmax(S / τ)_{i, i + N},  S = images imagesᵀ without its diagonal

    with images = cat(queries, keys) and i + N modulo 2N: the queries' losses, then the keys'.
    `bound` is for every pair of images. Other arguments as in `rkdo_loss`.

    Raises:
        ValueError, TypeError, RuntimeError: as `rkdo_loss`.
    """
    temperature, bound = plain(temperature), plain(bound)
    checks.choice("reduction", reduction, REDUCTIONS)
    problem = Problem(queries, keys, temperature, bound, None, backend, square="nt_xent")
    problem.among_themselves()
    problem.as_one()
    if problem.backend == "reference":
        with problem.materialised():
            losses = reference.nt_xent(*problem.wide(), temperature=problem.temperature)
    else:
        losses = rows.nt_xent(problem, reduction)
    return problem.reduce(losses, reduction)


def similarity_moments(
    queries: Tensor,  # [N, D]
    keys: Tensor,  # [M, D]
    *,
    temperature: float | Tensor,
    degree: int,
    bound: float = 1.0,
    exclude_self: bool = False,
    backend: Backend = "auto",
) -> Tensor:  # [N, degree + 1], float32 (float64 for float64 inputs)
    """The row moments of the similarity softmax, differentiable in queries, keys and temperature.

        M_ik = Σ_j exp((S_ij − b) / τ) (S_ij / b)^k,  S = queries keysᵀ,  b = `bound` ≥ max |S|

    A loss that needs Σ_j exp(S_ij / τ) f(S_ij / b) with a smooth f is Σ_k a_k M_ik, a_k being f's
    polynomial coefficients. `exclude_self` leaves key i out of row i.

    A learnable temperature's gradient is made of differences b (M_k+1 − M_k) / τ². Where S is near
    b they cancel, and it is known to about two float32 steps of b M_k / τ² a row.

    Raises:
        ValueError: as `rkdo_loss`; a temperature so small that exp(−2b/τ) is no normal number
            (2b/τ > 80, or 1400 in float64): `similarity_logsumexp` takes any.
        TypeError, RuntimeError: as `rkdo_loss`.
    """
    degree = plain(degree)
    checks.integer("degree", degree, at_least=0)
    temperature, bound = plain(temperature), plain(bound)
    checks.flag("exclude_self", exclude_self)
    if bound is None:
        raise ValueError("bound must be a number for moments, got None")
    problem = Problem(queries, keys, temperature, bound, 0, backend, paired=False)
    queries, keys, temperature = problem.queries, problem.keys, problem.temperature
    most = launch.exponent_range(queries.dtype)
    if not isinstance(temperature, Tensor) and 2 * bound / temperature > most:
        raise ValueError(
            f"temperature must be at least {2 * bound / most:.4g} "
            f"for moments with bound={bound:g}, got {temperature}"
        )
    if problem.backend == "reference":
        with problem.materialised():
            result = reference.similarity_moments(
                *problem.wide(), temperature=temperature, degree=degree, bound=bound,
                exclude_self=exclude_self,
            )  # fmt: skip
        return problem.reduce(result, "none")
    scale = problem.inverse_temperature()
    exclude = [0] if exclude_self else []
    learnable = isinstance(temperature, Tensor)
    m = ops.moments(
        queries, keys, scale.detach(), bound, degree + learnable, exclude, problem.backend,
        *problem.stand_ins,
    )  # fmt: skip
    if learnable:  # ∂M_k/∂c_0 = b M_{k+1}
        safe = scale.detach() <= most / (2 * bound)
        m = rows.Sloped.apply(m[:, :-1], bound * m[:, 1:, None].detach(), scale[None])
        m = m * torch.where(safe, 1.0, float("nan"))
    exact = scale.detach()
    rounded = ops.rounded_scale(exact, bound, queries, problem.backend)
    shift = scale + (rounded - exact)  # as the sums have it: where S is near b it cancels
    return problem.reduce(m * torch.exp(-bound * shift), "none")


def similarity_logsumexp(
    queries: Tensor,  # [N, D]
    keys: Tensor,  # [M, D]
    *,
    temperature: float | Tensor,
    bound: float | None = 1.0,
    exclude_self: bool = False,
    backend: Backend = "auto",
) -> Tensor:  # [N], float32 (float64 for float64 inputs)
    """log Σ_j exp(S_ij / τ), differentiable in queries, keys and temperature, at any temperature.

    All that InfoNCE, NT-Xent, CLIP, SupCon and MoCo need of the N × M matrix: their positives' term
    is a row-wise dot product. `exclude_self` leaves key i out of row i, and of a row without
    other keys the result is −∞.

    Raises:
        ValueError, TypeError, RuntimeError: as `rkdo_loss`.
    """
    temperature, bound = plain(temperature), plain(bound)
    checks.flag("exclude_self", exclude_self)
    problem = Problem(queries, keys, temperature, bound, 0, backend, paired=False)
    if problem.backend == "reference":
        with problem.materialised():
            losses = reference.similarity_logsumexp(
                *problem.wide(), temperature=problem.temperature, exclude_self=exclude_self
            )
        return problem.reduce(losses, "none")
    return problem.reduce(rows.logsumexp(problem, exclude=[0] if exclude_self else []), "none")
