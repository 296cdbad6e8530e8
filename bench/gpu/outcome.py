"""What a check answers, and what is kept of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

PASSED, FAILED, NOT_APPLICABLE, LEFT_OUT = "passed", "FAILED", "not applicable", "left out"


@dataclass(frozen=True)
class Setup:
    """What a process that runs checks has to know."""

    rehearsal: bool = False
    gpus: int = 1  # of the stand-in
    faults: dict[str, str] = field(default_factory=dict)  # by the name of a check, see stand_in.py
    rates: dict[str, float] = field(default_factory=dict)  # as measured
    gone: str = ""  # a file: once it is there no process finds the stand-in any more


class NotApplicable(Exception):
    """Why a check says nothing on this machine."""


@dataclass(frozen=True)
class Outcome:
    """Of a check that ran to its end."""

    passed: bool
    detail: str
    figures: dict[str, float] = field(default_factory=dict)  # in SI units


@dataclass(frozen=True)
class Found:
    """A line of checks.jsonl."""

    name: str
    stage: str
    verdict: str  # PASSED, FAILED, NOT_APPLICABLE or LEFT_OUT
    detail: str = ""
    figures: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    sensors: dict[str, Any] = field(default_factory=dict)  # see clocks.Watch.between
    rehearsal: bool = False

    @property
    def ran(self) -> bool:
        return self.verdict in (PASSED, FAILED)
