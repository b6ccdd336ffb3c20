"""Profile: where the time of a model goes, by op and by layer, against what the machine can do.

    with debug.profile() as p:
        model(ids)
    p                               # tables by op and by layer
    p.save_trace("trace.json")      # opens in Perfetto (ui.perfetto.dev) and chrome://tracing
    p.diff(other)                   # what changed

The time of a kernel is that of its compiled function alone. What is left of a forward, less what the profile knows to
be its own work, is the most that Python and dispatch can take; `p.overhead(run)` measures it with no tool on.
"""

from __future__ import annotations

import re
import statistics
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import ops
from ops import Call, ceilings, html
from ops.costs import Cost, cost, depends_on_values
from ops.plan import Plan
from ops.scope import Scope
from ops.table import Table

from . import timing
from .chrome_trace import write
from .roofline import plot
from .timing import CallTime, ModuleTime, clock, now
from .tool import Tool


class Overhead(NamedTuple):
    """Seconds of one run with no tool on, and in its kernels; what is left is Python and dispatch."""

    seconds: float
    kernel_seconds: float

    @property
    def python_seconds(self) -> float:
        return self.seconds - self.kernel_seconds


class Row(NamedTuple):
    """Calls of one op, or in one layer: seconds in their kernels, the least bytes and flops that they need."""

    name: str
    calls: int
    seconds: float
    bytes: int
    flops: int
    device: str = "cpu"

    @property
    def percent_of_bandwidth(self) -> float:
        return 100 * self.bytes / self.seconds / ceilings.bandwidth(self.device) if self.seconds else 0.0

    @property
    def percent_of_peak(self) -> float | None:
        """None on a device whose peak is not known."""
        peak = ceilings.peak(self.device)
        return None if peak is None else 100 * self.flops / self.seconds / peak if self.seconds else 0.0

    @property
    def bound(self) -> str:
        """The roof that is reached first: "memory" or "compute"; nothing where a roof is not known."""
        peak = ceilings.peak(self.device)
        if peak is None:
            return ""
        return "compute" if self.flops / peak > self.bytes / ceilings.bandwidth(self.device) else "memory"


_KEYS: dict[str, Callable[[CallTime], str]] = {
    "op": lambda call: call.op_name,
    "layer": lambda call: layer(call.path),
    "call": lambda call: call.address,
}


def layer(path: str) -> str:
    """The layer that a path lies in: up to the first number, `layers.3`, else its first name; "model" for the rest."""
    numbered = re.match(r"(.*?\.)?\d+(?=\.|$)", path)
    return numbered[0] if numbered else path.partition(".")[0] or "model"


