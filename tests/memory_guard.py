"""Every kernel, interpreted, on tensors that end or begin at a forbidden page; see test_bounds.

python memory_guard.py all|read|write|far [end|start]
"""

import ctypes
import math
import mmap
import sys

import torch

from rkdo_kernels import field, kernels, launch, quadrature, recursion
from rkdo_kernels.needs import BOTH

PAGE = mmap.PAGESIZE
LIBC = ctypes.CDLL(None, use_errno=True)
LIBC.mmap.restype = ctypes.c_void_p
LIBC.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
LIBC.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
READ_WRITE, PRIVATE_ANONYMOUS, NO_RESERVE = 3, 0x22, 0x4000
CALLS = {  # by the side that is guarded: past the end masks fail, before the start offsets do
    "end": [
        ((1, 1, 1), torch.bfloat16), ((3, 5, 31), torch.float32), ((64, 64, 16), torch.bfloat16),
        ((33, 65, 70), torch.float32),
    ],
    "start": [((33, 65, 70), torch.bfloat16)],
}  # fmt: skip
EMPTY = torch.empty


def memory(size):
    address = LIBC.mmap(None, size, READ_WRITE, PRIVATE_ANONYMOUS | NO_RESERVE, -1, 0)
    assert address not in (None, ctypes.c_void_p(-1).value)
    return address


def as_tensor(address, size, dtype):
    return torch.frombuffer((ctypes.c_char * size).from_address(address), dtype=dtype)


