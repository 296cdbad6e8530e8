"""Results as a table, and one result file against another."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from .errors import BenchError
from .record import Result, newest

TOLERANCE = 1.05
NO_GROWTH = 1 << 20  # bytes: less is the allocator's doing
HEADER = ("case", "N", "d", "dtype", "contender", "p50", "p20–p80", "÷ ours", "peak", "error", "")


def table(results: Iterable[Result]) -> str:
    """A block of lines a problem; times beside ours, and what is wrong in words."""
    rows: list[tuple[str, ...]] = [HEADER]
    found = list(newest(results).values())
    last = None
    for result in sorted(found, key=lambda x: (*x.problem[:1], x.problem[3], x.d, x.n)):
        if last is not None and last != result.problem:
            rows.append(("",) * len(HEADER))
        last = result.problem
        rows.append(line(result, found))
    return aligned(rows)


def line(result: Result, found: list[Result]) -> tuple[str, ...]:
    ratio = ratio_to_ours(result, found)
    spread = f"{duration(result.p20)}–{duration(result.p80)}" if result.p50 else ""
    error = ""
    if result.value_error is not None and result.gradient_error is not None:
        error = f"{result.value_error:.0e} {result.gradient_error:.0e}"
    right = result.status == "ok"
    remark = result.detail if right else f"{result.status.upper()} {result.detail}".strip()
    return (
        result.case,
        str(result.n),
        str(result.d),
        result.dtype,
        result.contender,
        duration(result.p50) if right else "",
        spread if right else "",
        f"{ratio:.2f}" if ratio else "",
        size(result.peak_bytes),
        error,
        remark,
    )


def ratio_to_ours(result: Result, found: list[Result]) -> float | None:
    """p50 ÷ ours; a wrong contender has no ratio, for it is not the same work."""
    if result.status != "ok" or not result.p50:
        return None
    wanted = result.contender.replace("eager", "ours") if "eager" in result.contender else "ours"
    for other in found:
        if other.problem == result.problem and other.contender == wanted and other.p50:
            return result.p50 / other.p50 if other.status == "ok" else None
    return None


def ratios(results: Iterable[Result]) -> list[str]:
    """The sentences that the table comes to: eager ÷ ours and compiled ÷ ours."""
    found = list(newest(results).values())
    lines = []
    for result in found:
        if result.contender in ("eager", "compiled") and (ratio := ratio_to_ours(result, found)):
            ours = next(x for x in found if x.problem == result.problem and x.contender == "ours")
            peaks = [x.peak_bytes for x in (result, ours)]
            against = f", peak {size(peaks[0])} against {size(peaks[1])}" if all(peaks) else ""
            lines.append(
                f"{result.case} N={result.n} d={result.d} {result.dtype}: {result.contender} ÷ ours"
                f" = {ratio:.2f}{against}"
            )
    for shallow, deep in depths(found):
        who, _, depth = deep.contender.partition(" depth ")
        lines.append(
            f"{deep.case} N={deep.n} d={deep.d} {deep.dtype}: {who}: "
            f"depth {depth} ÷ depth 1 = {times(deep, shallow):.2f}"
        )
    return lines


def depths(results: Iterable[Result]) -> list[tuple[Result, Result]]:
    """Pairs of one problem: at depth 1, and deeper."""
    found = {x.key: x for x in results if x.status == "ok" and x.p50}
    pairs = []
    for deep in found.values():
        who, _, depth = deep.contender.partition(" depth ")
        shallow = found.get(replace(deep, contender=f"{who} depth 1").key)
        if depth not in ("", "1") and shallow:
            pairs.append((shallow, deep))
    return pairs


def times(slower: Result, faster: Result) -> float:
    return (slower.p50 or 0.0) / (faster.p50 or float("nan"))


def comparable(results: Iterable[Result], device: str, threads: int) -> None:
    """Raises BenchError unless all were measured on this hardware."""
    for result in results:
        if (result.device, result.threads) != (device, threads):
            raise BenchError(
                f"nothing to compare: {result.device}, {result.threads} threads, against "
                f"{device}, {threads} threads"
            )


def against(before: Iterable[Result], now: Iterable[Result]) -> tuple[list[str], list[str]]:
    """What got worse by more than 5 %, and what else there is to say; about our own contenders.

    On a CPU times are compared as ratios to eager's in the same run, on a GPU as they are.
    """
    old, new = newest(before), newest(now)
    worse, notes = [], []
    compared = 0
    for key, was in old.items():
        if not was.contender.startswith("ours") or was.status != "ok":
            continue
        label = f"{was.case} {was.contender} N={was.n} d={was.d} {was.dtype}"
        if key not in new:
            notes.append(f"{label}: not measured this time")
            continue
        is_now = new[key]
        compared += 1
        if is_now.status != "ok":
            worse.append(f"{label}: was ok, is {is_now.status} {is_now.detail}".rstrip())
            continue
        then, later = cost(was, old), cost(is_now, new)
        if then is None or later is None:
            then, later = was.p50, is_now.p50
            notes.append(f"{label}: no eager beside it, so times are compared as they are")
        for what, a, b, least in (
            ("time", then, later, 0.0),
            ("memory", was.peak_bytes, is_now.peak_bytes, NO_GROWTH),
        ):
            if not a or not b or abs(b - a) <= least:
                continue
            change = f"{label}: {what} {100 * (b / a - 1):+.1f} %"
            if b > TOLERANCE * a:
                worse.append(change)
            elif a > TOLERANCE * b:
                notes.append(change)
    if not compared:
        raise BenchError("nothing to compare: no result of ours is in both")
    return worse, notes


def cost(result: Result, among: dict[tuple[str, str, int, int, str], Result]) -> float | None:
    if result.driver:
        return result.p50
    eager = among.get((result.case, result.contender.replace("ours", "eager"), *result.key[2:]))
    return result.p50 / eager.p50 if eager and eager.p50 and result.p50 else None


def duration(seconds: float | None) -> str:
    if seconds is None:
        return ""
    for unit, scale in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} µs"


def size(count: int | None) -> str:
    if count is None:
        return ""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def aligned(rows: list[tuple[str, ...]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )
