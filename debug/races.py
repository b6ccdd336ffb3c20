"""Race: all known kernels of the ops that a model calls, on the inputs that they have there.

    with debug.race("layers.0.*/rms_norm") as r:
        model(ids)
    r                                   # a table for each op and shape that the selector met

A call is raced once for its op, shapes, dtypes and constants, before it is launched; the model's result is its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from ops import Call, Tensor, html
from ops.race import Race
from ops.race import race as race_call

from .tool import Tool


class Races(Tool):
    """What `debug.race` gives: races by the address of the call that they were run on."""

    def __init__(self, where: Any, seconds: float):
        super().__init__(where)
        self.seconds = seconds
        self.races: dict[str, Race] = {}
        self._met: set[tuple] = set()

    @property
    def name(self) -> str:
        return "race"

    def call(self, call: Call, launch: Callable[[Call], Any]) -> Any:
        if self.means(call):
            specs = tuple(each.spec if isinstance(each, Tensor) else each for each in call.args)
            kind = (call.op.name, specs, *sorted(call.constants.items()))
            if kind not in self._met:
                self._met.add(kind)
                self.races[call.full_address] = race_call(call, self.seconds)
        return launch(call)

    def __getitem__(self, address: str) -> Race:
        return self.races[address]

    def __iter__(self) -> Iterator[Race]:
        return iter(self.races.values())

    def __len__(self) -> int:
        return len(self.races)

    def __repr__(self) -> str:
        return "\n\n".join(f"{address}: {each!r}" for address, each in self.races.items()) or "no race yet"

    def _repr_html_(self) -> str:
        return html.box(*[html.head(address) + each.html() for address, each in self.races.items()])


def race(where: Any = None, *, seconds: float = 0.5) -> Races:
    """`with debug.race(where) as r: model(ids)` races the kernels of the calls that are meant, `seconds` for each.

    TVM's kernel, the swaps that take such arguments, the NumPy reference, and torch where it knows the op: how long,
    what share of the machine's bandwidth and peak, how far off, and who is outvoted by the others.
    """
    return Races(where, seconds)
