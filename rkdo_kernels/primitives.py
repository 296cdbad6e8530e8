"""Pieces that the kernels share. `i` and `j` are int32 rows of the own and the other operand."""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def load_rows(
    x_ptr,  # [n, dim]
    stride,
    i,  # [ROWS]
    n,
    start,
    dim,
    WIDTH: tl.constexpr,
    FULL: tl.constexpr,  # dim is a multiple of WIDTH
    UPCAST: tl.constexpr,
):
    """Rows i, columns start .. start + WIDTH; zero past the ends."""
    d = start + tl.arange(0, WIDTH)
    mask = (i < n)[:, None]
    if not FULL:
        mask = mask & (d < dim)[None, :]
    x = tl.load(x_ptr + i.to(tl.int64)[:, None] * stride + d[None, :], mask=mask, other=0.0)
    return x.to(tl.float32) if UPCAST else x


@triton.jit
def similarity_tile(
    own,  # [OWN, WIDTH], its rows' first columns
    other,  # [OTHER, WIDTH]
    own_ptr,
    own_stride,
    i,
    n_own,
    other_ptr,
    other_stride,
    j,
    n_other,
    dim,
    WIDTH: tl.constexpr,
    CHUNKS: tl.constexpr,
    FULL: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):  # [OWN, OTHER], fp32
    """own otherᵀ; dims past WIDTH are loaded here, chunk by chunk."""
    s = tl.dot(own, tl.trans(other), input_precision=PRECISION)
    for chunk in range(1, CHUNKS):
        start = chunk * WIDTH
        a = load_rows(own_ptr, own_stride, i, n_own, start, dim, WIDTH, FULL, UPCAST)
        b = load_rows(other_ptr, other_stride, j, n_other, start, dim, WIDTH, FULL, UPCAST)
        s = tl.dot(a, tl.trans(b), s, input_precision=PRECISION)
    return s


@triton.jit
def on_diagonal(i, j, offset):  # [ROWS], [COLS] -> [ROWS, COLS]
    return (j[None, :] - i[:, None]) == offset


@triton.jit
def touches(first_i, ROWS: tl.constexpr, first_j, COLS: tl.constexpr, offset):
    """Whether the tile at (first_i, first_j) holds an entry with j − i = offset."""
    lowest = first_j - first_i - (ROWS - 1)
    return (lowest <= offset) & (offset <= first_j + (COLS - 1) - first_i)


@triton.jit
def into(acc, g, x, UPCAST: tl.constexpr, PRECISION: tl.constexpr):
    """acc + g x.  A gradient's entries span more than float16 holds; float16 is exact in tf32."""
    if x.dtype == tl.float16:
        return tl.dot(g, x.to(tl.float32), acc, input_precision=PRECISION)
    return tl.dot(g.to(x.dtype), x, acc, input_precision=PRECISION)


@triton.jit
def row_values(
    table_ptr, stride, i, n_own, j, n_other, BY_OWN: tl.constexpr
):  # [ROWS, 1] or [1, COLS]
    """A value of every query's row, laid along the own or the other axis; 0 past the end."""
    if BY_OWN:
        return tl.load(table_ptr + i.to(tl.int64) * stride, mask=i < n_own, other=0.0)[:, None]
    else:
        return tl.load(table_ptr + j.to(tl.int64) * stride, mask=j < n_other, other=0.0)[None, :]


@triton.jit
def student_distance(s, own_square_ptr, i, n_own, other_square_ptr, j, n_other):
    """1 + ‖own_i − other_j‖², [ROWS, COLS]."""
    own = tl.load(own_square_ptr + i, mask=i < n_own, other=0.0)
    other = tl.load(other_square_ptr + j, mask=j < n_other, other=0.0)
    return 1.0 + tl.maximum(own[:, None] + other[None, :] - 2.0 * s, 0.0)
