"""Runs a stage's checks in processes, several at a time; a crash or a hang costs one check."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from multiprocessing.connection import wait

from ..apart import ENDS_IN, Apart, Died
from ..record import Result
from . import worker
from .clocks import Watch
from .outcome import FAILED, LEFT_OUT, Found, Setup
from .plan import LANES, Check

GRACE = 15.0  # seconds past the end that what is under way still has
MOST = 16  # checks a process


@dataclass
class Lane:
    """A process and what it still has to do: the first of it is under way, or it is ending."""

    process: Apart
    left: deque[Check]
    since: float  # when that began

    @property
    def overdue(self) -> float:
        return self.since + (self.left[0].limit if self.left else ENDS_IN)


@dataclass
class Runner:
    setup: Setup
    watch: Watch
    end: float  # of the whole command, time.monotonic()
    lost: str = ""  # why the device answers no process any more
    lanes: list[Lane] = field(default_factory=list)

    def stage(self, checks: list[Check], until: float) -> Iterator[Result | Found]:
        """What is found, as it comes; every check has one Found in the end."""
        if not checks:
            return
        most = LANES[checks[0].stage]
        if self.setup.rehearsal:
            most = min(most, 2)
        waiting = deque(batches(checks, most))
        try:
            while waiting or self.lanes:
                if self.lost:
                    yield from self.give_up(waiting)
                    return
                while waiting and len(self.lanes) < most:
                    self.start(waiting.popleft(), until)
                yield from self.next_answers(waiting)
        finally:
            self.close()

    def start(self, batch: deque[Check], until: float) -> None:
        names = [x.name for x in batch]
        process = Apart(worker.work, names, self.setup, until)
        self.lanes.append(Lane(process, batch, time.monotonic()))

    def next_answers(self, waiting: deque[deque[Check]]) -> Iterator[Result | Found]:
        """Waits for the next, or for the first that takes too long."""
        latest = min(min(x.overdue for x in self.lanes), self.end + GRACE)
        ready = wait([x.process.pipe for x in self.lanes], max(0.0, latest - time.monotonic()))
        for lane in [x for x in self.lanes if x.process.pipe in ready]:
            yield from self.answer(lane, waiting)
        now = time.monotonic()
        for lane in list(self.lanes):
            if not lane.left:
                if now >= lane.overdue:
                    self.drop(lane, waiting)
            elif now >= lane.overdue:
                limit = lane.left[0].limit
                yield self.about(lane, FAILED, f"no answer in {limit:.0f} s")
                self.drop(lane, waiting)
            elif now >= self.end + GRACE:
                yield self.about(lane, LEFT_OUT, "broken off: the time is over")
                self.drop(lane, waiting)

    def answer(self, lane: Lane, waiting: deque[deque[Check]]) -> Iterator[Result | Found]:
        try:
            message = lane.process.receive()
        except EOFError:
            self.drop(lane, waiting)
            return
        except Died as death:
            if lane.left:
                yield self.about(lane, FAILED, f"its process died: {death}")
            self.drop(lane, waiting)
            return
        if isinstance(message, Result):
            sensors = self.watch.between(lane.since, time.monotonic())
            yield replace(message, sensors=sensors)
        elif isinstance(message, Found):
            lane.left.popleft()
            yield replace(message, sensors=self.watch.between(lane.since, time.monotonic()))
            lane.since = time.monotonic()
        elif isinstance(message, worker.Lost):
            self.lost = str(message)
        else:  # BROKEN: on with another process
            self.drop(lane, waiting)

    def about(self, lane: Lane, verdict: str, detail: str) -> Found:
        """Of the check under way, which is then over."""
        check, now = lane.left.popleft(), time.monotonic()
        return Found(check.name, check.stage, verdict, detail, seconds=now - lane.since,
                     sensors=self.watch.between(lane.since, now),
                     rehearsal=self.setup.rehearsal)  # fmt: skip

    def drop(self, lane: Lane, waiting: deque[deque[Check]]) -> None:
        """Ends a lane; what it had left comes next."""
        lane.process.close()
        self.lanes.remove(lane)
        if lane.left:
            waiting.appendleft(lane.left)

    def give_up(self, waiting: deque[deque[Check]]) -> Iterator[Found]:
        left = [x for lane in self.lanes for x in lane.left] + [
            x for batch in waiting for x in batch
        ]
        for check in left:
            yield Found(check.name, check.stage, LEFT_OUT, f"the device is lost: {self.lost}",
                        rehearsal=self.setup.rehearsal)  # fmt: skip

    def close(self) -> None:
        for lane in self.lanes:
            lane.process.close()
        self.lanes.clear()


def batches(checks: list[Check], most: int) -> Iterator[deque[Check]]:
    """Neighbours share a process: few, so that processes end together."""
    room = max(1, min(MOST, -(-len(checks) // most)))
    batch: deque[Check] = deque()
    for check in checks:
        if batch and (check.fresh or batch[0].fresh or len(batch) >= room):
            yield batch
            batch = deque()
        batch.append(check)
    if batch:
        yield batch
