"""What a GPU forbids is reported by the PTX interpreter, and what it allows is not."""

import execute_programs as programs
import pytest
import torch
from execute_programs import LIMIT, clean, kinds, listed, program, run

from bench.compiled.execute import machine
from bench.errors import BenchError

SYNC = "bar.sync 0;"
OWN = "shl.b32 %r1, %r0, 2; cvt.u64.u32 %rd9, %r1; add.s64 %rd10, %rd0, %rd9;"  # a thread's word
NEXT = "add.s32 %r2, %r1, 4; and.b32 %r2, %r2, {last};"  # and its neighbour's
OUTSIDE_READ = "global read outside the tensors"
OUTSIDE_WRITE = "global write outside the tensors"
STORED = "stored value that depends on what was never written"
CONDITION = "condition that depends on what was never written"
ADDRESS = "address that depends on what was never written"
RACES = {
    "race: written while others read", "race: written twice", "race: read while another writes",
}  # fmt: skip


def ints(count=32):
    return torch.arange(count, dtype=torch.int32)


def one(body, *tensors, **options):
    """The kinds of what is reported, which must have a line."""
    execution = run(body, *tensors, **options)
    assert all(violation.line > 0 for violation in execution.violations)
    return kinds(execution)


# ---- bounds and alignment


@pytest.mark.parametrize(("offset", "lanes"), [(-4, 1), (0, 0), (4, 1), (128, 32)])
def test_global_bounds_are_the_tensors(offset, lanes):
    backing = torch.zeros(3, 32, dtype=torch.int32)
    x = backing[1].clone() if lanes == 32 else backing[1]  # a view has no more than its own rows
    wrong = {OUTSIDE_READ} if lanes else set()
    assert one(f"{OWN} ld.global.b32 %r2, [%rd10+{offset}];", x) == wrong
    before = backing.clone()
    wrong = {OUTSIDE_WRITE} if lanes else set()
    assert one(f"{OWN} st.global.b32 [%rd10+{offset}], %r0;", x) == wrong
    if lanes:
        assert torch.equal(backing[0], before[0])
        assert torch.equal(backing[2], before[2])


def test_the_gaps_between_rows_are_outside():
    x = torch.zeros(32, 4, dtype=torch.int32)[:, :2]
    address = "mad.wide.u32 %rd10, %r0, 16, %rd0;"
    clean(f"{address} ld.global.v2.b32 {{%r1, %r2}}, [%rd10];", x)
    assert one(f"{address} ld.global.b32 %r1, [%rd10+8];", x) == {OUTSIDE_READ}
    assert one(f"{address} ld.global.b32 %r1, [%rd10+8];", x, x) == {OUTSIDE_READ}  # given twice


def test_views_of_one_storage_have_it_together():
    both = torch.zeros(64, dtype=torch.int32)
    clean(f"{OWN} ld.global.b32 %r2, [%rd10+128];", both[:32], both[4:8])


def test_a_mask_keeps_lanes_from_memory():
    body = OWN + "setp.lt.u32 %p1, %r0, 20; @{}%p1 ld.global.b32 %r2, [%rd10];"
    clean(body.format(""), ints(20))
    assert one(body.format("!"), ints(20)) == {OUTSIDE_READ}


def test_misaligned_addresses():
    wrong = {"misaligned address"}
    assert one("ld.global.b32 %r1, [%rd0+2];", ints()) == wrong
    assert one("ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%rd0+8];", ints()) == wrong
    assert one("mov.b32 %r1, 6; ld.shared.b32 %r2, [%r1];", shared=64) == wrong
    assert (
        one("mov.b32 %r1, 8; cp.async.cg.shared.global [%r1], [%rd0], 16;", ints(), shared=64)
        == wrong
    )


def test_shared_bounds():
    wrong = "shared memory: outside of what the program has"
    store = OWN + "st.shared.b32 [%r1+{}], %r0;"
    clean(store.format(0), ints(), shared=128)
    assert one(store.format(4), ints(), shared=128) == {wrong}
    assert one(store.format(-4), ints(), shared=128) == {wrong}
    assert wrong in one(
        OWN + "ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r2}, [%r1];", ints(), shared=0
    )


def test_more_shared_memory_than_there_is():
    execution = run("", shared=LIMIT + 16)
    assert kinds(execution) == {machine.SHARED_LIMIT}
    assert execution.violations[0].detail == LIMIT + 16
    clean("", shared=LIMIT)


