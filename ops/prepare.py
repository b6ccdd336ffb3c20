"""Have the kernels of a computation ready before it runs: found by a dry run, then built in parallel."""

from __future__ import annotations

import contextlib
import io
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

from . import build
from .call import Call
from .intercept import Interceptor, intercepted
from .scope import Scope, current
from .tensor import zeros

_alone = threading.RLock()  # a dry run replaces what belongs to the process: one at a time


class _DryRun(Interceptor):
    """Supplies zeros instead of launching, and remembers what would have been launched."""

    def __init__(self):
        self.requests: list[build.Request] = []

    def call(self, call: Call, launch: Callable[[Call], Any]) -> Any:
        plan = call.op.plan(call.args, call.constants)
        self.requests.append(plan.request())
        outputs = tuple(zeros(spec) for spec in plan.outputs)
        return outputs[0] if len(outputs) == 1 else outputs or None


def prepare(run: Callable[[], Any], progress: bool = True) -> int:
    """Build the kernels that `run()` calls, in parallel, launching none. Its ops give zeros, its prints go nowhere.

    Gives the number of kernels that had to be compiled; the others were in memory or in the disk cache.
    """
    dry = _DryRun()
    # What fails on zeros may be right on real values: the run that follows tells, with its own error.
    with _unnoticed(), intercepted(dry), contextlib.suppress(Exception):
        run()
    return build.prepare(dry.requests, progress)


@contextlib.contextmanager
def _unnoticed() -> Iterator[None]:
    """No output, no `breakpoint()`, and no pass is counted. Other threads notice nothing of it."""
    with _alone:
        hook, ours = sys.breakpointhook, threading.get_ident()
        sys.breakpointhook = lambda *args, **kwargs: None if threading.get_ident() == ours else hook(*args, **kwargs)
        token = current.set(Scope("", 0))
        out, err = _deaf(sys.stdout), _deaf(sys.stderr)
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                yield
        finally:
            current.reset(token)
            sys.breakpointhook = hook


def _deaf(stream: Any) -> Any:
    """A stream that drops what the calling thread writes; to all others it is `stream`."""
    ours, dropped = threading.get_ident(), io.StringIO()

    class Deaf:
        def __getattr__(self, name: str) -> Any:
            return getattr(dropped if threading.get_ident() == ours else stream, name)

    return Deaf()