class Guarded:
    """torch.empty of tensors between two forbidden pages, flush with the one at `side`."""

    def __init__(self, side):
        self.side, self.kept = side, []

    def empty(self, *shape, dtype=torch.float32, **_):
        shape = shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape
        size = math.prod(shape) * dtype.itemsize
        if size == 0:
            return EMPTY(shape, dtype=dtype)
        pages = -(-size // PAGE) * PAGE
        first = memory(pages + 2 * PAGE)
        for forbidden in (first, first + PAGE + pages):
            assert LIBC.mprotect(forbidden, PAGE, 0) == 0
        start = first + PAGE + (pages - size if self.side == "end" else 0)
        x = as_tensor(start, size, dtype).view(shape)
        return x.fill_(torch.nan if dtype.is_floating_point else -1)

    def copy(self, x):
        return self.empty(*x.shape, dtype=x.dtype).copy_(x)

    def call(self, function, *arguments):
        """With guarded arguments, and guarded results and temporaries inside."""
        arguments = [self.copy(a) if isinstance(a, torch.Tensor) else a for a in arguments]

        def new_empty(x, *shape, dtype=None, **_):
            return self.empty(*shape, dtype=dtype or x.dtype)

        def contiguous(x):
            return x if x.is_contiguous() else self.copy(x)

        was = torch.Tensor.new_empty, torch.Tensor.contiguous
        tables = recursion.row_tables
        torch.Tensor.new_empty, torch.Tensor.contiguous = new_empty, contiguous
        recursion.row_tables = lambda *arguments: tuple(map(self.copy, tables(*arguments)))
        try:
            return function(*arguments)
        finally:
            torch.Tensor.new_empty, torch.Tensor.contiguous = was
            recursion.row_tables = tables


def calls(n, m, d, dtype):
    """Every launcher with arguments for queries [n, d] and keys [m, d]."""
    generator = torch.Generator().manual_seed(0)

    def rows(*shape):
        return torch.rand(*shape, generator=generator)

    x = rows(n, d).div(d).to(dtype), rows(m, d).div(d).to(dtype)
    scales, level = torch.tensor([2.0, 2.5, 3.0]), rows(n).bfloat16()
    for exclude in ([], [0], [m - n, 0]):
        scale = scales[0].clone()
        yield "moments", (*x, scale, 1.5, 2, exclude)
        gradient = (*x, scale, 1.5, rows(n, 3), exclude, rows(n) if exclude else None)
        yield "moments_backward", gradient
        yield "moments_backward in parts", gradient
        if dtype == torch.bfloat16:
            yield "moments_backward in stripes", gradient
        if dtype != torch.float32:
            gradient = (*gradient, BOTH, level)
            yield "moments_backward", gradient
            yield "moments_backward in parts", gradient
            if dtype == torch.bfloat16:
                yield "moments_backward in stripes", gradient
        if exclude:
            settings = (scales.tolist(), 0.5, 1.5, 2, exclude)
            table = quadrature.table(2, tuple(scales.tolist()), 0.5, 1.5, x[0].device)
            yield "recursion_moments in one", (*x, *settings, False, BOTH, table)
            yield "recursion_moments in one", (*x, *settings, True, BOTH, table)
        yield "both_sums", (*x, 2.0, exclude)
        yield "both_sums in parts", (*x, 2.0, exclude)
        sums = (*x, 2.0, rows(n), rows(m), exclude, rows(n) if exclude else None)
        yield "both_sums_backward", sums
        yield "both_sums_backward in parts", sums
        if dtype != torch.float32:
            sums = (*sums, BOTH, rows(n), rows(m))
            yield "both_sums_backward", sums
            yield "both_sums_backward in parts", sums
        for parts in ("", " in parts"):
            call = (*x, scales, False, exclude)
            yield f"softmax_sums{parts}", call
            back = (*call, rows(n), rows(n, 3), rows(n))
            yield f"softmax_sums_backward{parts}", back
            if dtype != torch.float32:
                yield f"softmax_sums_backward{parts}", (*back, BOTH, level)
    yield "self_sums", (x[0], 2.0)
    yield "self_sums_backward", (x[0], 2.0, rows(n))
    yield "softmax_sums", (*x, scales, True, [])
    yield "softmax_sums_backward", (*x, scales, True, [], -rows(n), rows(n, 3), rows(n))
    for detach in (False, True):
        call = (*x, scales, 0.5, m - n, detach, 1 + rows(n), 3 + rows(n, 3))
        for parts in ("", " in parts"):
            yield f"recursion{parts}", call
            back = (*call, rows(n, 2), rows(n), rows(n))
            yield f"recursion_backward{parts}", back
            if dtype != torch.float32:
                yield f"recursion_backward{parts}", (*back, BOTH, level)
    yield from field_calls(x, generator)


def field_calls(x, generator):
    """A block at the field's end, and gathered; see field_tiles.py for the arguments."""
    (n, m), scale = (len(x[0]), len(x[1])), torch.tensor(2.0)

    def rows(*shape):
        return torch.rand(*shape, generator=generator)

    for stored in (torch.float32, torch.bfloat16):
        for start, index in ((2, (None, None, None)), (0, [torch.arange(n), torch.arange(m)])):
            state = (rows(n + 2, m + 2) / m).to(stored), rows(n + 2), torch.ones(n + 2).double()
            index = (*index, index[0])[:3]
            given = (*index, start, scale, torch.tensor(0.3), torch.tensor([1, 2]), BOTH)
            for parts in ("", " in parts"):
                yield f"dense_pass{parts}", (*x, *state, *given)
                call = (*x, *state[:2], *index, start, scale, rows(n))
                yield f"dense_gradient{parts}", call
        past = (rows(2, n, x[0].shape[1]).to(stored), rows(2, m, x[0].shape[1]).to(stored))
        tables = rows(n, 2), 1 + rows(n, 2), 2 - torch.arange(m) % 2
        columns = (rows(n, 1), torch.arange(n)[:, None], None, None)
        labels = (rows(n, 1), None, torch.arange(n), torch.arange(m))
        for prior in (columns, labels):
            for parts in ("", " in parts"):
                call = (*x, *past, *tables, *prior, scale)
                yield f"snapshot_pass{parts}", (*call, BOTH)
                yield f"snapshot_gradient{parts}", (*call, rows(n))


def step(*arguments):
    """The pass's results, and the field after it."""
    return (*field.dense_pass(*arguments), *arguments[2:5])


def copied(arguments):
    return [a.clone() if isinstance(a, torch.Tensor) else a for a in arguments]


def launcher(name):
    name, _, parts = name.partition(" in ")
    function = step if name == "dense_pass" else getattr(kernels, name, None)
    function = function or getattr(field, name)
    if parts == "stripes":
        return in_stripes(function)
    return in_parts(function) if parts == "parts" else function


def in_parts(function):
    """The launcher, its walks in up to three parts."""

    def call(*arguments):
        was, launch.splits = launch.splits, lambda *_: 3
        try:
            return function(*arguments)
        finally:
            launch.splits = was

    return call


def in_stripes(function):
    """The launcher, by stripes of up to 20 rows or columns of ∂L/∂S, whatever the width."""

    def call(*arguments):
        was = launch.STRIPE_DIM, launch.stripe
        launch.STRIPE_DIM, launch.stripe = 1, lambda count, _: min(count, 20)
        try:
            return function(*arguments)
        finally:
            launch.STRIPE_DIM, launch.stripe = was

    return call


def results(found):
    return found if isinstance(found, tuple) else (found,)


def run_all(side):
    guarded = Guarded(side)
    for shape, dtype in CALLS[side]:
        for name, arguments in calls(*shape, dtype):
            print(name, shape, str(dtype).removeprefix("torch."), flush=True)
            function = launcher(name)
            wanted = results(function(*copied(arguments)))
            found = results(guarded.call(function, *arguments))
            for a, b in zip(found, wanted, strict=True):
                assert a.shape == b.shape
                assert b.isfinite().all()
                assert torch.equal(a, b)


def run_far():
    """Rows so far apart that offsets pass 32 bits; pages that nobody uses cost nothing."""
    for far_operand, dtype in ((0, torch.float32), (1, torch.bfloat16)):
        n, d, stride = 5, 20, (1 << 29) + 16
        size = ((n - 1) * stride + d) * dtype.itemsize
        for name, arguments in calls(n, n, d, dtype):
            print(name, dtype, flush=True)
            function = launcher(name)
            wanted = results(function(*copied(arguments)))
            operand = far_operand if isinstance(arguments[1], torch.Tensor) else 0
            address = memory(size)
            far = as_tensor(address, size, dtype).as_strided((n, d), (stride, 1))
            far.copy_(arguments[operand])
            moved = copied(arguments)
            moved[operand] = far
            found = results(function(*moved))
            for a, b in zip(found, wanted, strict=True):
                assert torch.equal(a, b)
            LIBC.munmap(ctypes.c_void_p(address), ctypes.c_size_t(size))


def main(what, side="end"):
    if what == "all":
        run_all(side)
    elif what == "far":
        run_far()
    else:
        x = Guarded(side).empty(10)
        beyond = x.data_ptr() + (x.numel() * 4 if side == "end" else -4)
        if what == "read":
            ctypes.c_float.from_address(beyond).value  # noqa: B018
        else:
            ctypes.c_float.from_address(beyond).value = 1.0


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
