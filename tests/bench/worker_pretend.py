"""A side that computes nothing, for the tests of what stands around it: `python -m tests.bench.worker_pretend`."""

from __future__ import annotations

import os
import sys
import threading
import time
from typing import Any

from .worker import serve


class Pretender:
    """Claims to have taken so many seconds for every run; prints where an answer would go, as libraries do."""

    def __init__(self, **variants: float):
        self.variants = variants

    def facts(self) -> dict[str, Any]:
        print("a library greets")
        return {"pid": os.getpid()}

    def measure(self, test: str, **sizes: int) -> dict[str, Any]:
        """As a `Side`; the test "fail" raises, "end" ends the process. `sleep` seconds pass before the answer; a
        thread spins for `spin` seconds after it."""
        print("a library talks")
        if test == "fail":
            raise ValueError("nothing to measure")
        if test == "end":
            sys.exit("no more")
        time.sleep(sizes.get("sleep", 0))
        threading.Thread(target=_spin, args=(sizes.get("spin", 0),), daemon=True).start()
        return {"seconds": {name: [each] * 3 for name, each in self.variants.items()}, "compiles": 0}


def _spin(seconds: float) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        pass


if __name__ == "__main__":
    serve(Pretender)
