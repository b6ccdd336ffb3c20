"""A worker's end of the pipe: one request a line, one answer a line, both JSON. Imports nothing that is measured."""

from __future__ import annotations

import json
import os
import random
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any, Protocol

WARM = 2  # steps before the timed ones: they bring threads and caches back from the other side's turn


class Side(Protocol):
    """What a worker serves."""

    def facts(self) -> dict[str, Any]:
        """Versions and settings."""
        ...

    def measure(self, test: str, **sizes: int) -> dict[str, Any]:
        """{"seconds": {variant: the seconds of every run}} of "decode", "prefill" or "gemm"."""
        ...


def serve(make: Callable[..., Side]) -> None:
    """Answer until the pipe closes: {"open": arguments of `make`} with facts, {"test": ...} with seconds.

    What fails is answered with {"error": ..., "trace": ...}.
    """
    with os.fdopen(os.dup(1), "w", buffering=1) as answers:
        os.dup2(2, 1)  # what libraries print goes to the log
        side: Side | None = None
        for line in sys.stdin:
            request = json.loads(line)
            try:
                if "open" in request:
                    side = make(**request["open"])
                    answer = side.facts()
                elif side is None:
                    raise RuntimeError("a test came before the side was opened; send {'open': ...} first")
                else:
                    answer = side.measure(**request)
            except Exception as error:
                answer = {"error": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()}
            print(json.dumps(answer), file=answers)


def timed(run: Callable[[], Any], warm: int, least: int, seconds: float = 0.0) -> list[float]:
    """Seconds of each run after `warm` untimed ones: at least `least`, and more until `seconds` are over."""
    for _ in range(warm):
        run()
    times: list[float] = []
    while len(times) < least or sum(times) < seconds:
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return times


def tokens(count: int, config: dict[str, Any]) -> list[int]:
    """Random token ids, the same on all sides."""
    return random.Random(count).choices(range(config["vocab_size"]), k=count)
