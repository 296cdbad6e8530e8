"""Instructions of a whole warp in the PTX interpreter, against matrices in NumPy."""

from functools import reduce

import execute_programs as programs
import pytest
import torch
from execute_programs import each, listed

DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "tf32": torch.float32}
SYNC = "bar.sync 0;"
LANE = "shr.u32 %r1, %r0, 2; and.b32 %r2, %r0, 3;"  # g and t of "Matrix Fragments"


def matrix(n, m, kind, seed=0):
    """Whole numbers, so that any order of a sum is exact, in the type."""
    x = torch.randint(-8, 9, (n, m), generator=torch.Generator().manual_seed(seed))
    return x.to(DTYPES[kind])


def words(x):
    """Rows as registers of 32 bits."""
    return x.contiguous().view(torch.int32)


def load_words(register, base, row, column, words_a_row):
    """register ← word (row, column) of the matrix at base: the place in PTX's own arithmetic."""
    return (
        f"mad.lo.s32 %r3, {row}, {words_a_row}, {column}; mad.wide.s32 %rd30, %r3, 4, {base};"
        f"ld.global.b32 {register}, [%rd30];"
    )


def fragment(register, base, place, per_row):
    """One register of a fragment: rows g + r0, words t + c0."""
    row, column = place
    return f"add.s32 %r4, %r1, {row}; add.s32 %r5, %r2, {column};" + load_words(
        register, base, "%r4", "%r5", per_row
    )


def accumulator(i):
    """The place of the accumulators' register i: row g or g + 8, column 2 t or 2 t + 1."""
    return (
        f"add.s32 %r4, %r1, {8 * (i >> 1)}; mad.lo.s32 %r5, %r2, 2, {i & 1};"
        "mad.lo.s32 %r3, %r4, 8, %r5;"
    )


