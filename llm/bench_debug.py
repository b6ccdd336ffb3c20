"""`limpid bench debug`: what debugging tools cost a decode step. They are given: this package knows none."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import ops
from ops import intercept, scope
from ops.interleave import interleaved
from ops.scope import current

from . import bench
from .generate import prepare

Tools = Mapping[str, Callable[[], AbstractContextManager[Any]]]

_CONTEXT = 64
_SLOW = 20  # times a plain step: slower sides are measured apart, a few times
_REPEAT = 200


class _Count(ops.Interceptor):
    """How many calls and module calls a step makes."""

    calls = modules = 0

    def call(self, call: Any, launch: Any) -> Any:
        self.calls += 1
        return launch(call)

    def scope(self, scope: Any, run: Any) -> Any:
        self.modules += 1
        return super().scope(scope, run)


def measure(case: bench.Case, tools: Tools) -> dict[str, Any]:
    """A decode step under each tool, the sides taking turns, and what it costs without one that there could be one."""
    model = case.model()
    cache = model.new_cache()
    prepare(model, _CONTEXT)
    model([1] * _CONTEXT, cache, logits_to_keep=1)

    def step() -> None:
        model([1], cache, logits_to_keep=1)
        cache.truncate(_CONTEXT)

    count = _Count()
    with ops.intercepted(count):
        step()
    sides = {name: _under(make, step) for name, make in tools.items() if case.shape == "tiny" or name != "check"}
    seconds = _medians(sides)
    off = seconds["off"]
    rows = [
        {
            "tool": name,
            "us_per_step": each * 1e6,
            "percent_of_decode": 100 * (each / off - 1),
            "us_per_call": (each - off) * 1e6 / count.calls,
        }
        for name, each in seconds.items()
        if name != "off"
    ]
    unused = _unused(count.calls, count.modules)
    return {
        "context": _CONTEXT,
        "calls_per_step": count.calls,
        "decode_us": off * 1e6,
        "off_us": unused * 1e6,
        "off_percent_of_decode": 100 * unused / off,
        "rows": rows,
    }


def _under(make: Callable[[], AbstractContextManager[Any]], step: Callable[[], None]) -> Callable[[], None]:
    def run() -> None:
        with make():
            step()

    return run


def _medians(sides: dict[str, Callable[[], None]]) -> dict[str, float]:
    """The quick sides take turns; the slow ones after them, with "off" among them."""
    quick, slow, least = {}, {}, 0.0
    for name, side in sides.items():
        side()  # what is built at the first time is no cost of the tool
        started = time.perf_counter()
        side()
        took = time.perf_counter() - started
        least = least or took
        (slow if took > _SLOW * least else quick)[name] = side
    seconds = interleaved(quick, 8.0)
    return seconds | (interleaved(slow, 4.0) if slow else {})


def _unused(calls: int, modules: int) -> float:
    """Seconds of a step that the seam spends for tools while none is on: counting calls, and looking for a tool."""
    names = {"op": 0}

    def nobody() -> None: ...

    def look() -> None:
        for _ in range(_REPEAT):
            counts = current.get().counts
            counts["op"] = counts.get("op", 0) + 1
            if intercept._installed or intercept._local.get():
                raise ops.OpError("a tool is on: measure without")

    def nothing() -> None:
        for _ in range(_REPEAT):
            names["op"]

    def inside() -> None:
        for _ in range(_REPEAT):
            scope.run(None, "inside", nobody, (), {})

    def plain() -> None:
        for _ in range(_REPEAT):
            nobody()

    sides = {"look": look, "nothing": nothing, "inside": lambda: scope.run(None, "", inside, (), {}), "plain": plain}
    seconds = interleaved(sides, 1.0)
    call, module = seconds["look"] - seconds["nothing"], seconds["inside"] - seconds["plain"]
    return (calls * call + modules * module) / _REPEAT
