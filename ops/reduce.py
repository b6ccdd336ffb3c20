"""Reductions over the last axis: softmax, and which elements are largest. NaN is never lost."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from tvm import tirx
from tvm.script import tirx as T
from tvm.script.ir_builder import IRBuilder
from tvm.script.tirx import builder

from . import tir
from .errors import DTypeError, OpError, ShapeError
from .op import like, op
from .spec import FLOATS, Dim, Spec
from .tensor import Tensor

_LEAST = -(2**31)
_NAN = 2**31 - 1
_BEYOND = 2**30
_OPEN = ("n", None, "t")  # of attention's [n, heads, t] both ends; of [n, width] the first


@op(symbolic={"x": _OPEN}, ranges=(1, 2, 17))
def softmax(x: Tensor) -> Tensor:
    """exp(x) / sum(exp(x)) over the last axis, computed in float32 from x - max(x).

    x: [n, width] or [n, heads, width], float. Returns x's shape and dtype. As in NumPy, a row of only -inf, or with
    +inf or NaN in it, gives NaN.
    """
    return _checked(x)


@op(symbolic={"x": _OPEN}, ranges=(1, 2, 17))
def log_softmax(x: Tensor) -> Tensor:
    """x - max(x) - log(sum(exp(x - max(x)))) over the last axis, in float32: the log of `softmax`, without underflow.

    x: [n, width] or [n, heads, width], float. Returns x's shape and dtype.
    """
    return _checked(x)


@op(symbolic={"x": "n"}, ranges=(1, 2, 17))
def argmax(x: Tensor) -> Tensor:
    """Where each row is largest: the lowest index when several are equal. As in NumPy, NaN counts as largest.

    x: [n, width], float. Returns int32 [n].
    """
    return like(_checked(x, ranks=(2,)), x.shape[:1], "int32")


@op(symbolic={"x": "n"}, ranges=(1, 2, 17))
def top_k(x: Tensor, *, k: int) -> tuple[Tensor, Tensor]:
    """The k largest values of each row, in descending order, and their indices; of equal ones the lower index first.

    x: [n, width], float. Returns values [n, k] in x's dtype and int32 indices [n, k]. NaN counts as largest.
    """
    _checked(x, ranks=(2,))
    if not 1 <= k <= x.shape[-1]:
        raise OpError(f"k is {k}, expected 1 to {x.shape[-1]} for x {x}")
    return like(x, (x.shape[0], k)), like(x, (x.shape[0], k), "int32")


def _checked(x: Tensor, ranks: tuple[int, ...] = (2, 3)) -> Tensor:
    if x.dtype not in FLOATS:
        raise DTypeError(f"x is {x}, expected one of {', '.join(FLOATS)}; convert it with ops.cast")
    if x.ndim not in ranks or x.shape[-1] == 0:
        expected = " or ".join({2: "[n, width]", 3: "[n, heads, width]"}[rank] for rank in ranks)
        raise ShapeError(f"x is {x}, expected {expected} with width > 0")
    return like(x)


@softmax.reference
def _(x):
    with np.errstate(invalid="ignore"):
        e = np.exp(x.astype("float64") - x.max(axis=-1, keepdims=True).astype("float64"))
        return e / e.sum(axis=-1, keepdims=True)


@log_softmax.reference
def _(x):
    with np.errstate(invalid="ignore"):
        shifted = x.astype("float64") - x.max(axis=-1, keepdims=True).astype("float64")
        return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


@argmax.reference
def _(x):
    return np.argmax(x.astype("float32"), axis=-1).astype("int32")


@top_k.reference
def _(x, *, k):
    wide = x.astype("float32")
    order = np.lexsort((-wide, ~np.isnan(wide)), axis=-1)[:, :k]  # stable: the lower index first
    return np.take_along_axis(x, order, axis=-1), order.astype("int32")


def _rank(x: tirx.Expr) -> tirx.Expr:
    """An int32 that orders as the float32 does, NaN above all: LLVM vectorises maxima of integers, not of floats."""
    bits = tirx.reinterpret("int32", x)
    signed = tirx.Select(bits < 0, tirx.const(_LEAST, "int32") - bits, bits)  # both zeros give 0
    return tirx.Select(tirx.isnan(x), tirx.const(_NAN, "int32"), signed)


def _value(rank: tirx.Expr) -> tirx.Expr:
    """The float32 of a rank."""
    return tirx.reinterpret("float32", tirx.Select(rank < 0, tirx.const(_LEAST, "int32") - rank, rank))


def _top_rank(x: Any, shape: tuple) -> Any:
    """The greatest rank of each row."""
    least = tirx.const(_LEAST, "int32")
    return tir.folded("rank", shape, least, lambda top, at: tirx.max(top, _rank(tir.f32(x[at]))))


def _top(x: Any, shape: tuple) -> Any:
    """The greatest value of each row, in float32."""
    return _each_row("top", shape, _value, _top_rank(x, shape))


def _each_row(name: str, shape: tuple, function: Callable[[Any], Any], rows: Any) -> Any:
    """A block that applies `function` to one float32 result for each row."""
    out = tir.scratch(name, shape[:-1], "float32")
    with tir.block(name, shape[:-1]) as at:
        builder.buffer_store(out, function(rows[at]), at)
    return out


def _parameters(x: Spec, out: Spec) -> tuple[Any, Any, tuple]:
    """The kernel's two buffers, and the shape of the first; the leading size is open, and so is each `Dim`."""
    n, width = tirx.Var("n", "int64"), tirx.Var("t", "int64")

    def sizes(spec: Spec) -> tuple:
        return (n, *(width if isinstance(size, Dim) else size for size in spec.shape[1:]))

    source = builder.arg("x", builder.buffer(sizes(x), x.dtype, align=x.itemsize))
    target = builder.arg("out", builder.buffer(sizes(out), out.dtype, align=out.itemsize))
    return source, target, sizes(x)


