"""The implementations that a case compares: each takes queries and keys and returns a mean loss."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

Loss = Callable[[Tensor, Tensor], Tensor]  # queries [N, D], keys [N, D] -> []
RowLoss = Callable[..., Tensor]  # queries [R, D], keys [N, D], positive_offset -> [R]
CHUNKS = (64, 128, 256, 512, 1024)


class Unavailable(Exception):
    """Why a contender cannot run here, in a few words."""


@dataclass(frozen=True)
class Contender:
    """`make` is called once a shape, and may raise Unavailable; what it returns is timed.

    `rows` is the truth that it is held to, materialised for a block of rows.
    """

    name: str
    make: Callable[[int, torch.device], Loss]
    rows: RowLoss
    symmetric: bool = False  # both directions, averaged
    pooled: bool = False  # the rows' own views are keys too, after the others
    variants: tuple[int, ...] = ()  # `make` takes one of them as `variant`; the fastest is timed
    judged: bool = True  # False for what is no loss
    graph: bool = False  # captured once, replayed
    in_float32: bool = False  # returns a float32 loss in every dtype, and is held to it


def directions(
    queries: Tensor, keys: Tensor, symmetric: bool, pooled: bool
) -> list[tuple[Tensor, Tensor]]:
    """What the rows of a loss are, and their keys."""
    ways = [(queries, keys), (keys, queries)][: 1 + symmetric]
    return [(a, torch.cat([b, a])) for a, b in ways] if pooled else ways


def mean_of(rows: RowLoss, symmetric: bool, pooled: bool = False) -> Loss:
    """The loss as one would write it, materialised."""

    def loss(queries: Tensor, keys: Tensor) -> Tensor:
        means = [rows(a, b).mean() for a, b in directions(queries, keys, symmetric, pooled)]
        return (means[0] + means[1]) / 2 if symmetric else means[0]

    return loss


def in_chunks(
    rows: RowLoss, symmetric: bool, chunk: int, saving: bool = True, pooled: bool = False
) -> Loss:
    """The same by blocks of `chunk` rows, each recomputed for its gradient if `saving`."""

    def one_way(queries: Tensor, keys: Tensor) -> Tensor:
        total = torch.zeros((), dtype=torch.promote_types(queries.dtype, torch.float32))
        total = total.to(queries.device)
        for start in range(0, len(queries), chunk):
            block = partial(block_sum, rows, start, chunk)
            if saving:
                total = total + checkpoint(block, queries, keys, use_reentrant=False)
            else:
                total = total + block(queries, keys)
        return total / len(queries)

    def loss(queries: Tensor, keys: Tensor) -> Tensor:
        means = [one_way(a, b) for a, b in directions(queries, keys, symmetric, pooled)]
        return (means[0] + means[1]) / 2 if symmetric else means[0]

    return loss


def block_sum(rows: RowLoss, start: int, chunk: int, queries: Tensor, keys: Tensor) -> Tensor:
    block = queries[start : start + chunk]
    losses = rows(block, keys, positive_offset=start)
    return losses.sum(dtype=torch.promote_types(losses.dtype, torch.float32))


def eager(rows: RowLoss, symmetric: bool = False, pooled: bool = False) -> Contender:
    loss = mean_of(rows, symmetric, pooled)
    return Contender("eager", lambda n, device: loss, rows, symmetric, pooled)


def compiled(rows: RowLoss, symmetric: bool = False, pooled: bool = False) -> Contender:
    def make(n: int, device: torch.device) -> Loss:
        return compiled_loss(mean_of(rows, symmetric, pooled))

    return Contender("compiled", make, rows, symmetric, pooled)


def compiled_loss(loss: Callable[..., Any]) -> Callable[..., Any]:
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch")
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    torch._dynamo.reset()
    return torch.compile(loss, dynamic=False)


def chunked(rows: RowLoss, symmetric: bool = False, pooled: bool = False) -> Contender:
    def make(n: int, device: torch.device, variant: int = CHUNKS[0]) -> Loss:
        return in_chunks(rows, symmetric, variant, pooled=pooled)

    return Contender("chunked", make, rows, symmetric, pooled, variants=CHUNKS)


def ours(
    loss: Callable[..., Tensor], rows: RowLoss, symmetric: bool = False, pooled: bool = False
) -> Contender:
    """`loss` goes both ways by itself."""
    return Contender("ours", lambda n, device: loss, rows, symmetric, pooled, in_float32=True)


def fused_cross_entropy(temperature: float, rows: RowLoss, symmetric: bool = False) -> Contender:
    """PyTorch's cross_entropy on the materialised logits, which are the same both ways."""

    def make(n: int, device: torch.device) -> Loss:
        labels = torch.arange(n, device=device)

        def loss(queries: Tensor, keys: Tensor) -> Tensor:
            logits = queries @ keys.T / temperature
            value = cross_entropy(logits, labels)
            return (value + cross_entropy(logits.T, labels)) / 2 if symmetric else value

        return loss

    return Contender("cross_entropy", make, rows, symmetric)


