"""Fused attention for the CPU: one pass over the keys with an online softmax, scores never in memory as a whole.

Two kernels. `_decode` has one query a head: the lanes of a vector run along the head's dim, a group of heads shares
what is loaded of keys and values. `_prefill` has many queries: a lane is one query (a row and a head of the group), so
that the softmax needs no sum across lanes, and keys and values are broadcast from a compact copy of a block.
Dao et al. 2022; Milakov and Gimelshein 2018 for the running maximum and total.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as T

from .. import target, tir
from ..spec import DTYPES, Dim
from . import vector
from .vector import i64

LOWEST = -3.0e38  # the score of what a query must not see: finite, so that the difference of two is no NaN
KEYS = 32  # keys a block
COLUMNS = 64  # queries a tile of the prefill kernel, at the most
PARALLEL_WORK = 2**19  # multiplications below which a decode step runs faster on one thread
OUT_OF_RANGE = "a position lies outside the cache; expected 0 <= position < the rows of k"


def seen(key: Any, position: Any, window: int | None) -> tirx.Expr:
    """Whether the query at `position` sees `key`."""
    return key <= position if window is None else tirx.And(key <= position, key > position - window)


def capped(score: Any, softcap: float | None) -> Any:
    """A score, or a vector of them, bounded by `softcap`."""
    if softcap is None:
        return score
    dtype = str(score.ty.dtype)
    return tir.tanh(score * tirx.const(1 / softcap, dtype)) * tirx.const(softcap, dtype)


@dataclass(frozen=True)
class Problem:
    """The buffers of a call and what is known of it when the kernel is built. Sizes that stay open are variables."""

    q: Any
    k: Any
    v: Any
    positions: Any
    sinks: Any
    out: Any
    scale: float
    window: int | None
    softcap: float | None
    lanes: int

    heads = property(lambda self: int(self.q.shape[1]))
    dim = property(lambda self: int(self.q.shape[2]))
    v_dim = property(lambda self: int(self.v.shape[2]))
    kv_heads = property(lambda self: int(self.k.shape[1]))
    group = property(lambda self: self.heads // self.kv_heads)

    def first_key(self, position: Any) -> Any:
        """The first key that the query at `position` sees."""
        return i32(0) if self.window is None else tirx.max(position - i32(self.window - 1), i32(0))

    def sink(self, head: Any) -> tuple[Any, Any]:
        """The running maximum and total of a head's softmax before the first key: its sink, where there is one."""
        if self.sinks is None:
            return tir.f32(LOWEST), tir.f32(0.0)
        return vector.widened(self.sinks[head], str(self.sinks.dtype)), tir.f32(1.0)


def i32(value: int) -> tirx.IntImm:
    return tirx.IntImm("int32", value)


def build(q, k, v, positions, sinks, out, *, scale, window, softcap):
    """The fused kernel for these specs."""
    with IRBuilder() as builder:
        with T.prim_func(s_tir=True):
            T.func_name("attention")
            n, t = (s if isinstance(s, int) else tirx.Var(s.name, "int64") for s in (q.shape[0], k.shape[0]))
            buffers = [
                each and T.arg(name, T.buffer((size, *each.shape[1:]), each.dtype, align=each.itemsize))
                for name, each, size in (
                    ("q", q, n), ("k", k, t), ("v", v, t), ("positions", positions, n),
                    ("sinks", sinks, sinks and sinks.shape[0]), ("out", out, n),
                )
            ]  # fmt: skip
            problem = Problem(*buffers, scale, window, softcap, target.lanes())
            _check_positions(problem)
            width, v_width = math.gcd(problem.dim, problem.lanes), math.gcd(problem.v_dim, problem.lanes)
            if q.shape[0] == 1 and problem.group <= 8 and min(width, v_width) >= 4:
                _decode(problem, width, v_width)
            else:
                _prefill(problem, q.shape[0].high if isinstance(q.shape[0], Dim) else 1)
    return builder.get()


