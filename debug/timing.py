"""Times: of a plan's compiled function, apart from all that is around it; of calls and of module calls.

All are in ns by `time.perf_counter_ns`.
"""

from __future__ import annotations

import inspect
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from ops import Spec, build
from ops import device as devices
from ops.costs import Cost
from ops.plan import Plan

now = time.perf_counter_ns


class Clock(threading.local):
    """Of one thread: the time in compiled functions, when the last one began, and the time that profiles took."""

    kernel = 0
    begin = 0
    own = 0


clock = Clock()


class Timed:
    """A plan's compiled function while profiles time it, on a device to the end of its kernel."""

    __slots__ = ("device", "run")

    def __init__(self, run: Callable[..., Any], device: str):
        self.run, self.device = run, device

    def __call__(self, *data: Any) -> None:
        begin = now()
        self.run(*data)
        devices.wait(self.device)
        took = now() - begin
        clock.kernel += took
        clock.begin = begin


_lock = threading.Lock()
_users: dict[Plan, int] = {}  # the plans that are timed, and by how many profiles


def start(plans: Iterable[Plan]) -> None:
    """Time the compiled functions of these plans until `stop`, as often as they were started."""
    with _lock:
        for plan in plans:
            if plan not in _users:
                if inspect.ismethod(plan.run):  # not built yet, and building is not the kernel's time
                    plan.run = build.function(plan.request())
                plan.run = Timed(plan.run, plan.request().device)
            _users[plan] = _users.get(plan, 0) + 1


def stop(plans: Iterable[Plan]) -> None:
    """Undo one `start` of these plans."""
    with _lock:
        for plan in plans:
            _users[plan] -= 1
            if not _users[plan]:
                del _users[plan]
                plan.run = plan.run.run  # type: ignore[attr-defined]


class CallTime(NamedTuple):
    """One call: `begin` and `duration` of its launch, `kernel_begin` and `kernel` of its kernel in it."""

    path: str
    op_name: str
    ordinal: int
    number: int
    inputs: dict[str, Any]
    outputs: tuple[Spec, ...]
    kernel_name: str
    begin: int
    duration: int
    kernel_begin: int
    kernel: int
    cost: Cost
    thread: int

    @property
    def address(self) -> str:
        return f"{self.path}/{self.op_name}[{self.ordinal}]"


class ModuleTime(NamedTuple):
    """One module call: all of it, the kernels in it, and what the profile itself took meanwhile."""

    path: str
    kind: str
    number: int
    begin: int
    duration: int
    kernel: int
    own: int
    thread: int

    @property
    def python(self) -> int:
        """Python and dispatch."""
        return max(self.duration - self.kernel - self.own, 0)
