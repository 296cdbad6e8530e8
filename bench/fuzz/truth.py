"""What is true: losses on whole matrices whose algebra is not the code's.

In PyTorch, in any dtype: p and q by their logarithms, distances by differences; in float64 that is
the truth, but where float64 cancels. There the same formulas run in 80 digits, row by row, and
gradients are difference quotients with a step of 1e-30.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from .cases import Case

DIGITS = 80
STEP = "1e-30"
WORK = 1500  # exponentials that the truth in 80 digits may take


class Rounding:
    """One rounding, up or down, of every number that a softmax takes and gives: of its logits x, of
    log q, of the p that log q meets in the gradient, of rows' log Σ exp; and of α and 1 − α.

    Unlike a perturbation of the inputs it has what cancels: columns that are alike, and losses near
    0 of terms near 1. Rows that are alike round alike, and all masses do: often they are as large.
    """

    def __init__(self, unit: float, seed: int):
        self.unit = unit
        self.generator = torch.Generator().manual_seed(seed)
        self.of_masses = self.one()

    def signs(self, x: Tensor) -> Tensor:
        different, same = torch.unique(x.detach(), dim=0, return_inverse=True)
        signs = torch.randint(0, 2, different.shape, generator=self.generator)
        return (2 * signs - 1).to(x.dtype)[same] * self.unit

    def one(self) -> float:
        """Of a number that all rows share."""
        return self.unit * (2 * int(torch.randint(0, 2, (), generator=self.generator)) - 1)

    def logits(self, x: Tensor, rounded: Tensor | None = None) -> Tensor:
        size = 1 + (x if rounded is None else rounded).detach().abs()
        return x + (self.signs(x) * size).nan_to_num(0.0, 0.0, 0.0)

    def log_q(self, x: Tensor, log_q: Tensor) -> Tensor:
        finite = torch.where(torch.isfinite(x), x, 0)
        gradient = finite - finite.detach()  # 0, but for what is added to the gradient
        of_p = self.signs(finite) * gradient
        peak = x.amax(1, keepdim=True)  # from which a temperature's gradient has its logits
        mass = 1 + (torch.logsumexp(x, 1, keepdim=True) - peak).detach()
        below = gradient - (peak - peak.detach())
        of_q = self.of_masses * mass * (log_q.detach().exp() * below).sum(1, keepdim=True)
        return log_q + self.signs(finite) * (1 + finite.detach().abs()) + of_p - of_q


def log_softmax(x: Tensor, dim: int, rounding: Rounding | None) -> Tensor:
    if rounding is None:
        return torch.log_softmax(x, dim)
    if dim == 0:
        return log_softmax(x.T, 1, rounding).T
    x = rounding.logits(x)
    return rounding.log_q(x, torch.log_softmax(x, 1))


def losses(
    case: Case,
    queries: Tensor,
    keys: Tensor,
    temperature: float | Tensor,
    rounding: Rounding | None = None,
) -> Tensor:
    """[rows], or [n, degree + 1] for moments; a tensor temperature is [] or [rows, 1]."""
    s, settings = case.settings, case.settings
    diagonal = torch.arange(len(queries), device=queries.device)
    if case.loss == "nt_xent":
        images, n = torch.cat([queries, keys]), len(queries)
        logits = without_self(images @ images.T / temperature)
        log_q = log_softmax(logits, 1, rounding)
        return -log_q[torch.arange(2 * n), torch.arange(2 * n).roll(n)]
    if case.loss == "icon_loss" and s["kernel"] == "student":
        similarity = -torch.log1p((queries[:, None] - keys).square().sum(2))
    else:
        similarity = queries @ keys.T
    if case.loss == "similarity_moments":
        exponents = (similarity - case.bound) / temperature
        if rounding is not None:  # of S, before the bound is taken away
            exponents = rounding.logits(exponents, similarity / temperature)
        weight = torch.exp(exponents)
        if s["exclude_self"]:
            weight = torch.where(self_pairs(weight), 0, weight)
        u = similarity / case.bound
        return torch.stack([(weight * u**k).sum(1) for k in range(s["degree"] + 1)], 1)
    positive = diagonal + case.offset
    if case.loss == "rkdo_loss":
        return recursion(similarity, positive, temperature, rounding, **settings)
    logits = similarity / temperature
    if s.get("exclude_self"):
        logits = without_self(logits)
    if case.loss == "similarity_logsumexp":
        return logsumexp(logits if rounding is None else rounding.logits(logits))
    log_q = log_softmax(logits, 1, rounding)
    rows = -log_q[diagonal, positive]
    if s.get("symmetric"):
        return (rows - log_softmax(logits, 0, rounding)[positive, diagonal]) / 2
    if case.loss == "icon_loss":
        return kl_to_debiased(log_q, positive, s["debias"])
    return rows


def self_pairs(x: Tensor) -> Tensor:
    n, m = x.shape
    return torch.arange(n)[:, None] == torch.arange(m)


def without_self(logits: Tensor) -> Tensor:
    return torch.where(self_pairs(logits), float("-inf"), logits)


def kl_to_debiased(log_q: Tensor, positive: Tensor, debias: float) -> Tensor:
    """Σ_j p (log p − log q), p = (1 − δ) I + δ / M."""
    n, m = log_q.shape
    p = torch.full_like(log_q, debias / m)
    p[torch.arange(n), positive] += 1 - debias
    return torch.where(p == 0, 0, p * (torch.where(p == 0, 1, p).log() - log_q)).sum(1)


def recursion(
    similarity: Tensor,
    positive: Tensor,
    temperature: float | Tensor,
    rounding: Rounding | None,
    *,
    alpha: float,
    depth: int,
    cooling: float,
    detach_target: bool,
) -> Tensor:  # [N]
    """Σ_t KL(p_t ‖ q_t), with log p_t = log Σ_s α (1 − α)^(t−1−s) q_s, and (1 − α)^t more at the
    positive."""
    n = len(similarity)
    log_new, log_kept = (
        math.log(alpha) if alpha else -math.inf,
        math.log1p(-alpha) if alpha < 1 else -math.inf,
    )
    if rounding is not None:
        log_new, log_kept = log_new + rounding.one(), log_kept + rounding.one()
    at = torch.zeros_like(similarity, dtype=torch.bool)
    at[torch.arange(n), positive] = True
    log_q = [
        log_softmax(similarity / (temperature * (1 - cooling * t / depth)), 1, rounding)
        for t in range(depth + 1)
    ]
    loss = similarity.new_zeros(n)
    off: Tensor | None = None
    for t in range(1, depth + 1):
        if alpha == 0:
            loss = loss - log_q[t][at]
            continue
        new = log_new + log_q[t - 1]
        first = off is None or alpha == 1
        off = new if first else log_of_sum(log_kept + off, new)
        log_p = off
        if alpha < 1:
            log_p = torch.where(at, log_of_sum(off, t * log_kept), off)
        if detach_target:
            log_p = log_p.detach()
        loss = loss + (log_p.exp() * (log_p - log_q[t])).sum(1)
    return loss


def logsumexp(logits: Tensor) -> Tensor:  # [N, M] -> [N]
    """torch.logsumexp, whose gradient is a softmax only as far as the result has digits: in the
    truth's float64, that is, as float32 stands for eager code."""
    if logits.dtype != torch.float64:
        return torch.logsumexp(logits, 1)
    peak = logits.detach().amax(1, keepdim=True).clamp_min(torch.finfo(logits.dtype).min)
    return peak[:, 0] + torch.log(torch.exp(logits - peak).sum(1))