class Profile(Tool):
    """Times the calls that the selector `where` means (all, when None) inside `with`.

    `by("op")`, `by("layer")` and `by("call")` are tables, `rows(...)` their numbers; printed, it is the first two.
    `calls` and `modules` are the single times. Percentages are of the read bandwidth and of the float32 FMA peak, which
    are measured once: above 100 % of the bandwidth operands came from the caches, above 100 % of the peak they were
    narrower than float32.
    """

    def __init__(self, where: Any = None):
        super().__init__(where)
        self.calls: list[CallTime] = []
        self.modules: list[ModuleTime] = []
        self._overhead: Overhead | None = None
        self._told = timing.Clock()  # kernels that are some call's already
        self._plans: dict[Plan, tuple[dict[str, Any], Cost | None]] = {}

    def __enter__(self) -> Profile:
        super().__enter__()
        timing.start(self._plans)
        return self

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        timing.stop(self._plans)
        super().__exit__(kind, error, traceback)

    def call(self, call: Call, launch: Callable[[Call], Any]) -> Any:
        entered = now()
        plan = call.op.plan(call.args, call.constants)
        known = self._plans.get(plan)
        if known is None:
            known = self._begin(plan, call)
        inputs, needs = known
        meant, use = self.means(call), call.op.used_for(call)
        needs = needs or (cost(call) if meant else Cost(0, 0))
        own, before, inside, begin = clock.own, clock.kernel, self._told.kernel, now()
        output = launch(call)
        end = now()
        if use is not None:  # another kernel, perhaps in Python: its launch is what can be timed
            clock.kernel, clock.begin = before + end - begin, begin
        kernel = clock.kernel - before - (self._told.kernel - inside)  # without calls that this one was made of
        self._told.kernel += kernel
        if meant:
            self.calls.append(CallTime(
                call.path, call.op.name, call.ordinal, call.scope.number, inputs, plan.outputs,
                use.kernel.name if use else "tvm", begin, end - begin, clock.begin, kernel,
                needs if kernel else Cost(0, 0), threading.get_ident(),
            ))  # fmt: skip
        clock.own = own + now() - entered - (clock.kernel - before)  # all but the kernels, calls inside included
        return output

    def _begin(self, plan: Plan, call: Call) -> tuple[dict[str, Any], Cost | None]:
        """Time a plan; gives its inputs and what it costs, None where that depends on the values."""
        timing.start([plan])
        inputs = {
            name: spec.__name__ if isinstance(spec, type) else spec
            for name, spec in zip(call.op.parameters, plan.specs, strict=False)
        }
        known = self._plans[plan] = inputs, None if depends_on_values(call.op) else cost(call)
        return known

    def scope(self, scope: Scope, run: Callable[..., Any]) -> Any:
        kernel, own, begin = clock.kernel, clock.own, now()
        output = run(*scope.args, **scope.constants)
        end = now()
        self.modules.append(ModuleTime(
            scope.path, type(scope.module).__name__, scope.number, begin, end - begin, clock.kernel - kernel,
            clock.own - own, threading.get_ident(),
        ))  # fmt: skip
        clock.own += now() - end
        return output

    def rows(self, by: str = "op") -> list[Row]:
        """The calls put together "op" by op, "layer" by layer, or "call" by call (over the passes), slowest first."""
        if by not in _KEYS:
            raise ops.OpError(f"by is {by!r}, expected {', '.join(map(repr, _KEYS))}")
        groups: dict[str, list[CallTime]] = {}
        for call in self.calls:
            groups.setdefault(_KEYS[by](call), []).append(call)
        rows = [
            Row(name, len(calls), sum(c.kernel for c in calls) / 1e9,
                sum(c.cost.bytes for c in calls), sum(c.cost.flops for c in calls), self.device)
            for name, calls in groups.items()
        ]  # fmt: skip
        return sorted(rows, key=lambda row: -row.seconds)

    @property
    def device(self) -> str:
        """Where the calls were computed."""
        return next((spec.device for call in self.calls for spec in call.outputs), "cpu")

    @property
    def forwards(self) -> list[ModuleTime]:
        """The outermost module calls."""
        return [each for each in self.modules if not each.path]

    @property
    def kernel_seconds(self) -> float:
        """In kernels, of the calls that were meant."""
        return sum(call.kernel for call in self.calls) / 1e9

    @property
    def python_seconds(self) -> float:
        """In Python and dispatch, in all forwards, at most: some of what the seam does for a tool is in it."""
        return sum(each.python for each in self.forwards) / 1e9

    def python_by_layer(self) -> dict[str, float]:
        """Seconds in Python and dispatch, by layer; "model" has what is outside of the others."""
        found: dict[str, float] = {}
        for each in self.modules:
            if each.path and each.path == layer(each.path):
                found[each.path] = found.get(each.path, 0.0) + each.python / 1e9
        return found | {"model": max(self.python_seconds - sum(found.values()), 0.0)}

    def overhead(self, run: Callable[[], Any], repeat: int = 9) -> Overhead:
        """Run again what was profiled, `repeat` times with no tool on and as often with clocks at the kernels: medians.

        A kernel in use (`op.use`) counts as Python here.
        """
        totals, kernels = [], []
        for _ in range(repeat):
            begin = now()
            run()
            ops.device.wait(self.device)
            totals.append(now() - begin)
            timing.start(self._plans)
            before = clock.kernel
            try:
                run()
            finally:
                timing.stop(self._plans)
            kernels.append(clock.kernel - before)
        self._overhead = Overhead(statistics.median(totals) / 1e9, statistics.median(kernels) / 1e9)
        return self._overhead

    def by(self, by: str = "op") -> Table:
        """The table of `rows(by)`; by layer with the time in Python and dispatch."""
        rows, total, python = self.rows(by), self.kernel_seconds, self.python_by_layer()
        columns = [by, "calls", "us", "share %", "us/call", "bytes", "flops", "% bandwidth", "% peak", "bound by"]
        made = [
            [row.name, row.calls, row.seconds * 1e6, 100 * row.seconds / (total or 1), row.seconds * 1e6 / row.calls,
             row.bytes, row.flops, row.percent_of_bandwidth, row.percent_of_peak, row.bound]
            for row in rows
        ]  # fmt: skip
        if by == "layer":
            columns.append("python us")
            made = [[*each, python.get(each[0], 0.0) * 1e6] for each in made]
        note = "python us: in Python and dispatch, at most" if by == "layer" else ""
        return Table(f"by {by}", columns, made, note, shares=("share %", "% bandwidth", "% peak"))

    def summary(self) -> str:
        """What the forwards took, in a line."""
        kernels = f"kernels {_time_of(self.kernel_seconds)}"
        where, roofs = self.device, ", ".join(ceilings.described(self.device))
        if self.forwards:
            count = f"{len(self.forwards)} forward{'s' if len(self.forwards) > 1 else ''}, "
            python = f", Python and dispatch at most {_time_of(self.python_seconds)}"
        else:
            count = python = ""
        if self._overhead:
            seconds, own = self._overhead.seconds, self._overhead.python_seconds
            python = f"; a run with no tool on {_time_of(seconds)}, {own / seconds:.1%} of it Python and dispatch"
        return (
            f"{count}{len(self.calls)} calls: {kernels}{python}. {'This machine' if where == 'cpu' else where}: {roofs}"
        )

    def __repr__(self) -> str:
        return "\n\n".join([self.summary(), repr(self.by("op")), repr(self.by("layer"))])

    def roofline(self, by: str = "op") -> str:
        """The roofline plot as SVG: operations a second over operations a byte, and the two roofs.

        Raises OpError on a device, whose peak is not known.
        """
        peak = ceilings.peak(self.device)
        if peak is None:
            raise ops.OpError(f"no roofline of {self.device!r}: only the CPU's peak is measured")
        return plot(self.rows(by), ceilings.bandwidth(self.device), peak)

    def _repr_html_(self) -> str:
        tables = self.by("op").html(), self.by("layer").html()
        plots = [self.roofline()] if ceilings.peak(self.device) is not None else []
        return html.box(html.head("profile"), html.note(self.summary()), tables[0], *plots, tables[1])

    def save_trace(self, path: str | Path) -> Path:
        """Write Chrome's trace event format, which Perfetto opens: nested slices of modules, ops and kernels."""
        return write(Path(path), self.calls, self.modules)

    def diff(self, other: Profile) -> Diff:
        """What changed from this profile to `other`."""
        return Diff(self, other)


