"""PTX's one-lane operations as C.

An operation is what its result and its operands are, and a C expression of the operands a, b, c, d.
`spelling` takes the modifiers away that change nothing here (nearest rounding, approximations that
are exact here), so that one C function stands for all of their combinations. All operations are
generated at once: the interpreter is built once, whatever a program uses.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import product

C_TYPE = {
    "s16": "int16_t", "u16": "uint16_t", "b16": "uint16_t", "s32": "int32_t", "u32": "uint32_t",
    "b32": "uint32_t", "s64": "int64_t", "u64": "uint64_t", "b64": "uint64_t", "f32": "float",
    "f64": "double", "pred": "uint32_t", "s8": "int8_t", "u8": "uint8_t",
}  # fmt: skip
SIGNED, UNSIGNED = ("s16", "s32", "s64"), ("u16", "u32", "u64")
BITS, FLOATS = ("b16", "b32", "b64"), ("f32", "f64")
NO_MEANING = {"approx", "full", "uni"}  # approximations are exact here
NEAREST = {"add", "sub", "mul", "fma", "div", "rcp", "sqrt", "mad"}  # whose .rn is the default


@dataclass(frozen=True)
class Operation:
    """d = expression(a, b, c, d): what `types` says of the result and then of each operand."""

    types: tuple[str, ...]
    expression: str


def width(kind: str) -> int:
    """Bytes of the register that holds a value: predicates are 1 bit a lane, 0 bytes here."""
    if kind == "pred":
        return 0
    return 8 if kind.endswith("64") else 4


@cache
def spelling(opcode: str) -> str:
    parts = opcode.split(".")
    nearest = {"rn"} if parts[0] in NEAREST else set()
    return ".".join(part for part in parts if part not in NO_MEANING | nearest)


def unsigned(kind: str) -> str:
    return "u" + kind[1:]


def twice(kind: str) -> str:
    return kind[0] + str(2 * int(kind[1:]))


def arithmetic() -> dict[str, Operation]:
    """Integers: add to rem. Sums and products wrap, so they are formed without a sign."""
    found = {}
    for kind in SIGNED + UNSIGNED:
        same = (kind,) * 3
        wide = C_TYPE["u64"] if kind.endswith("64") else C_TYPE["u32"]  # 16 bits would promote
        for name, sign in (("add", "+"), ("sub", "-"), ("mul.lo", "*")):
            found[f"{name}.{kind}"] = Operation(same, f"({wide})a {sign} ({wide})b")
        found[f"mad.lo.{kind}"] = Operation((kind,) * 4, f"({wide})a * ({wide})b + ({wide})c")
        found[f"min.{kind}"] = Operation(same, "a < b ? a : b")
        found[f"max.{kind}"] = Operation(same, "a > b ? a : b")
        # Division by zero is unspecified; hardware gives all ones (PTX ISA, "div").
        least = f"(b == -1 ? ({wide})0 - ({wide})a : " if kind in SIGNED else "("
        rest = "(b == -1 ? 0 : " if kind in SIGNED else "("
        found[f"div.{kind}"] = Operation(same, f"b == 0 ? ({wide})-1 : ({wide}){least}a / b)")
        found[f"rem.{kind}"] = Operation(same, f"b == 0 ? a : {rest}a % b)")
        if not kind.endswith("64"):
            double = twice(kind)
            c = C_TYPE[double]
            whole = C_TYPE["u64"] if double.endswith("64") else C_TYPE["u32"]
            found[f"mul.wide.{kind}"] = Operation((double, kind, kind), f"({c})a * ({c})b")
            found[f"mad.wide.{kind}"] = Operation(
                (double, kind, kind, double), f"({whole})(({c})a * ({c})b) + ({whole})c"
            )
            found[f"mul.hi.{kind}"] = Operation(same, f"({c})a * ({c})b >> {kind[1:]}")
        else:
            int128 = "__int128" if kind in SIGNED else "unsigned __int128"
            found[f"mul.hi.{kind}"] = Operation(same, f"({int128})a * b >> 64")
    for name, sign in (("min", "<"), ("max", ">")):  # .relu: 0 for what is negative
        expression = f"(a {sign} b ? a : b) < 0 ? 0 : (a {sign} b ? a : b)"
        found[f"{name}.relu.s32"] = Operation(("s32",) * 3, expression)
    for kind in SIGNED:
        wide = C_TYPE["u64"] if kind == "s64" else C_TYPE["u32"]
        found[f"neg.{kind}"] = Operation((kind, kind), f"({wide})0 - ({wide})a")
        found[f"abs.{kind}"] = Operation((kind, kind), f"a < 0 ? ({wide})0 - ({wide})a : ({wide})a")
    return found


def logic() -> dict[str, Operation]:
    """Bits: and to brev. A shift by the width and more leaves 0, or the sign ("shl", "shr")."""
    found = {}
    for kind in BITS:
        size = int(kind[1:])
        for name, sign in (("and", "&"), ("or", "|"), ("xor", "^")):
            found[f"{name}.{kind}"] = Operation((kind,) * 3, f"a {sign} b")
        found[f"not.{kind}"] = Operation((kind, kind), "~a")
        found[f"shl.{kind}"] = Operation((kind, kind, "u32"), f"b >= {size} ? 0 : a << b")
    for kind in BITS + UNSIGNED:
        size = int(kind[1:])
        found[f"shr.{kind}"] = Operation((kind, kind, "u32"), f"b >= {size} ? 0 : a >> b")
    for kind in SIGNED:
        size = int(kind[1:])
        found[f"shr.{kind}"] = Operation(
            (kind, kind, "u32"), f"a >> (b >= {size} ? {size - 1} : b)"
        )
    for side, mode in product("lr", ("wrap", "clamp")):
        amount = "(c & 31)" if mode == "wrap" else "(c > 32 ? 32 : c)"
        both = "((uint64_t)b << 32 | a)"
        expression = f"({both} << {amount}) >> 32" if side == "l" else f"{both} >> {amount}"
        found[f"shf.{side}.{mode}.b32"] = Operation(("b32", "b32", "b32", "u32"), expression)
    found["bfe.u32"] = Operation(("u32", "u32", "u32", "u32"), "extract(a, b, c, 0)")
    found["bfe.s32"] = Operation(("s32", "s32", "u32", "u32"), "extract((uint32_t)a, b, c, 1)")
    found["bfi.b32"] = Operation(("b32", "b32", "b32", "u32", "u32"), "insert(a, b, c, d)")
    found["prmt.b32"] = Operation(("b32", "b32", "b32", "b32"), "permute(a, b, c)")
    found["lop3.b32"] = Operation(("b32", "b32", "b32", "b32", "b32"), "lop3(a, b, c, d)")
    found["clz.b32"] = Operation(("u32", "b32"), "a ? __builtin_clz(a) : 32")
    found["clz.b64"] = Operation(("u32", "b64"), "a ? __builtin_clzll(a) : 64")
    found["popc.b32"] = Operation(("u32", "b32"), "__builtin_popcount(a)")
    found["popc.b64"] = Operation(("u32", "b64"), "__builtin_popcountll(a)")
    found["brev.b32"] = Operation(("b32", "b32"), "reverse(a)")
    return found


def floating() -> dict[str, Operation]:
    """Floats, with and without .ftz: subnormal operands and results become zero, signs kept."""
    found = {}
    for kind, flush in (("f32", False), ("f32", True), ("f64", False)):
        ftz = ".ftz" if flush else ""
        arguments = {name: f"FTZ({name})" if flush else name for name in "abc"}
        a, b, c = arguments["a"], arguments["b"], arguments["c"]
        suffix = "f" if kind == "f32" else ""

        def put(name: str, count: int, expression: str) -> None:
            types = (kind,) * (count + 1)  # noqa: B023
            value = f"FTZ({expression})" if flush else expression  # noqa: B023
            found[f"{name}{ftz}.{kind}"] = Operation(types, value)  # noqa: B023

        put("add", 2, f"{a} + {b}")
        put("sub", 2, f"{a} - {b}")
        put("mul", 2, f"{a} * {b}")
        put("div", 2, f"{a} / {b}")
        put("fma", 3, f"fma{suffix}({a}, {b}, {c})")
        put("neg", 1, f"-{a}")
        put("abs", 1, f"fabs{suffix}({a})")
        put("sqrt", 1, f"sqrt{suffix}({a})")
        # A number wins over a NaN unless .NaN is asked for; −0 is less than +0 ("min", "max").
        put("min", 2, f"minimum_{kind}({a}, {b}, 0)")
        put("max", 2, f"maximum_{kind}({a}, {b}, 0)")
        if kind == "f32":
            for name, at_zero in (("min", "minimum"), ("max", "maximum")):
                expression = f"{at_zero}_f32({a}, {b}, 1)"
                value = f"FTZ({expression})" if flush else expression
                found[f"{name}{ftz}.NaN.f32"] = Operation((kind,) * 3, value)
            put("rcp", 1, f"1.0f / {a}")
            put("rsqrt", 1, f"1.0f / sqrtf({a})")
            put("ex2", 1, f"exp2f({a})")
            put("lg2", 1, f"log2f({a})")
            put("sin", 1, f"sinf({a})")
            put("cos", 1, f"cosf({a})")
    # Rounded to float32 first, which has more than twice bfloat16's digits: once more is once.
    halves = {
        name: f"to_bf16(from_bf16(a{{at}}) {sign} from_bf16(b{{at}}))"
        for name, sign in (("add", "+"), ("sub", "-"), ("mul", "*"))
    } | {"fma": "fma_bf16(a{at}, b{at}, c{at})"}
    for name, value in halves.items():
        count = 4 if name == "fma" else 3
        high, low = (value.format(at=at) for at in (" >> 16", " & 0xffff"))
        found[f"{name}.bf16"] = Operation(("b16",) * count, value.format(at=""))
        found[f"{name}.bf16x2"] = Operation(("b32",) * count, f"{high} << 16 | {low}")
    found["tanh.f32"] = Operation(("f32", "f32"), "tanhf(a)")
    found["rcp.f64"] = Operation(("f64", "f64"), "1.0 / a")
    # rcp.approx.ftz.f64: the low 32 bits of operand and result are zero (PTX ISA, "rcp").
    found["rcp.ftz.f64"] = Operation(("f64", "f64"), "coarse(1.0 / coarse(a))")
    found["copysign.f32"] = Operation(("f32",) * 3, "copysignf(b, a)")
    found["copysign.f64"] = Operation(("f64",) * 3, "copysign(b, a)")
    return found


def comparisons() -> dict[str, Operation]:
    """setp and selp. Ordered comparisons are false for NaN; those that end in u are true."""
    signs = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
    bare = {"lo": "<", "ls": "<=", "hi": ">", "hs": ">="}
    found = {}
    for kind in SIGNED + UNSIGNED + BITS:
        for name, sign in (signs | bare if kind in UNSIGNED else signs).items():
            found[f"setp.{name}.{kind}"] = Operation(("pred", kind, kind), f"a {sign} b")
    for kind, flush in (("f32", False), ("f32", True), ("f64", False)):
        ftz = ".ftz" if flush else ""
        a, b = ("FTZ(a)", "FTZ(b)") if flush else ("a", "b")
        types = ("pred", kind, kind)
        for name, sign in signs.items():
            ordered = "a == a && b == b && " if name == "ne" else ""
            found[f"setp.{name}{ftz}.{kind}"] = Operation(types, f"{ordered}{a} {sign} {b}")
            found[f"setp.{name}u{ftz}.{kind}"] = Operation(
                types, f"a != a || b != b || {a} {sign} {b}"
            )
        found[f"setp.num{ftz}.{kind}"] = Operation(types, "a == a && b == b")
        found[f"setp.nan{ftz}.{kind}"] = Operation(types, "a != a || b != b")
    return found


def conversions() -> dict[str, Operation]:
    """cvt: integers by C's rules; floats to integers saturate (PTX ISA, "cvt")."""
    found = {}
    integers = ("s8", "u8", *SIGNED, *UNSIGNED)
    roundings = {"rni": "rint", "rzi": "trunc", "rmi": "floor", "rpi": "ceil"}
    for to, source in product(integers, integers):
        inner = f"({C_TYPE[source]})a"
        found[f"cvt.{to}.{source}"] = Operation((to, source), f"({C_TYPE[to]}){inner}")
    for kind in FLOATS:
        c = C_TYPE[kind]
        for source in integers:
            found[f"cvt.rn.{kind}.{source}"] = Operation((kind, source), f"({c})a")
        for name, function in roundings.items():
            for to in (*SIGNED, *UNSIGNED):
                nan = "1" if "64" in to + kind else "0"
                found[f"cvt.{name}.{to}.{kind}"] = Operation(
                    (to, kind), f"to_{to}({function}((double)a), {nan})"
                )
                if kind == "f32":
                    found[f"cvt.{name}.ftz.{to}.{kind}"] = Operation(
                        (to, kind), f"to_{to}({function}((double)FTZ(a)), {nan})"
                    )
            found[f"cvt.{name}.{kind}.{kind}"] = Operation((kind, kind), f"({c}){function}(a)")
    found |= {
        "cvt.f64.f32": Operation(("f64", "f32"), "(double)a"),
        "cvt.rn.f32.f64": Operation(("f32", "f64"), "(float)a"),
        "cvt.f32.f16": Operation(("f32", "b16"), "from_f16(a)"),
        "cvt.f32.bf16": Operation(("f32", "b16"), "from_bf16(a)"),
        "cvt.rn.f16.f32": Operation(("b16", "f32"), "to_f16(a)"),
        "cvt.rn.bf16.f32": Operation(("b16", "f32"), "to_bf16(a)"),
        "cvt.rn.f16x2.f32": Operation(
            ("b32", "f32", "f32"), "(uint32_t)to_f16(a) << 16 | to_f16(b)"
        ),
        "cvt.rn.bf16x2.f32": Operation(
            ("b32", "f32", "f32"), "(uint32_t)to_bf16(a) << 16 | to_bf16(b)"
        ),
        "cvt.rna.tf32.f32": Operation(("b32", "f32"), "to_tf32(a)"),
    }
    return found


