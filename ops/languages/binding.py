"""Which argument of an op's call each parameter of a hand-written kernel gets: by name, with its type checked.

Names are the op's arguments, its outputs (`out` when there is one), its compile-time constants, `rows` and `width` of
the first tensor (the product of its leading sizes, and its last one), and what `dims=` adds.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..call import Call
from ..errors import SwapRefused, place
from ..op import Op
from ..spec import Spec
from ..tensor import Tensor
from .base import Language, Parameter, Source

SIZES = ("rows", "width")


def output_names(op: Op) -> tuple[str, ...]:
    """What a kernel calls the outputs: as the op's own kernel does; `out` where that does not tell."""
    if op.__signature__.return_annotation in (None, "None"):
        return ()
    parameters = inspect.signature(op._kernel).parameters.values() if op._kernel else ()
    positional = [each.name for each in parameters if each.kind is each.POSITIONAL_OR_KEYWORD]
    return tuple(name for name in positional if name not in {*op.parameters, *constant_names(op)}) or ("out",)


def constant_names(op: Op) -> tuple[str, ...]:
    """The op's compile-time constants."""
    parameters = op.__signature__.parameters.values()
    return tuple(each.name for each in parameters if each.kind is each.KEYWORD_ONLY)


@dataclass(frozen=True)
class Binding:
    """Names and values for kernels of one op. `dims` adds names: numbers, or functions of the call's tensors."""

    op: Op
    dims: Mapping[str, Any]

    @functools.cached_property
    def outputs(self) -> tuple[str, ...]:
        return output_names(self.op)

    @functools.cached_property
    def tensors(self) -> tuple[str, ...]:
        """Arguments and outputs that are arrays, in the order in which a signature written for the user has them."""
        given = [name for name, (kind, _) in zip(self.op.parameters, self.op._kinds, strict=True) if kind is Tensor]
        return (*given, *self.outputs)

    @functools.cached_property
    def numbers(self) -> tuple[str, ...]:
        """All names that stand for a number."""
        scalars = [n for n, (kind, _) in zip(self.op.parameters, self.op._kinds, strict=True) if kind is not Tensor]
        return tuple(dict.fromkeys((*self.dims, *scalars, *constant_names(self.op), *SIZES)))

    def check_names(self, entry: str, parameters: Sequence[Parameter]) -> None:
        """Raises SwapRefused for a name that means nothing, an array that is none, and an output that is not there."""
        known = (*self.tensors, *self.numbers)
        for each in parameters:
            if each.name not in known:
                near = difflib.get_close_matches(each.name, known, 1)
                hint = f"; did you mean {near[0]}?" if near else f"; dims={{'{each.name}': ...}} gives it a meaning"
                raise SwapRefused(f"{entry}: {self.op.name} has no {each.name}; it has {', '.join(known)}{hint}")
            if each.pointer != (each.name in self.tensors):
                kind = "a tensor" if each.name in self.tensors else "a number"
                raise SwapRefused(f"{entry} takes {each}, but {each.name} is {kind} of {self.op.name}")
        named = {each.name: each for each in parameters}
        for name in (*self.outputs, *self.op.writes):
            if name not in named:
                raise SwapRefused(f"{entry} has no parameter {name}, which is where {self.op.name} puts its result")
            if named[name].const:
                raise SwapRefused(f"{entry} takes {named[name]}, which it cannot write; drop the const")

    def check_types(self, entry: str, parameters: Sequence[Parameter], call: Call, outputs: Sequence[Any]) -> None:
        """Raises SwapRefused where a parameter is of another type than what the call has for it. Runs nothing."""
        given = self.values(entry, parameters, call, outputs)
        for each, value in zip(parameters, given, strict=True):
            spec = value.spec if isinstance(value, Tensor) else value
            if isinstance(spec, Spec):
                if each.dtype != held(spec):
                    raise SwapRefused(f"{entry} takes {each}, but {each.name} of {call.op.name} is {spec} here")
            elif not _takes(each, spec):
                raise SwapRefused(
                    f"{entry} takes {each}, but {each.name} of {call.op.name} is {spec!r}, {type(spec).__name__}"
                )

    def written_for(self, language: Language, call: Call, outputs: Sequence[Any]) -> tuple[Parameter, ...]:
        """The parameters of a signature for a body alone: every tensor of the call, and every number it has."""
        made = []
        for name in (*self.tensors, *self.numbers):
            value = self.value(name, call, outputs)
            if isinstance(value, (Tensor, Spec)):
                changes = name in self.outputs or name in self.op.writes
                spec = value.spec if isinstance(value, Tensor) else value
                made.append(Parameter(name, language.spelling(held(spec)), held(spec), True, not changes))
            elif isinstance(value, (bool, int, float)):
                dtype = "float32" if isinstance(value, float) else "int32"
                made.append(Parameter(name, language.spelling(dtype), dtype, False, False))
        return tuple(made)

    def values(self, entry: str, parameters: Sequence[Parameter], call: Call, outputs: Sequence[Any]) -> list[Any]:
        """What each parameter gets, tensors as they are."""
        found = []
        for each in parameters:
            value = self.value(each.name, call, outputs)
            if value is None:
                raise SwapRefused(
                    f"{entry} takes {each}, but {each.name} is left out in this call of {call.op.name}; narrow the "
                    f"swap with where=, or leave the parameter out"
                )
            found.append(value)
        return found

    def value(self, name: str, call: Call, outputs: Sequence[Any]) -> Any:
        """A tensor, a number, or None where the call has none."""
        if name in self.dims:
            return _plain(asked(self.dims[name], f"dims={{{name!r}: ...}}", call.args))
        if name in self.outputs:
            return outputs[self.outputs.index(name)]
        if name in call.op.parameters:
            return call.inputs.get(name)
        if name in call.constants:
            return call.constants[name]
        first = next((each for each in call.args if isinstance(each, (Tensor, Spec))), None)
        if first is None or not first.shape:
            return None
        return first.shape[-1] if name == "width" else math.prod(first.shape[:-1])

    def constants(self, source: Source, call: Call) -> dict[str, Any]:
        """What `{width}` and the like in the text stand for in this call."""
        found = {name: self.value(name, call, ()) for name in sorted(source.constants(self.numbers))}
        missing = [name for name, value in found.items() if value is None]
        if missing:
            raise SwapRefused(f"{source.entry} has {{{missing[0]}}} in its text, but this call has no {missing[0]}")
        return {name: int(value) if isinstance(value, bool) else value for name, value in found.items()}