class Diff:
    """What changed from profile `before` to `after`: `by("op")`, `by("layer")` and `by("call")` are tables."""

    def __init__(self, before: Profile, after: Profile):
        self.before, self.after = before, after

    def by(self, by: str = "op") -> Table:
        """Times in kernels before and after, the largest change first; by layer also those in Python and dispatch.

        "a call %" is the change of the time of one call.
        """
        a, b = ({row.name: row for row in each.rows(by)} for each in (self.before, self.after))
        python = [each.python_by_layer() for each in (self.before, self.after)]
        rows = []
        for name in a | b:
            one, two = (each.get(name, Row(name, 0, 0.0, 0, 0)) for each in (a, b))
            change = (two.seconds - one.seconds) * 1e6
            each_call = [row.seconds / row.calls if row.calls else 0.0 for row in (one, two)]
            percent = 100 * (each_call[1] / each_call[0] - 1) if all(each_call) else None
            row = [name, one.calls, two.calls, one.seconds * 1e6, two.seconds * 1e6, change, percent]
            rows.append(row + [each.get(name, 0.0) * 1e6 for each in python] * (by == "layer"))
        columns = [by, "calls before", "calls after", "us before", "us after", "change us", "a call %"]
        columns += ["python before", "python after"] * (by == "layer")
        note = "python: us in Python and dispatch, at most" if by == "layer" else ""
        return Table(f"by {by}", columns, sorted(rows, key=lambda row: -abs(row[5])), note)

    def summary(self) -> str:
        """The change of all kernels and of Python, in a line."""
        pairs = {
            "kernels": (self.before.kernel_seconds, self.after.kernel_seconds),
            "Python and dispatch": (self.before.python_seconds, self.after.python_seconds),
        }
        return ", ".join(f"{name} {_time_of(a)} -> {_time_of(b)}" for name, (a, b) in pairs.items())

    def __repr__(self) -> str:
        return "\n\n".join([self.summary(), repr(self.by("op")), repr(self.by("layer"))])

    def _repr_html_(self) -> str:
        return html.box(
            html.head("difference of two profiles"), html.note(self.summary()),
            self.by("op").html(), self.by("layer").html(),
        )  # fmt: skip


def _time_of(seconds: float) -> str:
    """A time for people."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"


profile = Profile  # a class, as in torch: `debug.profile.diff(a, b)` is `a.diff(b)`
