"""How large everything is: on a GPU, and in a rehearsal."""

from __future__ import annotations

from dataclasses import dataclass, replace

PATHS = (
    "rkdo, moments", "info_nce", "info_nce, both ways", "rkdo, direct", "icon, student",
    "nt_xent", "field, bf16", "rkdo, τ = 0.01", "icon, gaussian", "rkdo, depth 8",
    "rkdo, detached", "rkdo, direct, detached", "info_nce, no bound", "field, fp32",
)  # fmt: skip
SPEED = (
    "rkdo_loss", "clip", "field_dense_bf16", "info_nce", "rkdo_direct", "icon_student",
    "icon_gaussian", "nt_xent", "field_snapshot", "field_dense",
)  # fmt: skip
LOSSES = tuple(path for path in PATHS if not path.startswith("field"))
SHAPES = (
    (129, 200, "fp32"), (1, 1, "bf16"), (3, 31, "fp16"), (1024, 512, "bf16"), (1024, 64, "fp16"),
    (1, 1, "fp32"), (129, 200, "bf16"), (1024, 512, "fp32"), (129, 200, "fp16"), (3, 31, "bf16"),
    (64, 64, "bf16"), (128, 512, "fp32"), (101, 200, "fp16"),  # in a single launch
)  # fmt: skip


@dataclass(frozen=True)
class Sizes:
    """Odd N throughout, and few of them: checks share their compiled kernels."""

    paths: tuple[str, ...] = PATHS
    every: tuple[str, ...] = PATHS  # for the launch tables
    n: int = 1001
    small: int = 129
    wide: int = 200  # d that is no power of two
    many: int = 16385
    beyond: int = 46_401  # N with N² > 2³¹
    stride: int = 1 << 20  # elements, from a row to the next
    apart_n: int = 2305  # rows so far apart: the last starts past 2³¹
    striped_n: int = 9001
    samples: int = 5000
    reruns: int = 250
    line_n: int = 200
    single_n: int = 100  # in a single launch, where there is one
    dims: tuple[int, ...] = (64, 128, 512, 256, 192, 33, 16)
    first_lines: tuple[tuple[int, str], ...] = (
        (64, "bf16"), (512, "bf16"), (64, "fp32"), (192, "bf16"), (256, "fp16"),
    )  # fmt: skip
    shapes: tuple[tuple[int, int, str], ...] = SHAPES
    compiled: tuple[str, ...] = ("rkdo, moments", "info_nce, both ways", "rkdo, τ = 0.01")
    bounded: tuple[str, ...] = ("rkdo, moments", "info_nce", "info_nce, both ways", "nt_xent")
    matrix_free: tuple[str, ...] = LOSSES
    striped: tuple[str, ...] = ("rkdo, moments", "info_nce")
    far: tuple[str, ...] = (
        "rkdo, moments", "info_nce", "rkdo, direct", "icon, student", "field, bf16",
    )  # fmt: skip
    apart: tuple[str, ...] = ("rkdo, moments", "rkdo, direct")
    wide_paths: tuple[str, ...] = PATHS
    sanitized: tuple[str, ...] = ("rkdo, moments", "info_nce, both ways", "rkdo, direct",
                                  "icon, student", "field, bf16")  # fmt: skip
    golden: int | None = None  # how many of the golden values; None: all
    shared: int | None = None  # of the emulator's cases
    fuzzed: int = 24  # batches of the fuzzer's cases
    scale: int = 1  # by which the speed's N are divided
    widest: int = 1 << 20  # and the largest d
    tiers: int = 4  # of the speed's plan
    profiled: tuple[str, ...] = SPEED
    predicted: tuple[str, ...] = ("rkdo_loss", "info_nce", "clip", "icon_student", "rkdo_direct")


FULL = Sizes()
REHEARSED = replace(
    FULL,
    paths=("rkdo, moments", "field, bf16"), every=("info_nce", "icon, student"),
    n=33, small=17, many=49, beyond=67, stride=80, apart_n=21, striped_n=41, samples=60, reruns=2,
    line_n=20, single_n=9, dims=(16,), first_lines=((16, "bf16"),), shapes=((3, 31, "fp16"),),
    compiled=("rkdo, moments",), bounded=("rkdo, moments",), matrix_free=("rkdo, moments",),
    striped=("info_nce",), far=("rkdo, moments",), apart=("rkdo, direct",),
    wide_paths=("rkdo, moments",), sanitized=("info_nce",), golden=2, shared=3, fuzzed=1,
    scale=1024, widest=64, tiers=1, profiled=("rkdo_loss",), predicted=("rkdo_loss",),
)  # fmt: skip
