"""TIR expressions and statements as Python closures, for the interpreter: see its module for how values are held."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

import ops
from ops.spec import DTYPES

if TYPE_CHECKING:
    from .interpreter import Interpreter

Thunk = Callable[[], Any]

# What TVM's LLVM code does: a comparison with NaN is false, and picks the second.
_BINARY: dict[str, Callable[[Any, Any], Any]] = {
    "Add": lambda a, b: a + b,
    "Sub": lambda a, b: a - b,
    "Mul": lambda a, b: a * b,
    "Max": lambda a, b: a if a > b else b,
    "Min": lambda a, b: a if a < b else b,
    "FloorDiv": lambda a, b: a // b,
    "FloorMod": lambda a, b: a % b,
    "BitwiseAnd": lambda a, b: a & b,
    "BitwiseOr": lambda a, b: a | b,
    "BitwiseXor": lambda a, b: a ^ b,
    "LShift": lambda a, b: a << b,
    "RShift": lambda a, b: a >> b,
}
_OVERFLOWING = ("Add", "Sub", "Mul", "Div", "LShift")
_COMPARED: dict[str, Callable[[Any, Any], bool]] = {
    "LT": lambda a, b: a < b,
    "LE": lambda a, b: a <= b,
    "GT": lambda a, b: a > b,
    "GE": lambda a, b: a >= b,
    "EQ": lambda a, b: a == b,
    "NE": lambda a, b: a != b,
}
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "exp": np.exp,
    "exp2": np.exp2,
    "log": np.log,
    "log2": np.log2,
    "log1p": np.log1p,
    "sqrt": np.sqrt,
    "rsqrt": lambda x: type(x)(1) / np.sqrt(x),
    "sin": np.sin,
    "cos": np.cos,
    "tan": np.tan,
    "tanh": np.tanh,
    "sigmoid": lambda x: type(x)(1) / (type(x)(1) + np.exp(-x)),
    "erf": lambda x: type(x)(math.erf(x)),
    "pow": np.power,
    "fabs": np.abs,
    "floor": np.floor,
    "ceil": np.ceil,
    "trunc": np.trunc,
    "round": lambda x: np.copysign(np.floor(np.abs(x) + type(x)(0.5)), x),
    "nearbyint": np.rint,
    "fma": lambda a, b, c: a * b + c,
}


def is_float(dtype: str) -> bool:
    """Whether values of a TIR dtype are triples."""
    return dtype.startswith(("float", "bfloat"))


def numpy_dtype(dtype: str) -> np.dtype:
    """NumPy's dtype of a TIR dtype."""
    return DTYPES[dtype] if dtype in DTYPES else np.dtype(dtype)