def moves() -> dict[str, Operation]:
    every = (*SIGNED, *UNSIGNED, *BITS, *FLOATS)
    return {f"mov.{kind}": Operation((kind, kind), "a") for kind in every}


OPERATIONS: dict[str, Operation] = (
    arithmetic() | logic() | floating() | comparisons() | conversions() | moves()
)
HAND_WRITTEN = {  # operations of warp.h, memory.h and matrix.h: C functions by what calls them
    "selp.32": "select32", "selp.64": "select64", "and.pred": "and_predicate",
    "or.pred": "or_predicate", "xor.pred": "xor_predicate", "not.pred": "not_predicate",
    "mov.pred": "move_predicate", "pack": "pack", "unpack": "unpack", "shfl": "shuffle",
    "redux": "reduce", "ld.global": "load_global", "st.global": "store_global",
    "ld.shared": "load_shared", "st.shared": "store_shared", "bar.warp.sync": "sync_warp",
    "cp.async": "copy_async", "cp.async.commit_group": "commit_copies",
    "cp.async.wait_group": "wait_copies", "cp.async.wait_all": "wait_all_copies",
    "fence.proxy.async": "fence_async", "ldmatrix": "load_matrix", "stmatrix": "store_matrix",
    "mma.halves": "multiply_halves", "mma.tf32": "multiply_tf32", "wgmma": "wgmma_issue",
    "wgmma.fence": "wgmma_fence", "wgmma.commit_group": "wgmma_commit",
    "wgmma.wait_group": "wgmma_wait", "nothing": "nothing", "trap": "trap",
}  # fmt: skip
