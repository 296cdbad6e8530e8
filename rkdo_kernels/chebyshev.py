"""Polynomial interpolation on [−1, 1], and the degree that the recursion's loss needs.

Off the positive entry everything RKDO sums over a row is e_ij · f_i(u_ij) with a smooth f_i, so a
polynomial in u turns the row into its moments:  Σ_j e_ij f(u_ij) = Σ_k a_k M_ik.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .constants import host_constant

MAX_DEGREE = 12
MAX_TILT = 1.0  # powers of u that add up to exp(−tilt u) cancel: near u = 1, to exp(2 tilt) ulps
TOLERANCE = torch.finfo(torch.float32).eps  # degree 4 for the defaults


def nodes(degree: int) -> Tensor:  # [degree + 1] float64
    """The Chebyshev points of [−1, 1]."""
    return torch.cos((torch.arange(degree + 1, dtype=torch.float64) + 0.5) * math.pi / (degree + 1))


def monomials(degree: int) -> Tensor:  # [degree + 1, degree + 1] float64
    """The matrix from values at `nodes` to coefficients of 1, u, u², ..:  a = values @ matrix."""
    powers = [[1.0], [0.0, 1.0]]  # T_k in powers of u
    for _ in range(2, degree + 1):
        twice = [0.0, *(2 * c for c in powers[-1])]
        powers.append([a - b for a, b in zip(twice, [*powers[-2], 0.0, 0.0], strict=True)])
    angles = torch.acos(nodes(degree))
    matrix = torch.zeros(degree + 1, degree + 1, dtype=torch.float64)
    for k in range(degree + 1):
        coefficient = torch.cos(k * angles) * ((1 if k == 0 else 2) / (degree + 1))
        matrix[:, : k + 1] += coefficient[:, None] * torch.tensor(powers[k], dtype=torch.float64)
    return matrix


def interpolation_error(degree: int, alpha: float, scales: Sequence[float], bound: float) -> float:
    """How far the degree-`degree` interpolants of RKDO's rows are off, relative to what they weigh.

    With c = (c_0 + c_depth) / 2, e = exp(c S) and tilt_t = (c_t − c) b, the rows need of u = S / b
    the normalisers' exp(tilt_t u), the loss's f and the gradient's g,

        E_t(u) = exp(tilt_t u) / Z_t,  r_t = (1 − α) r_{t−1} + α E_{t−1},  w_t = log r_t − log E_t
        f = Σ_t r_t w_t,  g = Σ_t c_t (E_t − r_t) + y_t w_t
        y_t = (1 − α) y_{t−1} + α c_{t−1} E_{t−1}

    The result bounds |f̃ − f| / r_depth over u in [−1, 1], which since Σ_j e_ij r_depth(u_ij) ≤ 1 is
    the error of a row's loss in nats; the same for g / c; and the error of exp(tilt_t u) relative
    to itself, which is a normaliser's. Data enters only through the ratios of the Z_t =
    E[exp(tilt_t u)]. The maximum is taken over rows whose similarities sit at one point (9 of them)
    or at both ends (6 proportions): the extremes of what rows can be.
    """
    d = torch.tensor(tilts(scales, bound), dtype=torch.float64)
    u = torch.linspace(-1, 1, 65, dtype=torch.float64)
    powers = (u[:, None] ** torch.arange(degree + 1, dtype=torch.float64)).T
    x, to_coefficients = nodes(degree), monomials(degree)

    at_point = torch.linspace(-1, 1, 9, dtype=torch.float64)[:, None] * d
    share = torch.logspace(-6, -0.1, 6, dtype=torch.float64)[:, None]
    at_ends = torch.logaddexp(share.log() + d, torch.log1p(-share) - d)
    log_z = torch.cat([at_point, at_ends])[:, :, None]

    def rows(u: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # f, g / c, r_depth
        r, y, f, g = torch.zeros(4, len(log_z), len(u), dtype=torch.float64)
        e = torch.exp(d[0] * u - log_z[:, 0])
        for t in range(1, len(d)):
            r, y = (1 - alpha) * r + alpha * e, (1 - alpha) * y + alpha * scales[t - 1] * e
            log_e = d[t] * u - log_z[:, t]
            w, e = r.log() - log_e, torch.exp(log_e)
            f, g = f + r * w, g + scales[t] * (e - r) + y * w
        return f, g / middle(scales), r

    def error(at_nodes: Tensor, value: Tensor, weight: Tensor) -> float:
        return float(((at_nodes @ to_coefficients @ powers - value).abs() / weight).max())

    growth = torch.exp(d[:, None] * u)
    worst = error(torch.exp(d[:, None] * x), growth, growth)
    if alpha == 0:
        return worst
    f, g, r = rows(u)
    return max(worst, *(error(a, b, r) for a, b in zip(rows(x), (f, g), strict=False)))


@host_constant
def rkdo_degree(alpha: float, scales: tuple[float, ...], bound: float) -> int | None:
    """The least degree whose `interpolation_error` is within `tolerance`; None past the limits."""
    if tilts(scales, bound)[-1] > MAX_TILT:
        return None
    for degree in range(MAX_DEGREE + 1):
        if interpolation_error(degree, alpha, scales, bound) <= tolerance(alpha):
            return degree
    return None


def tolerance(alpha: float) -> float:
    """The nearer alpha is to 1, the nearer is p_t to q_{t−1}, and the smaller the loss."""
    return TOLERANCE * min(1, max(0.02, (2 * (1 - alpha)) ** 2))


def middle(scales: Sequence[float]) -> float:
    """The scale of the moments' weight: halfway, so that the tilts are as small as they can be."""
    return (scales[0] + scales[-1]) / 2


def tilts(scales: Sequence[float], bound: float) -> list[float]:
    """(c_t − c) b: how much steeper than the moments' weight each softmax is."""
    return [(c - middle(scales)) * bound for c in scales]
