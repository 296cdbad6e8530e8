"""Peak memory of forward and backward above the inputs.

On a CPU it is the growth of the resident set, in a process of its own: a fork of one that has run
nothing, so that no contender's leftovers help or hurt another. On a GPU it is the allocator's peak.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import re
import signal
from collections.abc import Callable
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import torch
import torch._inductor.config as inductor

from .cases import CASES, Case
from .contenders import Contender

MMAP_THRESHOLD = -3  # of mallopt
TIMEOUT = 600  # seconds


def apart(
    case: Case, contender: Contender, variant: int | None, n: int, d: int, dtype: str
) -> int | None:
    """Bytes, of a CPU's contender in a process of its own; None where they cannot be measured."""
    known = any(case.name == x.name for x in CASES)  # the child finds it by its name
    if not known or not Path("/proc/self/clear_refs").exists():
        return None
    context = multiprocessing.get_context("forkserver")
    start_server()
    mine, theirs = context.Pipe(duplex=False)
    names = case.name, contender.name, variant, n, d, dtype, torch.get_num_threads()
    child = context.Process(target=child_main, args=(theirs, *names), daemon=True)
    child.start()
    theirs.close()
    try:
        found = mine.recv() if mine.poll(TIMEOUT) else None
        child.join(10)
        return found
    except EOFError:
        return None
    finally:
        child.kill()


def start_server() -> None:
    """Deaf to Ctrl-C, as its forks are: that is for this process, which ends them."""
    forkserver.set_forkserver_preload(["bench.memory"])
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def child_main(
    pipe: Any, case: str, contender: str, variant: int | None, n: int, d: int, dtype: str,
    threads: int,
) -> None:  # fmt: skip
    torch.set_num_threads(threads)
    inductor.compile_threads = 1  # its pool of processes would outlive this one
    # Blocks past 64 KB go back to the system when they are freed: the warm-up leaves nothing.
    ctypes.CDLL(None).mallopt(MMAP_THRESHOLD, 1 << 16)
    found_case = next(x for x in CASES if x.name == case)
    found = next(x for x in found_case.contenders if x.name == contender)
    pipe.send(on_cpu(found_case, found, variant, n, d, dtype))


def on_cpu(
    case: Case, contender: Contender, variant: int | None, n: int, d: int, dtype: str
) -> int:
    from .measure import DTYPES, build, forward_and_backward

    inputs = case.inputs(n, d, DTYPES[dtype], "cpu")
    loss = build(contender, n, torch.device("cpu"), variant)
    forward_and_backward(loss, inputs)
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    before = status("VmRSS")
    kept = forward_and_backward(loss, inputs)
    after = status("VmHWM")
    del kept
    return max(0, after - before)


def status(name: str) -> int:
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return 1024 * int(found[1]) if found else 0


def on_gpu(step: Callable[[], Any]) -> int:
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    kept = step()
    torch.cuda.synchronize()
    del kept
    return torch.cuda.max_memory_allocated() - before
