"""Every one-lane operation of the PTX interpreter against NumPy or Python's whole numbers."""

import math
from fractions import Fraction

import execute_programs as programs
import numpy as np
import pytest
import torch

from bench.compiled.execute.opcodes import OPERATIONS, width

NUMPY = {
    "s8": np.int8, "u8": np.uint8, "s16": np.int16, "u16": np.uint16, "b16": np.uint16,
    "s32": np.int32, "u32": np.uint32, "b32": np.uint32, "s64": np.int64, "u64": np.uint64,
    "b64": np.uint64, "f32": np.float32, "f64": np.float64,
}  # fmt: skip
FLOAT = (0.0, -0.0, 1.0, -1.5, 2.5, -2.5, 0.49, 1e-40, -3e-39, 3e38, -3e38, np.inf, -np.inf, np.nan,
         65519.0, 65520.0, 1e-7, 3e-8, 70000.0, 1.00390625, 3e9, -3e9, 1e19, -1e19)  # fmt: skip
AMOUNT = ("shl", "shr", "shf", "bfe", "bfi")  # their last operands are places and counts


def sample(kind, name, at):
    """32 values of an operand, edges among them; other operands have them in another order."""
    random = np.random.default_rng([at, *name.encode()])
    if kind.startswith("f"):
        values = np.array(
            [*FLOAT, *random.normal(size=32 - len(FLOAT)) * 3], dtype=kind.replace("f", "float")
        )
    else:
        info = np.iinfo(NUMPY[kind])
        edges = [0, 1, 2, 3, 7, info.max, info.min, info.max - 1, info.min + 1]
        edges += [-1, -2, -7] if info.min < 0 else []
        some = random.integers(info.min, info.max, size=32 - len(edges), dtype=info.dtype)
        values = np.concatenate([np.array(edges, dtype=info.dtype), some])
        base = name.split(".")[0]
        if base in AMOUNT and at >= (2 if base in ("bfe", "shl", "shr") else 3):
            values = random.integers(0, 70, 32).astype(info.dtype)
            values[:6] = 0, 31, 32, 33, 1, 64
    return random.permutation(values) if at > 1 else values


def executed(name, operands):
    result, *types = OPERATIONS[name].types
    body = []
    for at, kind in enumerate(types):
        size = NUMPY[kind]().itemsize
        register = {0: "%rs", 4: "%r", 8: "%rd"}[0 if size < 4 else width(kind)]
        body.append(f"mad.wide.u32 %rd{20 + at}, %r0, {size}, %rd{at + 1};")
        body.append(f"ld.global.b{8 * size} {register}{10 + at}, [%rd{20 + at}];")
        operands[at] = operands[at].astype(NUMPY[kind])
    used = []
    for at, kind in enumerate(types):
        size = NUMPY[kind]().itemsize
        used.append(f"{'%rs' if size < 4 else '%r' if size == 4 else '%rd'}{10 + at}")
    # An 8-bit result stands in a wider register, its sign extended.
    size = 4 if result in ("pred", "s8", "u8") else NUMPY[result]().itemsize
    to = "%p1" if result == "pred" else {2: "%rs", 4: "%r", 8: "%rd"}[size] + "9"
    body.append(f"{name} {to}, {', '.join(used)};")
    if result == "pred":
        body.append("selp.b32 %r9, 1, 0, %p1;")
    body.append(f"mad.wide.u32 %rd20, %r0, {size}, %rd0;")
    body.append(f"st.global.b{8 * size} [%rd20], {'%r9' if to == '%p1' else to};")
    out = np.zeros(32, {2: np.int16, 4: np.int32, 8: np.int64}[size])
    tensors = [torch.from_numpy(out)]
    for x in operands:
        signed = {1: np.int8, 2: np.int16, 4: np.int32, 8: np.int64}[x.itemsize]
        tensors.append(torch.from_numpy(x.view(signed).copy()))
    programs.clean("\n".join(body), *tensors)
    if result in ("s8", "u8"):
        return out.astype(NUMPY[result])
    return out.astype(bool) if result == "pred" else out.view(NUMPY[result])


