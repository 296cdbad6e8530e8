"""The interpreter's generated part: a C function for each operation, and their table."""

from __future__ import annotations

from .opcodes import C_TYPE, HAND_WRITTEN, OPERATIONS, Operation, width


def operations() -> str:
    functions = [one(n, name, op) for n, (name, op) in enumerate(OPERATIONS.items())]
    names = [f"operation_{n}" for n in range(len(OPERATIONS))] + list(HAND_WRITTEN.values())
    table = ",\n  ".join(names)
    return "\n".join([*functions, f"static const Operation operations[] = {{\n  {table}\n}};\n"])


def one(number: int, name: str, operation: Operation) -> str:
    result, *operands = operation.types
    read, declared = [], []
    for at, kind in enumerate(operands, 1):
        letter = "abcd"[at - 1]
        bits = 64 if width(kind) == 8 else 32
        read.append(f"const uint{bits}_t *{letter}_ = V{bits}({at});")
        value = f"{letter}_[l]"
        value = f"as_{kind}({value})" if kind in ("f32", "f64") else f"({C_TYPE[kind]}){value}"
        declared.append(f"{C_TYPE[kind]} {letter} = {value};")
    known = " & ".join(f"SET({at})" for at in range(1, len(operands) + 1))
    expression = f"({operation.expression})"
    if result == "pred":
        start, each = "uint32_t bits = 0;", f"bits |= (uint32_t){expression} << l;"
        end = "put_predicate(W, I, 0, bits, m);"
    else:
        bits = 64 if width(result) == 8 else 32
        value = f"(uint{bits}_t)({C_TYPE[result]}){expression}"
        if result in ("f32", "f64"):
            value = f"bits_{result}{expression}"
        start, each = f"uint{bits}_t value[32];", f"value[l] = {value};"
        end = f"put{bits}(W, I, 0, value, m);"
    return f"""// {name}
static void operation_{number}(Warp *W, const Instruction *I, uint32_t m) {{
  {start}
  uint32_t set = {known};
  {" ".join(read)}
  for (int l = 0; l < 32; l++) {{
    {" ".join(declared)}
    {each}
  }}
  {end}
  mark(W, I, 0, m, set);
}}"""