# ---- races


def exchange(before, between, warps=1, after=""):
    """Threads write a word of their own and read their neighbour's."""
    last = 128 * warps - 1
    return f"""{OWN} {NEXT.replace("{last}", str(last))} {before}
{between} ld.shared.b32 %r3, [%r2]; {after} st.global.b32 [%rd10], %r3;"""


@pytest.mark.parametrize("warps", [1, 4])  # without a barrier a warp's lanes are in no order either
def test_shared_memory_read_without_a_barrier(warps):
    x = ints(32 * warps)
    body = exchange("st.shared.b32 [%r1], %r0;", SYNC, warps)
    clean(body, x, warps=warps, shared=128 * warps)
    assert x.tolist() == torch.arange(32 * warps).roll(-1).tolist()
    found = one(body.replace(SYNC, ""), x, warps=warps, shared=128 * warps)
    assert found & RACES


def test_lanes_of_a_warp_may_meet_without_the_others():
    meet = "bar.warp.sync 0xffffffff;"
    clean(exchange("st.shared.b32 [%r1], %r0;", meet), ints(), shared=128)
    found = one(exchange("st.shared.b32 [%r1], %r0;", meet, 4), ints(128), warps=4, shared=512)
    assert found & RACES


@pytest.mark.parametrize("warps", [1, 2])
def test_shared_memory_written_while_others_read_or_write(warps):
    sizes = {"warps": warps, "shared": 128 * warps}
    again = exchange("st.shared.b32 [%r1], %r0;", SYNC, warps, "{} st.shared.b32 [%r1], %r3;")
    clean(again.replace("{}", SYNC), ints(32 * warps), **sizes)
    found = one(again.replace("{}", ""), ints(32 * warps), **sizes)
    assert "race: written while others read" in found
    assert found <= RACES
    both = OWN + "mov.b32 %r2, 0; st.shared.b32 [%r2], {};"
    assert one(both.format("%r0"), ints(32 * warps), **sizes) == {"race: written twice"}
    clean(both.format("7"), ints(32 * warps), **sizes)  # all write the same: any order will do


@pytest.mark.parametrize("warps", [1, 2])
def test_global_memory_between_threads_wants_a_barrier(warps):
    last = 128 * warps - 1
    body = f"""{OWN} {NEXT.replace("{last}", str(last))} st.global.b32 [%rd10], %r0; {{}}
cvt.u64.u32 %rd11, %r2; add.s64 %rd12, %rd0, %rd11; ld.global.b32 %r3, [%rd12];"""
    clean(body.replace("{}", SYNC), ints(32 * warps), warps=warps)
    assert one(body.replace("{}", ""), ints(32 * warps), warps=warps) & RACES


def test_programs_do_not_wait_for_one_another():
    wrong = {"race between programs"}
    write = OWN + "mov.u32 %r2, %ctaid.x; st.global.b32 [%rd10], {};"
    assert one(write.format("%r2"), ints(), grid=(2, 1, 1)) == wrong
    clean(write.format("%r0"), ints(), grid=(2, 1, 1))  # the same in both
    assert one(OWN + "ld.global.b32 %r2, [%rd10]; add.s32 %r2, %r2, 1; st.global.b32 [%rd10], %r2;",
               ints(), grid=(2, 1, 1)) == wrong  # fmt: skip


@pytest.mark.parametrize(
    ("body", "reported"),
    [
        ("fma.rn.f32 %f4, %f1, %f1, %f3;", True),
        ("add.f32 %f4, %f2, %f3;", True),  # ptxas may contract it
        ("add.f32 %f4, %f3, %f2;", True),
        ("fma.rn.f32 %f4, %f1, %f5, %f3;", False),  # another product than the partner's
        ("mov.b32 %f2, 0f00000000; add.f32 %f4, %f2, %f3;", False),
    ],
)
def test_a_sum_that_every_lane_rounds_alike(body, reported):
    begin = f"{OWN} cvt.rn.f32.u32 %f1, %r0; mov.f32 %f5, %f1;"
    end = "add.s64 %rd11, %rd10, 0; st.global.b32 [%rd11], %f4;"
    x = torch.zeros(32)
    square = "mul.f32 %f2, %f1, %f1;"
    partner = "shfl.sync.bfly.b32 %f3, %f2, 1, 31, -1;"
    wanted = {machine.UNEVEN} if reported else set()
    assert one(f"{begin} {square} {partner} {body} {end}", x) == wanted
    rounded = "fma.rn.f32 %f2, %f1, %f1, 0f00000000;"  # no product, but a rounded sum
    clean(f"{begin} {rounded} {partner} add.f32 %f4, %f2, %f3; {end}", x)


