"""Trace: what a model computed, call by call.

with debug.trace("layers.0.*", keep=True) as t:
    model(ids)
t                                              # a table
t["layers.0.self_attn/rope[1]"].output         # a tensor
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, overload

import ops
from ops import Call, Selector, Tensor
from ops.call import tensors
from ops.scope import Scope

from . import storage
from .record import Held, Keeper, Record, described
from .show_code import calls
from .statistics import taken
from .tool import Tool

_ROWS = 60  # of a table that is longer, as many are shown


class ModuleRecord:
    """One module call: its path and pass, how long it took, and its inputs and output where they were kept."""

    __slots__ = ("held", "kind", "number", "path", "seconds")

    def __init__(self, scope: Scope):
        self.path, self.number, self.kind = scope.path, scope.number, type(scope.module).__name__
        self.seconds: float | None = None
        self.held: dict[str, Any] = {}

    @property
    def output(self) -> Tensor:
        """The kept output, the first where there are several. Raises KeyError when it was not kept."""
        if "output" not in self.held:
            raise KeyError(f"{self.path or 'model'}@{self.number}: its output was not kept; trace with keep=True")
        return self.held["output"].tensor

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """The kept positional inputs that are tensors."""
        return tuple(held.tensor for name, held in self.held.items() if name.startswith("input"))

    def __repr__(self) -> str:
        took = "did not return" if self.seconds is None else f"{self.seconds * 1e6:.1f} us"
        return f"{self.path or 'model'}@{self.number}  {self.kind}  {took}"


class Recording:
    """Records of calls, in the order they were made. `[3]` and `[2:5]` take some; `["path/op[ordinal]"]` takes one."""

    def __init__(self, records: Iterable[Record] = (), modules: Iterable[ModuleRecord] = ()):
        self.records, self.modules = list(records), list(modules)

    def __len__(self) -> int:
        return len(self.records)

    def __iter__(self) -> Iterator[Record]:
        return iter(self.records)

    @overload
    def __getitem__(self, key: int) -> Record: ...
    @overload
    def __getitem__(self, key: slice) -> Recording: ...
    @overload
    def __getitem__(self, key: str) -> Any: ...

    def __getitem__(self, key: Any) -> Any:
        """A record by index or address, `layers.0/add[1]`, with the pass where there are several, `layers.0/add[1]@2`.

        A path without an op, `layers.0.self_attn`, gives the record of the module call.
        """
        if isinstance(key, slice):
            return Recording(self.records[key])
        if not isinstance(key, str):
            return self.records[key]
        path, _, number = key.partition("@")
        found = self.records if "/" in path else self.modules
        matching = [each for each in found if _address(each) == path and number in ("", str(each.number))]
        if len(matching) == 1:
            return matching[0]
        if matching:
            numbers = ", ".join(str(each.number) for each in matching[:8])
            raise KeyError(f"{key} is in the passes {numbers}: add one, as {path}@{matching[0].number}, or use filter")
        near = Selector(path).nearest([*map(_address, self.records), *map(_address, self.modules)])
        raise KeyError(f"no {key} among {len(self)} calls; nearest: {', '.join(near) or 'nothing'}")

    def filter(self, where: Any) -> Recording:
        """The calls that a selector means; a function gets the record."""
        selector = Selector(where)
        return Recording(each for each in self.records if selector.matches(each))  # type: ignore[arg-type]

    def save(self, folder: str | Path) -> Path:
        """Write `records.json` and `tensors.safetensors` into a new folder, atomically."""
        return storage.save(self.records, Path(folder))

    @staticmethod
    def load(folder: str | Path) -> Recording:
        """A saved recording. Raises OpError for files that are not one."""
        return Recording(storage.load(Path(folder)))

    def rows(self) -> list[dict[str, str]]:
        """The table as text, a row a call."""
        return [
            {
                "call": each.full_address,
                "inputs": ", ".join(f"{value}" for value in each.inputs.values() if value is not None),
                "output": ", ".join(map(str, each.outputs)),
                "values": "; ".join(map(described, each.statistics)),
                "us": "" if each.seconds is None else f"{each.seconds * 1e6:.1f}",
                "line": each.source,
            }
            for each in self.records
        ]

    def __repr__(self) -> str:
        return storage.table(self.rows(), _ROWS)

    def _repr_html_(self) -> str:
        return calls(self.records)._repr_html_()


def _address(record: Any) -> str:
    return record.address if isinstance(record, Record) else record.path


class Trace(Tool, Recording):
    """Records the calls that `where` means, and module calls, while it is on; see `trace`."""

    def __init__(self, where: Any, keep: bool | str, statistics: bool, limit: int):
        Tool.__init__(self, where)
        Recording.__init__(self)
        if keep not in (True, False, "outputs"):
            raise ops.OpError(f"keep is {keep!r}, expected True, False or 'outputs'")
        self._inputs, self._outputs, self._statistics = keep is True, bool(keep), statistics
        self.keeper = Keeper(limit)
        self._lines: dict[tuple[int, int], tuple[Any, str]] = {}  # the code too, so that its id stays its own

    def call(self, call: Call, launch: Callable[[Call], Any]) -> Any:
        record = self._begun(call) if self.means(call) else None
        for tensor in call.written.values() if call.op.writes and self._outputs else ():
            self.keeper.before_writing(tensor)
        if record is None:
            return launch(call)
        ops.device.wait(call.device)  # for what was started before, whose time is not this call's
        started = time.perf_counter()
        output = launch(call)
        ops.device.wait(call.device)
        record.seconds = time.perf_counter() - started
        self._look(record, call, output)
        return output

    def _begun(self, call: Call) -> Record:
        """The record of a call that is about to be launched: a kernel may not come back."""
        record = Record(call, self._line(call))
        self.records.append(record)
        if self._inputs:
            for name, value in call.inputs.items():
                if isinstance(value, Tensor):
                    record.held[f"input {name}"] = self.keeper.keep(value, made=False)
        return record

    def _line(self, call: Call) -> str:
        """`call.source`, put together once for a line: a model makes the same calls again and again."""
        frame = call.frame
        if frame is None:
            return call.source
        key = id(frame.f_code), frame.f_lineno
        if key not in self._lines:
            self._lines[key] = frame.f_code, call.source
        return self._lines[key][1]

    def _look(self, record: Record, call: Call, output: Any) -> None:
        given = tuple(tensors(output))
        if self._statistics:
            record.moments = [taken(each) for each in given]
        if self._outputs:
            record.held |= self._kept(given, made=True)
        if self._inputs:
            record.held |= {f"written {name}": self.keeper.keep(x, made=False) for name, x in call.written.items()}

    def scope(self, scope: Scope, run: Callable[..., Any]) -> Any:
        record = ModuleRecord(scope)
        self.modules.append(record)
        if self._inputs:
            for i, each in enumerate(tensors(scope.args)):
                record.held[f"input {i}"] = self.keeper.keep(each, made=False)
        started = time.perf_counter()
        output = run(*scope.args, **scope.constants)
        for each in tensors(output):
            ops.device.wait(each.device)
        record.seconds = time.perf_counter() - started
        if self._outputs:
            record.held |= self._kept(tensors(output), made=False)
        return output

    def _kept(self, given: Iterable[Tensor], made: bool) -> dict[str, Held]:
        """Outputs by name: `output`, `output 1`, ..."""
        return {f"output {i}" if i else "output": self.keeper.keep(each, made) for i, each in enumerate(given)}


def trace(where: Any = None, keep: bool | str = False, statistics: bool = True, limit: int = 2 * 2**30) -> Trace:
    """Record the calls that the selector `where` means (all, when None) inside `with`.

    `keep=True` keeps inputs, outputs and what is written, "outputs" only those: by reference, copied when an op is
    about to write to the memory; past `limit` bytes the oldest go to a temporary file. `statistics=False` takes none of
    the outputs. The trace prints as a table; index it by address, `filter` it, `save` it, `Recording.load` it.
    """
    return Trace(where, keep, statistics, limit)
