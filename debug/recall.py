"""A recorded call as a Call again, on the inputs that were kept; and a call launched once more, past all tools."""

from __future__ import annotations

import copy
from typing import Any

from ops import Call, OpError, Spec, Tensor
from ops.op import registry
from ops.scope import Scope

from .record import Record


def recalled(record: Record) -> Call:
    """The call of a record. Raises OpError when its inputs were not kept, or its op is not known here."""
    op = registry.get(record.op_name)
    if op is None:
        raise OpError(f"{record.full_address}: this process has no op {record.op_name}; import what defines it")
    _require(record, [f"input {name}" for name, value in record.inputs.items() if isinstance(value, Spec)])
    args = tuple(record.input(name) if isinstance(value, Spec) else value for name, value in record.inputs.items())
    return Call(op, args, record.constants, Scope(record.path, record.number), record.ordinal)


def kept_results(record: Record, call: Call) -> dict[str, Tensor]:
    """What it gave, by name as in `ops.difference.results`. Raises OpError when it was not kept."""
    outputs = [f"output {i}" if i else "output" for i in range(len(record.outputs))]
    _require(record, [*outputs, *(f"written {name}" for name in call.written)])
    return {name: record.held[name].tensor for name in outputs} | {name: record.written(name) for name in call.written}


def _require(record: Record, names: list[str]) -> None:
    missing = [name for name in names if name not in record.held]
    if missing:
        why = "the call did not return" if record.seconds is None and record.held else "trace with keep=True"
        raise OpError(f"{record.full_address}: {', '.join(missing)} was not kept, and is needed; {why}")


def launched(call: Call) -> tuple[Call, Any]:
    """Launch a call on copies of the arguments that it writes: the call with them, and what it gave."""
    written = call.written
    fresh = call.replace(
        tuple(copy.deepcopy(value) if name in written else value for name, value in call.inputs.items())
    )
    return fresh, call.op._launch(call.op.plan(fresh.args, fresh.constants), fresh)
