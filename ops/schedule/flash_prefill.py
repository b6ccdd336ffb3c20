"""Attention with many queries: prefill, in tiles of queries by blocks of keys.

A lane of a vector is one query, a row and a head of the group, so that the softmax needs no sum across lanes and any
dim and group fill the vectors. Keys and values are copied to a compact float32 block and broadcast from there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from .. import target, tir
from . import vector
from .flash import KEYS, LOWEST, Problem, Register, capped, held, i32, repeat, seen
from .vector import i64

COLUMNS = 64  # queries a tile, at the most


def emit(a: Problem, high: int | None) -> None:
    """The kernel's body for at most `high` rows. Tiles are dealt out in turn, since later ones see more keys."""
    columns = COLUMNS if high is None else min(COLUMNS, -(-high * a.group // a.lanes) * a.lanes)
    queries = T.bind(a.q.shape[0] * i64(a.group))
    tiles = T.bind(T.ceildiv(queries, i64(columns)))
    units = T.bind(tiles * i64(a.kv_heads))
    threads = i64(target.threads())
    loop = T.parallel if target.threads() > 1 else T.serial
    with loop(i64(0), threads) as thread, T.serial(i64(0), T.ceildiv(units - thread, threads)) as turn:
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
        self.odd = scratch(1, self.lanes)  # of a block: zeros, or a NaN where a value is not finite
        self.position = scratch(1, dtype="int32")

    def emit(self) -> None:
        a = self.a
        low, stop = self._queries()
        with T.serial(0, T.ceildiv(stop - low, i32(KEYS))) as block:
            start = T.bind(low + block * i32(KEYS))
            count = T.bind(tirx.min(stop - start, i32(KEYS)))
            vector.store(self.odd, [i32(0), i32(0)], vector.zeros(self.lanes), self.lanes)
            with T.serial(0, count) as key:
                row = T.bind((start + key).astype("int64"))
                self._copy(a.k, row, self.k, key)
                self._copy(a.v, row, self.v, key, odd=self.odd)
            self._over_columns(self.lanes * len(self.offsets), lambda c: self._scores(c, count))
            self._over_columns(self.lanes, lambda c: self._softmax(c, start, count))
            odd = vector.lane_sums([vector.load(self.odd, [i32(0), i32(0)], self.lanes)], self.lanes)
            with T.If(odd == tir.f32(0.0)):
                with T.Then():
                    self._over_columns(self.lanes * len(self.offsets), lambda c: self._mix(c, count))
                with T.Else():
                    self._over_columns(self.lanes, lambda c: self._mix_seen(c, count))
        self._over_columns(
            self.lanes, lambda c: _repeat_blocks(a.v_dim, self.lanes, lambda d, w: self._finish(c, d, w))
        )

    def _copy(self, source: Any, row: Any, copy: Any, key: Any, odd: Any = None) -> None:
        def part(d: Any, width: int) -> None:
            values = held(_load(source, [row, self.h, d], width))
            _put(copy, [key, d], values)
            if odd is not None:
                before = _load(odd, [i32(0), i32(0)], width)
                zero = vector.zeros(width) if width > 1 else tir.f32(0.0)
                _put(odd, [i32(0), i32(0)], vector.fma(values, zero, before, width))  # TVM would fold values * 0

        _repeat_blocks(int(source.shape[2]), self.lanes, part)

    def _over_columns(self, step: int, body: Callable[[Any], None]) -> None:
        repeat(T.ceildiv(self.count, i64(step)), lambda c: body(c * i64(step)))

    def _over_parts(self, dim: int, body: Callable[[Any, Any, int], None]) -> None:
        """`body(c, d, width)` for vectors of columns and blocks of dims."""
        self._over_columns(self.lanes, lambda c: _repeat_blocks(dim, self.lanes, lambda d, width: body(c, d, width)))

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
            row, head = (T.bind(x) for x in self._place(c))
            T.buffer_store(self.position, a.positions[row], [0, c])
            T.buffer_store(low, tirx.min(low[0], a.first_key(a.positions[row])), [0])
            T.buffer_store(last, tirx.max(last[0], a.positions[row]), [0])
            for buffer, value in zip((self.top, self.total), a.sink(head), strict=True):
                T.buffer_store(buffer, value, [0, c])
        with T.serial(0, self.v_dim) as d, T.serial(0, self.columns) as c:
            T.buffer_store(self.mixed, tir.f32(0.0), [d, c])
        self._over_parts(a.dim, self._load)
        return T.bind(low[0]), T.bind(last[0] + i32(1))

    def _load(self, c: Any, d: Any, width: int) -> None:
        """Dims d to d + width of a vector of queries, from c on, into their columns."""
        rows = [held(_load(self.a.q, [*self._place(c + i64(i)), d], width)) for i in range(self.lanes)]
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
            for (r, j), total in sums.items():
                vector.store(self.weight, [row + i32(r), c + i64(j)], total.value, self.lanes)

    def _softmax(self, c: Any, start: Any, count: Any) -> None:
        """Scores become weights; each query's maximum and total take the block in."""
        a, lanes, none = self.a, self.lanes, T.broadcast(tir.f32(LOWEST), self.lanes)
        position = T.bind(self.position.vload([i32(0), c], f"int32x{lanes}"))
        old = held(vector.load(self.top, [i32(0), c], lanes))
        top = Register(old)
        with T.serial(0, count) as key:
            score = capped(vector.load(self.weight, [key, c], lanes), a.softcap)
            score = held(tirx.Select(seen(T.broadcast(start + key, lanes), position, a.window), score, none))
            vector.store(self.weight, [key, c], score, lanes)
            top.value = tirx.max(top.value, score)
        decay = held(tir.exp(old - top.value))
        total = Register(vector.load(self.total, [i32(0), c], lanes) * decay)
        with T.serial(0, count) as key:
            weight = tir.exp(vector.load(self.weight, [key, c], lanes) - top.value)
            visible = seen(T.broadcast(start + key, lanes), position, a.window)
            weight = held(tirx.Select(visible, weight, vector.zeros(lanes)))
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
            for (r, j), total in sums.items():
                vector.store(self.mixed, [row + i32(r), c + i64(j)], total.value, self.lanes)

    def _mix_seen(self, c: Any, count: Any) -> None:
        """As `_mix`, of values that are not all finite: what a query gives no weight is nothing to it, also a NaN."""
        decay = held(vector.load(self.decay, [i32(0), c], self.lanes))
        with T.serial(0, self.a.v_dim) as d:
            total = Register(vector.load(self.mixed, [d, c], self.lanes) * decay)
            with T.serial(0, count) as key:
                weight = held(vector.load(self.weight, [key, c], self.lanes))
                more = held(vector.fma(T.broadcast(self.v[key, d], self.lanes), weight, total.value, self.lanes))
                total.value = tirx.Select(weight > vector.zeros(self.lanes), more, total.value)
            vector.store(self.mixed, [d, c], total.value, self.lanes)

    def _finish(self, c: Any, d: Any, width: int) -> None:
        """Dims d to d + width of a vector of queries, from c on, to where they belong in the output."""
        inverse = held(T.broadcast(tir.f32(1.0), self.lanes) / vector.load(self.total, [i32(0), c], self.lanes))
        columns = [held(vector.load(self.mixed, [d + i32(i), c], self.lanes) * inverse) for i in range(width)]
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
        rows = [held(tirx.Shuffle(pairs[i], high if i & half else low)) for i in range(size)]
        half //= 2
    return rows


def _repeat_blocks(dim: int, lanes: int, body: Callable[[Any, int], None]) -> None:
    """`body(d, width)` for all of `dim`: by whole vectors where it is a multiple of them, else one by one."""
    width = lanes if dim % lanes == 0 else 1
    repeat(dim // width, lambda block: body(block * i32(width), width))


def _load(buffer: Any, index: list, width: int) -> Any:
    return vector.load(buffer, index, width) if width > 1 else vector.widened(buffer[tuple(index)], str(buffer.dtype))


def _put(buffer: Any, index: list, value: Any) -> None:
    """Store a float32, or a vector of them, in the buffer's dtype."""
    lanes = str(value.ty.dtype).removeprefix("float32")
    *outer, last = index
    at = T.ramp(last, 1, int(lanes[1:])) if lanes else last
    T.buffer_store(buffer, value.astype(str(buffer.dtype) + lanes), [*outer, at])
