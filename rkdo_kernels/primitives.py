"""Pieces that the kernels share. `i` and `j` are int32 rows of the queries and of the keys."""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
TINY = tl.constexpr(2.0**-120)  # beside a p of 0 or more: its logarithm is finite, 0 log 0 is 0
RUN = tl.constexpr(16)  # columns of a distance added up by themselves
LANES = tl.constexpr(8)  # neighbouring columns that partial sums keep apart


@triton.jit
def load_rows(
    x_ptr,  # [n, dim]
    stride,
    first,
    n,
    start,
    dim,
    COUNT: tl.constexpr,
    WIDTH: tl.constexpr,
    FULL: tl.constexpr,  # dim is a multiple of WIDTH
    MASKED: tl.constexpr,  # some of the rows may be past the last
    UPCAST: tl.constexpr,
):  # [COUNT, WIDTH]
    """Rows first .. first + COUNT, columns start .. start + WIDTH; zero past the ends."""
    local = tl.arange(0, COUNT)
    d = start + tl.arange(0, WIDTH)
    block_ptr = x_ptr + tl.cast(first, tl.int64) * stride
    pointers = block_ptr + local.to(tl.int64)[:, None] * stride + d[None, :]
    if MASKED:
        mask = (local < n - first)[:, None] & (d < dim)[None, :]
        x = tl.load(pointers, mask=mask, other=0.0)
    elif FULL:
        x = tl.load(pointers)
    else:
        x = tl.load(pointers, mask=(d < dim)[None, :], other=0.0)
    return x.to(tl.float32) if UPCAST else x


@triton.jit
def similarity_tile(
    q,  # [ROWS, WIDTH], the queries' first columns
    k,  # [COLS, WIDTH]
    queries_ptr,
    queries_stride,
    first_i,
    n,
    keys_ptr,
    keys_stride,
    first_j,
    m,
    dim,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNKS: tl.constexpr,
    FULL: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):  # [ROWS, COLS], fp32
    """queries keysᵀ; dims past WIDTH are loaded here, chunk by chunk."""
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    for chunk in range(1, CHUNKS):
        at = chunk * WIDTH
        a = load_rows(
            queries_ptr, queries_stride, first_i, n, at, dim, ROWS, WIDTH, FULL, True, UPCAST
        )
        b = load_rows(keys_ptr, keys_stride, first_j, m, at, dim, COLS, WIDTH, FULL, True, UPCAST)
        s = tl.dot(a, tl.trans(b), s, input_precision=PRECISION)
    return s


@triton.jit
def differences(
    own_ptr,
    own_stride,
    first,
    n_own,
    other_ptr,
    other_stride,
    start,
    n_other,
    at,
    OWN: tl.constexpr,
    OTHER: tl.constexpr,
):  # [OWN, OTHER], fp32
    """other_j − own_i in column `at`; rows past the last are 0."""
    i = tl.arange(0, OWN)
    j = tl.arange(0, OTHER)
    own_ptr += tl.cast(first, tl.int64) * own_stride + at
    other_ptr += tl.cast(start, tl.int64) * other_stride + at
    own = tl.load(own_ptr + i.to(tl.int64) * own_stride, mask=i < n_own - first, other=0.0)
    other = tl.load(other_ptr + j.to(tl.int64) * other_stride, mask=j < n_other - start, other=0.0)
    return other.to(tl.float32)[None, :] - own.to(tl.float32)[:, None]


@triton.jit
def distance_tile(
    own_ptr,
    own_stride,
    first,
    n_own,
    other_ptr,
    other_stride,
    start,
    n_other,
    dim,
    OWN: tl.constexpr,
    OTHER: tl.constexpr,
):  # [OWN, OTHER], fp32
    """‖own_i − other_j‖², by differences: products cancel where rows are long.

    RUN columns are added up by themselves: bfloat16's squares are so alike that in one long sum
    roundings lean to one side, by four steps of float32 at 256 columns.
    """
    total = tl.zeros([OWN, OTHER], tl.float32)
    for begin in range(0, dim, RUN):
        part = tl.zeros([OWN, OTHER], tl.float32)
        for at in range(begin, tl.minimum(begin + RUN, dim)):
            between = differences(
                own_ptr, own_stride, first, n_own, other_ptr, other_stride, start, n_other, at,
                OWN, OTHER,
            )  # fmt: skip
            part += between * between
        total += part
    return total


@triton.jit
def add_pulls(
    acc,
    g,
    own_ptr,
    own_stride,
    first,
    n_own,
    other_ptr,
    other_stride,
    start,
    n_other,
    dim,
    stripe,
    WIDTH: tl.constexpr,
    OWN: tl.constexpr,
    OTHER: tl.constexpr,
):  # [OWN, WIDTH]
    """acc + Σ_j g_ij (other_j − own_i) in columns stripe .. stripe + WIDTH."""
    column = tl.arange(0, WIDTH)[None, :]
    for at in range(stripe, tl.minimum(stripe + WIDTH, dim)):
        between = differences(
            own_ptr, own_stride, first, n_own, other_ptr, other_stride, start, n_other, at,
            OWN, OTHER,
        )  # fmt: skip
        acc += tl.where(column == at - stripe, tl.sum(rounded(g, between), 1)[:, None], 0.0)
    return acc


@triton.jit
def on_diagonal(i, j, offset):  # [ROWS], [COLS] -> [ROWS, COLS]
    return (j[None, :] - i[:, None]) == offset