def _check_positions(a: Problem) -> None:
    with T.serial(0, a.q.shape[0]) as i:
        position = a.positions[i].astype("int64")
        with T.Assert(tirx.And(position >= i64(0), position < a.k.shape[0]), OUT_OF_RANGE, "ValueError"):
            T.evaluate(i32(0))


def _decode(a: Problem, width: int, v_width: int) -> None:
    position = T.bind(a.positions[0])
    low, stop = T.bind(a.first_key(position)), T.bind(position + i32(1))
    threads = min(target.threads(), a.kv_heads)
    if threads == 1:
        _Step(a, i32(0), a.kv_heads, width, v_width).emit(low, stop)
        return
    share = -(-a.kv_heads // threads)
    with T.If(stop - low >= i32(-(-PARALLEL_WORK // (a.heads * (a.dim + a.v_dim))))):
        with T.Then(), T.parallel(0, -(-a.kv_heads // share)) as thread:
            _Step(a, T.bind(thread * i32(share)), share, width, v_width).emit(low, stop)
        with T.Else():
            _Step(a, i32(0), a.kv_heads, width, v_width).emit(low, stop)


def _each(loop: Callable, count: Any, body: Callable[[Any], None]) -> None:
    with loop(0, count) as index:
        body(index)


class _Step:
    """The one query of each head of up to `share` kv heads, from kv head `first` on.

    All heads go through a block of keys before the next block, so that memory is read nearly in order.
    Scratch buffers are [kv head, what varies]; g is a head of the group.
    """

    def __init__(self, a: Problem, first: Any, share: int, width: int, v_width: int):
        self.a, self.first, self.width, self.v_width = a, first, width, v_width
        self.heads = T.bind(tirx.min(i32(share), i32(a.kv_heads) - first))

        def scratch(size: int) -> Any:
            return T.alloc_buffer((share, size), "float32", scope="global")

        self.q, self.mixed, self.score = scratch(a.group * a.dim), scratch(a.group * a.v_dim), scratch(a.group * KEYS)
        self.top, self.total, self.decay = scratch(a.group), scratch(a.group), scratch(a.group)

    def emit(self, low: Any, stop: Any) -> None:
        _each(T.serial, self.heads, self._start)
        with T.serial(0, T.ceildiv(stop - low, i32(KEYS))) as block:
            start = T.bind(low + block * i32(KEYS))
            count = T.bind(tirx.min(stop - start, i32(KEYS)))
            with T.serial(0, count) as key, T.serial(0, self.heads) as h:
                self._scores(h, start + key, key)
            with T.serial(0, self.heads) as h:
                for g in range(self.a.group):
                    self._softmax(h, g, count)
                self._mix(h, start, count)
        _each(T.serial, self.heads, self._finish)

    def _start(self, h: Any) -> None:
        a = self.a
        head = T.bind((self.first + h) * i32(a.group))
        with T.serial(0, a.group) as g:
            for buffer, value in zip((self.top, self.total), a.sink(head + g), strict=True):
                T.buffer_store(buffer, value, [h, g])
            with T.serial(0, a.dim) as d:
                value = vector.widened(a.q[0, head + g, d], str(a.q.dtype))
                T.buffer_store(self.q, value * tir.f32(a.scale), [h, g * a.dim + d])
        with T.serial(0, a.group * a.v_dim) as d:
            T.buffer_store(self.mixed, tir.f32(0.0), [h, d])

    def _scores(self, h: Any, row: Any, key: Any) -> None:
        """The dot products of one key with the queries of the group."""
        a, width = self.a, self.width
        KPRE
        VPRE
        sums = [Register(vector.zeros(width)) for _ in range(a.group)]
        for d in range(0, a.dim, width):
            k = T.bind(vector.load(a.k, [row, self.first + h, i32(d)], width))
            for g, each in enumerate(sums):
                each.value = vector.fma(vector.load(self.q, [h, i32(g * a.dim + d)], width), k, each.value, width)
        for g, each in enumerate(sums):
            T.buffer_store(self.score, _across(operator.add, [each.value], width), [h, key + i32(g * KEYS)])

    def _softmax(self, h: Any, g: int, count: Any) -> None:
        """A head's scores of a block become weights; its maximum and total take the block in."""
        lanes = self.a.lanes
        vectors = []
        for j in range(0, KEYS, lanes):
            alive = T.ramp(i32(j), 1, lanes) < T.broadcast(count, lanes)
            value = capped(vector.load(self.score, [h, i32(g * KEYS + j)], lanes), self.a.softcap)
            vectors.append(_held(tirx.Select(alive, value, T.broadcast(tir.f32(LOWEST), lanes))))
        old = _held(self.top[h, g])
        new = _held(tirx.max(old, _across(tirx.max, vectors, lanes)))
        decay = _held(tir.exp(old - new))
        weights = [_held(tir.exp(each - T.broadcast(new, lanes))) for each in vectors]
        for j, each in enumerate(weights):
            vector.store(self.score, [h, i32(g * KEYS + j * lanes)], each, lanes)
        total = self.total[h, g] * decay + _across(operator.add, weights, lanes)
        for buffer, value in ((self.top, new), (self.decay, decay), (self.total, total)):
            T.buffer_store(buffer, value, [h, g])

    def _mix(self, h: Any, start: Any, count: Any) -> None:
        """The values of a block, weighed, are added to what was mixed before."""
        a, width = self.a, self.v_width
        vectors = a.v_dim // width
        step = max(1, target.registers() // 2 // a.group)
        for first in range(0, vectors, step):
            columns = [c * width for c in range(first, min(first + step, vectors))]
            sums = {}
            for g, d in itertools.product(range(a.group), columns):
                before = vector.load(self.mixed, [h, i32(g * a.v_dim + d)], width)
                sums[g, d] = Register(before * T.broadcast(self.decay[h, g], width))
            with T.serial(0, count) as key:
                row = T.bind(start + key)
                values = {d: T.bind(vector.load(a.v, [row, self.first + h, i32(d)], width)) for d in columns}
                for (g, d), each in sums.items():
                    factor = T.broadcast(self.score[h, key + i32(g * KEYS)], width)
                    each.value = vector.fma(factor, values[d], each.value, width)
            for (g, d), each in sums.items():
                vector.store(self.mixed, [h, i32(g * a.v_dim + d)], each.value, width)

    def _finish(self, h: Any) -> None:
        a = self.a
        with T.serial(0, a.group) as g:
            inverse = _held(tir.f32(1.0) / self.total[h, g])
            with T.serial(0, a.v_dim) as d:
                value = (self.mixed[h, g * a.v_dim + d] * inverse).astype(str(a.out.dtype))
                T.buffer_store(a.out, value, [0, (self.first + h) * a.group + g, d])


def _prefetch(buffer: Any, row: Any, h: Any) -> None:
    """Ask for a row early: the rows of one head lie apart, and the hardware sees no pattern in that."""
    row = tirx.min(row.astype("int64"), buffer.shape[0] - i64(1))
    for d in range(0, int(buffer.shape[2]), 64 // DTYPES[str(buffer.dtype)].itemsize):
        address = tirx.address_of(buffer[row, h, d])
        T.evaluate(tirx.call_llvm_intrin("void", "llvm.prefetch", address, i32(0), i32(3), i32(1)))


class Register:
    """A float32 or a vector of them that a loop changes; LLVM keeps it in a register.

    Also for a value that is used twice: TVM puts a bound one back in all its uses, and repeats the work.
    The buffer is one of scalars: TVM 0.27 lets buffers share memory, and fails where one of vectors meets another kind.
    """

    def __init__(self, value: Any):
        lanes = int(str(value.ty.dtype).removeprefix("float32").removeprefix("x") or 1)
        self._buffer = T.alloc_buffer((lanes,), "float32", scope="global")
        self._index = [T.ramp(i32(0), 1, lanes) if lanes > 1 else i32(0)]
        self.value = value

    @property
    def value(self) -> Any:
        return self._buffer[self._index[0]]

    @value.setter
    def value(self, value: Any) -> None:
        T.buffer_store(self._buffer, value, self._index)


def _held(value: Any) -> Any:
    return Register(value).value


def _across(function: Callable, vectors: list, lanes: int) -> Any:
    """All lanes of all vectors, combined by halves."""
    while len(vectors) > 1:
        vectors = [_held(function(*pair)) for pair in zip(vectors[::2], vectors[1::2], strict=True)]
    (value,) = vectors
    while lanes > 1:
        lanes //= 2
        value = _held(function(*(tirx.Shuffle([value], list(range(i, i + lanes))) for i in (0, lanes))))
    return value


def _prefill(a: Problem, high: int | None) -> None:
    """Tiles of queries of one kv head after the other, dealt out in turn: later tiles see more keys."""
    columns = COLUMNS if high is None else min(COLUMNS, -(-high * a.group // a.lanes) * a.lanes)
    queries = T.bind(a.q.shape[0] * i64(a.group))
    tiles = T.bind(T.ceildiv(queries, i64(columns)))
    units = T.bind(tiles * i64(a.kv_heads))
    threads = i64(target.threads())
    with (T.parallel if target.threads() > 1 else T.serial)(i64(0), threads) as thread:
        with T.serial(i64(0), T.ceildiv(units - thread, threads)) as turn:
            unit = T.bind(turn * threads + thread)
            first = T.bind(unit % tiles * i64(columns))
            _Tile(a, columns, unit // tiles, first, tirx.min(queries - first, i64(columns))).emit()


class _Tile:
    """Up to `columns` queries of kv head `h`; query c is head `c % group` of the group and row `c // group`.

    Scratch buffers are [what varies, columns]: a lane of a vector is a query. Columns from `count` on repeat the last.
    """

    def __init__(self, a: Problem, columns: int, h: Any, first: Any, count: Any):
        self.a, self.columns, self.h, self.first, self.count = a, columns, T.bind(h), first, T.bind(count)
        self.lanes = a.lanes
        self.offsets = range(0, columns, self.lanes)[: 2 - columns // self.lanes % 2]  # of a register tile's vectors
        self.rows = 8 if target.registers() >= 32 else 4
        self.v_dim = -(-a.v_dim // self.rows) * self.rows

        def scratch(rows: int, width: int = columns, dtype: str = "float32") -> Any:
            return T.alloc_buffer((rows, width), dtype, scope="global")

        self.q, self.mixed, self.weight = scratch(a.dim), scratch(self.v_dim), scratch(KEYS)
        self.k, self.v = scratch(KEYS, a.dim), scratch(KEYS, self.v_dim)
        self.top, self.total, self.decay = scratch(1), scratch(1), scratch(1)
        self.position = scratch(1, dtype="int32")

    def emit(self) -> None:
        a = self.a
        low, stop = self._queries()
        with T.serial(0, T.ceildiv(stop - low, i32(KEYS))) as block:
            start = T.bind(low + block * i32(KEYS))
            count = T.bind(tirx.min(stop - start, i32(KEYS)))
            with T.serial(0, count) as key:
                for source, copy in ((a.k, self.k), (a.v, self.v)):
                    _each_block(
                        source.shape[2], self.lanes,
                        lambda d, w: _put(copy, [key, d], _load(source, [start + key, self.h, d], w)),
                    )
            self._over_columns(self.lanes * len(self.offsets), lambda c: self._scores(c, count))
            self._over_columns(self.lanes, lambda c: self._softmax(c, start, count))
            self._over_columns(self.lanes * len(self.offsets), lambda c: self._mix(c, count))
        self._over_columns(self.lanes, lambda c: _each_block(a.v_dim, self.lanes, lambda d, w: self._finish(c, d, w)))

    def _over_columns(self, step: int, body: Callable[[Any], None]) -> None:
        _each(T.serial, T.ceildiv(self.count, i64(step)), lambda c: body(c * i64(step)))

    def _place(self, c: Any) -> tuple[Any, Any]:
        """Row and head of column `c`."""
        query = self.first + tirx.min(c, self.count - i64(1))
        return query // i64(self.a.group), self.h * i64(self.a.group) + query % i64(self.a.group)

    def _queries(self) -> tuple[Any, Any]:
        """Fill what belongs to queries; give the first key that one of them sees, and the key after the last."""
        a = self.a
        low, last = (T.alloc_buffer((1,), "int32", scope="global") for _ in range(2))
        T.buffer_store(low, i32(2**31 - 1), [0])
        T.buffer_store(last, i32(0), [0])
        with T.serial(i64(0), i64(self.columns)) as c:
            row, head = (T.bind(each) for each in self._place(c))
            T.buffer_store(self.position, a.positions[row], [0, c])
            T.buffer_store(low, tirx.min(low[0], a.first_key(a.positions[row])), [0])
            T.buffer_store(last, tirx.max(last[0], a.positions[row]), [0])
            for buffer, value in zip((self.top, self.total), a.sink(head), strict=True):
                T.buffer_store(buffer, value, [0, c])
        with T.serial(0, self.v_dim) as d, T.serial(0, self.columns) as c:
            T.buffer_store(self.mixed, tir.f32(0.0), [d, c])
        self._over_columns(self.lanes, lambda c: _each_block(a.dim, self.lanes, lambda d, w: self._load(c, d, w)))
        return T.bind(low[0]), T.bind(last[0] + i32(1))

    def _load(self, c: Any, d: Any, width: int) -> None:
        """Dims d to d + width of a vector of queries, from c on, into their columns."""
        rows = [_held(_load(self.a.q, [*self._place(c + i64(i)), d], width)) for i in range(self.lanes)]
        columns = _transposed(rows) if width == self.lanes else [tirx.Shuffle(rows, list(range(self.lanes)))]
        for i, column in enumerate(columns):
            vector.store(self.q, [d + i32(i), c], column * T.broadcast(tir.f32(self.a.scale), self.lanes), self.lanes)

    def _product(self, c: Any, extent: Any, left: Callable, right: Any, initial: Callable) -> dict:
        """Some rows of the sum over x < extent of left(row, x) * right[x, columns from c on], in registers."""
        sums = {(r, j): Register(initial(r, c + i64(j))) for r in range(self.rows) for j in self.offsets}
        with T.serial(0, extent) as x:
            vectors = {j: T.bind(vector.load(right, [x, c + i64(j)], self.lanes)) for j in self.offsets}
            for r in range(self.rows):
                factor = T.bind(T.broadcast(left(r, x), self.lanes))
                for j in self.offsets:
                    sums[r, j].value = vector.fma(factor, vectors[j], sums[r, j].value, self.lanes)
        return sums

    def _scores(self, c: Any, count: Any) -> None:
        with T.serial(0, T.ceildiv(count, i32(self.rows))) as group:
            row = T.bind(group * i32(self.rows))
            zero = vector.zeros(self.lanes)
            sums = self._product(c, self.a.dim, lambda r, d: self.k[row + i32(r), d], self.q, lambda *_: zero)
            for (r, j), each in sums.items():
                vector.store(self.weight, [row + i32(r), c + i64(j)], each.value, self.lanes)

    def _softmax(self, c: Any, start: Any, count: Any) -> None:
        """Scores become weights; each query's maximum and total take the block in."""
        a, lanes, none = self.a, self.lanes, T.broadcast(tir.f32(LOWEST), self.lanes)
        position = T.bind(self.position.vload([i32(0), c], f"int32x{lanes}"))
        old = _held(vector.load(self.top, [i32(0), c], lanes))
        top = Register(old)
        with T.serial(0, count) as key:
            score = capped(vector.load(self.weight, [key, c], lanes), a.softcap)
            score = _held(tirx.Select(seen(T.broadcast(start + key, lanes), position, a.window), score, none))
            vector.store(self.weight, [key, c], score, lanes)
            top.value = tirx.max(top.value, score)
        decay = _held(tir.exp(old - top.value))
        total = Register(vector.load(self.total, [i32(0), c], lanes) * decay)
        with T.serial(0, count) as key:
            weight = tir.exp(vector.load(self.weight, [key, c], lanes) - top.value)
            visible = seen(T.broadcast(start + key, lanes), position, a.window)
            weight = _held(tirx.Select(visible, weight, vector.zeros(lanes)))
            vector.store(self.weight, [key, c], weight, lanes)
            total.value = total.value + weight
        for buffer, value in ((self.top, top.value), (self.total, total.value), (self.decay, decay)):
            vector.store(buffer, [i32(0), c], value, lanes)

    def _mix(self, c: Any, count: Any) -> None:
        """The values of the block, weighed, are added to what was mixed before."""
        with T.serial(0, self.v_dim // self.rows) as group:
            row = T.bind(group * i32(self.rows))

            def before(r: int, column: Any) -> Any:
                decay = vector.load(self.decay, [i32(0), column], self.lanes)
                return vector.load(self.mixed, [row + i32(r), column], self.lanes) * decay

            sums = self._product(c, count, lambda r, key: self.v[key, row + i32(r)], self.weight, before)
            for (r, j), each in sums.items():
                vector.store(self.mixed, [row + i32(r), c + i64(j)], each.value, self.lanes)

    def _finish(self, c: Any, d: Any, width: int) -> None:
        """Dims d to d + width of a vector of queries, from c on, to where they belong in the output."""
        inverse = _held(T.broadcast(tir.f32(1.0), self.lanes) / vector.load(self.total, [i32(0), c], self.lanes))
        columns = [_held(vector.load(self.mixed, [d + i32(i), c], self.lanes) * inverse) for i in range(width)]
        rows = _transposed(columns) if width > 1 else [tirx.Shuffle(columns, [i]) for i in range(self.lanes)]
        for i, row in enumerate(rows):
            with T.If(c + i64(i) < self.count), T.Then():
                _put(self.a.out, [*self._place(c + i64(i)), d], row)


def _transposed(rows: list) -> list:
    """As many vectors as a vector has lanes, as the columns of a matrix whose rows they were."""
    size = len(rows)
    half = size // 2
    while half:
        low = [j if not j & half else size + j - half for j in range(size)]
        high = [j + half if not j & half else size + j for j in range(size)]
        pairs = {i: [rows[i & ~half], rows[i | half]] for i in range(size)}
        rows = [_held(tirx.Shuffle(pairs[i], high if i & half else low)) for i in range(size)]
        half //= 2
    return rows


def _each_block(dim: int, lanes: int, body: Callable[[Any, int], None]) -> None:
    """`body(d, width)` for all of `dim`: by whole vectors where it is a multiple of them, else one by one."""
    width = lanes if dim % lanes == 0 else 1
    _each(T.serial, dim // width, lambda block: body(block * i32(width), width))


def _load(buffer: Any, index: list, width: int) -> Any:
    return vector.load(buffer, index, width) if width > 1 else vector.widened(buffer[tuple(index)], str(buffer.dtype))


def _put(buffer: Any, index: list, value: Any) -> None:
    """Store a float32, or a vector of them, in the buffer's dtype."""
    lanes = str(value.ty.dtype).removeprefix("float32")
    *outer, last = index
    at = T.ramp(last, 1, int(lanes[1:])) if lanes else last
    T.buffer_store(buffer, value.astype(str(buffer.dtype) + lanes), [*outer, at])