def log_of_sum(a: Tensor, b: Tensor | float) -> Tensor:
    """torch.logaddexp, whose second derivative is NaN in float32 from a difference of 89 on."""
    return b + torch.nn.functional.softplus(a - b, threshold=40)


# ---- in 80 digits --------------------------------------------------------------------------------


def fits_80_digits(case: Case) -> bool:
    per_entry = case.settings.get("depth", 1) + 1
    rows, m = case.rows, 2 * case.n if case.loss == "nt_xent" else case.m
    double = 2 if case.settings.get("symmetric") else 1
    detached = case.settings.get("detach_target", False)
    alone = case.settings.get("exclude_self") and case.m == 1  # a row without keys
    return (
        case.loss != "similarity_moments"
        and not alone
        and not detached
        and double * rows * m * m * per_entry <= WORK
    )


def in_80_digits(
    case: Case, queries: Tensor, keys: Tensor, temperature: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The losses [rows], then the gradients of Σ w loss to queries, keys and temperature [rows].

    w are the case's weights by row. Gradients to the logits are difference quotients, those from
    there to the vectors the sum over pairs.
    """
    import mpmath

    with mpmath.workdps(DIGITS):
        mpf = mpmath.mpf
        tau = mpf(float(temperature)) if temperature is not None else mpf(case.temperature)
        vectors = [[mpf(x) for x in row] for row in torch.cat([queries, keys]).tolist()]
        student = case.settings.get("kernel") == "student"
        w, step = row_weights(case).tolist(), mpf(STEP)
        values = [mpf(0)] * case.rows
        slopes = [mpf(0)] * case.rows
        gradient = [[mpf(0)] * case.d for _ in vectors]
        for row, share, a, others, f in row_terms(case, mpmath):
            x = [logit(vectors[a], vectors[b], student, mpmath) for b in others]
            share = mpf(share)
            values[row] += share * f(x, tau)
            weight = share * mpf(w[row])
            slopes[row] += weight * (f(x, tau + step) - f(x, tau - step)) / (2 * step)
            for k, b in enumerate(others):
                up, down = list(x), list(x)
                up[k] += step
                down[k] -= step
                g = weight * (f(up, tau) - f(down, tau)) / (2 * step)
                pull(gradient, vectors, a, b, g, x[k] if student else None, mpmath)
        n = case.n
        as_tensor = [[float(x) for x in row] for row in gradient]
        d = torch.tensor(as_tensor, dtype=torch.float64)
        values, slopes = (
            torch.tensor([float(x) for x in xs], dtype=torch.float64) for xs in (values, slopes)
        )
        return values, d[:n], d[n:], slopes


def row_weights(case: Case) -> Tensor:  # [rows], ∂L/∂loss_i
    w = case.weights()
    if case.reduction == "none":
        return w
    return w.expand(case.rows) / (case.rows if case.reduction == "mean" else 1)


def logit(a: list, b: list, student: bool, mp: Any) -> Any:
    if student:
        return -mp.log(1 + sum((x - y) ** 2 for x, y in zip(a, b, strict=True)))
    return sum(x * y for x, y in zip(a, b, strict=True))


def pull(gradient: list, vectors: list, a: int, b: int, g: Any, x: Any, mp: Any) -> None:
    """Adds g ∂x_ab/∂a and g ∂x_ab/∂b."""
    for k, (p, q) in enumerate(zip(vectors[a], vectors[b], strict=True)):
        if x is None:
            gradient[a][k] += g * q
            gradient[b][k] += g * p
        else:
            change = -2 * g * (p - q) * mp.exp(x)
            gradient[a][k] += change
            gradient[b][k] -= change


def row_terms(case: Case, mp: Any) -> Iterator[tuple[int, float, int, list[int], Callable]]:
    """(row of the loss, share, its vector, the vectors that it meets, the function of logits)."""
    n, m, s = case.n, case.m, case.settings
    if case.loss == "nt_xent":
        for i in range(2 * n):
            others = [j for j in range(2 * n) if j != i]
            yield i, 1, i, others, cross_entropy(others.index((i + n) % (2 * n)), mp)
        return
    for i in range(n):
        columns = [j for j in range(m) if not (s.get("exclude_self") and j == i)]
        others = [n + j for j in columns]
        share = 0.5 if s.get("symmetric") else 1
        if case.loss == "similarity_logsumexp":
            yield i, 1, i, others, lambda x, tau: log_sum(x, tau, mp)
            continue
        positive = columns.index(i + case.offset)
        if case.loss == "rkdo_loss":
            yield i, 1, i, others, recursive(positive, s, mp)
        elif case.loss == "icon_loss":
            yield i, 1, i, others, debiased(positive, s["debias"], m, mp)
        else:
            yield i, share, i, others, cross_entropy(positive, mp)
            if s.get("symmetric"):
                yield i, share, n + i, list(range(n)), cross_entropy(i, mp)


def log_sum(x: list, tau: Any, mp: Any) -> Any:
    peak = max(x)
    return peak / tau + mp.log(sum(mp.exp((y - peak) / tau) for y in x))


def cross_entropy(positive: int, mp: Any) -> Callable:
    def f(x: list, tau: Any) -> Any:  # with the digits of a loss that is almost 0
        return mp.log1p(
            sum(mp.exp((y - x[positive]) / tau) for k, y in enumerate(x) if k != positive)
        )

    return f


def debiased(positive: int, debias: float, m: int, mp: Any) -> Callable:
    share = mp.mpf(debias) / m
    p = [share + (1 - mp.mpf(debias) if k == positive else 0) for k in range(m)]

    def f(x: list, tau: Any) -> Any:
        total = log_sum(x, tau, mp)
        return sum(w * (mp.log(w) - y / tau + total) for w, y in zip(p, x, strict=True) if w > 0)

    return f


def recursive(positive: int, s: dict[str, Any], mp: Any) -> Callable:
    alpha, depth, cooling = mp.mpf(s["alpha"]), s["depth"], mp.mpf(s["cooling"])

    def softmax(x: list, tau: Any) -> list:
        peak = max(x)
        e = [mp.exp((y - peak) / tau) for y in x]
        total = sum(e)
        return [y / total for y in e]

    def f(x: list, tau: Any) -> Any:
        q = [softmax(x, tau * (1 - cooling * t / depth)) for t in range(depth + 1)]
        p = [mp.mpf(k == positive) for k in range(len(x))]
        loss = mp.mpf(0)
        for t in range(1, depth + 1):
            p = [(1 - alpha) * a + alpha * b for a, b in zip(p, q[t - 1], strict=True)]
            loss += sum(a * mp.log(a / b) for a, b in zip(p, q[t], strict=True) if a > 0)
        return loss

    return f