def flush(x):
    tiny = np.abs(x) < 2.0**-126
    return np.where(tiny, np.copysign(np.float32(0), x), x).astype(np.float32)


def nearest(exact, dtype):
    """The number of the type that is next to an exact one, ties to even."""
    guess = dtype(float(exact))
    if not np.isfinite(guess):
        return guess
    around = [guess, np.nextafter(guess, dtype(np.inf)), np.nextafter(guess, dtype(-np.inf))]
    size = np.uint32 if dtype is np.float32 else np.uint64
    around = [x for x in around if np.isfinite(x)]
    return min(around, key=lambda x: (abs(Fraction(float(x)) - exact), int(x.view(size)) & 1))


def fused(a, b, c):
    with np.errstate(all="ignore"):
        plain = a * b + c
    for i in range(len(a)):
        if np.isfinite([a[i], b[i], c[i]]).all():
            exact = Fraction(float(a[i])) * Fraction(float(b[i])) + Fraction(float(c[i]))
            if exact:
                plain[i] = nearest(exact, type(a[i]))
    return plain


def real(name, parts, x):
    """Floats in, floats out."""
    base = parts[0]
    f32 = parts[-1] == "f32"
    if "ftz" in parts and f32:
        x = [flush(value) for value in x]
    if "ftz" in parts and not f32:
        cut = x[0].view(np.uint64) & np.uint64(0xFFFFFFFF00000000)
        full = 1.0 / cut.view(np.float64)
        return (full.view(np.uint64) & np.uint64(0xFFFFFFFF00000000)).view(np.float64)
    a, b = x[0], x[min(1, len(x) - 1)]
    if base in ("min", "max"):
        pick = np.fmin if base == "min" else np.fmax
        if "NaN" in parts:
            pick = np.minimum if base == "min" else np.maximum
        result = pick(a, b)
        zeros = (a == 0) & (b == 0)  # −0 is less than +0
        negative = (
            (np.signbit(a) | np.signbit(b)) if base == "min" else (np.signbit(a) & np.signbit(b))
        )
        return np.where(zeros, np.where(negative, -0.0, 0.0), result).astype(a.dtype)
    table = {
        "add": lambda: a + b, "sub": lambda: a - b, "mul": lambda: a * b, "div": lambda: a / b,
        "fma": lambda: fused(*x), "neg": lambda: -a, "abs": lambda: np.abs(a),
        "sqrt": lambda: np.sqrt(a), "rcp": lambda: a.dtype.type(1) / a,
        "copysign": lambda: np.copysign(b, a), "mov": lambda: a,
    }  # fmt: skip
    wide = {"rsqrt": lambda v: 1 / np.sqrt(v), "ex2": np.exp2, "lg2": np.log2, "sin": np.sin,
            "cos": np.cos, "tanh": np.tanh}  # fmt: skip
    result = wide[base](a.astype(np.float64)).astype(np.float32) if base in wide else table[base]()
    return flush(result) if "ftz" in parts else result


def extracted(a, at, count, bits_signed):
    at, count = at & 255, count & 255
    if count == 0:
        return 0
    sign = (a >> min(at + count - 1, 31)) & 1 if bits_signed else 0
    bits = [(a >> i) & 1 if i <= 31 else sign for i in range(at, at + count)]
    bits += [sign] * 32
    return sum(bit << i for i, bit in enumerate(bits[:32]))


def permuted(a, b, selectors):
    data = (a | b << 32).to_bytes(8, "little")
    out = []
    for i in range(4):
        selector = selectors >> 4 * i & 15
        byte = data[selector & 7]
        out.append((255 if byte & 128 else 0) if selector & 8 else byte)
    return int.from_bytes(bytes(out), "little")


def funnel(a, b, amount, parts):
    amount = amount & 31 if parts[2] == "wrap" else min(amount, 32)
    both = b << 32 | a
    return both << amount >> 32 if parts[1] == "l" else both >> amount


def looked_up(a, b, c, table):
    bits = (((a >> i & 1) << 2 | (b >> i & 1) << 1 | (c >> i & 1)) for i in range(32))
    return sum((table >> n & 1) << i for i, n in enumerate(bits))


