"""Have the kernels of a computation ready before it runs: found by a dry run, then built in parallel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from . import build
from .call import Call
from .intercept import Interceptor, intercepted
from .tensor import empty


class _DryRun(Interceptor):
    """Supplies uninitialised outputs instead of launching, and remembers what would have been launched."""

    def __init__(self):
        self.requests: list[build.Request] = []

    def call(self, call: Call, launch: Callable[[Call], Any]) -> Any:
        plan = call.op.plan(call.args, call.constants)
        self.requests.append(plan.request())
        outputs = tuple(empty(spec.shape, spec.dtype, spec.device) for spec in plan.outputs)
        return outputs[0] if len(outputs) == 1 else outputs or None


def prepare(run: Callable[[], Any], progress: bool = True) -> int:
    """Build the kernels that `run()` calls, in parallel, launching none: its values must not steer it.

    Gives the number of kernels that had to be compiled; the others were in memory or in the disk cache.
    """
    dry = _DryRun()
    with intercepted(dry):
        run()
    return build.prepare(dry.requests, progress)