class Compiler:
    """Closures over the interpreter's variables, which are `slots` of one list."""

    def __init__(self, interpreter: Interpreter):
        self._interpreter = interpreter
        self.slots: list[Any] = []
        self._slots: dict[Any, int] = {}

    def slot(self, variable: Any) -> int:
        """Where the value of a variable is; a new place at its first mention."""
        if variable not in self._slots:
            self._slots[variable] = len(self.slots)
            self.slots.append(None)
        return self._slots[variable]

    def bind(self, variable: Any, value: Any) -> None:
        self.slots[self.slot(variable)] = value

    def integer(self, value: Any) -> Callable[[], int]:
        """A closure for an index or a size, which may be a plain int."""
        return (lambda: value) if isinstance(value, int) else self.expression(value)

    def expression(self, e: Any) -> Thunk:
        """A closure that gives the value of an expression."""
        kind, dtype = type(e).__name__, str(e.ty.dtype)
        if kind in _BINARY or kind in ("Div", "Mod"):
            return self._binary(kind, dtype, self.expression(e.a), self.expression(e.b))
        if kind in _COMPARED:
            return self._compared(kind, e)
        build = getattr(self, f"_{kind.lower()}", None)
        if build is None:
            raise ops.OpError(f"the interpreter knows no {kind}, as in {e}")
        return build(e, dtype)

    def _binary(self, kind: str, dtype: str, left: Thunk, right: Thunk) -> Thunk:
        compute = _BINARY.get(kind)
        if not is_float(dtype):
            compute = compute or (_divided if kind == "Div" else _remainder)
            whole = lambda: compute(left(), right())  # noqa: E731
            return _wrapped(whole, dtype) if kind in _OVERFLOWING and dtype != "int64" else whole
        compute = compute or (lambda a, b: a / b if kind == "Div" else np.fmod(a, b))

        def run() -> tuple:
            a, b = left(), right()
            return compute(a[0], b[0]), compute(a[1], b[1]), compute(a[2], b[2])

        if kind in ("Max", "Min"):  # which one is taken is for the rounded values to say
            return lambda: a if compute((a := left())[0], (b := right())[0]) is a[0] else b
        return run

    def _compared(self, kind: str, e: Any) -> Thunk:
        compute, left, right = _COMPARED[kind], self.expression(e.a), self.expression(e.b)
        if is_float(str(e.a.ty.dtype)):
            return lambda: bool(compute(left()[0], right()[0]))
        return lambda: compute(left(), right())

    def _var(self, e: Any, _: str) -> Thunk:
        slot, slots = self.slot(e), self.slots
        return lambda: slots[slot]

    def _intimm(self, e: Any, _: str) -> Thunk:
        value = int(e.value)
        return lambda: value

    def _floatimm(self, e: Any, dtype: str) -> Thunk:
        rounded = numpy_dtype(dtype).type(e.value)
        # The constant that the kernel has is the rounded one, in the float64 answer too.
        value = (rounded, np.float64(rounded), np.float64(rounded))
        return lambda: value

    def _cast(self, e: Any, dtype: str) -> Thunk:
        given, value = str(e.value.ty.dtype), self.expression(e.value)
        make = numpy_dtype(dtype).type
        if is_float(dtype):
            if not is_float(given):
                return lambda: (make(v := value()), np.float64(v), np.float64(v))
            return lambda: (make((v := value())[0]), v[1], v[2])
        if is_float(given):  # drops the fraction, and wraps as the processor does
            return lambda: int(np.asarray(value()[0]).astype(dtype))
        return _wrapped(value, dtype)

    def _select(self, e: Any, _: str) -> Thunk:
        return self._chosen(e.condition, e.true_value, e.false_value)

    def _chosen(self, *parts: Any) -> Thunk:
        condition, yes, no = map(self.expression, parts)
        return lambda: yes() if condition() else no()

    def _and(self, e: Any, _: str) -> Thunk:
        left, right = self.expression(e.a), self.expression(e.b)
        return lambda: left() and right()

    def _or(self, e: Any, _: str) -> Thunk:
        left, right = self.expression(e.a), self.expression(e.b)
        return lambda: left() or right()

    def _not(self, e: Any, _: str) -> Thunk:
        value = self.expression(e.a)
        return lambda: not value()

    def _call(self, e: Any, dtype: str) -> Thunk:
        name = e.op.name.rpartition(".")[2]
        if name == "if_then_else":
            return self._chosen(*e.args)
        if name == "reinterpret":
            return self._reinterpreted(e.args[0], dtype)
        arguments = [self.expression(each) for each in e.args]
        if name in ("isnan", "isinf", "isfinite"):
            test = getattr(np, name)
            return lambda: bool(test(arguments[0]()[0]))
        compute = _FUNCTIONS.get(name)
        if compute is None or not is_float(dtype):
            raise ops.OpError(f"the interpreter knows no {e.op.name} of {dtype}, as in {e}")
        if len(arguments) == 1:
            (only,) = arguments
            return lambda: (compute((v := only())[0]), compute(v[1]), compute(v[2]))
        return lambda: tuple(compute(*each) for each in zip(*(get() for get in arguments), strict=True))

    def _reinterpreted(self, e: Any, dtype: str) -> Thunk:
        """The same bits as another dtype: of a float its rounded value's."""
        value, to = self.expression(e), numpy_dtype(dtype)
        if not is_float(dtype):
            return lambda: int(np.asarray(value()[0]).view(dtype))
        bits = np.dtype(f"uint{8 * to.itemsize}").type
        mask = 2 ** (8 * to.itemsize) - 1

        def run() -> tuple:
            found = bits(value() & mask).view(to)
            wide = np.float64(found)
            return found, wide, wide

        return run

    def _tensorload(self, e: Any, _: str) -> Thunk:
        interpreter, buffer = self._interpreter, e.source
        indices = [self.integer(each) for each in e.indices]
        found = interpreter.elements(buffer)
        read, name = interpreter.reader(buffer), interpreter.name(buffer)

        def run() -> Any:
            index = tuple([at() for at in indices])
            value = found.get(index)
            if value is None:
                value = read(index)
            if interpreter.watched is not None:
                interpreter.watched[name, index] = value
            return value

        return run

    def statement(self, s: Any, block: Any) -> Callable[[tuple], None]:
        """A closure that runs a statement of `block` at a step."""
        build = getattr(self, f"_run_{type(s).__name__.lower()}", None)
        if build is None:
            raise ops.OpError(f"the interpreter knows no {type(s).__name__}, as in {s}")
        return build(s, block)

    def _run_seqstmt(self, s: Any, block: Any) -> Callable[[tuple], None]:
        parts = [self.statement(each, block) for each in s.seq]

        def run(point: tuple) -> None:
            for part in parts:
                part(point)

        return run

    def _run_for(self, s: Any, block: Any) -> Callable[[tuple], None]:
        slot, low, size = self.slot(s.loop_var), self.integer(s.min), self.integer(s.extent)
        body = self.statement(s.body, block)

        def run(point: tuple) -> None:
            start = low()
            for value in range(start, start + size()):
                self.slots[slot] = value
                body((*point, value))

        return run

    def _run_ifthenelse(self, s: Any, block: Any) -> Callable[[tuple], None]:
        condition, yes = self.expression(s.condition), self.statement(s.then_case, block)
        no = None if s.else_case is None else self.statement(s.else_case, block)

        def run(point: tuple) -> None:
            if condition():
                yes(point)
            elif no is not None:
                no(point)

        return run

    def _run_bind(self, s: Any, _: Any) -> Callable[[tuple], None]:
        slot, value = self.slot(s.var), self.expression(s.value)

        def run(_: tuple) -> None:
            self.slots[slot] = value()

        return run

    def _run_bufferstore(self, s: Any, block: Any) -> Callable[[tuple], None]:
        indices, value = [self.integer(each) for each in s.indices], self.expression(s.value)
        wrap = str(s.buffer.dtype)
        value = value if is_float(wrap) else _wrapped(value, wrap)

        def run(point: tuple) -> None:
            self._interpreter.store(s.buffer, tuple([at() for at in indices]), value(), block, point)

        return run


def _wrapped(value: Thunk, dtype: str) -> Thunk:
    """An integer as `dtype` holds it."""
    if dtype == "bool":
        return lambda: bool(value())
    info = np.iinfo(dtype)
    low, high, bits = int(info.min), int(info.max), 2**info.bits

    def run() -> int:
        found = int(value())
        return found if low <= found <= high else (found - low) % bits + low

    return run


def _divided(a: int, b: int) -> int:
    """Towards zero, as the processor divides."""
    return -(-a // b) if (a < 0) != (b < 0) else a // b


def _remainder(a: int, b: int) -> int:
    return a - b * _divided(a, b)
