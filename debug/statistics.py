"""A tensor's statistics by one small kernel: cheap enough to take of every output of every call.

The kernel is launched past the seam: other tools do not see it.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import numpy as np
from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as T

import ops
from ops import Tensor, memory, target, tir
from ops.display import Statistics
from ops.op import like
from ops.schedule import vector
from ops.schedule.flash import Register, held
from ops.schedule.vector import i64
from ops.spec import FLOATS, Spec

_LARGEST = float(np.finfo("float32").max)


class Moments:
    """Statistics of a tensor that are read when somebody asks: until then, what the kernel left in a few bytes."""

    __slots__ = ("_buffers", "_size")

    def __init__(self, tensor: Tensor):
        specs = Spec((4,), "float32"), Spec((2,), "int32")
        self._size, self._buffers = tensor.size, tuple(memory.allocate(spec) for spec in specs)
        flat = tensor.on_cpu().reshape(-1)
        moments.plan((flat,), {}).run(flat.buffer.data, *(each.data for each in self._buffers))

    def read(self) -> Statistics:
        """The statistics."""
        found, (nan, infinite) = (np.from_dlpack(each.data).tolist() for each in self._buffers)
        least, most, mean, deviation = found if nan + infinite < self._size else [None] * 4
        return Statistics(self._size, nan, infinite, least, mean, most, deviation)


def taken(tensor: Tensor) -> Moments | None:
    """The statistics of a float tensor; None for an empty one, for integers and for a packed weight."""
    return Moments(tensor) if tensor.dtype in FLOATS and tensor.size else None


@ops.op(symbolic={"x": "n"})
def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Least and greatest value, mean and standard deviation of the finite values; how many are NaN, how many infinite.

    x: [n], float, n > 0. Returns float32 [4] and int32 [2]. Without finite values the first mean nothing.
    """
    if x.dtype not in FLOATS or x.ndim != 1:
        raise ops.ShapeError(f"x is {x}, expected [n] of {', '.join(FLOATS)}")
    return like(x, (4,), "float32"), like(x, (2,), "int32")


@moments.reference
def _(x):
    x = x.astype("float64")
    finite = x[np.isfinite(x)]
    return np.array([finite.min(), finite.max(), finite.mean(), finite.std()]), np.array(
        [np.isnan(x).sum(), np.isinf(x).sum()], "int32"
    )


@moments.template("cpu")
def _(x, found, counts):
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("moments")
        n = tirx.Var("n", "int64")
        X = T.arg("x", T.buffer((n,), x.dtype, align=x.itemsize))
        results = T.arg("found", T.buffer((4,), "float32", align=4)), T.arg("counts", T.buffer((2,), "int32", align=4))
        _emit(X, n, *results)
    return builder.get()


def _emit(x: Any, n: Any, found: Any, counts: Any) -> None:
    """One pass over x, a vector at a time; then the lanes are put together."""
    lanes = target.lanes()

    def vectors(value: float, dtype: str) -> Any:
        return T.broadcast(tirx.const(value, dtype), lanes)

    infinite, ones = vectors(np.inf, "float32"), vectors(1, "int32")
    least, most = Register(infinite), Register(-infinite)
    total, squares = Register(vectors(0.0, "float64")), Register(vectors(0.0, "float64"))
    nan, infinities = Register(vectors(0, "int32")), Register(vectors(0, "int32"))

    def step(value: Any, alive: Any = None) -> None:
        size, largest = tirx.abs(value), vectors(_LARGEST, "float32")
        finite, endless, strange = size <= largest, size > largest, tirx.isnan(value)  # a NaN is neither of the former
        if alive is not None:
            finite, endless, strange = (tirx.And(alive, each) for each in (finite, endless, strange))
        least.value = tirx.min(least.value, tirx.Select(finite, value, infinite))
        most.value = tirx.max(most.value, tirx.Select(finite, value, -infinite))
        wide = held(tirx.Select(finite, value, vectors(0.0, "float32")).astype(f"float64x{lanes}"))
        total.value = total.value + wide
        squares.value = squares.value + wide * wide
        nan.value = nan.value + tirx.Select(strange, ones, vectors(0, "int32"))
        infinities.value = infinities.value + tirx.Select(endless, ones, vectors(0, "int32"))

    with T.serial(i64(0), n // lanes) as i:
        step(held(vector.load(x, [i * lanes], lanes)))
    rest, last = n % lanes, T.alloc_buffer((lanes,), "float32", scope="global")
    vector.store(last, [i64(0)], vector.zeros(lanes), lanes)
    with T.serial(i64(0), rest) as i:
        T.buffer_store(last, vector.widened(x[n - rest + i], str(x.dtype)), [i])
    step(held(vector.load(last, [i64(0)], lanes)), T.ramp(i64(0), 1, lanes) < T.broadcast(rest, lanes))

    strange, endless = _folded(operator.add, nan, lanes), _folded(operator.add, infinities, lanes)
    kept = held((n - (strange + endless).astype("int64")).astype("float64"))
    mean = held(_folded(operator.add, total, lanes) / kept)
    variance = tirx.max(_folded(operator.add, squares, lanes) / kept - mean * mean, tirx.const(0.0, "float64"))
    ends = _folded(tirx.min, least, lanes), _folded(tirx.max, most, lanes)
    for i, value in enumerate((*ends, tir.f32(mean), tir.f32(tirx.sqrt(variance)))):
        T.buffer_store(found, value, [i])
    for i, value in enumerate((strange, endless)):
        T.buffer_store(counts, value, [i])


def _folded(fold: Callable[[Any, Any], Any], register: Register, lanes: int) -> Any:
    value = register.value
    while lanes > 1:
        lanes //= 2
        value = held(value)
        value = fold(*(tirx.Shuffle([value], list(range(start, start + lanes))) for start in (0, lanes)))
    return held(value)
