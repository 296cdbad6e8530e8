"""Faults seeded in small programs, of every kind, are noticed; what changes nothing survives."""

import pytest
import torch
from execute_programs import LIMIT, listed, program

from bench.compiled.execute import faults
from bench.compiled.execute.faults import FAULTS, Launch, examine, table

OWN = "shl.b32 %r1, %r0, 2; cvt.u64.u32 %rd9, %r1; add.s64 %rd10, %rd0, %rd9;"
FENCES = "fence.proxy.async.shared::cta;\n\tbar.sync 0;"
SCALE = 256 >> 4 << 32 | 128 >> 4 << 16  # of tiles of 16-byte rows: strides of 8 of them, of 16
PRODUCT = f"""{OWN} shl.b32 %r2, %r0, 4; mov.b32 %r3, 0x3f803f80; mov.b32 %r4, 0;
st.shared.v4.b32 [ %r2 + 0 ], {{%r3, %r4, %r3, %r4}};
setp.lt.u32 %p1, %r0, 16; @%p1 st.shared.v4.b32 [ %r2 + 2048 ], {{%r3, %r3, %r4, %r4}};
{FENCES}
mov.b64 %rd11, {SCALE}; mov.b64 %rd12, {SCALE | 2048 >> 4};
mov.f32 %f0, 0f00000000; mov.f32 %f1, %f0; mov.f32 %f2, %f0; mov.f32 %f3, %f0;
wgmma.fence.sync.aligned;
wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {listed("%f", 0, 4)},
%rd11, %rd12, 1, 1, 1, 0, 0;
wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;
st.global.b32 [%rd10], %f0;"""
COPIED = f"""{OWN} mov.b32 %r3, 4; setp.lt.u32 %p1, %r0, 20; selp.b32 %r3, 4, 0, %p1;
cp.async.ca.shared.global [ %r1 + 0 ], [ %rd10 + 0 ], 0x4, %r3;
cp.async.commit_group; cp.async.wait_group 0;
ld.shared.b32 %r4, [%r1]; mad.wide.u32 %rd11, %r0, 4, %rd1; st.global.b32 [%rd11], %r4;"""
MASKED = f"""{OWN} setp.lt.u32 %p1, %r0, 20; mov.b32 %r4, 0;
@%p1 ld.global.b32 %r4, [%rd10]; add.s32 %r4, %r4, 1;
@%p1 st.global.b32 [%rd10], %r4;"""
ROTATED = f"""{OWN} add.s32 %r2, %r1, 4; and.b32 %r2, %r2, 127;
st.shared.b32 [ %r1 + 0 ], %r0;
\tbar.sync 0;
ld.shared.b32 %r3, [%r2]; shfl.sync.bfly.b32 %r4, %r3, 1, 31, -1; st.global.b32 [%rd10], %r4;"""
MATRIX = f"""{OWN} and.b32 %r2, %r0, 7; shl.b32 %r2, %r2, 4; st.shared.b32 [%r1], %r0;
bar.sync 0; ldmatrix.sync.aligned.m8n8.x4.shared.b16 {listed("%r", 10, 4)}, [%r2];
st.global.b32 [%rd10], %r10;"""


def prepared(body, *tensors, warps=1, shared=0):
    arguments = [("*", x) for x in tensors]
    text = program(body, len(tensors), 32 * warps)
    return Launch(text, "k", (1, 1, 1), warps, shared, arguments, LIMIT)


def ints(count):
    return torch.arange(count, dtype=torch.int32)


PROGRAMS = {
    "product": lambda: prepared(PRODUCT, torch.zeros(128), warps=4, shared=2304),
    "copied": lambda: prepared(COPIED, ints(20), ints(32), shared=128),
    "masked": lambda: prepared(MASKED, ints(20)),
    "rotated": lambda: prepared(ROTATED, ints(32), shared=128),
    "matrix": lambda: prepared(MATRIX, ints(32), shared=128),
}
SEEDED = {
    "product": {
        "barrier removed", "wgmma waits for a group less", "wgmma.fence removed",
        "fence.proxy.async removed", "shared store 16 bytes on",
    },
    "copied": {"cp.async's mask removed", "cp.async waits for a group less"},
    "masked": {"load's mask removed", "store's mask removed"},
    "rotated": {
        "barrier removed", "shared store 16 bytes on", "shuffle from twice the distance",
    },
    "matrix": {"barrier removed", "ldmatrix transposed"},
}  # fmt: skip


@pytest.mark.parametrize("name", PROGRAMS)
def test_every_fault_is_noticed(name):
    rows = examine([PROGRAMS[name]()], most=4)
    assert {kind for kind, row in rows.items() if row.seeded} == SEEDED[name]
    survivors = {kind: row.survived for kind, row in rows.items() if row.survived}
    assert not survivors
    assert all(row.reported + row.other_result == row.seeded for row in rows.values())


def test_every_kind_is_seeded_somewhere():
    assert set().union(*SEEDED.values()) == set(FAULTS)
    assert set(faults.EQUIVALENT) <= set(FAULTS)


def test_a_fault_that_changes_nothing_survives_and_is_told():
    twice = ROTATED.replace("\tbar.sync 0;", "\tbar.sync 0;\n\tbar.sync 0;")
    rows = examine([prepared(twice, ints(32), shared=128)], most=4)
    row = rows["barrier removed"]
    assert (row.seeded, len(row.survived)) == (2, 2)
    assert "survived: barrier removed: k, line" in table(rows)
    assert faults.EQUIVALENT["barrier removed"] in table(rows)


def test_faults_are_seeded_only_where_they_could_be_noticed():
    """Not in code that was not reached, nor at a mask that left no lane out."""
    all_lanes = MASKED.replace("%r0, 20", "%r0, 99")
    never = f"{all_lanes} bra $end; @%p1 ld.global.b32 %r4, [%rd10];\n\tbar.sync 0;\n$end:"
    rows = examine([prepared(never, ints(32))], most=4)
    assert sum(row.seeded for row in rows.values()) == 0


def test_rows_of_nan_show_what_a_mask_kept_out():
    """Row i's columns past the second are masked: they are the next row's, times zero."""
    body = """mad.wide.u32 %rd10, %r0, 8, %rd0; mad.wide.u32 %rd12, %r0, 4, %rd1;
mov.f32 %f3, 0f00000000; setp.gt.u32 %p1, %r0, 99; ld.global.b32 %f1, [%rd10];
@%p1 ld.global.b32 %f3, [%rd10+8]; fma.rn.f32 %f1, %f3, 0f00000000, %f1;
st.global.b32 [%rd12], %f1;"""
    x = torch.rand(33, 2)  # a row more than is used, so that nothing is outside
    rows = examine([prepared(body, x, torch.zeros(32))], most=1)
    assert rows["load's mask removed"].other_result == 1
    assert not x.isnan().any()


def test_views_of_one_storage_are_examined_apart():
    """A store past the first view is in the second, which is written last: only bounds tell."""
    body = """mad.wide.u32 %rd10, %r0, 4, %rd0; mad.wide.u32 %rd11, %r0, 4, %rd1;
setp.lt.u32 %p1, %r0, 20; @%p1 st.global.b32 [%rd10], %r0;
\tbar.sync 0; @%p1 st.global.b32 [%rd11], %r0;"""
    both = ints(52)
    rows = examine([prepared(body, both[:20], both[20:40])], most=4)
    assert rows["store's mask removed"].reported == 2
    split = prepared(body, both[:20], both[24:40])  # reaches past its second view: as it is
    assert faults.apart(split) is split
