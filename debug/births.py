"""nan_hunt: where the first NaN or infinity was born.

    with debug.nan_hunt() as h:
        model(ids)
    h                                              # where, which element, of which operands, why
    h.birth                                        # the same to take apart; None when all was finite

A non-finite value is born in the first call that gives one which no non-finite input explains. What explains it is
found with the op's own reference in float64: on the call's inputs, and on the same with finite values in the place of
the others. Infinities that a reference gives whatever its inputs are, such as those of masked scores, are no alarm
until a NaN comes of them; nor is anything that no result depends on, such as rows of a cache that were never written.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import numpy as np

from ops import Call, Tensor
from ops.difference import results

from .evidence import Birth, Evidence
from .statistics import taken
from .tool import Tool


class NanHunt(Tool):
    """Looks at what calls give while it is on; see `nan_hunt`. `birth` is None as long as no value was born."""

    def __init__(self, where: Any = None):
        super().__init__(where)
        self.birth: Birth | None = None
        self._accepted: dict[int, tuple[weakref.ref, str]] = {}  # memory with infinities on purpose: which call made it

    @property
    def name(self) -> str:
        return "nan_hunt"

    def call(self, call: Call, launch: Callable[[Call], Any]) -> Any:
        if not self.means(call) or self.birth is not None:
            return launch(call)
        before = {name: tensor.numpy().copy() for name, tensor in call.written.items()}
        output = launch(call)
        found = [name for name, tensor in results(call, output).items() if _nonfinite(tensor)]
        if found:
            self._look(call, before, output, found)
        return output

    @np.errstate(all="ignore")  # memory that nothing was written to may hold anything
    def _look(self, call: Call, before: dict[str, np.ndarray], output: Any, found: list[str]) -> None:
        """Some results have non-finite values: was one born here?"""
        given = {
            name: before.get(name, value.numpy()) if isinstance(value, Tensor) else value
            for name, value in call.inputs.items()
        }
        evidence = Evidence(call, given, self._makers(call))
        for i, (name, tensor) in enumerate(results(call, output).items()):
            if name not in found:
                continue
            self.birth, on_purpose = evidence.birth(name, i, tensor.numpy(), before.get(name))
            if self.birth is not None:
                return
            if on_purpose:
                root = _root(tensor)
                self._accepted[id(root)] = weakref.ref(root), call.full_address

    def _makers(self, call: Call) -> dict[str, str]:
        """Of the inputs that calls gave infinities on purpose: which call."""
        found = {}
        for name, value in call.inputs.items():
            known = self._accepted.get(id(_root(value))) if isinstance(value, Tensor) else None
            if known is not None and known[0]() is _root(value):  # an id is used again when its tensor has died
                found[name] = known[1]
        return found

    def __repr__(self) -> str:
        return str(self.birth) if self.birth else f"no NaN and no infinity was born in {self.hits} calls"


def _nonfinite(tensor: Tensor) -> bool:
    found = taken(tensor)
    if found is None:
        return False
    counted = found.read()
    return bool(counted.nan or counted.inf)


def _root(tensor: Tensor) -> Tensor:
    """The tensor that a view, of a view, is of."""
    while isinstance(tensor.owner, Tensor):
        tensor = tensor.owner
    return tensor


def nan_hunt(where: Any = None) -> NanHunt:
    """Find where the first NaN or infinity is born among the calls that the selector `where` means: all, when None."""
    return NanHunt(where)