@pytest.mark.parametrize(
    ("kind", "depth"),
    [("bf16", 16), ("f16", 16), ("bf16", 8), ("f16", 8), ("tf32", 8), ("tf32", 4)],
)
def test_mma(kind, depth):
    a, b, c = matrix(16, depth, kind), matrix(depth, 8, kind, 1), matrix(16, 8, "tf32", 2)
    want = a.float() @ b.float() + c
    a_count, b_count = (depth // 2, depth // 4) if kind == "tf32" else (depth // 4, depth // 8)
    per_row = depth if kind == "tf32" else depth // 2
    body = [LANE]
    for r in range(a_count):
        body.append(fragment(f"%r{10 + r}", "%rd0", (8 * (r & 1), 4 * (r >> 1)), per_row))
    for r in range(b_count):  # b is given by columns
        body.append(fragment(f"%r{20 + r}", "%rd1", (0, 4 * r), per_row))
    for r in range(4):
        body.append(
            accumulator(r) + f"mad.wide.s32 %rd30, %r3, 4, %rd2; ld.global.b32 %f{r}, [%rd30];"
        )
    body.append(
        f"mma.sync.aligned.m16n8k{depth}.row.col.f32.{kind}.{kind}.f32 {listed('%f', 4, 4)},"
        f"{listed('%r', 10, a_count)}, {listed('%r', 20, b_count)}, {listed('%f', 0, 4)};"
    )
    for r in range(4):
        body.append(
            accumulator(r) + f"mad.wide.s32 %rd30, %r3, 4, %rd2; st.global.b32 [%rd30], %f{4 + r};"
        )
    programs.clean("\n".join(body), words(a), words(b.T), c)
    assert torch.equal(c, want)


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("transposed", [False, True])
def test_ldmatrix(count, transposed):
    x = torch.arange(8 * count * 8, dtype=torch.int16).view(8 * count, 8)
    out = torch.zeros(count, 32, 2, dtype=torch.int16)
    trans = ".trans" if transposed else ""
    body = (
        # thread i stores row i, 16 bytes; addresses of lanes past 8 count are not used
        f"and.b32 %r1, %r0, {8 * count - 1}; shl.b32 %r2, %r1, 4;"
        "mad.wide.u32 %rd10, %r1, 16, %rd0;"
        "setp.lt.u32 %p1, %r0, " + str(8 * count) + ";"
        "ld.global.v4.b32 {%r4, %r5, %r6, %r7}, [%rd10];"
        "@%p1 st.shared.v4.b32 [%r2], {%r4, %r5, %r6, %r7};"
        + SYNC
        + f"ldmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 {listed('%r', 10, count)}, [%r2];"
        "mad.wide.u32 %rd11, %r0, 4, %rd1;"
        + each(count, "").join(
            f"st.global.b32 [%rd11+{128 * i}], %r{10 + i};" for i in range(count)
        )
    )
    programs.clean(body, x, out, shared=512)
    for j in range(count):
        block = x[8 * j : 8 * j + 8]
        want = (block.T if transposed else block).reshape(32, 2)
        assert torch.equal(out[j], want)


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("transposed", [False, True])
def test_stmatrix(count, transposed):
    x = torch.arange(64 * count, dtype=torch.int16).view(count, 32, 2)
    out = torch.zeros(8 * count, 8, dtype=torch.int16)
    trans = ".trans" if transposed else ""
    loads = "".join(f"ld.global.b32 %r{10 + i}, [%rd11+{128 * i}];" for i in range(count))
    body = (
        "mad.wide.u32 %rd11, %r0, 4, %rd0;"
        + loads
        + f"and.b32 %r1, %r0, {8 * count - 1}; shl.b32 %r2, %r1, 4;"
        f"stmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 [%r2], {listed('%r', 10, count)};"
        + SYNC
        + "ld.shared.v4.b32 {%r4, %r5, %r6, %r7}, [%r2];"
        f"setp.lt.u32 %p1, %r0, {8 * count}; mad.wide.u32 %rd12, %r1, 16, %rd1;"
        "@%p1 st.global.v4.b32 [%rd12], {%r4, %r5, %r6, %r7};"
    )
    programs.clean(body, x, out, shared=512)
    for j in range(count):
        want = x[j].reshape(8, 8)
        assert torch.equal(out[8 * j : 8 * j + 8], want.T if transposed else want)


# ---- wgmma


def layout(x, mode, transposed):
    """A tile [mn, k] in shared memory as bytes, and its leading and stride offsets.

    Blocks of 8 rows of `pitch` bytes; bits 4 to 6 of an address are exclusively or-ed with bits 7
    to 9, as many as the mode has.
    """
    mn, k = x.shape
    item = x.element_size()
    pitch = {0: 16, 1: 128, 2: 64, 3: 32}[mode]
    items = pitch // item
    rows, columns = (k, mn) if transposed else (mn, k)
    y = x.T if transposed else x
    blocks = (columns + items - 1) // items  # across; a block is [rows, items]
    data = torch.zeros(blocks * rows * pitch, dtype=torch.uint8)
    for row in range(rows):
        for column in range(columns):
            at = column // items * rows * pitch + row * pitch + column % items * item
            if mode:
                at ^= (at >> 7 & {1: 7, 2: 3, 3: 1}[mode]) << 4
            data[at : at + item] = y[row, column].reshape(1).view(torch.uint8)
    across, down = rows * pitch, 8 * pitch
    if mode == 0 and transposed:  # there "leading" goes down k and "stride" across
        return data, down, across
    return data, across, down


def descriptor(register, start, leading, stride, mode):
    bits = start >> 4 | leading >> 4 << 16 | stride >> 4 << 32 | mode << 62
    return f"mov.b64 {register}, {bits};"


def wgmma_body(size, mode, kind, n, offsets, transposed, in_registers, scale=1, extra=""):
    """Copies `size` bytes from %rd0 to shared memory, multiplies, stores [64, n] to %rd1."""
    (a, b) = offsets
    depth = 8 if kind == "tf32" else 16
    accumulators = listed("%f", 0, n // 2)
    flags = ""
    if kind != "tf32":
        flags = (
            f", {int(transposed[1])}"
            if in_registers
            else "".join(f", {int(t)}" for t in transposed)
        )
    first = "%rd10" if a else listed("%r", 20, 4)
    body = f"""
shl.b32 %r1, %r0, 2; add.s64 %rd20, %rd0, 0; mov.u32 %r2, %r1;
$copy: setp.lt.u32 %p1, %r2, {size}; @!%p1 bra $copied;
cvt.u64.u32 %rd21, %r2; add.s64 %rd22, %rd20, %rd21; ld.global.b32 %r3, [%rd22];
st.shared.b32 [%r2], %r3; add.s32 %r2, %r2, 512; bra $copy;
$copied: fence.proxy.async.shared::cta; {SYNC}
{descriptor("%rd10", *a) if a else ""}
{descriptor("%rd11", *b)}
"""
    body += "".join(f"mov.f32 %f{i}, 0f40000000;" for i in range(n // 2))
    body += f"mov.b32 %r9, {scale}; setp.ne.b32 %p2, %r9, 0;" + extra
    body += f"""
wgmma.fence.sync.aligned;
wgmma.mma_async.sync.aligned.m64n{n}k{depth}.f32.{kind}.{kind} {accumulators},
{first}, %rd11, %p2, 1, 1{flags};
wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;
shr.u32 %r4, %r0, 5; and.b32 %r5, %r0, 31; shr.u32 %r6, %r5, 2; and.b32 %r7, %r5, 3;
mad.lo.s32 %r6, %r4, 16, %r6; mul.lo.s32 %r6, %r6, {n}; mad.lo.s32 %r6, %r7, 2, %r6;
mad.wide.s32 %rd23, %r6, 4, %rd1;
"""
    for r in range(n // 2):  # row 16 warp + g (+ 8), column 8 (r / 4) + 2 t + (r mod 2)
        at = 4 * (8 * (r >> 1 & 1) * n + r // 4 * 8 + (r & 1))
        body += f"st.global.b32 [%rd23+{at}], %f{r};\n"
    return body


def tiles(kind, n, mode, transposed, in_registers=False):
    depth = 8 if kind == "tf32" else 16
    a, b = matrix(64, depth, kind), matrix(n, depth, kind, 1)
    a_bytes, a_leading, a_stride = layout(a, mode, transposed[0])
    b_bytes, b_leading, b_stride = layout(b, mode, transposed[1])
    start = (len(a_bytes) + 1023) // 1024 * 1024  # a swizzle repeats every 1024 bytes
    data = torch.cat([a_bytes, torch.zeros(start - len(a_bytes), dtype=torch.uint8), b_bytes])
    offsets = (0, a_leading, a_stride, mode), (start, b_leading, b_stride, mode)
    return a, b, data, offsets


@pytest.mark.parametrize("mode", [0, 1, 2, 3], ids=["plain", "128", "64", "32"])
@pytest.mark.parametrize(("kind", "transposed"), [
    ("bf16", (0, 0)), ("bf16", (1, 0)), ("bf16", (0, 1)), ("f16", (1, 1)), ("tf32", (0, 0)),
])  # fmt: skip
def test_wgmma_reads_both_operands_through_descriptors(kind, transposed, mode):
    for n in (8, 64):
        a, b, data, offsets = tiles(kind, n, mode, transposed)
        out = torch.zeros(64, n)
        body = wgmma_body(len(data), mode, kind, n, offsets, transposed, False)
        programs.clean(body, data.view(torch.int32), out, warps=4, shared=len(data))
        assert torch.equal(out, a.float() @ b.float().T + 2)


@pytest.mark.parametrize("kind", ["bf16", "f16", "tf32"])
def test_wgmma_takes_a_from_registers(kind):
    a, b, data, (_, at_b) = tiles(kind, 32, 1, (0, 0))
    per_row = a.shape[1] * a.element_size() // 4
    extra = """shr.u32 %r4, %r0, 5; and.b32 %r5, %r0, 31; shr.u32 %r6, %r5, 2;
and.b32 %r7, %r5, 3; mad.lo.s32 %r6, %r4, 16, %r6;"""
    for r in range(4):
        extra += f"add.s32 %r10, %r6, {8 * (r & 1)}; add.s32 %r11, %r7, {4 * (r >> 1)};"
        extra += load_words(f"%r{20 + r}", "%rd2", "%r10", "%r11", per_row)
    out = torch.zeros(64, 32)
    body = wgmma_body(len(data), 1, kind, 32, (None, at_b), (0, 0), True, extra=extra)
    programs.clean(body, data.view(torch.int32), out, words(a), warps=4, shared=len(data))
    assert torch.equal(out, a.float() @ b.float().T + 2)


def test_wgmma_forgets_its_accumulators_where_scale_d_is_0():
    a, b, data, offsets = tiles("bf16", 16, 1, (0, 0))
    out = torch.zeros(64, 16)
    body = wgmma_body(len(data), 1, "bf16", 16, offsets, (0, 0), False, scale=0)
    programs.clean(body, data.view(torch.int32), out, warps=4, shared=len(data))
    assert torch.equal(out, a.float() @ b.float().T)


# ---- cp.async, shuffles, reductions, packing


def test_cp_async_fills_with_zeros_and_lands_by_groups():
    x, out = torch.arange(64, dtype=torch.int32), torch.full((128,), -1, dtype=torch.int32)
    body = f"""
shl.b32 %r1, %r0, 4; cvt.u64.u32 %rd10, %r1; and.b32 %r2, %r0, 15;
mad.wide.u32 %rd11, %r2, 16, %rd0;
setp.lt.u32 %p1, %r0, 16; selp.b32 %r3, 16, 4, %p1;
cp.async.cg.shared.global [%r1], [%rd11], 16, %r3; cp.async.commit_group;
cp.async.ca.shared.global [%r1+512], [%rd11], 16; cp.async.commit_group;
cp.async.wait_group 1; ld.shared.v4.b32 {listed("%r", 4, 4)}, [%r1];
add.s64 %rd12, %rd1, %rd10; st.global.v4.b32 [%rd12], {listed("%r", 4, 4)};
cp.async.wait_group 0; {SYNC}"""
    programs.clean(body, x, out, shared=1024)
    want = x.view(16, 4).repeat(2, 1)
    want[16:, 1:] = 0
    assert torch.equal(out.view(32, 4), want)


@pytest.mark.parametrize(("mode", "amount", "clamp"), [
    ("bfly", 1, 31), ("bfly", 16, 31), ("bfly", 3, 0x181F), ("idx", 5, 31), ("up", 3, 0),
    ("down", 9, 31),
])  # fmt: skip
def test_shuffle(mode, amount, clamp):
    out, inside = torch.zeros(32, dtype=torch.int32), torch.zeros(32, dtype=torch.int32)
    body = f"""mul.lo.s32 %r1, %r0, 7;
shfl.sync.{mode}.b32 %r2|%p1, %r1, {amount}, {clamp}, 0xffffffff; selp.b32 %r3, 1, 0, %p1;
mad.wide.u32 %rd10, %r0, 4, %rd0; st.global.b32 [%rd10], %r2;
mad.wide.u32 %rd11, %r0, 4, %rd1; st.global.b32 [%rd11], %r3;"""
    programs.clean(body, out, inside)
    lanes = range(32)
    segment = 8 if clamp >> 8 else 32  # of lanes that may read from one another
    move = {"bfly": lambda i: i ^ amount, "idx": lambda i: amount, "up": lambda i: i - amount,
            "down": lambda i: i + amount}[mode]  # fmt: skip
    fits = [0 <= move(i) < 32 and move(i) // segment == i // segment for i in lanes]
    assert inside.tolist() == fits
    assert out.tolist() == [7 * (move(i) if fit else i) for i, fit in zip(lanes, fits, strict=True)]


@pytest.mark.parametrize(
    ("name", "kind"),
    [("min", "s32"), ("max", "s32"), ("max", "u32"), ("add", "u32"), ("xor", "b32")],
)
def test_redux(name, kind):
    x = torch.randint(-(2**31), 2**31, (32,), generator=torch.Generator().manual_seed(0)).int()
    out = torch.zeros(32, dtype=torch.int32)
    body = f"""mad.wide.u32 %rd10, %r0, 4, %rd0; ld.global.b32 %r1, [%rd10];
redux.sync.{name}.{kind} %r2, %r1, 0xffffffff;
mad.wide.u32 %rd11, %r0, 4, %rd1; st.global.b32 [%rd11], %r2;"""
    programs.clean(body, x, out)
    values = [v % 2**32 if kind != "s32" else v for v in x.tolist()]
    fold = {"min": min, "max": max, "add": int.__add__, "xor": int.__xor__}[name]
    want = reduce(fold, values)
    assert {v % 2**32 for v in out.tolist()} == {want % 2**32}


def test_registers_are_packed_and_unpacked():
    x, out = torch.arange(32, dtype=torch.int64) * 0x123456789AB, torch.zeros(32, dtype=torch.int64)
    body = """mad.wide.u32 %rd10, %r0, 8, %rd0; ld.global.b64 %rd12, [%rd10];
mov.b64 {%r1, %r2}, %rd12; mov.b32 {%rs1, %rs2}, %r1; mov.b32 %r3, {%rs2, %rs1};
mov.b64 %rd13, {%r2, %r3};
mad.wide.u32 %rd11, %r0, 8, %rd1; st.global.b64 [%rd11], %rd13;"""
    programs.clean(body, x, out)
    halves = x.view(torch.int16).view(32, 4)[:, [2, 3, 1, 0]].contiguous()
    assert torch.equal(out, halves.view(torch.int64).view(32))


def test_lanes_part_at_a_branch_and_meet_again():
    out = torch.zeros(32, dtype=torch.int32)
    body = """setp.lt.u32 %p1, %r0, 10; mov.b32 %r1, 0; mov.b32 %r2, 0;
@%p1 bra $few;
$loop: add.s32 %r1, %r1, 2; add.s32 %r2, %r2, 1; setp.lt.u32 %p2, %r2, %r0; @%p2 bra $loop;
bra $end;
$few: mov.b32 %r1, 1;
$end: shfl.sync.idx.b32 %r3, %r1, 31, 31, 0xffffffff; add.s32 %r1, %r1, %r3;
mad.wide.u32 %rd10, %r0, 4, %rd0; st.global.b32 [%rd10], %r1;"""
    programs.clean(body, out)
    assert out.tolist() == [62 + (1 if i < 10 else 2 * i) for i in range(32)]


def test_a_grid_numbers_its_programs():
    out = torch.zeros(2, 3, 4, dtype=torch.int32)
    body = """mov.u32 %r1, %ctaid.x; mov.u32 %r2, %ctaid.y; mov.u32 %r3, %ctaid.z;
mov.u32 %r4, %nctaid.x;
mov.u32 %r5, %nctaid.y; mad.lo.s32 %r6, %r3, %r5, %r2; mad.lo.s32 %r6, %r6, %r4, %r1;
setp.eq.b32 %p1, %r0, 0; mad.wide.s32 %rd10, %r6, 4, %rd0; @%p1 st.global.b32 [%rd10], %r6;"""
    programs.clean(body, out, grid=(4, 3, 2))
    assert out.flatten().tolist() == list(range(24))
