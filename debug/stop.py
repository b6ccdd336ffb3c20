"""Stop: the debugger opens in the model's own frame, at the line that makes a call and before the call completes.

    debug.stop("layers.3.self_attn", when=debug.nonfinite)      # for the process, until removed
    with debug.stop("layers.0-3/rope", after=2):                # inside the `with`
        model(ids)

LIMPID_ON_ERROR=breakpoint opens it where an op fails.
"""

from __future__ import annotations

import atexit
import os
import sys
import threading
from collections.abc import Callable
from typing import Any, Self

import ops
from ops import Call, SelectorError
from ops.prepare import _DryRun
from ops.scope import Scope

from . import prompt
from .conditions import Condition
from .rewind import Pass
from .stopped import Stopped
from .tool import Tool

__limpid_plumbing__ = True  # frames of this file pass calls on: the model's line is further out

_lock = threading.Lock()
_stops: tuple[Stop, ...] = ()
_handle: Any = None  # of the one interceptor, while it is installed


def stop(where: Any = None, when: Condition | None = None, after: int = 0) -> Stop:
    """Open the debugger at the calls that the selector `where` means (all, when None), from now on, in all threads.

    Without `when` it opens before the launch. `when` is a function of the call, asked before the launch: what is true
    stops there; a function that it gives is asked of the output, after the launch and before the model gets it. So are
    `debug.nonfinite`, `debug.above(x)` and `debug.diverges(tolerance)`. The first `after` times that it would stop
    it goes on.

    Gives a handle with `hits`, `stopped` and `remove()`; in a `with` it is removed at the end, and a selector that
    meant no call raises SelectorError. At the prompt `call` and, after the launch, `output` are at hand, and the
    commands back, goto, rerun, edit, undo and reload: `help goto`.
    """
    return Stop(where, when, after).install()


def stops() -> tuple[Stop, ...]:
    """The stops that are set."""
    return _stops


def clear() -> None:
    """Remove all stops."""
    for each in _stops:
        each.remove()


class Stop(Tool):
    """A stop; see `stop`. `hits` counts the calls that its selector meant, `stopped` how often it stopped."""

    def __init__(self, where: Any, when: Condition | None, after: int):
        super().__init__(where)
        if when is not None and not callable(when):
            raise ops.OpError(f"when is {when!r}, expected a function of the call, or one of debug's conditions")
        if not isinstance(after, int) or isinstance(after, bool) or after < 0:
            raise ops.OpError(f"after is {after!r}, expected an integer, 0 or above")
        self.when, self.after, self.stopped, self._held = when, after, 0, 0

    def asked(self, call: Call) -> Any:
        """What the condition says before the launch."""
        return True if self.when is None else self.when(call)

    def due(self, answer: Any) -> str:
        """Why to stop for what a condition said; empty when it does not hold, or not often enough yet."""
        if not answer:
            return ""
        with _lock:
            self._held += 1
            if self._held <= self.after:
                return ""
            self.stopped += 1
        return (
            answer
            if isinstance(answer, str)
            else f"asked for by {self.where}"
            if self.when is None
            else "its condition holds"
        )

    def install(self) -> Self:
        global _stops
        with _lock:
            _stops = (*_stops, self)
        _arrange()
        return self

    def remove(self) -> None:
        """It stops no more. Removing twice is harmless."""
        global _stops
        with _lock:
            _stops = tuple(each for each in _stops if each is not self)
        _arrange()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        self.remove()
        if kind is None:
            self.check_hits()

    def unmet(self) -> str:
        """What is to be said of a selector that meant none of the calls that were made; empty when all is well."""
        try:
            if self._others:
                self.check_hits()
        except SelectorError as error:
            return str(error)
        return ""

    def __repr__(self) -> str:
        when = "" if self.when is None else f" when {getattr(self.when, '__qualname__', self.when)}"
        return (
            f"<stop at {self.where}{when.replace('.<locals>.condition', '')}, {self.hits} hits, {self.stopped} stops>"
        )


class Watch(ops.Interceptor):
    """The one interceptor of all stops: it records passes, so that they can go back, and opens the prompt."""

    def __init__(self) -> None:
        self.passes: dict[int, Pass] = {}

    @property
    def name(self) -> str:
        return "stop"

    def call(self, call: Call, launch: Callable[[Call], Any]) -> Any:
        if _dry():
            return launch(call)
        run = self.running(call.scope)
        step, before = run.begin(call)
        return run.repeat(step, call, launch) if before else Stopped(run, step).make(call, launch, _stops)

    def scope(self, scope: Scope, run: Callable[..., Any]) -> Any:
        if scope.parent is None or scope.parent.parent is not None or _dry():  # inside another module call, or for show
            return run(*scope.args, **scope.constants)
        whole = self.passes[scope.number] = Pass()
        try:
            return whole.run(scope, run)
        finally:
            del self.passes[scope.number]
            _arrange()

    def running(self, scope: Scope) -> Pass:
        """The pass that a call is part of; an empty one when it was not recorded from its beginning."""
        return self.passes.get(scope.number) or Pass(whole=False)


_watch = Watch()


def _arrange() -> None:
    """Have the interceptor on while there are stops, and until the passes that it records have ended."""
    global _handle
    with _lock:
        if _stops and _handle is None:
            _handle = ops.install(_watch)
        elif not _stops and not _watch.passes and _handle is not None:
            _handle.remove()
            _handle = None


def _dry() -> bool:
    """Whether this is a dry run of `ops.prepare`: it computes nothing, and nobody hears what is printed there."""
    return any(isinstance(each, _DryRun) for each in ops.intercept.chain())


def on_error(error: Exception, call: Call) -> None:
    """LIMPID_ON_ERROR=breakpoint: the prompt, where an op failed."""
    wanted = os.environ.get("LIMPID_ON_ERROR", "")
    if wanted not in ("", "breakpoint"):
        error.add_note(f"LIMPID_ON_ERROR is {wanted!r}; what it can be is breakpoint")
    if wanted != "breakpoint" or prompt.is_open() or _dry() or not prompt.enabled():
        return
    frame = sys._getframe(1)
    while prompt.is_runtime(frame) and frame.f_back is not None:
        frame = frame.f_back
    run = _watch.running(call.scope)
    Stopped(run, run.under_way(call)).fail(call, error, frame)


def _report() -> None:
    for message in filter(None, (each.unmet() for each in _stops)):
        print(message, file=sys.stderr)


ops.errors.on_error = on_error
atexit.register(_report)