# ---- copies under way


def test_cp_async_must_be_waited_for():
    wrong = "shared memory that an unfinished cp.async writes"
    body = """shl.b32 %r1, %r0, 2; mad.wide.u32 %rd10, %r0, 4, %rd0;
cp.async.ca.shared.global [%r1], [%rd10], 4; cp.async.commit_group; cp.async.wait_group {};
ld.shared.b32 %r2, [%r1]; st.global.b32 [%rd10], %r2;"""
    clean(body.replace("{}", "0"), ints(), shared=128)
    assert wrong in one(body.replace("{}", "1"), ints(), shared=128)
    early = "cp.async.wait_group {};\nld.shared.b32 %r2, [%r1];"
    written = body.replace(
        early, "st.shared.b32 [%r1], %r0; cp.async.wait_all; ld.shared.b32 %r2, [%r1];"
    )
    assert one(written, ints(), shared=128) == {wrong}


def test_a_copy_that_landed_is_its_own_threads_until_a_barrier():
    copied = """mad.wide.u32 %rd11, %r0, 4, %rd0; cp.async.ca.shared.global [%r1], [%rd11], 4;
cp.async.wait_all;"""
    clean(exchange(copied, SYNC), ints(), shared=128)
    assert "race: read while another writes" in one(exchange(copied, ""), ints(), shared=128)


def test_a_copy_of_fewer_bytes_reads_no_more():
    body = f"{OWN} mov.b32 %r2, {{}}; cp.async.ca.shared.global [%r1], [%rd10+128], 4, %r2;"
    clean(body.replace("{}", "0"), ints(), shared=128)
    assert one(body.replace("{}", "4"), ints(), shared=128) == {OUTSIDE_READ}


# ---- wgmma

MULTIPLY = """wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%f0, %f1, %f2, %f3},
%rd10, %rd11, 1, 1, 1, 0, 0;
wgmma.commit_group.sync.aligned;"""
FENCE, WAIT = "fence.proxy.async.shared::cta;", "wgmma.wait_group.sync.aligned 0;"
UNSEEN = "shared memory stored, and read by wgmma, with no fence.proxy.async between"


def product(before=f"{FENCE} {SYNC}", fence="wgmma.fence.sync.aligned;", between="", after=""):
    """Threads of four warps fill two tiles: 64 × 16 and 8 × 16 of bfloat16 without swizzling."""
    scale = 256 >> 4 << 32 | 128 >> 4 << 16
    return f"""shl.b32 %r1, %r0, 4; mov.b32 %r2, 0; mad.wide.u32 %rd12, %r0, 4, %rd0;
st.shared.v4.b32 [%r1], {listed("%r", 1, 1)[:-1]}, %r2, %r2, %r2}};
setp.lt.u32 %p1, %r0, 16; @%p1 st.shared.v4.b32 [%r1+2048], {{%r2, %r2, %r2, %r2}};
{before}
mov.b64 %rd10, {scale}; mov.b64 %rd11, {scale | 2048 >> 4};
mov.f32 %f0, 0f00000000; mov.f32 %f1, %f0; mov.f32 %f2, %f0; mov.f32 %f3, %f0;
{fence} {MULTIPLY} {between} {WAIT} {after} st.global.b32 [%rd12], %f0;"""


def checked(body, **options):
    return one(body, ints(128), warps=4, shared=2304, **options)


def test_wgmma_sees_stores_behind_a_proxy_fence_only():
    assert checked(product()) == set()
    assert checked(product(f"{SYNC} {FENCE}")) == set()  # the reader's own fence, after the barrier
    assert checked(product(SYNC)) == {UNSEEN}
    assert checked(product(f"{FENCE} {SYNC} st.shared.b32 [%r1], %r2; {SYNC}")) == {UNSEEN}
    one_warp = f"setp.lt.u32 %p2, %r0, 32; @%p2 {FENCE} {SYNC}"
    assert checked(product(one_warp)) == {UNSEEN}  # of what the other warps stored
    assert checked(product(f"{SYNC} {one_warp}")) == set()  # that warp had seen it all
    assert "race: read while another writes" in checked(product(FENCE))


