"""Rows looked up, joined, cut and stored: token embeddings, concatenation, columns, heads, and writes to a cache."""

from __future__ import annotations

import numpy as np
from tvm import tirx
from tvm.script import tirx as T
from tvm.script.ir_builder import IRBuilder
from tvm.script.tirx import builder

from . import packed, tir
from .errors import DTypeError, ShapeError
from .op import like, op
from .quantize import KNOWN
from .spec import DTYPES, FLOATS
from .tensor import Tensor

_IDS = ("int32", "int64")


@op(symbolic={"ids": "n"}, ranges=(1, 2, 17))
def embedding(ids: Tensor, weight: Tensor, *, dtype: str | None = None) -> Tensor:
    """The rows of `weight` that `ids` name: ids [n], int32 or int64; weight [vocabulary, width], float or packed.

    Returns [n, width] in `dtype`; when that is None, in weight's, or float32 where weight is packed. An id outside the
    vocabulary raises KernelError. HF nn.Embedding.
    """
    if ids.dtype not in _IDS:
        raise DTypeError(f"ids is {ids}, expected int32 or int64")
    if weight.dtype not in (*FLOATS, *KNOWN):
        raise DTypeError(f"weight is {weight}, expected one of {', '.join((*FLOATS, *KNOWN))}")
    if dtype not in (None, *FLOATS):
        raise DTypeError(f"dtype is {dtype!r}, expected one of {', '.join(FLOATS)}")
    if ids.ndim != 1:
        raise ShapeError(f"ids is {ids}, expected [n]")
    if weight.ndim != 2:
        raise ShapeError(f"weight is {weight}, expected [vocabulary, width]")
    stored = weight.dtype if weight.dtype in FLOATS else "float32"
    return like(weight, (ids.shape[0], weight.shape[1]), dtype or stored)


@op(symbolic={"x": "n", "y": "m"})
def concat(x: Tensor, y: Tensor) -> Tensor:
    """x and then y along the leading axis: [n, ...] and [m, ...] give [n + m, ...]. Any dtype, the same for both."""
    if x.ndim < 1:
        raise ShapeError(f"x is {x}, expected at least one axis")
    if y.ndim != x.ndim or y.shape[1:] != x.shape[1:]:
        raise ShapeError(f"y is {y}, expected [{', '.join(['m', *map(str, x.shape[1:])])}] for x {x}")
    if y.dtype != x.dtype:
        raise DTypeError(f"y is {y.dtype}, expected {x.dtype}, the dtype of x; convert it with ops.cast")
    return like(x, (x.shape[0] + y.shape[0], *x.shape[1:]))


@op(symbolic={"x": "n"}, ranges=(1, 2, 17))
def columns(x: Tensor, *, start: int, stop: int) -> Tensor:
    """x[..., start:stop] in memory of its own, such as the queries of a fused projection. Any dtype, two axes or more.

    0 <= start < stop <= the last axis; unlike a slice's, they are not counted from the end.
    """
    if x.ndim < 2:
        raise ShapeError(f"x is {x}, expected rows: [n, ..., width]")
    if not 0 <= start < stop <= x.shape[-1]:
        raise ShapeError(f"start {start} and stop {stop} are no columns of x {x}: expected 0 <= start < stop <= width")
    return like(x, (*x.shape[:-1], stop - start))


@op(symbolic={"x": "n", "y": "n"}, ranges=(1, 2, 17))
def join(x: Tensor, y: Tensor) -> Tensor:
    """x and then y along the last axis: [n, heads, a] and [n, heads, b] give [n, heads, a + b].

    A y of one head joins each head of x. Any dtype, the same for both. HF torch.cat(..., dim=-1), for DeepSeek's keys.
    """
    if x.ndim != 3:
        raise ShapeError(f"x is {x}, expected [n, heads, a]")
    if y.ndim != 3 or y.shape[0] != x.shape[0] or y.shape[1] not in (1, x.shape[1]):
        raise ShapeError(f"y is {y}, expected [{x.shape[0]}, {x.shape[1]} or 1, b] for x {x}")
    if y.dtype != x.dtype:
        raise DTypeError(f"y is {y.dtype}, expected {x.dtype}, the dtype of x; convert it with ops.cast")
    return like(x, (*x.shape[:-1], x.shape[-1] + y.shape[-1]))


@op(symbolic={"cache": "t", "x": "n", "positions": "n"}, writes=("cache",))
def cache_write(cache: Tensor, x: Tensor, positions: Tensor) -> None:
    """cache[positions[i]] = x[i] for each i in order, cast to cache's dtype; of equal positions the last one stays.

    cache: [t, heads, dim], float; x: [n, heads, dim], float; positions: int32 [n]. A position outside [0, t) raises
    KernelError before anything is written.
    """
    for name, tensor in (("cache", cache), ("x", x)):
        if tensor.dtype not in FLOATS:
            raise DTypeError(f"{name} is {tensor}, expected one of {', '.join(FLOATS)}")
    if positions.dtype != "int32":
        raise DTypeError(f"positions is {positions}, expected int32")
    if cache.ndim != 3:
        raise ShapeError(f"cache is {cache}, expected [t, heads, dim]")
    if x.ndim != 3 or x.shape[1:] != cache.shape[1:]:
        raise ShapeError(f"x is {x}, expected [n, {cache.shape[1]}, {cache.shape[2]}] for cache {cache}")
    if positions.shape != x.shape[:1]:
        raise ShapeError(f"positions is {positions}, expected [{x.shape[0]}] for x {x}")


