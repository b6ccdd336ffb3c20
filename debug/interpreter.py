"""Interprets the block definition of an op for one element of its result, as far as that element asks for.

An integer is a Python int. A float is a triple: as the TIR says, rounded to its dtype after each operation; in float64
since its operands were loaded, which tells the rounding that this block introduces; in float64 from the arguments on.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import tvm_ffi
from tvm import s_tir, tirx

import ops
from ops.spec import Spec

from .expressions import Compiler, is_float

Index = tuple[int, ...]
_TINY = float(np.finfo("float32").tiny)
_TERMS_DEPTH = 3  # folds as near to the result as this keep their partial sums


@dataclass
class Sum:
    """One element that a block adds up: where, and after each step the axes' values, the term and the partial sum.

    `terms` and `exact` are float64, `partial` is as the TIR rounds it.
    """

    block: Block
    buffer: Any
    index: Index
    depth: int
    points: list[Index] = field(default_factory=list)
    terms: list[float] = field(default_factory=list)
    partial: list[float] = field(default_factory=list)
    exact: list[float] = field(default_factory=list)


@dataclass
class Rounding:
    """Of one block, the step whose rounding introduced most, relative to the largest partial result of its element."""

    block: Block
    elements: int = 0
    steps: int = 0
    introduced: float = 0.0
    buffer: Any = None
    index: Index = ()
    point: Index = ()
    rounded: float = 0.0
    exact: float = 0.0


class Block:
    """A block, what it stores, and its axes: a slot of the interpreter for each, in the order of the loops."""

    def __init__(self, realize: Any, loops: Sequence[Any], compiler: Compiler):
        block = realize.block
        self.name, self.body, self.init = block.name_hint, block.body, block.init
        stores: list[Any] = []
        tvm_ffi.structural_walk(block.body, (tirx.BufferStore, stores.append))
        self.stores = stores
        self.buffers = list(dict.fromkeys(store.buffer for store in stores))
        axes = {value: axis for axis, value in zip(block.iter_vars, realize.iter_values, strict=True) if value in loops}
        if len(axes) != len(block.iter_vars) or len(axes) != len(loops):
            raise ops.OpError(f"the block {self.name} does not go over its loops one by one; only definitions do")
        self.axes = [axes[loop] for loop in loops]
        self.slots = [compiler.slot(axis.var) for axis in self.axes]
        self.lows = [compiler.integer(axis.dom.min) for axis in self.axes]
        self.sizes = [compiler.integer(axis.dom.extent) for axis in self.axes]
        self.reduces = [axis.iter_type == tirx.IterVar.CommReduce for axis in self.axes]
        self.rounding = Rounding(self)

    def store(self, buffer: Any) -> Any:
        """The block's last assignment to a buffer."""
        return [each for each in self.stores if each.buffer.same_as(buffer)][-1]

    def pinned(self, buffer: Any) -> list[int | None]:
        """For each axis, the dimension of `buffer` that says its value; None where none does."""
        found: list[int | None] = []
        for axis in self.axes:
            at = [
                {i for i, each in enumerate(store.indices) if each.same_as(axis.var)}
                for store in self.stores
                if store.buffer.same_as(buffer)
            ]
            same = set.intersection(*at) if axis.iter_type == tirx.IterVar.DataPar else set()
            found.append(min(same) if same else None)
        return found

    def added(self) -> Any:
        """`term` when the block's only assignment is `element = element + term`, from an initial value on."""
        store, value = self.stores[0], self.stores[0].value
        if len(self.stores) != 1 or self.init is None or not isinstance(value, tirx.Add):
            return None
        own = [_loads_element(side, store) for side in (value.a, value.b)]
        return None if own[0] == own[1] else value.b if own[0] else value.a

    def steps(self, buffer: Any) -> list[str]:
        """The names of the axes that an element of `buffer` does not say: a step has a value for each."""
        return [axis.var.name for axis, at in zip(self.axes, self.pinned(buffer), strict=True) if at is None]


def _loads_element(value: Any, store: Any) -> bool:
    """Whether `value` is a load of the element that `store` writes."""
    if not hasattr(value, "source") or not value.source.same_as(store.buffer):
        return False
    return all(a.same_as(b) for a, b in zip(value.indices, store.indices, strict=True))


