"""A profile as Chrome's trace event format: a JSON file that Perfetto and chrome://tracing open."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ops import Spec

if TYPE_CHECKING:
    from .timing import CallTime, ModuleTime


def write(path: Path, calls: Sequence[CallTime], modules: Sequence[ModuleTime]) -> Path:
    """Write the calls and module calls as complete events ("ph": "X"), times in us from the first of them."""
    timed = [*calls, *modules]
    zero = min((each.begin for each in timed), default=0)
    events = [*_names({each.thread for each in timed}), *_modules(modules, zero), *_calls(calls, zero)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ns"}))
    return path


def _names(threads: set[int]) -> Iterator[dict[str, Any]]:
    known = {thread.ident: thread.name for thread in threading.enumerate()}
    yield {"name": "process_name", "ph": "M", "pid": os.getpid(), "tid": 0, "args": {"name": "limpid"}}
    for thread in sorted(threads):
        name = {"name": known.get(thread, f"thread {thread}")}
        yield {"name": "thread_name", "ph": "M", "pid": os.getpid(), "tid": thread, "args": name}


def _slice(name: str, category: str, begin: int, duration: int, thread: int, args: dict[str, Any]) -> dict[str, Any]:
    return {
        "name": name, "cat": category, "ph": "X", "ts": begin / 1000, "dur": duration / 1000, "pid": os.getpid(),
        "tid": thread, "args": args,
    }  # fmt: skip


def _modules(modules: Sequence[ModuleTime], zero: int) -> Iterator[dict[str, Any]]:
    for each in sorted(modules, key=lambda module: (module.begin, -module.duration)):
        args = {"path": each.path, "class": each.kind, "pass": each.number}
        yield _slice(each.path or "model", "module", each.begin - zero, each.duration, each.thread, args)


def _calls(calls: Sequence[CallTime], zero: int) -> Iterator[dict[str, Any]]:
    for each in sorted(calls, key=lambda call: call.begin):
        args = {
            "address": each.address, "pass": each.number, "kernel": each.kernel_name,
            "inputs": {name: _plain(value) for name, value in each.inputs.items()},
            "outputs": [str(spec) for spec in each.outputs], "bytes": each.cost.bytes, "flops": each.cost.flops,
        }  # fmt: skip
        yield _slice(each.op_name, "op", each.begin - zero, each.duration, each.thread, args)
        if each.kernel:
            name = f"{each.op_name} kernel"
            yield _slice(name, "kernel", each.kernel_begin - zero, each.kernel, each.thread, {"address": each.address})


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Spec) else value