def held(spec: Spec) -> str:
    """The dtype in which a kernel sees a tensor: a packed weight as its bytes."""
    return spec.dtype if spec.format is None else "uint8"


def asked(given: Any, what: str, args: Sequence[Any]) -> Any:
    """What a function of the user's says of a call's tensors; a value as it is. Raises SwapRefused that names it."""
    if not callable(given):
        return given
    try:
        return given(*args)
    except Exception as error:
        raise SwapRefused(f"{what} {place(given)} raised {type(error).__name__}: {error}") from error


def triple(given: int | tuple | Callable | None, call: Call, what: str) -> tuple[int, int, int]:
    """A grid or a block: a number, up to three of them, or a function of the call's tensors that gives them."""
    value = asked(given, f"{what}=", call.args)
    least = 0 if callable(given) and what == "grid" else 1  # of no rows there is nothing to do
    sizes = tuple(value) if isinstance(value, (tuple, list)) else (1 if value is None else value,)
    if not 1 <= len(sizes) <= 3 or not all(isinstance(_plain(each), int) and each >= least for each in sizes):
        raise SwapRefused(f"{what} is {value!r}, expected 1 to 3 whole numbers above 0, or a function of the call")
    x, y, z = (*map(int, sizes), 1, 1)[:3]
    return x, y, z


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value


def _takes(parameter: Parameter, value: Any) -> bool:
    """Whether a number may go into the parameter unchanged."""
    if isinstance(value, bool):
        return parameter.type == "bool" or parameter.dtype in ("int32", "int64", "uint8", "int8")
    if isinstance(value, int):
        exact = parameter.dtype == "float32" and abs(value) <= 2**24
        return parameter.dtype in ("int32", "int64") or parameter.type == "double" or exact
    if isinstance(value, float):
        return parameter.dtype == "float32" or parameter.type == "double"
    return False
