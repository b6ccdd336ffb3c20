"""Is a kernel right? Compared with the op's reference on its edge cases, then on calls as they come.

A `Schedule` says which calls: "first 8, then 1/64" are the first eight, and every 64th after them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from . import examples
from .call import Call, Kernel
from .difference import Difference, Expected, bound
from .errors import OpError, SwapRefused
from .languages.base import LaunchError
from .op import Op
from .scope import Scope
from .select import Selector
from .spec import FLOATS
from .tensor import Tensor, empty, tensor

_SCHEDULE = re.compile(r"(?:first (?P<first>\d+))?(?:,? ?(?:then )?1/(?P<every>\d+))?")
_FULL = {"always": (0, 1), "never": (0, 0)}


@dataclass(frozen=True)
class Schedule:
    """The `first` calls are checked, then one in `every`; none more when that is 0."""

    first: int
    every: int

    @property
    def checks(self) -> bool:
        """Whether any call is checked."""
        return bool(self.first or self.every)

    @classmethod
    def of(cls, text: str) -> Schedule:
        """Of "first 8, then 1/64", "first 8", "1/64", "always" or "never"."""
        if text in _FULL:
            return cls(*_FULL[text])
        match = _SCHEDULE.fullmatch(text.strip()) if isinstance(text, str) and text.strip() else None
        if match is None or match["every"] == "0":
            raise OpError(f"check is {text!r}, expected 'first 8, then 1/64', 'first 8', '1/64', 'always' or 'never'")
        return cls(int(match["first"] or 0), int(match["every"] or 0))

    def means(self, number: int) -> bool:
        """Whether call `number`, counted from 0, is checked."""
        return number < self.first or (bool(self.every) and (number - self.first) % self.every == self.every - 1)


@dataclass(frozen=True)
class Wrong:
    """What a kernel gave that its op does not: of which call, what (`output`), how far off, and what the element was
    computed from."""

    call: Call
    name: str
    difference: Difference
    bound: float
    operands: dict[str, str]

    def __str__(self) -> str:
        of = "".join(f"\n  {name}: {text}" for name, text in self.operands.items())
        return f"{self.name} of {shown(self.call)}: {self.difference}, allowed {self.bound:g}{of}"


def shown(call: Call) -> str:
    """The call as messages name it: op, arguments, and where it was made."""
    given = ", ".join(f"{n}={getattr(v, 'spec', v)!r}" for n, v in (call.inputs | call.constants).items())
    return f"{call.op.name}({given})" + (f" in {call.full_address}" if call.scope.number else "")


class Comparison:
    """Of what a call is going to give with its reference, computed now, on the inputs from before. Poisons outputs."""

    def __init__(self, call: Call, outputs: tuple[Tensor, ...]):
        self.call, self.outputs, self.expected = call, outputs, Expected(call)
        for each in outputs:
            _poison(each)

    def wrong(self) -> Wrong | None:
        """The worst of what the call has given by now; None where all is right."""
        output = self.outputs[0] if len(self.outputs) == 1 else self.outputs
        worst: Wrong | None = None
        for name, given, difference in self.expected.differences(output):
            if difference.error > bound(given) and (worst is None or difference.error > worst.difference.error):
                operands = _operands(self.expected.given, difference.index)
                worst = Wrong(self.call, name, difference, bound(given), operands)
        return worst


def _poison(output: Tensor) -> None:
    """Fill with what no kernel gives by chance: what it does not write is then seen."""
    output.numpy()[...] = np.nan if output.dtype in FLOATS else np.iinfo(output.numpy().dtype).min + 77


def _operands(given: dict[str, Any], index: tuple[int, ...]) -> dict[str, str]:
    """What of the inputs lies where the element lies: its row of each, as far as the sizes agree."""
    found = {}
    for name, value in given.items():
        if not isinstance(value, np.ndarray):
            found[name] = repr(value)
            continue
        lead = index[: value.ndim - 1] if value.ndim > 1 else ()
        if all(i < size for i, size in zip(lead, value.shape, strict=False)):
            at = f"{name}[{', '.join(map(str, lead))}]" if lead else name
            found[at] = np.array2string(value[lead], precision=6, threshold=8, edgeitems=3)
    return found


def edge_cases(op: Op, kernel: Kernel, where: Selector) -> Iterator[Call]:
    """Calls of the op's examples that the kernel takes and the selector may mean, in the dtypes that the kernel names.

    A selector's path does not count here: the calls are made nowhere. Its words, and a function, do.
    """
    dtypes = kernel.dtypes
    for args, constants in examples.of(op, _leading(op, dtypes)):
        bound_args, full = op._bound(args, constants)
        names = dict(zip(op.parameters, bound_args, strict=False))
        if any(isinstance(v, Tensor) and v.spec.format and dtypes.get(n, "uint8") != "uint8" for n, v in names.items()):
            continue  # packed, where the kernel takes elements
        cast = {n: _cast(v, dtypes.get(n)) for n, v in names.items()}
        call = Call(op, tuple(cast.values()), full, Scope("", 0), 0)
        if where.fits(call) and kernel.fits(call):
            yield call


def _cast(value: Any, dtype: str | None) -> Any:
    """A tensor of elements in the kernel's dtype; all else as it is."""
    if not isinstance(value, Tensor) or value.spec.format is not None or dtype in (None, value.dtype):
        return value
    return tensor(value.numpy(), dtype)


def _leading(op: Op, dtypes: dict[str, str]) -> str:
    """The float dtype of the first argument that has one."""
    return next((dtypes[n] for n in op.parameters if dtypes.get(n) in FLOATS), "float32")


def verify(op: Op, kernel: Kernel, where: Selector) -> int:
    """Compare the kernel with the reference on the op's edge cases. Gives how many; raises SwapRefused."""
    count = 0
    for call in edge_cases(op, kernel, where):
        try:
            outputs = tuple(empty(spec) for spec in call.outputs)
        except OpError as error:  # the rule has no such call: of a dtype that the op does not take
            raise SwapRefused(f"{kernel.name}: {error}") from None
        comparison = Comparison(call, outputs)
        try:
            kernel.launch(call, outputs)
        except LaunchError as error:
            raise SwapRefused(f"{kernel.name} on an edge case, {shown(call)}: {error}") from None
        wrong = comparison.wrong()
        if wrong is not None:
            raise SwapRefused(f"{kernel.name} is wrong on an edge case: {wrong}{_left_out(kernel, call)}{_HINT}")
        count += 1
    return count


_HINT = "\nedge_cases=False skips these"


def _left_out(kernel: Kernel, call: Call) -> str:
    """Tensors of the call that the kernel has no parameter for, which may be why it is wrong."""
    given = [name for name, value in call.inputs.items() if isinstance(value, Tensor)]
    missing = [name for name in given if kernel.dtypes and name not in kernel.dtypes]
    if not missing:
        return ""
    return f"\n{kernel.name} takes no {', '.join(missing)}, which this call has; narrow the swap with where="