def test_wgmma_sees_what_cp_async_filled_behind_a_proxy_fence_only():
    copy = (
        f"cp.async.cg.shared.global [%r1], [%rd0], 16; cp.async.commit_group; "
        f"cp.async.wait_group 0; {SYNC}"
    )
    assert checked(product(f"{FENCE} {SYNC} {copy}")) == {machine.COPY_UNSEEN}
    assert checked(product(f"{FENCE} {SYNC} {copy} {FENCE}")) == set()


def test_wgmma_must_be_waited_for():
    wrong = {"register of a wgmma under way"}
    assert checked(product(between="add.f32 %f4, %f0, %f0;")) == wrong
    assert checked(product(between="mov.f32 %f0, 0f00000000;")) == wrong
    assert checked(product(between="add.f32 %f4, %f5, %f5;")) == set()
    late = product().replace(WAIT, "wgmma.wait_group.sync.aligned 1;")
    assert checked(late) == wrong


def test_wgmma_reads_shared_memory_until_its_wait():
    wrong = "shared memory overwritten while wgmma reads it"
    store = "st.shared.b32 [%r1], %r2;"
    assert wrong in checked(product(between=store))
    assert wrong in checked(product(between=f"{SYNC} {store}"))
    assert checked(product(after=f"{SYNC} {store}")) == set()
    # The wait is each warp's own: others may read on.
    assert checked(product(after="@%p1 st.shared.b32 [%r1+2048], %r2;")) & RACES


def test_wgmma_wants_its_fence_after_others_use_its_registers():
    wrong = {"register used after the last wgmma.fence before wgmma"}
    assert checked(product(fence="")) == wrong
    assert checked(product(fence="wgmma.fence.sync.aligned; add.f32 %f1, %f1, %f1;")) == wrong
    copy = "mov.f32 %f1, 0f3f800000;"  # which ptxas renames away, or adds a fence to
    assert checked(product(fence=f"wgmma.fence.sync.aligned; {copy}")) == set()
    assert checked(product(between=copy)) == {"register of a wgmma under way"}
    # A copy of what was used: is that the accumulator itself, once it is renamed?
    used = "mov.f32 %f9, %f1; add.f32 %f9, %f9, %f9; mov.f32 %f1, %f9;"
    assert checked(product(after=f"{used} {MULTIPLY} {WAIT}")) == wrong
    assert checked(product(after=f"{used} wgmma.fence.sync.aligned; {MULTIPLY} {WAIT}")) == set()
    made = "wgmma.fence.sync.aligned; add.f32 %f9, %f8, %f8; mov.f32 %f7, %f9; mov.f32 %f1, %f7;"
    assert (
        checked(
            product(fence=made).replace("mov.f32 %f0", "mov.f32 %f8, 0f00000000; mov.f32 %f0", 1)
        )
        == wrong
    )
    assert checked(product(fence="wgmma.fence.sync.aligned; add.f32 %f9, %f1, %f1;")) == wrong
    assert checked(product(between=MULTIPLY)) == set()  # into the same accumulators again


# ---- what was never written


@pytest.mark.parametrize(("body", "kind"), [
    ("st.global.b32 [%rd10], %r9;", STORED),
    ("add.s32 %r8, %r9, %r0; st.global.b32 [%rd10], %r8;", STORED),
    ("setp.lt.s32 %p1, %r9, 3; @%p1 bra $end; $end:", CONDITION),
    ("cvt.u64.u32 %rd11, %r9; add.s64 %rd11, %rd11, %rd10; ld.global.b32 %r8, [%rd11];",
     ADDRESS),
    ("ld.shared.b32 %r8, [%r1]; st.global.b32 [%rd10], %r8;", STORED),
    ("setp.lt.u32 %p1, %r0, 31; @%p1 mov.b32 %r8, 0; st.global.b32 [%rd10], %r8;",
     STORED),
    ("setp.lt.u32 %p1, %r0, 31; @%p1 st.shared.b32 [%r1], %r0; bar.sync 0;"
     "shfl.sync.bfly.b32 %r8, %r9, 1, 31, -1;"
     "ld.shared.b32 %r7, [%r1]; st.global.b32 [%rd10], %r7;", STORED),
])  # fmt: skip
def test_what_was_never_written_reaches_nothing(body, kind):
    assert kind in one(OWN + body, ints(), shared=128)


