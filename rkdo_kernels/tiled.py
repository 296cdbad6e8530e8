"""The kernels' mathematics tile by tile in PyTorch: for CPU, MPS, any device without Triton.

One tile of similarities exists at a time, in buffers that all tiles share. Products and sums run
in float32 (float64 for float64 inputs). `exclude` lists diagonals: key i + offset is left out of
row i.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import distances as apart
from .distances import Distances
from .needs import BOTH, Needs
from .one_pass import recursion_moments as recursion_moments
from .tiles import Gradients, Strip, compute, may_pass, sums, tiles

FAR = 1e20  # products beyond it may be infinite, or become so


def bottom(scales: Tensor) -> Tensor:  # []
    """A logit below which no exponential is left (at temperatures up to 1e36, in float32), and
    whose multiples by `scales`, and sums of them, are numbers."""
    return torch.finfo(scales.dtype).max / -8 / (1e3 * scales.amax()).clamp_min(1)


def moments(
    queries: Tensor,  # [N, D]
    keys: Tensor,  # [M, D]
    scale: Tensor,  # [], c_0
    bound: float,
    degree: int,
    exclude: list[int],
) -> Tensor:  # [N, degree + 1]
    """Σ_j exp(c_0 S_ij) (S_ij / b)^k."""
    queries, keys = compute(queries), compute(keys)
    result = queries.new_zeros(degree + 1, len(queries))
    for tile in tiles(queries, keys, buffers=1, factor=1 / bound):
        for strip in tile.strips():
            u, e = strip.s, strip.buffers[0]
            torch.mul(u, scale * bound, out=e).exp_()
            strip.fill(e, exclude, 0)
            result[0, strip.rows] += e.sum(1)
            for k in range(1, degree + 1):
                result[k, strip.rows] += e.mul_(u).sum(1)
    return result.T.contiguous()


def moments_backward(
    queries: Tensor,  # [N, D]
    keys: Tensor,  # [M, D]
    scale: Tensor,  # []
    bound: float,
    weights: Tensor,  # [N, degree + 1]
    exclude: list[int],
    at_positive: Tensor | None = None,  # [N], ∂L/∂S on the diagonal exclude[0], else 0
    needs: Needs = BOTH,  # a gradient that is not needed has no entries
) -> tuple[Tensor, Tensor]:  # [N, D], [M, D]
    """The gradients through S of  ∂L/∂S_ij = exp(c_0 S_ij) Σ_k weights_ik (S_ij / b)^k."""
    gradients = Gradients(queries, keys, needs)
    for tile in tiles(gradients.queries, gradients.keys, buffers=2, factor=1 / bound):
        for strip in tile.strips():
            u, (e, g) = strip.s, strip.buffers
            torch.mul(u, scale * bound, out=e).exp_()  # rounded as in the forward pass
            strip.fill(e, exclude, 0)
            w = weights[strip.rows].T[:, :, None].unbind()
            if len(w) == 1:
                torch.mul(e, w[0], out=u)
            else:
                torch.addcmul(w[-2], w[-1], u, out=g)
                for w_k in w[-3::-1]:
                    torch.addcmul(w_k, g, u, out=g)
                torch.mul(g, e, out=u)
        gradients.add(tile)
    if at_positive is not None:
        gradients.add_pairs(at_positive, exclude[0])
    return gradients.result()


def both_sums(
    queries: Tensor,  # [N, D]
    keys: Tensor,  # [M, D]
    scale: float,  # c
    exclude: list[int],
) -> tuple[Tensor, Tensor]:  # [N], [M]
    """Σ_j exp(c S_ij) and Σ_i exp(c S_ij)."""
    queries, keys = compute(queries), compute(keys)
    rows = queries.new_zeros(len(queries), dtype=sums(queries))
    cols = rows.new_zeros(len(keys))
    for tile in tiles(queries, keys, buffers=0, factor=scale):
        for strip in tile.strips():
            e = strip.s.exp_()
            strip.fill(e, exclude, 0)
            rows[strip.rows] += e.sum(1)
            cols[strip.cols] += e.sum(0)
    return rows, cols


def both_sums_backward(
    queries: Tensor,  # [N, D]
    keys: Tensor,  # [M, D]
    scale: float,
    row_weights: Tensor,  # [N]
    col_weights: Tensor,  # [M]
    exclude: list[int],
    at_positive: Tensor | None,  # [N], ∂L/∂S on the diagonal exclude[0], else 0
    needs: Needs = BOTH,
) -> tuple[Tensor, Tensor]:  # [N, D], [M, D]
    """The gradients through S of  ∂L/∂S_ij = exp(c S_ij) (row_weights_i + col_weights_j)."""
    gradients = Gradients(queries, keys, needs)
    for tile in tiles(gradients.queries, gradients.keys, buffers=1, factor=scale):
        for strip in tile.strips():
            weigh(strip, row_weights, col_weights, exclude)
        gradients.add(tile)
    if at_positive is not None:
        gradients.add_pairs(at_positive, exclude[0])
    return gradients.result()


def self_sums(images: Tensor, scale: float) -> Tensor:  # [N, D] -> [N]
    """Σ_j exp(c S_ij) off the diagonal of S = images imagesᵀ, from its upper half."""
    x = compute(images)
    result = x.new_zeros(len(x), dtype=sums(x))
    for tile in tiles(x, x, buffers=0, factor=scale, upper=True):
        after = tile.mirrored
        for strip in tile.strips():
            e = strip.s.exp_()
            strip.fill(e, [0], 0)
            result[strip.rows] += e.sum(1)
            result[strip.cols][after:] += e[:, after:].sum(0)
    return result


def self_sums_backward(images: Tensor, scale: float, weights: Tensor) -> Tensor:  # [N, D]
    """G images with the G of `both_sums_backward`."""
    x = compute(images)
    result = torch.zeros_like(x, memory_format=torch.contiguous_format)
    for tile in tiles(x, x, buffers=1, factor=scale, upper=True):
        for strip in tile.strips():
            weigh(strip, weights, weights, [0])
        result[tile.rows].addmm_(tile.s, tile.keys)
        after = tile.mirrored
        result[tile.cols][after:].addmm_(tile.s[:, after:].T, tile.queries)
    return result


def weigh(strip: Strip, row_weights: Tensor, col_weights: Tensor, exclude: list[int]) -> None:
    """exp(c S) (row_weights + col_weights) where the strip had c S."""
    (weight,) = strip.buffers
    torch.add(row_weights[strip.rows, None], col_weights[strip.cols], out=weight)
    strip.s.exp_().mul_(weight)
    strip.fill(strip.s, exclude, 0)


def softmax_sums(
    queries: Tensor,  # [N, D]
    keys: Tensor,  # [M, D]
    scales: Tensor,  # [T], c_t
    student: bool,
    exclude: list[int],
    first: Tensor | None = None,  # [N], for S on the diagonal exclude[0], as the tiles have it
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # [N], [N, T], [N, T], [N]
    """Row sums of the logits x_ij = S_ij or, if `student`, −log(1 + ‖zq_i − zk_j‖²).

        peak_i = max_j x_ij                  mass_it = Σ_j exp(c_t (x_ij − peak_i))
        total_i = Σ_j x_ij                   slope_it = Σ_j (x_ij − peak_i) exp(c_t (x_ij − peak_i))

    A row without keys has mass 0 and a peak that is a number.
    """
    queries, keys = compute(queries), compute(keys)
    scales = scales.to(queries.dtype)
    lowest = torch.finfo(queries.dtype).min / 4
    mass = queries.new_zeros(len(queries), len(scales), dtype=sums(queries))
    peak = mass.new_full((len(queries), 1), lowest, dtype=mass.dtype if student else queries.dtype)
    nearest = queries.new_full((len(queries) * student, 1), -lowest)
    slope, total = torch.zeros_like(mass), torch.zeros_like(mass[:, :1])
    form = Distances(queries, keys) if student else None
    deep = may_pass(FAR, queries, keys)
    for tile in tiles(queries, keys, buffers=1, form=form):
        for strip in tile.strips():
            x, e, rows = strip.s, strip.buffers[0], strip.rows
            if student:  # x holds distances
                strip.fill(x, exclude, torch.inf)
                near = nearest[rows] = torch.minimum(nearest[rows], x.amin(1, keepdim=True))
                risen = torch.log1p(near.to(peak.dtype)).neg_()
                near = torch.expm1(-risen).to(x.dtype)  # as the backward pass has it
            else:
                if first is not None:
                    strip.take(first, exclude[0])
                strip.fill(x, exclude, 0)
                total[rows] += x.sum(1, keepdim=True, dtype=total.dtype)
                strip.fill(x, exclude, lowest)
                risen = torch.maximum(peak[rows], x.amax(1, keepdim=True))
            fall = (peak[rows] - risen).to(mass.dtype)
            shrink = torch.exp(fall * scales)
            slope[rows] = shrink * (slope[rows] + fall * mass[rows])
            mass[rows] *= shrink
            peak[rows] = risen
            if student:
                apart.below_peak(x, near)
                strip.fill(x, exclude, 0)
                total[rows] += x.sum(1, keepdim=True, dtype=total.dtype) + risen * x.shape[1]
                for offset in exclude:
                    strip.diagonal(total[rows].expand_as(x), offset).sub_(
                        strip.diagonal(risen.expand_as(x), offset)
                    )
            else:
                x.sub_(risen)
            if deep:
                torch.maximum(x, bottom(scales), out=x)
            for t, c in enumerate(scales):
                torch.mul(x, c, out=e).exp_()
                strip.fill(e, exclude, 0)
                mass[rows, t] += e.sum(1, dtype=mass.dtype)
                slope[rows, t] += e.mul_(x).sum(1, dtype=mass.dtype)
    return peak[:, 0], mass, slope, total[:, 0]


def softmax_sums_backward(
    queries: Tensor,  # [N, D]
    keys: Tensor,  # [M, D]
    scales: Tensor,  # [T]
    student: bool,
    exclude: list[int],
    peak: Tensor,  # [N]
    weights: Tensor,  # [N, T], ∂L/∂mass
    total_weight: Tensor,  # [N], ∂L/∂total
    needs: Needs = BOTH,
) -> tuple[Tensor, Tensor]:  # [N, D], [M, D]
    """Through  ∂L/∂x_ij = Σ_t weights_it c_t exp(c_t (x_ij − peak_i)) + total_weight_i."""
    form = Distances(queries, keys) if student else None
    gradients = apart.Gradients(form, needs) if form else Gradients(queries, keys, needs)
    queries, keys = compute(queries), compute(keys)
    scales, peak = scales.to(queries.dtype), peak[:, None]
    nearest = torch.expm1(-peak).to(queries.dtype)  # of Student's
    peak = peak.to(queries.dtype)
    steep = weights * scales
    for tile in tiles(queries, keys, buffers=3 if student else 2, form=form):
        for strip in tile.strips():
            x, (e, g, *distance), rows = strip.s, strip.buffers, strip.rows
            if student:  # v = 1 + ‖zq − zk‖², x = −log v
                torch.add(x, 1, out=distance[0])
                apart.below_peak(x, nearest[rows])
            else:
                x.sub_(peak[rows])
            g.copy_(total_weight[rows, None].expand_as(g))
            for t, c in enumerate(scales):
                torch.mul(x, c, out=e).exp_()
                g.addcmul_(e, steep[rows, t : t + 1])
            strip.fill(g, exclude, 0)
            if student:
                torch.div(g, distance[0], out=x).mul_(2)
            else:
                x.copy_(g)
        gradients.add(tile)
    return gradients.result()


def recursion(
    queries: Tensor,  # [N, D]
    keys: Tensor,  # [M, D]
    scales: Tensor,  # [T], c_t for t = 0..depth
    alpha: float,
    positive_offset: int,
    detach_target: bool,
    peak: Tensor,  # [N]
    log_mass: Tensor,  # [N, T], of exp(c_t (S − peak)) over the whole row
) -> tuple[Tensor, Tensor, Tensor]:  # [N], [N, depth], [N, T]
    """The sums of RKDO over the keys that are not the positive; see `Recursion` for b.

    loss_i = Σ_t Σ_j p_t log(p_t / q_t),   pull_it = α Σ_j q_t b_{t+1},
    slope_it = Σ_j (S_ij − peak_i) (q_t − p_t [t > 0] + α q_t b_{t+1} [t < depth])
    """
    queries, keys = compute(queries), compute(keys)
    depth = len(scales) - 1
    loss = queries.new_zeros(len(queries), dtype=sums(queries))
    pull = loss.new_zeros(len(queries), depth)
    slope = loss.new_zeros(len(queries), depth + 1)
    deep = may_pass(FAR, queries, keys)
    for tile in tiles(queries, keys, buffers=Recursion.buffers(depth)):
        for strip in tile.strips():
            state = Recursion(strip, scales, alpha, positive_offset, peak, log_mass, deep)
            state.add_sums(loss, pull, slope, detach_target)
    return loss, pull, slope


def recursion_backward(
    queries: Tensor,  # [N, D]
    keys: Tensor,  # [M, D]
    scales: Tensor,  # [T]
    alpha: float,
    positive_offset: int,
    detach_target: bool,
    peak: Tensor,  # [N]
    log_mass: Tensor,  # [N, T]
    pull: Tensor,  # [N, depth], over the whole row
    weights: Tensor,  # [N], ∂L/∂loss
    at_positive: Tensor,  # [N], ∂loss_i/∂S_ij at the positive
    needs: Needs = BOTH,
) -> tuple[Tensor, Tensor]:  # [N, D], [M, D]
    gradients = Gradients(queries, keys, needs)
    depth = len(scales) - 1
    deep = may_pass(FAR, gradients.queries, gradients.keys)
    for tile in tiles(gradients.queries, gradients.keys, buffers=Recursion.buffers(depth)):
        for strip in tile.strips():
            state = Recursion(strip, scales, alpha, positive_offset, peak, log_mass, deep)
            state.gradient(pull, at_positive, detach_target).mul_(weights[strip.rows, None])
        gradients.add(tile)
    return gradients.result()


class Recursion:
    """p_t and q_t of one strip, off the positives, as multiples of q_0, all t at once.

        E_t = q_t / q_0 = exp((c_t − c_0) (S − peak) − (log_mass_t − log_mass_0))
        r_t = p_t / q_0 = Σ_{s<t} mix_ts E_s,  mix_ts = α (1 − α)^(t−1−s)
        w_t = log p_t − log q_t = log r_t − log E_t

    The logarithms are of numbers near 1, and log E_t is linear in S: more digits than log p_t and
    log q_t have. What p_t does to the loss is w_t + 1 plus what it does through p_{t+1}; the 1 may
    be left out since Σ_j p_t = 1; b_t = w_t + (1 − α) b_{t+1} is left: α b_{t+1} = Σ_v mix_vt w_v.
    """

    def __init__(
        self,
        strip: Strip,
        scales: Tensor,
        alpha: float,
        positive_offset: int,
        peak: Tensor,
        log_mass: Tensor,
        deep: bool,  # whether a product may be −∞: 0 · log 0
    ) -> None:
        depth, rows = len(scales) - 1, strip.rows
        self.strip, self.positive = strip, [positive_offset]
        self.x, (self.q_0, self.term) = strip.s, strip.buffers[:2]
        stacks = strip.memory[2:].split([depth + 1, depth + 1, depth, depth, depth])
        self.e, log_e, self.r, self.w, self.b = stacks
        x = self.x
        dtype = x.dtype
        self.scales = scales.to(dtype)
        steeper = (scales - scales[0]).to(dtype)[:, None, None]
        lighter = (log_mass[rows] - log_mass[rows, :1]).T.to(dtype)[:, :, None]
        t = torch.arange(depth, device=scales.device)
        age = t[:, None] - t
        self.mix = (alpha * (1 - alpha) ** age.clamp_min(0).to(sums(x)) * (age >= 0)).to(dtype)

        x.sub_(peak[rows, None])
        if deep:
            torch.maximum(x, bottom(self.scales), out=x)
        strip.fill(x, self.positive, 0)
        torch.mul(x, self.scales[0], out=self.q_0).exp_().mul_(torch.exp(-log_mass[rows, :1]))
        strip.fill(self.q_0, self.positive, 0)
        torch.mul(x, steeper, out=log_e).sub_(lighter)
        torch.exp(log_e, out=self.e)
        self.contract(self.mix, self.e[:-1], out=self.r).clamp_min_(torch.finfo(dtype).tiny)
        torch.log(self.r, out=self.w).sub_(log_e[1:])
        self.contract(self.mix.T, self.w, out=self.b)

    @staticmethod
    def buffers(depth: int) -> int:
        return 5 * depth + 4

    @staticmethod
    def contract(matrix: Tensor, stack: Tensor, *, out: Tensor) -> Tensor:
        torch.mm(matrix, stack.flatten(1), out=out.flatten(1))
        return out

    def add_sums(self, loss: Tensor, pull: Tensor, slope: Tensor, detach_target: bool) -> None:
        rows = self.strip.rows
        term = torch.sum(self.w.mul_(self.r), 0, out=self.term).mul_(self.q_0)
        loss[rows] += term.sum(1, dtype=loss.dtype)
        weighted = torch.sub(self.e[1:], self.r, out=self.w).mul_(self.q_0)
        slope[rows, 1:] += weighted.mul_(self.x).sum(2, dtype=loss.dtype).T
        if not detach_target:
            weighted = torch.mul(self.b, self.e[:-1], out=self.w).mul_(self.q_0)
            pull[rows] += weighted.sum(2, dtype=loss.dtype).T
            slope[rows, :-1] += weighted.mul_(self.x).sum(2, dtype=loss.dtype).T

    def gradient(self, pull: Tensor, at_positive: Tensor, detach_target: bool) -> Tensor:
        """∂loss_i/∂S_ij = Σ_{t>0} c_t (q_t − p_t) + Σ_{t<depth} c_t q_t (α b_{t+1} − pull_t),

        where the strip had S.
        """
        g, rows = self.x, self.strip.rows
        change = torch.sub(self.e[1:], self.r, out=self.w)
        torch.mv(change.flatten(1).T, self.scales[1:], out=g.view(-1))
        if not detach_target:
            through = self.b.sub_(pull[rows].T[:, :, None]).mul_(self.e[:-1])
            g.view(-1).addmv_(through.flatten(1).T, self.scales[:-1])
        g.mul_(self.q_0)
        self.strip.diagonal(g, self.positive[0]).copy_(
            self.strip.diagonal(at_positive[rows, None].expand_as(g), self.positive[0])
        )
        return g
