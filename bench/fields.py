"""The response field's contenders. Each holds a field, and every call is a step of it: the loss of
the field as it is, and its update. The first call's loss is the one that is judged."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import kl_div

from rkdo_kernels import ResponseField, reference

from .contenders import Contender, Loss, compiled_loss, products
from .problems import two_views

ALPHA = 0.1
TEMPERATURE = 0.5
CLASSES = 16  # of the dense field's start: even ones where N is a multiple, exact in bfloat16
SAMPLES = 1_000_000  # that a snapshot field is over; the batch is N of them
DIM = 64
HISTORY = 4
KEPT_IN = torch.bfloat16


# ---- dense ---------------------------------------------------------------------------------------


def dense(stored: torch.dtype) -> tuple[Contender, ...]:
    """The batch is all N samples."""

    def materialised(step: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., Loss]:
        def make(n: int, device: torch.device) -> Loss:
            block = same_class(n, slice(0, n), device).float()
            block = (block / block.sum(1, keepdim=True)).to(stored)

            def loss(queries: Tensor, keys: Tensor) -> Tensor:
                nonlocal block
                value, block = step(queries, keys, block)
                return value

            return loss

        return make

    def ours(n: int, device: torch.device) -> Loss:
        field = dense_field(n, device, stored)
        return lambda queries, keys: field.step(
            queries, keys, slice(0, n), alpha=ALPHA, temperature=TEMPERATURE
        )

    return (
        Contender("eager", materialised(dense_step), dense_rows),
        Contender(
            "compiled",
            lambda n, device: materialised(compiled_loss(dense_step))(n, device),
            dense_rows,
        ),
        Contender("ours", ours, dense_rows, in_float32=True),
        products(dense_rows),
    )


def dense_step(queries: Tensor, keys: Tensor, block: Tensor) -> tuple[Tensor, Tensor]:
    """KL(p̂ ‖ q) and the next field, on whole matrices."""
    log_q = torch.log_softmax(queries @ keys.T / TEMPERATURE, dim=1)
    p = block.float()
    mass = p.sum(1, keepdim=True)
    value = kl_div(log_q, p / mass, reduction="batchmean")
    with torch.no_grad():
        p = torch.addcmul((1 - ALPHA) * p, ALPHA * mass, log_q.exp())
    return value, p.to(block.dtype)


def untouched(stored: torch.dtype) -> Contender:
    """The loss alone, of a field that stays as it is; held to what that field has stored."""

    def make(n: int, device: torch.device) -> Loss:
        field = dense_field(n, device, stored)
        return lambda queries, keys: field.loss(queries, keys, slice(0, n), temperature=TEMPERATURE)

    def rows(queries: Tensor, keys: Tensor, *, positive_offset: int = 0) -> Tensor:
        of = slice(positive_offset, positive_offset + len(queries))
        block = first_field(len(keys), keys.device, stored).rows(of).to(keys.dtype)
        return reference.field_loss(block, queries, keys, temperature=TEMPERATURE)

    return Contender("ours", make, rows, in_float32=True)


@lru_cache(maxsize=1)
def first_field(n: int, device: torch.device, stored: torch.dtype) -> ResponseField:
    return dense_field(n, device, stored)


def dense_field(n: int, device: torch.device, stored: torch.dtype) -> ResponseField:
    return ResponseField.dense(n, dtype=stored, initial=torch.arange(n) % CLASSES, device=device)


def dense_rows(queries: Tensor, keys: Tensor, *, positive_offset: int = 0) -> Tensor:
    rows = slice(positive_offset, positive_offset + len(queries))
    block = same_class(len(keys), rows, keys.device).to(keys.dtype)
    return reference.field_loss(block, queries, keys, temperature=TEMPERATURE)


def same_class(n: int, rows: slice, device: torch.device) -> Tensor:  # [R, n]
    labels = torch.arange(n, device=device) % CLASSES
    return labels[rows, None] == labels


# ---- snapshots -----------------------------------------------------------------------------------


def snapshot() -> tuple[Contender, ...]:
    """The batch is N of SAMPLES, each of which has been there HISTORY times."""

    def eager(n: int, device: torch.device) -> Loss:
        index = batch(n, device)
        past_queries, past_keys = (
            torch.zeros(HISTORY, SAMPLES, DIM, dtype=KEPT_IN, device=device) for _ in range(2)
        )
        for s, (queries, keys) in enumerate(visits(n, DIM, device)):
            past_queries[s, index], past_keys[s, index] = queries, keys
        oldest = 0

        def loss(queries: Tensor, keys: Tensor) -> Tensor:
            nonlocal oldest
            log_q = torch.log_softmax(queries @ keys.T / TEMPERATURE, dim=1)
            with torch.no_grad():
                p = (1 - ALPHA) ** HISTORY * torch.eye(n, dtype=torch.float32, device=device)
                for s in range(HISTORY):
                    slot = (oldest - 1 - s) % HISTORY
                    a, b = (x[slot, index].float() for x in (past_queries, past_keys))
                    weight = ALPHA * (1 - ALPHA) ** s
                    p += weight * torch.softmax(a @ b.T / TEMPERATURE, dim=1)
            value = kl_div(log_q, p, reduction="batchmean")
            with torch.no_grad():
                past_queries[oldest, index] = queries.to(KEPT_IN)
                past_keys[oldest, index] = keys.to(KEPT_IN)
            oldest = (oldest + 1) % HISTORY
            return value

        return loss

    def ours(n: int, device: torch.device) -> Loss:
        index = batch(n, device)
        field = snapshot_field(n, device, SAMPLES, index)
        return lambda queries, keys: field.step(
            queries, keys, index, alpha=ALPHA, temperature=TEMPERATURE
        )

    return (
        Contender("eager", eager, snapshot_rows),
        Contender("ours", ours, snapshot_rows, in_float32=True),
        products(snapshot_rows),
    )


def snapshot_field(
    n: int, device: torch.device, samples: int, index: Tensor, dim: int = DIM
) -> ResponseField:
    field = ResponseField.snapshot(samples, dim, history=HISTORY, dtype=KEPT_IN, device=device)
    for queries, keys in visits(n, dim, device):
        field.update(queries, keys, index, alpha=ALPHA, temperature=TEMPERATURE)
    return field


def snapshot_rows(queries: Tensor, keys: Tensor, *, positive_offset: int = 0) -> Tensor:
    n, dim = keys.shape
    latest_first = list(visits(n, dim, keys.device))[::-1]
    past_queries, past_keys = (
        torch.stack(x).to(keys.dtype) for x in zip(*latest_first, strict=True)
    )
    each = torch.ones(HISTORY, n, dtype=keys.dtype, device=keys.device)
    target = reference.snapshot_target(
        past_queries, past_keys, ALPHA * each, TEMPERATURE * each, (HISTORY * each[0]).long(),
        torch.eye(n, dtype=keys.dtype, device=keys.device),
    )  # fmt: skip
    rows = slice(positive_offset, positive_offset + len(queries))
    return reference.field_loss(target[rows], queries, keys, temperature=TEMPERATURE)


def batch(n: int, device: torch.device) -> Tensor:  # [n], of SAMPLES
    generator = torch.Generator().manual_seed(0)
    return torch.randperm(SAMPLES, generator=generator)[:n].to(device)


def visits(n: int, dim: int, device: torch.device) -> list[tuple[Tensor, Tensor]]:
    """Embeddings of a batch's earlier visits, the oldest first."""
    found = (two_views(n, dim, KEPT_IN, str(device), seed=1 + s) for s in range(HISTORY))
    return [(x["queries"].detach(), x["keys"].detach()) for x in found]