@softmax.kernel
def _(x, out):
    with IRBuilder() as ir, builder.prim_func(s_tir=True):
        builder.func_name("softmax")
        source, target, shape = _parameters(x, out)
        top = _top(source, shape)

        def power(at: tuple) -> tirx.Expr:
            return tir.exp(tir.f32(source[at]) - top[at[:-1]])

        total = tir.folded("total", shape, tir.f32(0.0), lambda total, at: total + power(at))
        with tir.block("softmax", shape) as at:
            builder.buffer_store(target, (power(at) * (tir.f32(1.0) / total[at[:-1]])).astype(out.dtype), at)
    return ir.get()


@log_softmax.kernel
def _(x, out):
    with IRBuilder() as ir, builder.prim_func(s_tir=True):
        builder.func_name("log_softmax")
        source, target, shape = _parameters(x, out)
        top = _top(source, shape)

        def shifted(at: tuple) -> tirx.Expr:
            return tir.f32(source[at]) - top[at[:-1]]

        total = tir.folded("total", shape, tir.f32(0.0), lambda total, at: total + tir.exp(shifted(at)))
        log = _each_row("log", shape, tirx.log, total)
        with tir.block("log_softmax", shape) as at:
            builder.buffer_store(target, (shifted(at) - log[at[:-1]]).astype(out.dtype), at)
    return ir.get()


@argmax.kernel
def _(x, out):
    with IRBuilder() as ir, builder.prim_func(s_tir=True):
        builder.func_name("argmax")
        source, target, shape = _parameters(x, out)
        top = _top_rank(source, shape)

        def lowest(index: tirx.Expr, at: tuple) -> tirx.Expr:
            # A sum, since LLVM does not vectorise the minimum of a conditional: too much unless at[-1] is the largest.
            differs = (_rank(tir.f32(source[at])) != top[at[:-1]]).astype("int32")
            return tirx.min(index, at[-1] + differs * tirx.const(_BEYOND, "int32"))

        tir.folded("lowest", shape, tirx.const(_NAN, "int32"), lowest, target)
    return ir.get()


@top_k.kernel
def _(x, values, indices, *, k):
    width, dtype = x.shape[-1], x.dtype

    @T.prim_func(s_tir=True)
    def top_k(x_: T.handle, values_: T.handle, indices_: T.handle):
        n = T.int64()
        X = T.match_buffer(x_, (n, width), dtype, align=x.itemsize)
        V = T.match_buffer(values_, (n, k), dtype, align=values.itemsize)
        I = T.match_buffer(indices_, (n, k), "int32", align=indices.itemsize)  # noqa: E741
        rank = T.alloc_buffer((n, k), "int32")
        for i in range(n):
            with T.sblock("insert"):
                vi = T.axis.spatial(n, i)
                for j in range(k):
                    rank[vi, j] = T.int32(_LEAST)
                    I[vi, j] = T.int32(0)
                for c in range(width):
                    # A row's best so far are sorted; a better one moves those below it down by one.
                    if _rank(T.Cast("float32", X[vi, c])) > rank[vi, k - 1]:
                        for j in range(k):
                            p: T.let = k - 1 - j
                            if p > 0 and rank[vi, T.max(p - 1, 0)] < _rank(T.Cast("float32", X[vi, c])):
                                rank[vi, p] = rank[vi, p - 1]
                                I[vi, p] = I[vi, p - 1]
                            elif rank[vi, p] < _rank(T.Cast("float32", X[vi, c])):
                                rank[vi, p] = _rank(T.Cast("float32", X[vi, c]))
                                I[vi, p] = c
                for j in range(k):
                    V[vi, j] = X[vi, I[vi, j]]

    return top_k