def inserted(a, b, at, count):
    at, count = at & 255, count & 255
    mask = ((1 << count) - 1) << at & 0xFFFFFFFF
    return (b & ~mask) | (a << at & mask)


def whole(parts, kind, a, b=0, c=0, d=0):
    """Python's integers in, an integer out that is yet to be cut to its type."""
    base, size = parts[0], 8 * NUMPY[kind]().itemsize
    quotient = abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1) if b else -1
    count = min(b, size)
    table = {
        "add": lambda: a + b, "sub": lambda: a - b, "and": lambda: a & b, "or": lambda: a | b,
        "xor": lambda: a ^ b, "not": lambda: ~a, "neg": lambda: -a, "abs": lambda: abs(a),
        "div": lambda: quotient, "rem": lambda: a - b * quotient if b else a,
        "shl": lambda: a << count, "shr": lambda: a >> count, "mov": lambda: a,
        "shf": lambda: funnel(a, b, c, parts), "prmt": lambda: permuted(a, b, c),
        "bfe": lambda: extracted(a & 0xFFFFFFFF, b, c, kind == "s32"),
        "bfi": lambda: inserted(a, b, c, d), "lop3": lambda: looked_up(a, b, c, d),
        "clz": lambda: size - a.bit_length(), "popc": lambda: bin(a).count("1"),
        "brev": lambda: int(f"{a:032b}"[::-1], 2), "cvt": lambda: a,
        "mul": lambda: a * b >> size if parts[1] == "hi" else a * b, "mad": lambda: a * b + c,
        "min": lambda: max(min(a, b), 0) if "relu" in parts else min(a, b),
        "max": lambda: max(a, b, 0) if "relu" in parts else max(a, b),
    }  # fmt: skip
    return table[base]()


def compared(parts, a, b):
    test = parts[1]
    if "ftz" in parts:
        a, b = flush(a), flush(b)
    if test in ("num", "nan"):
        unordered = np.isnan(a) | np.isnan(b)
        return unordered if test == "nan" else ~unordered
    test = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}.get(test, test)
    plain = {"eq": a == b, "ne": a != b, "lt": a < b, "le": a <= b, "gt": a > b, "ge": a >= b}
    if not np.issubdtype(a.dtype, np.floating):
        return plain[test]
    unordered = np.isnan(a) | np.isnan(b)
    if test.endswith("u") and test != "u":
        return plain[test[:-1]] | unordered
    return plain[test] & ~unordered


def converted(parts, result, source, x):
    rounding = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}
    a = flush(x[0]) if "ftz" in parts else x[0]
    function = next((rounding[part] for part in parts if part in rounding), None)
    if source == "b16":
        if parts[-1] == "f16":
            return a.view(np.float16).astype(np.float32)
        return (a.astype(np.uint32) << np.uint32(16)).view(np.float32)
    if parts[-2] in ("f16", "f16x2"):
        halves = [value.astype(np.float16).view(np.uint16) for value in x]
    elif parts[-2] in ("bf16", "bf16x2"):
        halves = [
            torch.from_numpy(value).bfloat16().view(torch.int16).numpy().view(np.uint16)
            for value in x
        ]
    elif parts[-2] == "tf32":
        bits = a.view(np.uint32)
        return np.where(np.isfinite(a), (bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000), bits)
    elif result.startswith("f"):
        return (function(a) if function else a).astype(NUMPY[result])
    else:
        info = np.iinfo(NUMPY[result])
        top = (1 << info.bits - 1) if "64" in result + source else 0
        out = []
        for value in function(a.astype(np.float64)):
            if np.isnan(value):
                out.append(top)
            else:
                out.append(
                    info.max if value >= info.max else info.min if value <= info.min else int(value)
                )
        return cut(out, result)
    return (
        halves[0] if len(halves) == 1 else halves[0].astype(np.uint32) << np.uint32(16) | halves[1]
    )


def in_bfloat16(base, *x):
    """By halves, where there are two."""
    parts = [torch.from_numpy(value.view(np.int16)).view(torch.bfloat16) for value in x]
    if base == "fma":
        result = torch.tensor(
            [once_rounded(*(float(v) for v in of)) for of in zip(*parts, strict=True)]
        )
        result = result.bfloat16()
    else:
        result = {"add": torch.add, "sub": torch.sub, "mul": torch.mul}[base](*parts)
    return result.view(torch.int16).numpy().view(x[0].dtype)


