"""The calls that compiled kernels are held to: every loss and field, on every path."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from typing import Any

import rkdo_kernels as rk
from rkdo_kernels import reference

from .calls import DTYPES, AnyCall, LossCall
from .field_calls import FieldCall

FUNCTIONS: dict[str, Any] = {
    "rkdo": (rk.rkdo_loss, reference.rkdo_loss),
    "info_nce": (rk.info_nce, reference.info_nce),
    "nt_xent": (rk.nt_xent, reference.nt_xent),
    "icon": (rk.icon_loss, reference.icon_loss),
    "logsumexp": (rk.similarity_logsumexp, reference.similarity_logsumexp),
    "moments": (rk.similarity_moments, reference.similarity_moments),
}
DIRECT, ROWS, SUM = {"bound": None}, {"reduction": "none"}, {"reduction": "sum"}
BASE, ONE, SINGLE, MORE = (200, 200, 64), (1, 1, 1), (65, 65, 64), (65, 300, 40)
WIDE, LONG, ODD, TINY = (140, 140, 256), (320, 320, 64), (131, 131, 33), (3, 5, 17)
OFFSET = {"positive_offset": 100}
QUICK_LOSSES = {  # name and dtype: every kernel, with its parts and its joins
    ("rkdo", "bf16"), ("rkdo", "fp32"), ("info_nce", "fp16"), ("rkdo in parts", "bf16"),
    ("rkdo direct in parts", "bf16"), ("info_nce both ways", "fp32"), ("rkdo, one launch", "bf16"),
    ("nt_xent in parts", "bf16"), ("icon student", "bf16"), ("rkdo wide", "bf16"),
    ("rkdo, one launch, wide", "fp32"),
}  # fmt: skip


def of(name: str, function: str, *ours_only: dict[str, Any], **given: Any) -> LossCall:
    """`given` are the call's fields, and the settings that reference.py knows too."""
    loss, rows = FUNCTIONS[function]
    fields = {x: given.pop(x) for x in [*given] if x in LossCall.__dataclass_fields__}
    ours = {k: v for options in ours_only for k, v in options.items()}
    return LossCall(name, loss, rows, settings=given, ours_only=ours, **fields)


def losses() -> Iterator[LossCall]:
    """What `every` has in all dtypes."""
    yield of("rkdo", "rkdo")
    yield of("rkdo by rows", "rkdo", ROWS)
    yield of("rkdo, one launch", "rkdo", shape=SINGLE)
    yield of("rkdo, one launch, wide", "rkdo", shape=(70, 70, 136))
    yield of("rkdo, one entry", "rkdo", shape=ONE)
    yield of("rkdo, more keys", "rkdo", shape=MORE, **OFFSET)
    yield of("rkdo, odd rows", "rkdo", shape=ODD, layout="odd")
    yield of("rkdo wide", "rkdo", shape=WIDE)
    yield of("rkdo in parts", "rkdo", ROWS, shape=LONG, splits=2)
    yield of("rkdo direct", "rkdo", DIRECT)
    yield of("rkdo direct, more keys", "rkdo", DIRECT, shape=MORE, **OFFSET)
    yield of("rkdo direct wide", "rkdo", DIRECT, shape=WIDE)
    yield of("rkdo direct in parts", "rkdo", DIRECT, ROWS, shape=LONG, splits=2)
    yield of("info_nce", "info_nce")
    yield of("info_nce direct", "info_nce", DIRECT)
    yield of("info_nce, one launch", "info_nce", shape=SINGLE)
    yield of("info_nce wide", "info_nce", shape=WIDE)
    yield of("info_nce both ways", "info_nce", symmetric=True)
    yield of("info_nce both ways, odd rows", "info_nce", symmetric=True, shape=ODD, layout="odd")
    yield of("info_nce both ways wide", "info_nce", symmetric=True, shape=WIDE)
    yield of("info_nce both ways in parts", "info_nce", symmetric=True, shape=LONG, splits=2)
    yield of("nt_xent", "nt_xent", shape=(100, 100, 64))
    yield of("nt_xent wide", "nt_xent", shape=(100, 100, 256))
    yield of("icon", "icon")
    yield of("icon student", "icon", kernel="student")
    yield of("icon student wide", "icon", kernel="student", shape=WIDE)
    yield of("icon student in parts", "icon", kernel="student", shape=LONG, splits=2)
    yield of("moments, degree 3", "moments", temperature=0.3, degree=3)