def test_what_was_never_written_may_be_thrown_away():
    clean(f"""{OWN} ld.shared.b32 %r8, [%r1]; add.s32 %r8, %r8, %r9; setp.lt.u32 %p1, %r0, 99;
selp.b32 %r8, %r0, %r8, %p1; st.global.b32 [%rd10], %r8;
setp.lt.s32 %p2, %r9, 1; setp.gt.u32 %p3, %r0, 99; and.pred %p4, %p2, %p3; @%p4 bra $end; $end:""",
          ints(), shared=128)  # fmt: skip


def test_a_new_program_finds_nothing_of_the_one_before():
    body = f"""{OWN} mov.u32 %r2, %ctaid.x; setp.eq.b32 %p1, %r2, 0; @%p1 st.shared.b32 [%r1], %r0;
{SYNC} ld.shared.b32 %r3, [%r1]; st.global.b32 [%rd10], %r3;"""
    clean(body, ints(), shared=128)
    found = one(body, ints(), shared=128, grid=(2, 1, 1))
    assert STORED in found


# ---- lanes, barriers, ends


def test_shuffles_want_their_lanes():
    part = "setp.lt.u32 %p1, %r0, 16; @%p1 shfl.sync.{} %r2, %r0, {}, 31, {};"
    wrong = {"lane that is absent"}
    clean(part.format("bfly.b32", 8, "0xffff"))
    assert one(part.format("bfly.b32", 8, "0xffffffff")) == wrong
    assert one(part.format("bfly.b32", 16, "0xffff")) == wrong
    assert one(part.format("idx.b32", 20, "0xffff")) == wrong
    assert one("setp.lt.u32 %p1, %r0, 16; @%p1 redux.sync.add.u32 %r2, %r0, 0xffffffff;") == wrong


def test_barriers_are_everyones():
    wrong = {"barrier that not all threads reach alike"}
    assert one("setp.lt.u32 %p1, %r0, 16; @%p1 bra $end; bar.sync 0; $end:") == wrong
    assert one("setp.lt.u32 %p1, %r0, 32; @%p1 bra $end; bar.sync 0; $end:", warps=2) == wrong
    two = "setp.lt.u32 %p1, %r0, 32; @%p1 bra $few; bar.sync 0; bra $end; $few: bar.sync 0; $end:"
    assert one(two, warps=2) == wrong
    clean(two, warps=1)


def test_matrix_instructions_are_the_whole_warps():
    body = """setp.lt.u32 %p1, %r0, 16; mov.b32 %r1, 0;
@%p1 ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r2}, [%r1];"""
    assert "not executed by all lanes of the warp" in one(body, shared=128)


def test_a_program_ends():
    assert one("$loop: bra $loop;", most=1000) == {"no end"}
    assert one("trap;") == {"trap"}


# ---- what cannot be executed


def test_an_operation_that_is_not_there_is_named():
    with pytest.raises(
        BenchError, match=r"k, line \d+ of the PTX: the interpreter has no tcgen05\.alloc"
    ):
        run("tcgen05.alloc %r1;")
    with pytest.raises(BenchError, match=r"has no add\.f32 .*3 operands, not 2"):
        run("add.f32 %f1, %f2;")
    with pytest.raises(BenchError, match="no entry other"):
        machine.execute(program("", 0), "other", (1, 1, 1), 1, 0, [], LIMIT)
    with pytest.raises(BenchError, match=r"1 parameters, and 2 arguments"):
        machine.execute(program("", 1), "k", (1, 1, 1), 1, 0, [("*", ints())] * 2, LIMIT)


def test_a_missing_compiler_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("RKDO_EXECUTE_CACHE", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    with pytest.raises(BenchError, match="needs a C compiler, and there is no gcc and no cc"):
        machine.build()
    monkeypatch.setenv("CC", "nobodys-compiler")
    with pytest.raises(BenchError, match="there is no nobodys-compiler"):
        machine.build()


def test_programs_of_the_helper_are_what_they_say():
    assert programs.listed("%r", 2, 3) == "{%r2, %r3, %r4}"