def once_rounded(a, b, c):
    """a·b + c to bfloat16's eight digits, halves to even, from the exact sum."""
    near = a * b + c
    if not math.isfinite(near) or near == 0:
        return near
    exact = Fraction(a) * Fraction(b) + Fraction(c)
    step = Fraction(2) ** max(math.frexp(near)[1] - 8, -133)
    return float(round(exact / step) * step)


def cut(values, kind):
    size = 8 * NUMPY[kind]().itemsize
    unsigned = np.array([value & ((1 << size) - 1) for value in values], f"uint{size}")
    return unsigned.view(NUMPY[kind])


def truth(name, operands):
    result, *types = OPERATIONS[name].types
    parts = name.split(".")
    with np.errstate(all="ignore"):
        if parts[0] == "setp":
            return compared(parts, *operands)
        if parts[0] == "cvt" and "f" in parts[-1] + parts[-2]:
            return converted(parts, result, types[0], operands)
        if types[0].startswith("f"):
            return real(name, parts, operands)
        if parts[-1].startswith("bf16"):
            return in_bfloat16(parts[0], *operands)
    lanes = zip(*[[int(value) for value in x] for x in operands], strict=True)
    return cut([whole(parts, types[0], *lane) for lane in lanes], result)


def same(got, want):
    """Bits, but that one NaN is as good as another."""
    if np.issubdtype(want.dtype, np.floating):
        bits = np.uint32 if want.itemsize == 4 else np.uint64
        return np.where(np.isnan(want), np.isnan(got), got.view(bits) == want.view(bits))
    return got == want


@pytest.mark.parametrize("name", sorted(OPERATIONS))
def test_an_operation_is_what_numpy_says(name):
    operands = [sample(kind, name, at) for at, kind in enumerate(OPERATIONS[name].types[1:], 1)]
    got, want = executed(name, operands), truth(name, operands)
    if name.split(".")[0] in (
        "rsqrt",
        "ex2",
        "lg2",
        "sin",
        "cos",
        "tanh",
    ):  # C's are near, not exact
        finite = np.isfinite(want)
        np.testing.assert_allclose(got[finite], want[finite], rtol=3e-7, atol=1e-38)
        got, want = got[~finite], want[~finite]
    if name.startswith("cvt") and name.split(".")[-2] in ("f16", "bf16", "f16x2", "bf16x2"):
        keep = ~np.any([np.isnan(x) for x in operands], axis=0)  # bits of a NaN are anyone's
        assert np.isin(got[~keep] & 0x7C00, 0x7C00).all() or len(operands) == 2
        got, want = got[keep], want[keep]
    if ".bf16" in name and not name.startswith("cvt"):
        got, want = got.view(np.uint16), want.view(np.uint16)
        nans = (want & 0x7FFF) > 0x7F80
        assert ((got[nans] & 0x7FFF) > 0x7F80).all()
        got, want = got[~nans], want[~nans]
    if name == "cvt.rna.tf32.f32":
        got, want = got[np.isfinite(operands[0])], want[np.isfinite(operands[0])]
    agrees = same(got, want)
    assert agrees.all(), [
        (*(x[i] for x in operands), got[i], want[i]) for i in np.flatnonzero(~agrees)
    ][:4]


def test_a_bfloat16_fma_rounds_once():
    """Its product lies half-way between two numbers: what decides is far below."""
    a, b = np.uint16(0x3FC0), np.uint16(0x3F81)  # 1.5 · (1 + 2⁻⁷)
    least = [0x0D80, 0x8D80, 0, 0x0001, 0x8001]  # ±2⁻¹⁰⁰, 0, ± the least there is
    operands = [np.full(32, x, np.uint16) for x in (a, b, 0)]
    operands[2][: len(least)] = least
    got = executed("fma.bf16", operands).view(np.uint16)[: len(least)]
    assert [hex(x) for x in got] == ["0x3fc2", "0x3fc1", "0x3fc2", "0x3fc2", "0x3fc1"]