def attention(temperature: float, rows: RowLoss, symmetric: bool = False) -> Contender:
    """InfoNCE by PyTorch's flash attention, whose log-sum-exp is the loss and whose output with
    the keys as values is half of the gradient; see `AttentionLoss`."""

    def make(n: int, device: torch.device) -> Loss:
        def loss(queries: Tensor, keys: Tensor) -> Tensor:
            if queries.is_cuda and queries.dtype == torch.float32:
                raise Unavailable("flash attention takes no float32 on a GPU")
            if queries.is_cuda and queries.shape[1] > 256:
                raise Unavailable("flash attention takes at most 256 dimensions")
            value = AttentionLoss.apply(queries, keys, temperature)
            if not symmetric:
                return value
            return (value + AttentionLoss.apply(keys, queries, temperature)) / 2

        return loss

    return Contender("attention", make, rows, symmetric)


class AttentionLoss(torch.autograd.Function):
    """mean_i (lse_i − s_ii / τ). With p = softmax(S / τ): ∂/∂zq = (p zk − zk) / τN, and
    ∂/∂zk = (pᵀ zq − zq) / τN, where pᵀ zq is attention's gradient for its values."""

    @staticmethod
    def forward(ctx: Any, queries: Tensor, keys: Tensor, temperature: float) -> Tensor:
        q, k = queries[None, None], keys[None, None]
        scale = 1 / temperature
        aten = torch.ops.aten
        if queries.is_cuda:
            out, lse, *rest = aten._scaled_dot_product_flash_attention(q, k, k, scale=scale)
            ctx.rest = rest[:6]
        else:
            out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, k, scale=scale)
        ctx.scale = scale
        ctx.save_for_backward(queries, keys, out, lse)
        positive = (queries.float() * keys.float()).sum(1)
        return (lse.flatten()[: len(queries)] - scale * positive).mean()

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        queries, keys, out, lse = ctx.saved_tensors
        q, k = queries[None, None], keys[None, None]
        aten = torch.ops.aten
        if queries.is_cuda:
            _, _, mixed = aten._scaled_dot_product_flash_attention_backward(
                q, q, k, k, out, lse, *ctx.rest[:4], 0.0, False, *ctx.rest[4:6], scale=ctx.scale
            )
        else:
            _, _, mixed = aten._scaled_dot_product_flash_attention_for_cpu_backward(
                q, q, k, k, out, lse, 0.0, False, scale=ctx.scale
            )
        weight = upstream[0] * ctx.scale / len(queries)
        return (
            (weight * (out[0, 0] - keys)).to(queries.dtype),
            (weight * (mixed[0, 0] - queries)).to(keys.dtype),
            None,
        )


def inf_cl(temperature: float, rows: RowLoss, symmetric: bool = False) -> Contender:
    """Inf-CL's kernel, where the package and a GPU are there."""

    def make(n: int, device: torch.device) -> Loss:
        if device.type != "cuda":
            raise Unavailable("needs a GPU")
        if find_spec("inf_cl") is None:
            raise Unavailable("inf-cl is not installed")
        from inf_cl import cal_flash_loss

        def one_way(queries: Tensor, keys: Tensor) -> Tensor:
            dim = min(queries.shape[1], 256)
            return cal_flash_loss(queries, keys, scale=1 / temperature, head_dim=dim).mean()

        def loss(queries: Tensor, keys: Tensor) -> Tensor:
            value = one_way(queries, keys)
            return (value + one_way(keys, queries)) / 2 if symmetric else value

        return loss

    return Contender("inf-cl", make, rows, symmetric)


class Products(torch.autograd.Function):
    """No loss: the least that any of them does, by blocks of rows. One product for S and two for
    the gradients, and one exp an entry."""

    @staticmethod
    def forward(ctx: Any, queries: Tensor, keys: Tensor) -> Tensor:
        d_queries, d_keys = torch.empty_like(queries), torch.zeros_like(keys)
        for start in range(0, len(queries), 256):
            q = queries[start : start + 256]
            weight = (q @ keys.T).exp_()
            torch.mm(weight, keys, out=d_queries[start : start + 256])
            d_keys.addmm_(weight.T, q)
        ctx.save_for_backward(d_queries, d_keys)
        return queries.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        return ctx.saved_tensors


def products(rows: RowLoss) -> Contender:
    return Contender("floor", lambda n, device: Products.apply, rows, judged=False)
