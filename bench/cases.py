"""The cases, as data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

import rkdo_kernels
from rkdo_kernels import reference

from . import contenders as by
from . import fields
from .contenders import Contender
from .problems import two_views

CPU_SHAPES = ((64, 64), (256, 64), (1024, 64), (4096, 64))
GPU_SHAPES = (*CPU_SHAPES, (16384, 64), (65536, 64), (4096, 512), (16384, 512), (65536, 512))


@dataclass(frozen=True)
class Work:
    """What the loss needs at least, forward and backward, an entry of S."""

    products: int  # of 2 D floating-point operations
    exponentials: int


@dataclass(frozen=True)
class Case:
    name: str
    contenders: tuple[Contender, ...]
    work: Work = Work(products=5, exponentials=3)  # S three times, its gradient into both operands
    shapes: tuple[tuple[int, int], ...] = CPU_SHAPES  # (N, D)
    gpu_shapes: tuple[tuple[int, int], ...] = GPU_SHAPES
    quick: tuple[tuple[int, int], ...] = ()
    dtypes: tuple[str, ...] = ("fp32",)
    gpu_dtypes: tuple[str, ...] = ("bf16", "fp32")
    inputs: Callable[[int, int, torch.dtype, str], dict[str, Tensor]] = two_views


def standard(
    loss: Callable[..., Tensor],
    rows: Callable[..., Tensor],
    symmetric: bool = False,
    pooled: bool = False,
) -> tuple[Contender, ...]:
    return (
        by.eager(rows, symmetric, pooled),
        by.compiled(rows, symmetric, pooled),
        by.chunked(rows, symmetric, pooled),
        by.ours(loss, rows, symmetric, pooled),
        by.products(rows),
    )


def at_depth(depth: int) -> tuple[Contender, ...]:
    rows = partial(reference.rkdo_loss, depth=depth)
    fused = by.ours(partial(rkdo_kernels.rkdo_loss, depth=depth), rows)
    return tuple(
        replace(contender, name=f"{contender.name} depth {depth}")
        for contender in (by.eager(rows), fused)
    )


def contrastive(temperature: float, symmetric: bool) -> tuple[Contender, ...]:
    rows = partial(reference.info_nce, temperature=temperature)
    fused = partial(rkdo_kernels.info_nce, temperature=temperature, symmetric=symmetric)
    return (
        *standard(fused, rows, symmetric),
        by.fused_cross_entropy(temperature, rows, symmetric),
        by.attention(temperature, rows, symmetric),
        by.inf_cl(temperature, rows, symmetric),
    )


def nt_xent_rows(queries: Tensor, images: Tensor, *, positive_offset: int = 0) -> Tensor:
    """NT-Xent of a block of rows; `images` are the other views, then the rows' own."""
    logits = queries @ images.T / 0.5
    own = reference.diagonal_mask(logits, positive_offset + len(images) // 2)
    log_q = torch.log_softmax(logits.masked_fill(own, float("-inf")), dim=1)
    return -log_q.diagonal(positive_offset)[: len(queries)]


FEWER = ((1024, 64), (4096, 64))
GPU_FEWER = ((4096, 64), (16384, 64), (65536, 64))
OF_FIELDS = Work(products=3, exponentials=1)  # S once, for both gradients and the update
RKDO = standard(rkdo_kernels.rkdo_loss, reference.rkdo_loss)
CASES = (
    Case(
        "rkdo_loss",
        (
            *RKDO,
            replace(RKDO[0], name="eager, graph", graph=True),
            replace(RKDO[3], name="ours, graph", graph=True),
        ),
        quick=((64, 64), (1024, 64), (4096, 64)),
    ),
    Case(
        "depth",
        (*at_depth(1), *at_depth(8)),
        shapes=((2048, 64),),
        gpu_shapes=((2048, 64), (16384, 64)),
        quick=((2048, 64),),
    ),
    Case("info_nce", contrastive(0.1, False), shapes=FEWER, gpu_shapes=GPU_FEWER),
    Case(
        "clip",
        contrastive(0.1, True),
        shapes=((1024, 512), (4096, 512)),
        gpu_shapes=((4096, 512), (16384, 512), (65536, 512)),
    ),
    Case(
        "nt_xent",
        standard(rkdo_kernels.nt_xent, nt_xent_rows, symmetric=True, pooled=True),
        work=Work(products=12, exponentials=8),  # three blocks of S, two of them symmetric
        shapes=FEWER,
        gpu_shapes=GPU_FEWER,
    ),
    Case(
        "icon_gaussian",
        standard(rkdo_kernels.icon_loss, reference.icon_loss),
        shapes=FEWER,
        gpu_shapes=GPU_FEWER,
    ),
    Case(
        "icon_student",
        standard(
            partial(rkdo_kernels.icon_loss, kernel="student"),
            partial(reference.icon_loss, kernel="student"),
        ),
        shapes=FEWER,
        gpu_shapes=GPU_FEWER,
    ),
    Case(
        "rkdo_direct",
        standard(
            partial(rkdo_kernels.rkdo_loss, temperature=0.01),
            partial(reference.rkdo_loss, temperature=0.01),
        ),
        shapes=FEWER,
        gpu_shapes=GPU_FEWER,
    ),
    Case(
        "field_dense",
        fields.dense(torch.float32),
        work=OF_FIELDS,
        shapes=FEWER,
        gpu_shapes=((4096, 64), (16384, 64)),
        quick=((4096, 64),),
    ),
    Case(
        "field_dense_bf16",
        fields.dense(torch.bfloat16),
        work=OF_FIELDS,
        shapes=FEWER,
        gpu_shapes=((4096, 64), (16384, 64), (65536, 64)),
    ),
    Case(
        "field_snapshot",
        fields.snapshot(),
        work=Work(products=3 + fields.HISTORY, exponentials=1 + fields.HISTORY),
        shapes=((1024, 64),),
        gpu_shapes=((1024, 64), (4096, 64)),
        quick=((1024, 64),),
    ),
)


def listed(case: Case) -> bool:
    return any(case.name == x.name for x in CASES)


def named(name: str) -> Case:
    (case,) = (x for x in CASES if x.name == name)
    return case