class Interpreter:
    """`element(name, index)` of a result of `function`, a PrimFunc of blocks.

    `arguments` by name in the order of the function's parameters: an array, which is loaded from, a number, or the
    Spec of an output. `written` names the arrays that are results as well. `loads` holds, by argument, the elements
    that were loaded; `sums` what was added up near to the result.
    """

    def __init__(self, function: Any, arguments: dict[str, Any], written: Sequence[str] = ()):
        self.function = function
        self.loads: dict[str, dict[Index, Any]] = {}
        self.sums: list[Sum] = []
        self.watched: dict[tuple[str, Index], Any] | None = None
        self._compiler = Compiler(self)
        self._buffers: dict[str, Any] = {}
        self._arrays: dict[Any, np.ndarray] = {}
        self._names: dict[Any, str] = {}
        self._inputs: set[Any] = set()
        self._elements: dict[Any, dict[Index, Any]] = {}
        self._making: dict[tuple[Any, Index], None] = {}
        for parameter, (name, value) in zip(function.params, arguments.items(), strict=True):
            self._bind(parameter, name, value, name in written)
        self.blocks = self._blocks()
        for block in self.blocks:
            self._names |= {each: block.name for each in block.buffers if not self.name(each)}
        self._makers: dict[Any, list[Callable[[Index], None]]] = {}

    def element(self, name: str, index: Index) -> tuple[Any, Any]:
        """An element as the TIR computes it, and in float64; an integer twice."""
        with np.errstate(all="ignore"):  # inf and NaN are results here, as in the kernel
            found = self.made(self._buffers[name], index)
        return (found[0], found[2]) if isinstance(found, tuple) else (found, found)

    def operands(self, found: Sum, step: int) -> dict[tuple[str, Index], Any]:
        """What a step of a sum loads, by buffer and index."""
        block, self.watched = found.block, {}
        for slot, value in self._at(block, found.buffer, found.index, found.points[step]):
            self._compiler.slots[slot] = value
        try:
            with np.errstate(all="ignore"):
                self._compiler.expression(block.added())()
            return {at: each[0] if isinstance(each, tuple) else each for at, each in self.watched.items()}
        finally:
            self.watched = None

    def name(self, buffer: Any) -> str:
        """What errors and explanations call a buffer: the argument's name, or the buffer's own."""
        return self._names.get(buffer) or str(buffer.name)

    def made(self, buffer: Any, index: Index) -> Any:
        """The value of an element of a buffer that blocks store to."""
        found = self.elements(buffer).get(index)
        if found is not None:
            return found
        key = (buffer, index)
        if key not in self._making:
            self._making[key] = None
            try:
                for make in self._makers_of(buffer):
                    make(index)
            finally:
                del self._making[key]
            found = self._elements[buffer].get(index)
        return self._arguments(buffer)(index) if found is None else found

    def reader(self, buffer: Any) -> Callable[[Index], Any]:
        """What gives an element of a buffer that is not known yet."""
        return self._arguments(buffer) if buffer in self._inputs else lambda index: self.made(buffer, index)

    def _arguments(self, buffer: Any) -> Callable[[Index], Any]:
        """What gives an element of an argument, as it was before the call."""
        name, array, floating = self.name(buffer), self._arrays.get(buffer), is_float(str(buffer.dtype))
        known = self.elements(buffer) if buffer in self._inputs else {}  # of a written one these are the new values
        found = self.loads.setdefault(name, {}) if array is not None else {}

        def read(index: Index) -> Any:
            if array is None:
                raise ops.OpError(f"{name}{list(index)} is read before a block stores it")
            try:
                value: Any = array[index]
            except IndexError:
                value = None
            if value is None or (index and min(index) < 0):
                raise ops.OpError(f"{name}{list(index)} is read, which is outside {name} {list(array.shape)}")
            if floating:
                found[index] = value
                value = (value, wide := np.float64(value), wide)
            else:
                value = found[index] = int(value)
            known[index] = value
            return value

        return read

    def elements(self, buffer: Any) -> dict[Index, Any]:
        """The elements of a buffer that are known."""
        return self._elements.setdefault(buffer, {})

    def _bind(self, parameter: Any, name: str, value: Any, written: bool) -> None:
        if not hasattr(parameter.ty, "shape"):
            wide = np.float64(np.float32(value))
            scalar = (np.float32(value), wide, wide) if is_float(str(parameter.ty.dtype)) else int(value)
            self._compiler.bind(parameter, scalar)
            return
        self._buffers[name], self._names[parameter] = parameter, name
        if not isinstance(value, Spec):
            self._arrays[parameter] = value
            if not written:
                self._inputs.add(parameter)
        for dim, size in zip(parameter.shape, value.shape, strict=True):
            if isinstance(dim, tirx.Var):
                self._compiler.bind(dim, int(size))

    def _blocks(self) -> list[Block]:
        """The function's blocks that store something, in order."""
        root = self.function.body
        if not isinstance(root, s_tir.SBlockRealize):
            raise ops.OpError(f"{self.function.attrs['global_symbol']} is a loop nest, not a definition in blocks")
        found, body = [], root.block.body
        for nest in body.seq if isinstance(body, tirx.SeqStmt) else [body]:
            loops = []
            while isinstance(nest, tirx.For):
                loops.append(nest.loop_var)
                nest = nest.body
            if isinstance(nest, s_tir.SBlockRealize):
                stores: list[Any] = []
                tvm_ffi.structural_walk(nest.block.body, (tirx.BufferStore, stores.append))
                if stores:  # not a block that only checks
                    found.append(Block(nest, loops, self._compiler))
        return found

    def _makers_of(self, buffer: Any) -> list[Callable[[Index], None]]:
        if buffer not in self._makers:
            self._makers[buffer] = [
                self._maker(block, buffer) for block in self.blocks if any(b.same_as(buffer) for b in block.buffers)
            ]
        return self._makers[buffer]

    def _maker(self, block: Block, buffer: Any) -> Callable[[Index], None]:
        """What runs the instances of a block that store an element of `buffer`."""
        pinned, slots = block.pinned(buffer), self._compiler.slots
        free = [i for i, at in enumerate(pinned) if at is None]
        fixed = [(block.slots[i], at) for i, at in enumerate(pinned) if at is not None]
        term = block.added() if all(block.reduces[i] for i in free) else None
        run = self._adding(block, buffer, free, term) if term is not None else self._running(block, buffer, free)

        def make(index: Index) -> None:
            before = [slots[slot] for slot in block.slots]
            for slot, at in fixed:
                slots[slot] = index[at]
            try:
                run(index)
            finally:
                for slot, value in zip(block.slots, before, strict=True):
                    slots[slot] = value

        return make

    def _points(self, block: Block, free: list[int]) -> Iterator[Index]:
        """The values of the axes that the element does not say, in the order of the loops; they are set."""
        slots, where = self._compiler.slots, [block.slots[i] for i in free]
        ranges = [range(low := block.lows[i](), low + block.sizes[i]()) for i in free]
        for point in itertools.product(*ranges):
            for slot, value in zip(where, point, strict=True):
                slots[slot] = value
            yield point

    def _at(self, block: Block, buffer: Any, index: Index, point: Index) -> Iterator[tuple[int, int]]:
        """Slots and values of the axes at an element and a step of it."""
        rest = iter(point)
        for slot, at in zip(block.slots, block.pinned(buffer), strict=True):
            yield slot, next(rest) if at is None else index[at]

    def _adding(self, block: Block, buffer: Any, free: list[int], term: Any) -> Callable[[Index], None]:
        """Adds up the terms of one element, and keeps an eye on the rounding."""
        start, each = self._compiler.expression(block.init.value), self._compiler.expression(term)
        elements = self.elements(buffer)
        floating, rounding = is_float(str(buffer.dtype)), block.rounding

        def run(index: Index) -> None:
            total = start() if floating else (start(),) * 3
            kept = Sum(block, buffer, index, len(self._making)) if len(self._making) <= _TERMS_DEPTH else None
            worst, largest, at = 0.0, 0.0, None
            for point in self._points(block, free):
                found = each()
                added = found if floating else (found,) * 3
                total = (total[0] + added[0], total[1] + added[1], total[2] + added[2])
                rounding.steps += 1
                off = abs(total[0] - total[1])
                largest = max(largest, abs(total[1]))
                if off > worst:
                    worst, at = off, (point, total[0], total[1])
                if kept is not None:
                    kept.points.append(point)
                    kept.terms.append(float(added[2]))
                    kept.partial.append(float(total[0]))
                    kept.exact.append(float(total[2]))
            if kept is not None:
                self.sums.append(kept)
            rounding.elements += 1
            _note(rounding, buffer, index, at, worst, largest)
            elements[index] = (total[0], np.float64(total[0]), total[2]) if floating else total[0]

        return run

    def _running(self, block: Block, buffer: Any, free: list[int]) -> Callable[[Index], None]:
        """Runs a block's statements; where it is one assignment, only those for the element."""
        alone = len(block.stores) == 1
        indices = [self._compiler.integer(each) for each in block.store(buffer).indices]
        rest = [i for i in free if block.reduces[i]]
        init = None if block.init is None else self._compiler.statement(block.init, block)
        body = self._compiler.statement(block.body, block)

        def run(index: Index) -> None:
            block.rounding.elements += 1
            for point in self._points(block, free):
                if alone and tuple(at() for at in indices) != index:
                    continue
                block.rounding.steps += 1
                if init is not None and all(self._compiler.slots[block.slots[i]] == block.lows[i]() for i in rest):
                    init(point)
                body(point)

        return run

    def store(self, buffer: Any, index: Index, value: Any, block: Block, point: Index) -> None:
        """Put a value into an element; what it was rounded by is noted for the block."""
        if isinstance(value, tuple):
            rounded, local, exact = value
            _note(block.rounding, buffer, index, (point, rounded, local), abs(rounded - local), abs(local))
            value = (rounded, np.float64(rounded), exact)
        self.elements(buffer)[index] = value


def _note(rounding: Rounding, buffer: Any, index: Index, at: Any, off: float, largest: float) -> None:
    """Remember the step `at` when more was lost in it than in any before; what is too small for float32 is not."""
    relative = float(off) / max(float(largest), _TINY)
    if at is not None and relative > rounding.introduced and math.isfinite(relative):
        point, rounded, exact = at
        rounding.introduced, rounding.buffer, rounding.index, rounding.point = relative, buffer, index, point
        rounding.rounded, rounding.exact = float(rounded), float(exact)
