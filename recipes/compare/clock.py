"""How long the parts of a step take: time of the process on a CPU, events on a GPU, read when all is done."""

from __future__ import annotations

import statistics
import time

import torch


class Clock:
    """
    Adds up, step after step, what lies between `start` and `stop`.

    Args:
        device (`str`): Where the steps run; on `"cuda"` nothing waits for the device before [`~Clock.milliseconds`].
    """

    def __init__(self, device: str) -> None:
        self._events = device.startswith("cuda")
        self._parts: list[list[tuple]] = []

    def step(self) -> None:
        """A step begins."""
        self._parts.append([])

    def start(self) -> None:
        self._parts[-1].append((self._now(),))

    def stop(self) -> None:
        self._parts[-1][-1] += (self._now(),)

    def _now(self):
        if not self._events:
            return time.process_time()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def milliseconds(self) -> float:
        """Median of a step."""
        if self._events:
            torch.cuda.synchronize()
            return statistics.median(sum(a.elapsed_time(b) for a, b in parts) for parts in self._parts)
        return 1e3 * statistics.median(sum(b - a for a, b in parts) for parts in self._parts)
