"""A hand-written kernel on trial: for which kinds of calls it was right, for which wrong, and when it is checked.

A kind is the shapes, dtypes and constants of a call. The first call of each kind is compared with the reference, and
only a kernel that was right there runs in this process; how often it is checked later is the swap's `Schedule`.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from . import verify
from .call import Call, Kernel
from .tensor import Tensor

_KINDS = 4096  # that are remembered; then each is checked anew


@dataclass(frozen=True)
class Failure:
    """What went wrong with a call. `known`: the kind is in quarantine, and nothing was computed."""

    what: str
    error: Exception | None = None
    known: bool = False


class Trial:
    """One kernel of a swap; a reload begins another trial. `right` counts the live calls that were compared."""

    def __init__(self, kernel: Kernel, edge_cases: int, text: str | None):
        self.kernel, self.text = kernel, text
        self.checked = edge_cases
        self.right, self.calls = 0, 0
        self.seconds, self.timed = 0.0, 0  # in the kernel, of calls that were not checked
        self.quarantined: dict[tuple, str] = {}  # why, by the kind of call
        self._proven: set[tuple] = set()
        self._lock = threading.Lock()

    @property
    def microseconds(self) -> float | None:
        """Of a call that was not checked."""
        return self.seconds / self.timed * 1e6 if self.timed else None

    def launch(self, call: Call, outputs: tuple[Tensor, ...], schedule: verify.Schedule) -> Failure | None:
        """Compute, and compare where the schedule or a new kind asks for it. What a failed call wrote is put back."""
        kind = kind_of(call)
        if kind in self.quarantined:
            return Failure(self.quarantined[kind], known=True)
        with self._lock:
            number, self.calls = self.calls, self.calls + 1
        new = kind not in self._proven
        trusted = not schedule.checks or (not new and number >= schedule.first and not self.quarantined)
        run = self.kernel.launch_here if trusted else self.kernel.launch
        if schedule.means(number) or (new and schedule.checks):
            return self._checked(run, call, outputs, kind)
        begin = time.perf_counter()
        try:
            run(call, outputs)
        except Exception as error:
            if call.op.writes:  # nobody kept what was there before
                raise
            return Failure(_said(call, error), error)
        self.seconds, self.timed = self.seconds + time.perf_counter() - begin, self.timed + 1
        return None

    def _checked(self, run: Any, call: Call, outputs: tuple[Tensor, ...], kind: tuple) -> Failure | None:
        before = {name: each.numpy().copy() for name, each in call.written.items()}
        comparison = verify.Comparison(call, outputs)
        failure: Failure | None = None
        try:
            run(call, outputs)
        except Exception as error:
            failure = Failure(_said(call, error), error)
        wrong = comparison.wrong() if failure is None else None
        with self._lock:
            self.checked += 1
            if failure is None and wrong is None:
                self.right += 1
                if len(self._proven) >= _KINDS:
                    self._proven.clear()
                self._proven.add(kind)
                return None
        for name, each in call.written.items():
            np.copyto(each.numpy(), before[name])
        return failure or Failure(str(wrong))


def _said(call: Call, error: Exception) -> str:
    kind = "" if type(error).__module__.startswith("ops.") else f"{type(error).__name__}: "
    return f"{verify.shown(call)}: {kind}{error}"


def kind_of(call: Call) -> tuple:
    """Shapes, dtypes and constants of a call."""
    specs = [each.spec if isinstance(each, Tensor) else type(each) for each in call.args]
    return (*specs, *call.constants.items())


def kind_text(kind: tuple) -> str:
    """A kind for people: what its arguments are."""
    shown = [each.__name__ if isinstance(each, type) else str(each) for each in kind if not isinstance(each, tuple)]
    return f"({', '.join(shown)})"