def settings() -> Iterator[LossCall]:
    """Each in one dtype."""
    bf16, fp16, fp32 = ({"dtype": dtype} for dtype in ("bf16", "fp16", "fp32"))
    # All rows near one direction: the product of G with the keys cancels, and its roundings do not.
    for dtype in (bf16, fp16):
        near = {"cosine": 0.999, **dtype}
        yield of("rkdo, collapsed", "rkdo", **near)
        yield of("rkdo, one launch, collapsed", "rkdo", shape=SINGLE, **near)
        yield of("rkdo wide, collapsed", "rkdo", shape=WIDE, **near)
        yield of("rkdo direct, collapsed", "rkdo", DIRECT, **near)
        yield of("info_nce, collapsed", "info_nce", **near)
        yield of("info_nce by rows, collapsed", "info_nce", ROWS, **near)
        yield of("info_nce direct, collapsed", "info_nce", DIRECT, **near)
        yield of("info_nce both ways, collapsed", "info_nce", symmetric=True, **near)
        yield of("info_nce both ways by rows, collapsed", "info_nce", ROWS, symmetric=True, **near)
        yield of("nt_xent, collapsed", "nt_xent", **near)
        yield of("icon, collapsed", "icon", **near)
    near = {"cosine": 0.999, **bf16}
    yield of("rkdo in parts, collapsed", "rkdo", ROWS, shape=LONG, splits=2, **near)
    yield of("rkdo direct in parts, collapsed", "rkdo", DIRECT, ROWS, shape=LONG, splits=2, **near)
    yield of("rkdo in stripes, collapsed", "rkdo", shape=(300, 300, 256), stripe_bytes=1, **near)
    yield of("rkdo, few, collapsed", "rkdo", ROWS, shape=TINY, positive_offset=2, **near)
    yield of("info_nce both ways in parts, collapsed", "info_nce", symmetric=True, shape=LONG,
             splits=2, **near)  # fmt: skip
    yield of("info_nce both ways, few, collapsed", "info_nce", symmetric=True, shape=(5, 5, 17),
             **near)  # fmt: skip
    yield of("nt_xent, few, collapsed", "nt_xent", shape=(4, 4, 17), **near)
    yield of("moments without self, collapsed", "moments", temperature=0.3, degree=3,
             exclude_self=True, **near)  # fmt: skip
    yield of("rkdo, depth 1", "rkdo", ROWS, depth=1, **bf16)
    yield of("rkdo, depth 8", "rkdo", depth=8, **fp32)
    yield of("rkdo, α = 0", "rkdo", alpha=0.0, **bf16)
    yield of("rkdo, α = 1", "rkdo", alpha=1.0, **fp16)
    yield of("rkdo, τ = 0.1", "rkdo", ROWS, temperature=0.1, **fp16)
    yield of("rkdo, τ = 0.1", "rkdo", temperature=0.1, **fp32)
    yield of("rkdo, τ = 0.01", "rkdo", SUM, temperature=0.01, **bf16)
    yield of("rkdo detached", "rkdo", detach_target=True, **bf16)
    yield of("rkdo learnable", "rkdo", learnable=0.3, **fp32)
    yield of("rkdo within 1.5", "rkdo", {"bound": 1.5}, ROWS, **bf16)
    yield of("rkdo, one launch, odd", "rkdo", shape=TINY, positive_offset=2, **bf16)
    yield of("rkdo wider", "rkdo", shape=(130, 130, 512), **bf16)
    yield of("rkdo wider", "rkdo", ROWS, shape=(130, 130, 512), **fp32)
    yield of("rkdo, d = 192", "rkdo", ROWS, shape=(140, 140, 192), **bf16)
    yield of("rkdo in stripes", "rkdo", shape=(300, 300, 256), stripe_bytes=1, **bf16)
    yield of("rkdo, frozen keys", "rkdo", frozen="keys", **bf16)
    yield of("rkdo, frozen queries", "rkdo", ROWS, frozen="queries", **fp32)
    yield of("rkdo in three parts, odd", "rkdo", shape=(65, 700, 40), splits=3, **OFFSET, **bf16)
    yield of("rkdo direct, depth 1", "rkdo", DIRECT, depth=1, **bf16)
    yield of("rkdo direct, depth 8", "rkdo", DIRECT, ROWS, depth=8, **fp16)
    yield of("rkdo direct, α = 0", "rkdo", DIRECT, alpha=0.0, **fp32)
    yield of("rkdo direct, α = 1", "rkdo", DIRECT, ROWS, alpha=1.0, **bf16)
    yield of("rkdo direct detached", "rkdo", DIRECT, detach_target=True, **fp32)
    yield of("rkdo direct, one entry", "rkdo", DIRECT, shape=ONE, **fp32)
    yield of("rkdo direct, odd rows", "rkdo", DIRECT, shape=ODD, layout="odd", **bf16)
    yield of("rkdo direct, frozen keys", "rkdo", DIRECT, frozen="keys", **fp16)
    yield of("rkdo direct in three parts, odd", "rkdo", DIRECT, shape=(65, 700, 40), splits=3,
             **OFFSET, **fp32)  # fmt: skip
    yield of("info_nce by rows", "info_nce", ROWS, **bf16)
    yield of("info_nce, τ = 0.01", "info_nce", ROWS, temperature=0.01, **fp32)
    yield of("info_nce learnable", "info_nce", learnable=0.2, **bf16)
    yield of("info_nce, one entry", "info_nce", shape=ONE, **fp16)
    yield of("info_nce, queue", "info_nce", shape=MORE, positive_offset=0, frozen="keys", **bf16)
    yield of("info_nce without self", "info_nce", ROWS, shape=MORE, exclude_self=True,
             positive_offset=200, **fp32)  # fmt: skip
    yield of("info_nce, odd rows", "info_nce", shape=ODD, layout="odd", **fp16)
    yield of("info_nce wider", "info_nce", shape=(130, 130, 512), **fp16)
    yield of("info_nce in parts", "info_nce", shape=LONG, splits=2, **bf16)
    yield of("info_nce direct in parts", "info_nce", DIRECT, shape=LONG, splits=2, **fp32)
    yield of("info_nce both ways by rows", "info_nce", ROWS, symmetric=True, **bf16)
    yield of("info_nce both ways direct", "info_nce", DIRECT, symmetric=True, **bf16)
    yield of("info_nce both ways learnable", "info_nce", symmetric=True, learnable=0.2, **fp32)
    yield of("info_nce both ways, one entry", "info_nce", symmetric=True, shape=ONE, **fp32)
    yield of("info_nce both ways, frozen keys", "info_nce", symmetric=True, frozen="keys", **bf16)
    yield of("nt_xent by rows", "nt_xent", ROWS, shape=(100, 100, 64), **bf16)
    yield of("nt_xent direct", "nt_xent", DIRECT, shape=(100, 100, 64), **fp32)
    yield of("nt_xent learnable", "nt_xent", shape=(100, 100, 64), learnable=0.3, **bf16)
    yield of("nt_xent, two images", "nt_xent", shape=ONE, **fp32)
    yield of("nt_xent, odd rows", "nt_xent", shape=(67, 67, 33), layout="odd", **fp32)
    yield of("nt_xent in parts", "nt_xent", shape=(200, 200, 64), splits=2, **bf16)
    yield of("icon direct", "icon", DIRECT, **bf16)
    yield of("icon, more keys", "icon", ROWS, shape=MORE, **OFFSET, **fp32)
    yield of("icon student by rows", "icon", ROWS, kernel="student", **fp32)
    yield of("icon student, one entry", "icon", kernel="student", shape=ONE, **fp32)
    yield of("icon student, more keys", "icon", kernel="student", shape=MORE, **OFFSET, **bf16)
    yield of("icon student learnable", "icon", kernel="student", learnable=0.4, **fp16)
    yield of("logsumexp", "logsumexp", temperature=0.3, **bf16)
    yield of("logsumexp without self", "logsumexp", temperature=0.3, exclude_self=True, **fp32)
    yield of("logsumexp, τ = 0.01", "logsumexp", temperature=0.01, **fp16)
    yield of("moments without self", "moments", temperature=0.3, degree=3, exclude_self=True,
             **bf16)  # fmt: skip
    yield of("moments, degree 8, more keys", "moments", temperature=0.2, degree=8, shape=MORE,
             **fp32)  # fmt: skip
    yield of("moments learnable", "moments", degree=2, learnable=0.3, **fp32)


