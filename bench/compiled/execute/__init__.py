"""Compiled kernels, executed on a CPU: PTX and a launch in, changed tensors and violations out.

    ptx.py       text to statements: labels, scopes, registers
    program.py   statements to instructions of the interpreter
    opcodes.py   what each operation of one lane is, as a C expression; generate.py writes them out
    values.h     numbers and their conversions
    warp.h       warps, registers, shuffles
    memory.h     global and shared memory: bounds, alignment, races, copies, proxies, unset values
    matrix.h     ldmatrix, stmatrix, mma.sync, wgmma
    launch.c     programs, divergence, barriers
    machine.py   builds the interpreter, executes a launch
    faults.py    faults seeded in PTX: what is noticed, and what is equivalent

It tests what the compiler makes of a kernel: layouts, swizzles, masks, pipelines, waits, barriers,
fragments. It does not test ptxas, the rounding inside a tensor core (products are added up in
float32, in order), the errors of approximate functions (they are exact here), memory order beyond
barriers, the driver, or speed.
"""
