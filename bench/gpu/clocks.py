"""Clock, power and temperature of the GPU while a figure is measured, and whether it throttles.

By pynvml where that can be imported, else by nvidia-smi, else unknown. Nothing here touches CUDA:
the process that watches is not the one that measures.
"""

from __future__ import annotations

import os
import subprocess
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

PERIOD = 0.5  # seconds from one reading to the next
REASONS = {  # bits of NVML's clocksEventReasons that mean: slower than the clock it could have
    0x4: "power cap", 0x8: "hardware slowdown", 0x20: "thermal slowdown",
    0x40: "hardware thermal slowdown", 0x80: "power brake",
}  # fmt: skip
QUERIES = (  # the last is called by another name in older drivers
    "clocks.sm,clocks.mem,power.draw,temperature.gpu,clocks_event_reasons.active",
    "clocks.sm,clocks.mem,power.draw,temperature.gpu,clocks_throttle_reasons.active",
    "clocks.sm,clocks.mem,power.draw,temperature.gpu",
)
Reading = dict[str, float]  # MHz, MHz, W, °C, bits; what is not known is not in it


def visible() -> str:
    """The GPU that CUDA calls 0, as nvidia-smi names it."""
    return os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip() or "0"


def by_nvidia_smi(gpu: str | None = None) -> Callable[[], Reading]:
    """Raises OSError where there is none, or it answers none of the queries."""
    gpu = gpu if gpu is not None else visible()
    for query in QUERIES:
        with suppress(subprocess.SubprocessError, ValueError):
            if ask_nvidia_smi(query, gpu):
                return partial(ask_nvidia_smi, query, gpu)
    raise OSError("nvidia-smi answers no query")


def ask_nvidia_smi(query: str, gpu: str) -> Reading:
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader,nounits", "-i", gpu]
    found = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True)
    return parse(found.stdout)


def parse(text: str) -> Reading:
    """A line of nvidia-smi: '1980, 2619, 312.45, 51, 0x0000000000000004'; '[N/A]' is unknown."""
    names = ("clock", "memory_clock", "power", "temperature", "reasons")
    reading: Reading = {}
    for name, value in zip(names, text.splitlines()[0].split(","), strict=False):
        with suppress(ValueError):
            reading[name] = int(value, 16) if name == "reasons" else float(value)
    return reading


def by_pynvml() -> Callable[[], Reading]:
    """Raises ImportError, or pynvml's errors."""
    import pynvml

    pynvml.nvmlInit()
    name = visible()
    number = name.isdigit()
    handle = (
        pynvml.nvmlDeviceGetHandleByIndex(int(name))
        if number
        else pynvml.nvmlDeviceGetHandleByUUID(name)
    )
    reasons = getattr(pynvml, "nvmlDeviceGetCurrentClocksEventReasons", None)
    reasons = reasons or pynvml.nvmlDeviceGetCurrentClocksThrottleReasons
    ask: dict[str, Callable[[], float]] = {
        "clock": lambda: pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM),
        "memory_clock": lambda: pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_MEM),
        "power": lambda: pynvml.nvmlDeviceGetPowerUsage(handle) / 1e3,
        "temperature": lambda: pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU),
        "reasons": lambda: reasons(handle),
    }

    def read() -> Reading:
        reading: Reading = {}
        for what, value in ask.items():
            with suppress(pynvml.NVMLError):
                reading[what] = value()
        return reading

    return read


def sensor() -> Callable[[], Reading] | None:
    for way in (by_pynvml, by_nvidia_smi):
        try:
            read = way()
            if read():
                return read
        except Exception:  # whatever an odd driver answers: then it is unknown
            continue
    return None


@dataclass
class Watch:
    """Reads the sensors every PERIOD, until closed. `sensor` None: everything is unknown."""

    read: Callable[[], Reading] | None

    def __post_init__(self) -> None:
        self.readings: list[tuple[float, Reading]] = []
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self.run, daemon=True)
        if self.read:
            self.thread.start()

    def run(self) -> None:
        while not self.ended.is_set():
            self.take()
            self.ended.wait(PERIOD)

    def take(self) -> None:
        assert self.read
        try:
            reading = self.read()
        except Exception:  # nvidia-smi hangs or fails where the device is lost
            reading = {}
        if reading:
            self.readings.append((time.monotonic(), reading))

    def close(self) -> None:
        self.ended.set()

    def between(self, start: float, end: float) -> dict[str, Any]:
        """Of the readings then, and the one before: the clock's median and least, the largest of
        the others, and what held the clock down. {}: unknown."""
        before = [x for at, x in self.readings if at < start][-1:]
        found = [x for at, x in self.readings if start <= at <= end] or before
        if not found:
            return {}

        def of(name: str) -> list[float]:
            return [x[name] for x in found if name in x]

        result: dict[str, Any] = {}
        if clocks := of("clock"):
            result |= {"clock": median(clocks), "least_clock": min(clocks)}
        for name in ("memory_clock", "power", "temperature"):
            if values := of(name):
                result[name] = max(values)
        bits = 0
        for value in of("reasons"):
            bits |= int(value)
        if held := [word for bit, word in REASONS.items() if bits & bit]:
            result["throttled"] = ", ".join(held)
        return result


def shown(sensors: dict[str, Any]) -> str:
    """'1980 MHz, 312 W, 51 °C', with what throttled it; 'clock unknown'."""
    parts = []
    for name, unit in (("clock", "MHz"), ("power", "W"), ("temperature", "°C")):
        if name in sensors:
            parts.append(f"{sensors[name]:.0f} {unit}")
    if not parts:
        return "clock, power and temperature unknown"
    if "throttled" in sensors:
        parts.append(f"THROTTLED: {sensors['throttled']}")
    return ", ".join(parts)
