"""Results as a table, and one result file against another."""

from __future__ import annotations

from collections.abc import Iterable

from .record import Result, newest

TOLERANCE = 1.05
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
            lines.append(
                f"{result.case} N={result.n} d={result.d} {result.dtype}: {result.contender} ÷ ours"
                f" = {ratio:.2f}, peak {size(result.peak_bytes)} against {size(ours.peak_bytes)}"
            )
    by_depth = {x.contender: x for x in found if x.case == "depth" and x.p50}
    for who in ("eager", "ours"):
        shallow, deep = (by_depth.get(f"{who} depth {depth}") for depth in (1, 8))
        if shallow and deep and shallow.p50 and deep.p50:
            lines.append(f"{who}: depth 8 ÷ depth 1 = {deep.p50 / shallow.p50:.2f}")
    return lines


def against(before: Iterable[Result], now: Iterable[Result]) -> tuple[list[str], list[str]]:
    """What got worse by more than 5 %, and what else there is to say; about our own contenders.

    On a CPU times are compared as ratios to eager's in the same run, on a GPU as they are.
    """
    old, new = newest(before), newest(now)
    worse, notes = [], []
    for key, was in old.items():
        if not was.contender.startswith("ours") or was.status != "ok":
            continue
        label = f"{was.case} {was.contender} N={was.n} d={was.d} {was.dtype}"
        if key not in new:
            notes.append(f"{label}: not measured this time")
            continue
        is_now = new[key]
        if is_now.status != "ok":
            worse.append(f"{label}: was ok, is {is_now.status} {is_now.detail}".rstrip())
            continue
        then, later = cost(was, old), cost(is_now, new)
        if (then is None or later is None) and was.p50 and is_now.p50:
            then, later = was.p50, is_now.p50
        if then and later and later > TOLERANCE * then:
            worse.append(f"{label}: time {100 * (later / then - 1):+.1f} %")
        if was.peak_bytes and is_now.peak_bytes:
            growth = is_now.peak_bytes / was.peak_bytes
            if growth > TOLERANCE and is_now.peak_bytes - was.peak_bytes > 1 << 20:
                worse.append(f"{label}: memory {100 * (growth - 1):+.1f} %")
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
