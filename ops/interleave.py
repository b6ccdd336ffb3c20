"""Sides of a comparison that take turns, so that a machine whose speed drifts is drifting for all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any


def interleaved(sides: dict[str, Callable[[], Any]], seconds: float = 2.0, batch: int = 1) -> dict[str, float]:
    """Median seconds of one run of each side. The sides take turns; each turn runs a side `batch` times."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for side in sides.values():
        side()
    until = time.perf_counter() + seconds
    while time.perf_counter() < until or min(map(len, times.values())) < 3:
        for name, side in sides.items():
            started = time.perf_counter()
            for _ in range(batch):
                side()
            times[name].append((time.perf_counter() - started) / batch)
    return {name: statistics.median(each) for name, each in times.items()}
