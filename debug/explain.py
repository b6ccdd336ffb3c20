"""why: one element of what a call gave, explained by the op's block definition.

Of a call that was recorded with its tensors:

    with debug.trace(keep=True) as t:
        model(ids)
    debug.why(t["layers.0.mlp.gate_proj/linear[0]"], index=(5, 17))
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np

from ops import Call, KernelError, OpError, Tensor
from ops.difference import results

from .interpreter import Interpreter, Rounding, Sum
from .recall import kept_results, launched, recalled
from .record import Record, to_bytes

_TERMS = 8  # shown, of a sum
_OPERANDS = 6  # shown, of a term


@dataclass(frozen=True)
class Term:
    """A step of a sum: the values of its axes, the term in float64, and what it loads, by `name[index]`."""

    step: str
    value: float
    operands: dict[str, Any]


@dataclass(frozen=True)
class Place:
    """Where a block's rounding introduced most, relative to the largest partial result of that element.

    `at` says the element and the step; `rounded` is the partial result as the TIR computes it, `exact` the same in
    float64 from the same operands; `line` is the line of TVMScript, from 1, and `text` what it says.
    """

    block: str
    at: str
    introduced: float
    rounded: float
    exact: float
    line: int
    text: str
    elements: int
    steps: int


class Explanation:
    """One element of a call's result.

    `value`: by interpretation of the block definition, each operation rounded as the TIR states. `actual`: what the
    kernel gave. `exact`: the same definition in float64 from the same arguments. `loads`: by argument, the elements
    that were read, with their values (of a packed weight its bytes), `load_count` in all. `terms`: the largest of the
    sum nearest to the result, whose partial sums are in `partial` (rounded) and `partial_exact`. `places`: the blocks
    by the rounding that they introduced, most first; `worst` is the first, None where nothing was rounded. `line` and
    `source`: the line of the TVMScript `script` that stores the element.
    """

    def __init__(self, call: Call, kernel: str, result: str, index: tuple[int, ...], actual: Any, made: _Made):
        interpreter = made.interpreter
        self.address, self.op_name, self.kernel = call.full_address, call.op.name, kernel
        self.result, self.index, self.actual = result, index, actual
        self.value, self.exact = made.value, made.exact
        self.loads = {name: found for name, found in interpreter.loads.items() if found}
        self.load_count = sum(map(len, self.loads.values()))
        self.sum_name = ""
        self.terms: tuple[Term, ...] = ()
        self.partial: tuple[float, ...] = ()
        self.partial_exact: tuple[float, ...] = ()
        inputs = call.inputs.items()
        self._units = {name: "bytes of " for name, each in inputs if isinstance(each, Tensor) and each.spec.format}
        if interpreter.sums:
            nearest = min(interpreter.sums, key=lambda each: each.depth)
            self.sum_name = f"{interpreter.name(nearest.buffer)}{list(nearest.index)}"
            self.partial, self.partial_exact = tuple(nearest.partial), tuple(nearest.exact)
            self.terms = _terms(interpreter, nearest)
        self.script = interpreter.function.script()
        self.places = _places(interpreter, self.script)
        self.worst = self.places[0] if self.places and self.places[0].introduced else None
        stores = [each for block in interpreter.blocks for each in block.stores]
        last = [each for each in stores if interpreter.name(each.buffer) == result][-1]
        self.line, self.source = _line(interpreter, self.script, last)

    def rows(self) -> list[tuple[str, str]]:
        """What it says, as pairs of a name and a text."""
        count = ", ".join(f"{len(each)} {self._units.get(name, '')}{name}" for name, each in self.loads.items())
        found = [
            ("kernel", f"{_number(self.actual)}  ({self.kernel})"),
            ("interpreted", f"{_number(self.value)}  {_apart(self.value, self.actual, 'the kernel')}"),
            ("float64", f"{_number(self.exact)}  {_apart(self.exact, self.actual, 'the kernel')}"),
            ("loads", f"{self.load_count}: {count}" if count else "none"),
            ("stored by", f"line {self.line}: {self.source}"),
        ]
        if self.worst is not None:
            w = self.worst
            found.append(
                ("most rounding", f"{w.block} {w.at}: {_number(w.rounded)} instead of {_number(w.exact)}, "
                 f"{w.introduced:.2g} of the largest partial result; line {w.line}: {w.text}")
            )  # fmt: skip
        return found

    def __repr__(self) -> str:
        lines = [self._title(), *(f"  {name:<14}{text}" for name, text in self.rows())]
        lines += [f"  largest terms of {self.sum_name}, {len(self.partial)} in all:"] if self.terms else []
        lines += [f"    {each.step:<12}{_number(each.value):<14}{_operands(each)}" for each in self.terms]
        if len(self.places) > 1:
            lines.append("  rounding by block, relative to the largest partial result:")
            lines += [f"    {each.introduced:<10.2g}{each.block}: {_amount(each)}" for each in self.places]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        font = "font-family:ui-monospace,Menlo,Consolas,'DejaVu Sans Mono',monospace;font-size:13px;color:inherit"
        parts = [f"<div style='font-weight:600;margin-bottom:6px'>{escape(self._title())}</div>", _table(self.rows())]
        if self.terms:
            parts.append(f"<div style='margin-top:8px'>largest terms of {escape(self.sum_name)}</div>")
            parts.append(_table([(each.step, _number(each.value), _operands(each)) for each in self.terms]))
        if len(self.places) > 1:
            parts.append("<div style='margin-top:8px'>rounding by block</div>")
            parts.append(_table([(each.block, f"{each.introduced:.2g}", _amount(each)) for each in self.places]))
        numbered = "\n".join(f"{i:>4}  {text}" for i, text in enumerate(self.script.splitlines(), 1))
        parts.append(f"<details style='margin-top:8px'><summary>TIR</summary><pre>{escape(numbered)}</pre></details>")
        return f'<div style="{font};line-height:1.5">{"".join(parts)}</div>'

    def _title(self) -> str:
        return f"{self.address}  {self.result}{list(self.index)}"


def why(call: Record | Call, index: int | tuple[int, ...], result: str | None = None) -> Explanation:
    """Explain the element at `index` of what a call gave.

    `call`: a record kept with `keep=True`, or a Call, whose kernel is then launched on copies of what it writes.
    `result` names which one, where there are several: "output", "output 1", or a written argument. Raises OpError when
    the inputs were not kept, the op has no block definition, or the index is out of range.
    """
    if isinstance(call, Record):
        made = recalled(call)
        kernel, given = call.kernel, kept_results(call, made)
    else:
        use = call.op.used_for(call)
        made, kernel = call, use.kernel.name if use else "tvm"
        given = results(*launched(call))
    if made.op._kernel is None:
        raise OpError(f"{made.full_address}: {made.op.name} has no block definition, which is what why explains")
    result = next(iter(given)) if result is None else result
    if result not in given:
        raise OpError(f"{made.full_address} gives {', '.join(given)}, not {result!r}")
    tensor = given[result]
    at = _checked(index, tensor, f"{made.full_address} {result}")
    return Explanation(made, kernel, result, at, _scalar(tensor.numpy()[at]), _interpreted(made, result, at))


@dataclass(frozen=True)
class _Made:
    interpreter: Interpreter
    value: Any
    exact: Any


def _checked(index: int | tuple[int, ...], tensor: Tensor, name: str) -> tuple[int, ...]:
    at = (index,) if isinstance(index, (int, np.integer)) else tuple(index)
    if len(at) != tensor.ndim:
        raise OpError(f"{name} is {tensor.spec}: an element has {tensor.ndim} indices, given {list(at)}")
    if not all(-size <= each < size for each, size in zip(at, tensor.shape, strict=True)):
        raise OpError(f"{name} is {tensor.spec}: there is no element {list(at)}")
    return tuple(int(each) % size for each, size in zip(at, tensor.shape, strict=True))


def _interpreted(call: Call, result: str, index: tuple[int, ...]) -> _Made:
    """The element by the block definition."""
    request = call.op.plan(call.args, call.constants).request()
    arguments: dict[str, Any] = {
        name: (to_bytes(value) if value.spec.format else value.numpy()) if isinstance(value, Tensor) else value
        for name, value in call.inputs.items()
        if value is not None
    }
    outputs = {f"output {i}" if i else "output": spec for i, spec in enumerate(call.outputs)}
    try:
        interpreter = Interpreter(request.blocks(), arguments | outputs, tuple(call.written))
        value, exact = interpreter.element(result, index)
    except (OpError, KernelError) as error:
        raise OpError(f"{call.full_address}: {error}") from error
    return _Made(interpreter, _scalar(value), _scalar(exact))


def _scalar(value: Any) -> Any:
    """An int as it is, else a Python float."""
    return int(value) if isinstance(value, (int, np.integer)) else float(value)


def _terms(interpreter: Interpreter, found: Sum) -> tuple[Term, ...]:
    order = sorted(range(len(found.terms)), key=lambda i: -_magnitude(found.terms[i]))[:_TERMS]
    names, terms = found.block.steps(found.buffer), []
    for i in order:
        operands = interpreter.operands(found, i)
        shown = {f"{name}{list(at)}": _scalar(value) for (name, at), value in operands.items()}
        terms.append(Term(_named(names, found.points[i]), found.terms[i], shown))
    return tuple(terms)


def _magnitude(value: float) -> float:
    return math.inf if math.isnan(value) else abs(value)


def _places(interpreter: Interpreter, script: str) -> tuple[Place, ...]:
    used = [each.rounding for each in interpreter.blocks if each.rounding.elements]
    return tuple(_place(interpreter, script, each) for each in sorted(used, key=lambda each: -each.introduced))


def _place(interpreter: Interpreter, script: str, found: Rounding) -> Place:
    block, where = found.block, ""
    buffer = block.buffers[-1] if found.buffer is None else found.buffer
    if found.introduced:
        step = f" at {_named(block.steps(buffer), found.point)}" if found.point else ""
        where = f"{interpreter.name(buffer)}{list(found.index)}{step}"
    line, text = _line(interpreter, script, block.store(buffer))
    return Place(
        block.name, where, found.introduced, found.rounded, found.exact, line, text, found.elements, found.steps
    )


def _named(names: list[str], point: tuple[int, ...]) -> str:
    names = names + [f"loop {i}" for i in range(len(point) - len(names))]
    return ", ".join(f"{name}={value}" for name, value in zip(names, point, strict=True))


def _line(interpreter: Interpreter, script: str, statement: Any) -> tuple[int, str]:
    """The line of the function's TVMScript, from 1, that is this statement."""
    marked = interpreter.function.script(obj_to_underline=[statement]).splitlines()
    at = next(i for i, text in enumerate(marked) if text.strip() and set(text.strip()) == {"^"})
    before = len(marked) - len(script.splitlines()) - 1  # lines that say what is underlined
    return at - before, marked[at - 1].strip()


def _apart(value: Any, other: Any, name: str) -> str:
    if value == other or (value != value and other != other):
        return f"as {name}"
    return f"{value - other:+.2g} from {name}"


def _number(value: Any) -> str:
    return str(value) if isinstance(value, int) else f"{value:.9g}"


def _operands(term: Term) -> str:
    shown = [f"{name} = {_number(value)}" for name, value in term.operands.items()]
    return ", ".join(shown[:_OPERANDS]) + (", ..." if len(shown) > _OPERANDS else "")


def _amount(place: Place) -> str:
    return f"{place.elements} elements in {place.steps or place.elements} steps" + (f", {place.at}" if place.at else "")


def _table(rows: list[Any]) -> str:
    cell = "padding:1px 14px 1px 0;text-align:left;vertical-align:top;background:none;border:none"
    lines = ["".join(f"<td style='{cell}'>{escape(text)}</td>" for text in row) for row in rows]
    body = "".join(f"<tr style='background:none'>{line}</tr>" for line in lines)
    return f"<table style='border-collapse:collapse;border:none;margin:0;color:inherit;font-size:12px'>{body}</table>"