@triton.jit
def touches(first_i, ROWS: tl.constexpr, first_j, COLS: tl.constexpr, offset):
    """Whether the tile at (first_i, first_j) holds an entry with j − i = offset."""
    lowest = first_j - first_i - (ROWS - 1)
    return (lowest <= offset) & (offset <= first_j + (COLS - 1) - first_i)


@triton.jit
def leave_out(
    e,
    first_i,
    first_j,
    exclude_a,
    exclude_b,
    EXCLUDE: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    INSTEAD: tl.constexpr = 0.0,
):
    """e without the excluded diagonals; a tile that they miss is not touched."""
    i = first_i + tl.arange(0, ROWS)
    j = first_j + tl.arange(0, COLS)
    if EXCLUDE >= 1:
        if touches(first_i, ROWS, first_j, COLS, exclude_a):
            e = tl.where(on_diagonal(i, j, exclude_a), INSTEAD, e)
    if EXCLUDE >= 2:
        if touches(first_i, ROWS, first_j, COLS, exclude_b):
            e = tl.where(on_diagonal(i, j, exclude_b), INSTEAD, e)
    return e


@triton.jit
def store_rows(x_ptr, i, n, start, dim, x, WIDTH: tl.constexpr):
    """Rows i, columns start .. start + WIDTH of a contiguous [n, dim]."""
    d = start + tl.arange(0, WIDTH)
    mask = (i < n)[:, None] & (d < dim)[None, :]
    at = x_ptr + i.to(tl.int64)[:, None] * dim + d[None, :]
    tl.store(at, x.to(x_ptr.dtype.element_ty), mask=mask)


@triton.jit
def into(acc, g, x, PRECISION: tl.constexpr):
    """acc + g x.  A gradient's entries span more than float16 holds; float16 is exact in tf32."""
    if x.dtype == tl.float16:
        return tl.dot(g, x.to(tl.float32), acc, input_precision=PRECISION)
    return tl.dot(g.to(x.dtype), x, acc, input_precision=PRECISION)


@triton.jit
def row_polynomials(
    weights_ptr, first, n, ROWS: tl.constexpr, DEGREE: tl.constexpr, MASKED: tl.constexpr
):
    """DEGREE + 1 columns of weights, [ROWS, 1] each; 0 past the last row."""
    local = tl.arange(0, ROWS)
    table_ptr = weights_ptr + tl.cast(first, tl.int64) * (DEGREE + 1)
    result = ()
    for power in tl.static_range(DEGREE + 1):
        at = table_ptr + local * (DEGREE + 1) + power
        w = tl.load(at, mask=local < n - first, other=0.0) if MASKED else tl.load(at)
        result = result + (w[:, None],)
    return result


@triton.jit
def block_values(
    table_ptr,
    stride,
    first,
    n,
    COUNT: tl.constexpr,
    AXIS: tl.constexpr,
    MASKED: tl.constexpr,
):
    """A value of each row first .. first + COUNT, [COUNT, 1] or [1, COUNT]; 0 past the last."""
    local = tl.arange(0, COUNT)
    pointers = table_ptr + tl.cast(first, tl.int64) * stride + local * stride
    if MASKED:
        return tl.expand_dims(tl.load(pointers, mask=local < n - first, other=0.0), AXIS)
    else:
        return tl.expand_dims(tl.load(pointers), AXIS)


@triton.jit
def scalars(table_ptr, COUNT: tl.constexpr):
    """COUNT values as float32."""
    result = ()
    for at in tl.static_range(COUNT):
        result = result + (tl.load(table_ptr + at).to(tl.float32),)
    return result


@triton.jit
def log2(x, PRECISION: tl.constexpr):
    """Of a normal number; on NVIDIA by one instruction, which tl.log2 is not."""
    if PRECISION == "ieee":
        return tl.log2(x)
    else:
        return tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=r,r", [x], tl.float32, is_pure=True, pack=1
        )


@triton.jit
def rounded(x, y):
    """x y for a sum over lanes of one product each.

    An FMA of a lane's own product and its partner's rounded one leaves every lane another sum of
    the row: threads that hold the same entry then store different values of it.
    """
    return tl.fma(x, y, 0.0)


@triton.jit
def fold(x, ROWS: tl.constexpr, COLS: tl.constexpr):
    """[ROWS, COLS] -> [ROWS, LANES], over columns that one thread owns."""
    return tl.sum(tl.reshape(x, [ROWS, COLS // LANES, LANES]), 1)


@triton.jit
def walk(span, count, SPLIT: tl.constexpr, STEP: tl.constexpr):
    """Where this program's split begins, where its last whole step of STEP rows ends, its end."""
    start = 0
    stop = count
    if SPLIT:
        start = tl.program_id(2) * span
        stop = tl.minimum(start + span, count)
    return start, start + (stop - start) // STEP * STEP, stop


@triton.jit
def column_groups(x, ROWS: tl.constexpr, COLS: tl.constexpr):
    """[ROWS, COLS] -> [ROWS, LANES] each: columns that one thread owns, to add up by FMAs."""
    if COLS == LANES:
        return (x,)
    else:
        halves = tl.permute(tl.reshape(x, [ROWS, 2, COLS // 2]), (0, 2, 1))
        left, right = tl.split(halves)
        return column_groups(left, ROWS, COLS // 2) + column_groups(right, ROWS, COLS // 2)