def fields() -> Iterator[FieldCall]:
    for stored in ("fp32", "bf16"):
        for gathered in (False, True):
            apart = "gathered" if gathered else "in a row"
            name = f"field of {stored}, {apart}"
            own: dict[str, Any] = {"kind": "dense", "stored": stored, "gathered": gathered}
            quick = stored == "bf16" and gathered
            for dtype in DTYPES:
                yield FieldCall(f"{name}: step", dtype=dtype, quick=quick and dtype == "bf16",
                                **own)  # fmt: skip
            yield FieldCall(f"{name}: loss", does="loss", initial="labels", **own)
            yield FieldCall(f"{name}: by rows", does="none", dtype="bf16", **own)
            yield FieldCall(f"{name}: update", does="update", initial="identity", **own)
            yield FieldCall(f"{name}: in parts", splits=2, batch=140, dim=64, dtype="bf16",
                            quick=quick, **own)  # fmt: skip
            yield FieldCall(f"{name}: wide", dim=200, dtype="bf16", **own)
            yield FieldCall(f"{name}: wide, by rows", does="none", dim=200, **own)
    yield FieldCall("field of one sample", "dense", samples=1, batch=1, dim=1, initial="identity")
    for frozen in ("queries", "keys"):
        yield FieldCall(f"field, frozen {frozen}", "dense", frozen=frozen)
    own = {"kind": "snapshot", "batch": 67}
    for stored in ("fp32", "bf16"):
        for dtype in DTYPES:
            name = f"snapshots of {stored}"
            yield FieldCall(f"{name}: step", dtype=dtype, stored=stored, **own)
        yield FieldCall(f"{name}: by rows", does="none", dtype="bf16", stored=stored, **own)
        yield FieldCall(f"{name}: labels", initial="labels", dim=64, dtype="bf16", stored=stored,
                        quick=stored == "bf16", **own)  # fmt: skip
        yield FieldCall(f"{name}: wide", dim=200, dtype="bf16", stored=stored, history=1, **own)
    yield FieldCall("snapshots in parts", "snapshot", batch=140, dim=64, dtype="bf16",
                    stored="bf16", splits=2, quick=True)  # fmt: skip
    for stored in ("fp32", "bf16"):
        yield FieldCall(f"snapshots of {stored}, one after another", "snapshot", dtype="bf16",
                        stored=stored, scarce=True)  # fmt: skip
    yield FieldCall("snapshots, frozen keys", "snapshot", initial="identity", frozen="keys")
    yield FieldCall("snapshots of one sample", "snapshot", samples=1, batch=1, dim=1, history=1,
                    initial="identity")  # fmt: skip


@lru_cache(maxsize=1)
def every() -> tuple[AnyCall, ...]:
    """Neighbours differ in dtype: processes that take turns seldom compile the same."""
    loss_calls = [replace(call, dtype=dtype) for call in losses() for dtype in DTYPES]
    loss_calls += settings()
    quick = [replace(x, quick=(x.name, x.dtype) in QUICK_LOSSES) for x in loss_calls]
    return (*quick, *fields())


def label(call: AnyCall) -> str:
    n, m, d = call.shape
    return f"{call.name}, {call.dtype}, {n}×{d}" + ("" if n == m else f" to {m}")