@top_k.template("gpu")
def _(x, values, indices, *, k):
    """A thread block a row: k times the best of those that come after the last one, by value and then by index."""
    width, dtype, threads = x.shape[-1], x.dtype, min(256, 32 * -(-x.shape[-1] // 32))

    @T.prim_func(s_tir=True)
    def top_k(x_: T.handle, values_: T.handle, indices_: T.handle):
        n = T.int64()
        X = T.match_buffer(x_, (n, width), dtype, align=x.itemsize)
        V = T.match_buffer(values_, (n, k), dtype, align=values.itemsize)
        I = T.match_buffer(indices_, (n, k), "int32", align=indices.itemsize)  # noqa: E741
        last = T.sblock_alloc_buffer((n, 2), "int32", scope="local")  # rank and index, known to every thread
        rank = T.sblock_alloc_buffer((n,), "int32", scope="local")
        index = T.sblock_alloc_buffer((n,), "int32", scope="local")
        for i in T.thread_binding(n, "blockIdx.x"):
            for _first in T.thread_binding(threads, "threadIdx.x"):
                with T.sblock("first"):
                    vi = T.axis.spatial(n, i)
                    last[vi, 0] = T.int32(_NAN)
                    last[vi, 1] = T.int32(-1)
            for j in T.serial(k):
                for outer in T.serial(T.ceildiv(width, threads)):
                    for inner in T.thread_binding(threads, "threadIdx.x"):
                        with T.sblock("rank"):
                            vi = T.axis.spatial(n, i)
                            vc = T.axis.reduce(width, outer * threads + inner)
                            T.where(outer * threads + inner < width)
                            with T.init():
                                rank[vi] = T.min_value("int32")
                            rank[vi] = T.max(
                                rank[vi],
                                T.if_then_else(
                                    _after(_rank(T.Cast("float32", X[vi, vc])), vc, last[vi, 0], last[vi, 1]),
                                    _rank(T.Cast("float32", X[vi, vc])),
                                    T.min_value("int32"),
                                ),
                            )
                for outer in T.serial(T.ceildiv(width, threads)):
                    for inner in T.thread_binding(threads, "threadIdx.x"):
                        with T.sblock("index"):
                            vi = T.axis.spatial(n, i)
                            vc = T.axis.reduce(width, outer * threads + inner)
                            T.where(outer * threads + inner < width)
                            with T.init():
                                index[vi] = T.max_value("int32")
                            index[vi] = T.min(
                                index[vi],
                                T.if_then_else(
                                    T.And(
                                        _rank(T.Cast("float32", X[vi, vc])) == rank[vi],
                                        _after(rank[vi], vc, last[vi, 0], last[vi, 1]),
                                    ),
                                    vc,
                                    T.max_value("int32"),
                                ),
                            )
                for _next in T.thread_binding(threads, "threadIdx.x"):
                    with T.sblock("next"):
                        vi = T.axis.spatial(n, i)
                        last[vi, 0] = rank[vi]
                        last[vi, 1] = index[vi]
                for thread in T.thread_binding(threads, "threadIdx.x"):
                    with T.sblock("take"):
                        vi = T.axis.spatial(n, i)
                        vj = T.axis.spatial(k, j)
                        T.where(thread < 1)
                        V[vi, vj] = X[vi, index[vi]]
                        I[vi, vj] = index[vi]

    return top_k


def _after(rank: tirx.Expr, index: Any, last_rank: tirx.Expr, last_index: tirx.Expr) -> tirx.Expr:
    """Whether an element comes after the last one in the order of `top_k`."""
    return tirx.Or(rank < last_rank, tirx.And(rank == last_rank, index > last_index))
