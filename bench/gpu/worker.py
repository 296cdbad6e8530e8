"""A process that runs checks one after the other, and says what each has found as it ends."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator
from typing import Any

from .outcome import FAILED, LEFT_OUT, NOT_APPLICABLE, PASSED, Found, NotApplicable, Setup

BROKEN = "broken"  # an error that stays: nothing more runs in this process


class Lost(Exception):
    """The device answers no new process either."""


def work(names: list[str], setup: Setup, until: float) -> Iterator[Any]:
    """Yields each check's results and then its Found; BROKEN instead of going on, or a Lost.

    `until` is a time.monotonic(): what would take longer is left out."""
    from ..measure import release
    from .device import current
    from .plan import every

    known = {x.name: x for x in every(setup.rehearsal)}
    checks = [known[name] for name in names]
    prepare(setup)
    if text := trouble():
        yield Lost(text)
        return
    for check in checks:
        about = {"name": check.name, "stage": check.stage, "rehearsal": setup.rehearsal}
        if time.monotonic() + check.cost > until:
            yield Found(verdict=LEFT_OUT, detail="no time left for its stage", **about)
            continue
        start = time.monotonic()
        verdict: dict[str, Any] = {}
        try:
            if fault := setup.faults.get(check.name):
                current().fail(fault)
            outcome = check.run()
            if isinstance(outcome, Iterator):
                outcome = yield from passed_on(outcome)
            current().synchronize()
            verdict = {"verdict": PASSED if outcome.passed else FAILED, "detail": outcome.detail,
                       "figures": outcome.figures}  # fmt: skip
        except NotApplicable as why:
            verdict = {"verdict": NOT_APPLICABLE, "detail": str(why)}
        except Exception as error:  # a crash is a failed check, and the next one still runs
            from .checks import one_line

            verdict = {"verdict": FAILED, "detail": one_line(error)}
        finally:
            if setup.rehearsal:
                current().fail("")
            release("cuda")
        yield Found(seconds=time.monotonic() - start, **verdict, **about)
        if verdict["verdict"] == FAILED and trouble():
            yield BROKEN
            return


def passed_on(messages: Iterator[Any]) -> Generator[Any, None, Any]:
    """All but the last, which is the outcome."""
    last = next(messages)
    for message in messages:
        yield last
        last = message
    return last


def prepare(setup: Setup) -> None:
    if setup.rehearsal:
        from .device import use
        from .stand_in import StandIn

        use(StandIn(setup.gpus, setup.gone))
    from .timing import RATES

    RATES.update(setup.rates)


def trouble() -> str:
    """Why nothing runs on the device in this process, as after an illegal access; "" if it does."""
    from .checks import one_line
    from .device import current

    try:
        current().synchronize()
    except RuntimeError as error:
        return one_line(error)
    return ""