@embedding.reference
def _(ids, weight, dtype=None):
    if ids.size and not (ids.min() >= 0 and ids.max() < len(weight)):
        raise IndexError(f"ids hold a value outside [0, {len(weight)})")
    return np.asarray(weight)[ids].astype(DTYPES[dtype] if dtype else weight.dtype)


@concat.reference
def _(x, y):
    return np.concatenate([x, y])


@columns.reference
def _(x, *, start, stop):
    return x[..., start:stop].copy()


@join.reference
def _(x, y):
    return np.concatenate([x, np.broadcast_to(y, (*x.shape[:-1], y.shape[-1]))], axis=-1)


@cache_write.reference
def _(cache, x, positions):
    if positions.size and not (positions.min() >= 0 and positions.max() < len(cache)):
        raise IndexError(f"positions hold a value outside [0, {len(cache)})")
    written = cache.copy()
    for position, row in zip(positions, x, strict=True):
        written[position] = row.astype(cache.dtype)
    return written


@embedding.kernel
def _(ids, weight, out, dtype):
    vocabulary, width = weight.shape
    with IRBuilder() as ir, builder.prim_func(s_tir=True):
        builder.func_name("embedding")
        n = tirx.Var("n", "int64")
        named = packed.argument("ids", ids, (n,))
        rows = packed.argument("weight", weight)
        target = packed.argument("out", out, (n, width))
        with tir.block("check", (n,), reduces=True) as (token,):  # not in parallel: a worker's error may be lost
            known = tirx.And(named[token] >= 0, named[token] < vocabulary)
            with builder.Assert(known, f"ids hold a value outside [0, {vocabulary})"):
                builder.evaluate(0)
        with tir.block("embedding", (n, width)) as (token, column):
            row = named[token]
            if weight.format is None or weight.nbytes >= 2**31:
                row = row.astype("int64")
            value = rows[row, column] if weight.format is None else packed.Weight(rows, weight).value(row, column)
            builder.buffer_store(target, value.astype(out.dtype), (token, column))
    return ir.get()


@concat.kernel
def _(x, y, out):
    with IRBuilder() as ir, builder.prim_func(s_tir=True):
        builder.func_name("concat")
        n, m, rest = tirx.Var("n", "int64"), tirx.Var("m", "int64"), x.shape[1:]
        first = builder.arg("x", builder.buffer((n, *rest), x.dtype, align=x.itemsize))
        second = builder.arg("y", builder.buffer((m, *rest), y.dtype, align=y.itemsize))
        target = builder.arg("out", builder.buffer((n + m, *rest), out.dtype, align=out.itemsize))
        with tir.block("concat", (n + m, *rest)) as (row, *at):
            value = tirx.if_then_else(row < n, first[(row, *at)], second[(row - n, *at)])
            builder.buffer_store(target, value, (row, *at))
    return ir.get()


@columns.kernel
def _(x, out, *, start, stop):
    with IRBuilder() as ir, builder.prim_func(s_tir=True):
        builder.func_name("columns")
        n = tirx.Var("n", "int64")
        source = builder.arg("x", builder.buffer((n, *x.shape[1:]), x.dtype, align=x.itemsize))
        target = builder.arg("out", builder.buffer((n, *out.shape[1:]), out.dtype, align=out.itemsize))
        with tir.block("columns", (n, *out.shape[1:])) as (*at, column):
            builder.buffer_store(target, source[(*at, column + start)], (*at, column))
    return ir.get()


@join.kernel
def _(x, y, out):
    width, shared = x.shape[-1], y.shape[1] != x.shape[1]
    with IRBuilder() as ir, builder.prim_func(s_tir=True):
        builder.func_name("join")
        n = tirx.Var("n", "int64")
        first = builder.arg("x", builder.buffer((n, *x.shape[1:]), x.dtype, align=x.itemsize))
        second = builder.arg("y", builder.buffer((n, *y.shape[1:]), y.dtype, align=y.itemsize))
        target = builder.arg("out", builder.buffer((n, *out.shape[1:]), out.dtype, align=out.itemsize))
        with tir.block("join", (n, *out.shape[1:])) as (row, head, at):
            other = second[row, 0 if shared else head, tirx.max(at - width, 0)]
            value = tirx.if_then_else(at < width, first[row, head, tirx.min(at, width - 1)], other)
            builder.buffer_store(target, value, (row, head, at))
    return ir.get()


@cache_write.kernel
def _(cache, x, positions):
    _, heads, dim = cache.shape

    @T.prim_func(s_tir=True)
    def cache_write(cache_: T.handle, x_: T.handle, positions_: T.handle):
        n, t = T.int64(), T.int64()
        C = T.match_buffer(cache_, (t, heads, dim), cache.dtype, align=cache.itemsize)
        X = T.match_buffer(x_, (n, heads, dim), x.dtype, align=x.itemsize)
        P = T.match_buffer(positions_, (n,), "int32", align=positions.itemsize)
        for i in range(n):
            with T.sblock("check"):
                vi = T.axis.reduce(n, i)
                assert T.And(P[vi] >= 0, T.Cast("int64", P[vi]) < t), "positions hold a value outside the cache"
                T.evaluate(0)
        for i, h, d in T.grid(n, heads, dim):
            with T.sblock("write"):
                vi = T.axis.opaque(n, i)  # in order: positions may repeat
                vh, vd = T.axis.remap("SS", [h, d])
                C[P[vi], vh, vd] = T.Cast(cache.dtype, X[vi, vh, vd])

    return cache_write
